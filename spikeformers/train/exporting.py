"""A finished run as one file to deploy: its engine, how far that agrees with the network, what both cost, its card."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure, tree_unflatten

from spikeformers.deploy import ModelCard, integer
from spikeformers.deploy.agreement import listening, neurons_of_images
from spikeformers.deploy.fuse import plain_copy
from spikeformers.deploy.outputs import equal_predictions, largest_difference, named_outputs
from spikeformers.quantize import FixedPointNorm, size
from spikeformers.train.evaluate import drawn
from spikeformers.train.exportable import Exportable, in_share
from spikeformers.train.results import short

WARM_UP, REPEATS = 3, 21


@dataclass(frozen=True)
class Comparison:
    """A network and its integer engine on the same test images.

    `inputs`: what the network was given of `images` (the same, but for windows). `equal_counts`: share of all counts
    that are those of the float64 network; `flipped`: inputs where any is not. `same`: inputs with the same predictions
    as it; `share`: of all `predictions`. `before`, `after`: scores of network and engine, 0..1.
    """

    images: int
    inputs: int
    equal_counts: float
    flipped: int
    same: int
    share: float
    predictions: int
    before: dict[str, float]
    after: dict[str, float]


@torch.no_grad()
def compared(subject: Exportable, engine: nn.Module, *, images: int) -> Comparison:
    """Run both on `images` test images, the same at every call."""
    found = engine.compare(copy.deepcopy(subject.model).double(), subject.inputs(images))
    with listening(neurons_of_images(engine, subject.model)) as counts:
        engine(subject.image())
    sizes = {name: each.numel() for name, each in counts.items()}
    flips = sum(found.flip_rates[name] * sizes[name] for name in sizes) / sum(sizes.values())
    return Comparison(
        images=len(drawn(len(subject.split), images)),
        inputs=found.total,
        equal_counts=1 - flips,
        flipped=len(found.flipped),
        same=found.same,
        share=found.equal,
        predictions=found.predictions,
        before=subject.before(images),
        after=subject.after(engine, images),
    )


def comparison_facts(subject: Exportable, found: Comparison) -> list[tuple[str, str]]:
    """The lines about what the engine keeps of the network."""
    agreeing = subject.agreeing(found.same, found.share, predictions=found.predictions)
    flipped = f"{found.flipped:,} of {found.inputs:,}; {agreeing}"
    rows = [
        ("Counts equal", f"{in_share(found.equal_counts)} of the float64 network's"),
        (f"{subject.unit.capitalize()} with a flip", flipped),
    ]
    for field, name in ((field, name) for field, name in subject.SCORES.items() if field in found.before):
        scores = f"{100 * found.before[field]:.2f} % before, {100 * found.after[field]:.2f} % after"
        rows.append((name, f"{scores}, of {found.images:,} {subject.TESTED}"))
    return rows


def check_one_size(subject: Exportable, *, images: int, what: str) -> None:
    """Raises ValueError if the network is given several sizes, of which a compiled graph takes one."""
    sizes = {tuple(each.shape[-2:]) for each in chain([subject.image()], subject.inputs(images))}
    if len(sizes) > 1:
        least, most = (f"{height} x {width}" for height, width in (min(sizes), max(sizes)))
        raise ValueError(
            f"{what} takes {subject.unit} of one size, and the test images of {subject.run} give {len(sizes)}, from "
            f"{least} to {most}: train with {subject.ONE_SIZE}, or take --to spk without --backend"
        )


@torch.no_grad()
def latencies(runs: Sequence[Callable[[Tensor], object]], image: Tensor) -> list[float]:
    """Median milliseconds of each of `runs` on one image, measured in turn, so that a busy machine slows all alike."""
    for run in runs:
        for _ in range(WARM_UP):
            run(image)
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for run, times in zip(runs, spent, strict=True):
            start = time.perf_counter()
            run(image)
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in spent]


def latency_fact(subject: Exportable, run: Callable[[Tensor], object], *, backend: str) -> tuple[str, str]:
    """The line about the time that one image (or window) takes, in the network as float32 layers and in `run`.

    The layers of an exact network round, as none of torch's do: it is timed as it is.
    """
    exact = any(isinstance(module, FixedPointNorm) for module in subject.model.modules())
    before = subject.model if exact else plain_copy(subject.model).float()
    before, after = latencies([before, run], subject.image())
    threads = torch.get_num_threads()
    where = f"median of {REPEATS}, {threads} thread{'s' * (threads != 1)}, {backend}"
    return "Latency", f"{short(before)} ms before, {short(after)} ms after ({where})"


def energy_fact(subject: Exportable) -> tuple[str, str]:
    """The line about the energy of one image."""
    found = subject.summary
    ann = f"{short(found.ann_energy_mj)} mJ as an ANN"
    return "Energy", f"{short(found.energy_mj)} mJ {subject.EACH} ({ann}, {found.energy_convention})"


def size_fact(subject: Exportable, file: Path) -> tuple[str, str]:
    """The line about the size of what was written."""
    return "Size", f"{short(file.stat().st_size / 1e6)} MB ({short(size(subject.model).fp32_mb)} MB as 32-bit floats)"


def engine_of(subject: Exportable, *, backend: str = "torch") -> nn.Module:
    """The integer engine of the run's network."""
    return integer(subject.model, subject.image(), backend=backend)


def onnx_runner(file: Path, given: Any) -> Callable[[Tensor], Any]:
    """What runs an ONNX file in onnxruntime, on as many threads as torch has, and gives what is of the form of `given`.

    Raises ImportError without onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('comparing an ONNX file needs the extra "onnx": pip install "spikeformers[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name, names, form = session.get_inputs()[0].name, list(named_outputs(given)), tree_structure(given)

    def run(images: Tensor) -> Any:
        return tree_unflatten(map(torch.from_numpy, session.run(names, {name: images.contiguous().numpy()})), form)

    return run


def onnx_fact(subject: Exportable, engine: nn.Module, run: Callable[[Tensor], Any], *, images: int) -> tuple[str, str]:
    """The line about how far `run`, the engine in ONNX, gives what the engine gives."""
    same = count = equal = predictions = 0
    largest = 0.0
    for batch in subject.inputs(images):
        wanted, got = engine(batch), run(batch)
        found = equal_predictions(subject.model, wanted, got, tuple(batch.shape[-2:]))
        same, count = same + int(found.everywhere.sum()), count + len(found.everywhere)
        equal, predictions = equal + int(found.equal.sum()), predictions + int(found.total.sum())
        largest = max(largest, largest_difference(wanted, got))
    agreeing = subject.agreeing(same, equal / predictions if predictions else 1.0, predictions=predictions)
    return "In onnxruntime", f"{count:,} {subject.unit}: {agreeing} as in the engine, logits within {short(largest)}"


def card_of(subject: Exportable, comparison: Comparison, *, license_note: str) -> ModelCard:
    """What a file says about the run that it comes from; paths stay out of it."""
    recipe, summary = subject.recipe, subject.summary
    return ModelCard(
        model=summary.model,
        **comparison.after,
        images=comparison.images,
        data=recipe.data.source,
        energy_mj=summary.energy_mj,
        ann_energy_mj=summary.ann_energy_mj,
        energy_convention=summary.energy_convention,
        source=f"recipe {recipe.name}, {summary.epochs} epochs, seed {recipe.seed}",
        license=license_note,
        versions=summary.versions,
    )

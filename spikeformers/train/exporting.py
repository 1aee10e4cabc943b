"""A finished run as one file to deploy: its engine, how far that agrees with the network, what both cost, its card."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spikeformers.data.images import ImageSplit, load_split
from spikeformers.deploy import ModelCard, integer
from spikeformers.deploy.agreement import listening
from spikeformers.deploy.counts import CountNeuron
from spikeformers.deploy.fuse import plain_copy
from spikeformers.layers.pretrained import CONFIG
from spikeformers.neurons import Neuron
from spikeformers.quantize import FixedPointNorm, size
from spikeformers.train.evaluate import batches_of, drawn
from spikeformers.train.recipe import Recipe
from spikeformers.train.results import short
from spikeformers.train.saved import PACKED, read_classifier, run_of
from spikeformers.train.summary import Summary, read_summary
from spikeformers.zoo import CATALOGUE, from_pretrained

BATCH = 8  # images at once, in float64
WARM_UP, REPEATS = 3, 21


@dataclass(frozen=True)
class Exportable:
    """A finished run of a spiking classifier: its network (the packed form, if there is one), and what is known of it.

    `split`: its test images.
    """

    run: Path
    model: nn.Module
    recipe: Recipe
    summary: Summary
    split: ImageSplit

    def image(self) -> Tensor:
        """The first test image, [1, C, size, size]."""
        return self.split[0][0][None]


def read_exportable(source: Path) -> Exportable:
    """Raises ValueError for anything but a finished run of a network that spikes, and says what to do instead."""
    run = run_of(source) or source
    if not (run / "recipe.json").is_file() and (run / CONFIG).is_file():
        data = CATALOGUE[from_pretrained(run).origin.name].data
        kind = "test clips" if data == "events" else "test images"
        raise ValueError(
            f"{source} is a saved model without its run, whose {kind} export needs: give the run, or use "
            "spikeformers.deploy.integer and spikeformers.deploy.save in Python"
        )
    model, recipe, _ = read_classifier(run)
    if source.name != "model" and (run / PACKED).is_dir():
        model = from_pretrained(run / PACKED)
    if not any(isinstance(module, Neuron) for module in model.modules()):
        raise ValueError(f"{source} is an ANN: nothing in it spikes, so it has no integer form; give a spiking run")
    summary, split = read_summary(run), load_split(recipe.data, "test", seed=recipe.seed)
    if len(summary.predictions) != len(split):
        raise ValueError(
            f"{source} was tested on {len(summary.predictions):,} images, and {recipe.data.source} has {len(split):,} "
            "now: put the test images back that it was trained with"
        )
    return Exportable(run, model, recipe, summary, split)


@dataclass(frozen=True)
class Comparison:
    """A network and its integer engine on the same test images.

    `equal_counts`: share of all counts that are those of the float64 network; `flipped`: images where any is not;
    `same`: images with the same prediction as it. `accuracies`: of the network as its run was tested, and of the
    engine, 0..1.
    """

    images: int
    equal_counts: float
    flipped: int
    same: int
    accuracies: tuple[float, float]

    def facts(self) -> list[tuple[str, str]]:
        """Lines for a table."""
        before, after = (100 * each for each in self.accuracies)
        return [
            ("Counts equal", f"{_share(self.equal_counts)} of the float64 network's"),
            ("Images with a flip", f"{self.flipped:,} of {self.images:,}; same prediction for {self.same:,}"),
            ("Accuracy", f"{before:.2f} % before, {after:.2f} % after, of {self.images:,} test images"),
        ]


def _share(equal: float) -> str:
    """A share close to 1, without rounding to it what is less."""
    if equal == 1:
        return "all"
    return f"{100 * equal:.3f} %" if equal < 0.9999 else f"all but {short(100 * (1 - equal))} %"


@torch.no_grad()
def compared(subject: Exportable, engine: nn.Module, *, images: int) -> Comparison:
    """Run both on `images` test images, the same at every call."""
    chosen = drawn(len(subject.split), images)
    loader = batches_of(subject.split, batch_size=BATCH, images=images)
    found = engine.compare(copy.deepcopy(subject.model).double(), loader)
    guesses = torch.cat([engine(batch).argmax(1) for batch, _ in loader])
    labels = torch.as_tensor(subject.split.labels)[chosen]
    before = torch.tensor(subject.summary.predictions)[chosen]
    right = tuple(float((each == labels).double().mean()) for each in (before, guesses))
    neurons = {name: each for name, each in engine.net.named_modules() if isinstance(each, CountNeuron)}
    with listening(neurons) as counts:
        engine(subject.image())
    sizes = {name: each.numel() for name, each in counts.items()}
    flips = sum(found.flip_rates[name] * sizes[name] for name in sizes) / sum(sizes.values())
    return Comparison(found.total, 1 - flips, len(found.flipped), found.same, right)


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
    """The line about the time that one image takes, in the network as float32 layers and in `run`.

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
    return "Energy", f"{short(found.energy_mj)} mJ an image ({ann}, {found.energy_convention})"


def size_fact(subject: Exportable, file: Path) -> tuple[str, str]:
    """The line about the size of what was written."""
    return "Size", f"{short(file.stat().st_size / 1e6)} MB ({short(size(subject.model).fp32_mb)} MB as 32-bit floats)"


def engine_of(subject: Exportable, *, backend: str = "torch") -> nn.Module:
    """The integer engine of the run's network."""
    return integer(subject.model, subject.image(), backend=backend)


def onnx_runner(file: Path) -> Callable[[Tensor], Tensor]:
    """What runs an ONNX file in onnxruntime, on as many threads as torch has. Raises ImportError without it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError('comparing an ONNX file needs the extra "onnx": pip install "spikeformers[onnx]"') from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def onnx_fact(
    subject: Exportable, engine: nn.Module, run: Callable[[Tensor], Tensor], *, images: int
) -> tuple[str, str]:
    """The line about how far `run`, the engine in ONNX, gives what the engine gives."""
    same, largest = 0, 0.0
    for batch, _ in batches_of(subject.split, batch_size=BATCH, images=images):
        wanted, got = engine(batch), run(batch)
        same += int((wanted.argmax(1) == got.argmax(1)).sum())
        largest = max(largest, float((wanted - got).abs().max()))
    of = len(drawn(len(subject.split), images))
    return "In onnxruntime", f"prediction of the engine for {same:,} of {of:,}, logits within {short(largest)}"


def card_of(subject: Exportable, comparison: Comparison, *, license_note: str) -> ModelCard:
    """What a file says about the run that it comes from; paths stay out of it."""
    recipe, summary = subject.recipe, subject.summary
    return ModelCard(
        model=summary.model,
        accuracy=comparison.accuracies[1],
        images=comparison.images,
        data=recipe.data.source,
        energy_mj=summary.energy_mj,
        ann_energy_mj=summary.ann_energy_mj,
        energy_convention=summary.energy_convention,
        source=f"recipe {recipe.name}, {summary.epochs} epochs, seed {recipe.seed}",
        license=license_note,
        versions=summary.versions,
    )

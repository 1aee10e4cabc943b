"""Trained runs at few bits: the recipe that fine-tunes one, what that leaves, and which kind of layer it hurts most.

Paper: QSD-Transformer, Fig. 2 (a): only FC, only Conv, only attention, or all weights at 4 bits, in the spiking network
and in an ANN; Table 1 for "Param".
Departures from the paper: it does not say how the networks of Fig. 2 (a) were trained; here each is fine-tuned from the
same trained network for the same epochs.
"""

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from rich.console import Console
from torch import nn

from spikeformers.data.splits import load_split
from spikeformers.neurons import Neuron
from spikeformers.quantize import convert, prepare, quantizable, size
from spikeformers.train.checkpoint import read_json, write_json
from spikeformers.train.evaluate import batches_of, evaluate
from spikeformers.train.loop import train
from spikeformers.train.recipe import Init, Quantize, Recipe, from_json, override
from spikeformers.train.results import short
from spikeformers.train.saved import PACKED, read_classifier
from spikeformers.train.summary import Summary, circumstances, read_summary
from spikeformers.zoo import from_pretrained

EPOCHS_PART, RATE_PART = 4, 3  # fine-tuning takes a quarter of the epochs and starts at a third of the peak rate
FLOAT = "float"  # of a variant: the network as it was trained
LABELS = {FLOAT: "none", "linear": "only FC", "conv": "only Conv", "attention": "only attention", "all": "all"}
Changes = Sequence[tuple[str, str]]
"""Fields of a recipe by dotted path, and texts to set them to, as `override` takes them."""


@dataclass(frozen=True)
class Source:
    """A finished run to start from: its final network, recipe, class names, and accuracy (0..1) on the test split."""

    run: Path
    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]
    accuracy: float


def read_source(run: Path) -> Source:
    """Raises ValueError for anything but a finished classifier, or one that its recipe gave low-bit weights."""
    model, recipe, classes = read_classifier(run)
    if recipe.quantize.chosen() is not None:
        start = recipe.init.backbone
        cure = f"quantise the run that it started from, {start}" if start else "train it without them first"
        layers = "".join(f", quantize.layers.{name}={bits}" for name, bits in recipe.quantize.layers.items())
        told = f"quantize.bits={recipe.quantize.bits}{layers}"
        raise ValueError(f"{run} has low-bit weights already, by its recipe ({told}): {cure}")
    return Source(run, model, recipe, classes, read_summary(run).accuracy)


def fine_tuning(source: Source, *, mark: str, changes: Changes, epochs: int = 0) -> Recipe:
    """The recipe of `source` as one that goes on from its weights, called NAME_`mark`, with `changes` applied last.

    It has `epochs` (0: a quarter of those of `source`), a third of the learning rate, and as much less warm-up and
    cool-down as there are fewer epochs. The bits stand in `changes`.
    Raises ValueError for changes or bits that cannot be, or that leave every weight in float.
    """
    recipe, optim = source.recipe, source.recipe.optim
    uncooled = dataclasses.replace(
        recipe,
        optim=dataclasses.replace(optim, cooldown_epochs=0.0),
        epochs=epochs or max(1, recipe.epochs // EPOCHS_PART),
    )
    epochs = changed(uncooled, [each for each in changes if each[0] == "epochs"]).epochs
    share = min(1.0, epochs / recipe.epochs)
    warmup = min(optim.warmup_epochs * share, float(epochs))
    if optim.per_epoch:
        warmup = float(int(warmup))  # a part of an epoch would keep a whole one at warmup_lr, which may be 0
    optim = dataclasses.replace(
        optim, lr=optim.lr / RATE_PART, warmup_epochs=warmup, cooldown_epochs=optim.cooldown_epochs * share
    )
    tuned = dataclasses.replace(
        recipe, name=f"{recipe.name}_{mark}", init=Init(backbone=str(source.run)), optim=optim, epochs=epochs
    )
    tuned = changed(tuned, changes)
    prepared(source.model, tuned.quantize)
    return tuned


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """`recipe` with all `changes`, in order. Raises as `override` does."""
    for path, text in changes:
        recipe = override(recipe, path, text)
    return recipe


def prepared(model: nn.Module, group: Quantize) -> nn.Module:
    """A copy of `model` with the low-bit weights that `group` asks for, untrained. Raises as `fine_tuning` does."""
    for name, bits in group.layers.items():
        if type(bits) is not int:
            raise ValueError(f"bits of {name} must be a whole number, 2 to 8 (or 0 for float), got {bits!r}")
    bits = group.chosen()
    if bits is None:
        raise ValueError("quantize.bits=0 leaves every weight in float: choose 2 to 8 bits")
    return prepare(copy.deepcopy(model), bits=bits, **group.options())


def stored_fine_tuning(run: Path, *, source: Source) -> Recipe | None:
    """The recipe that the fine-tuning in `run` was started with; None if `run` holds none yet.

    Raises ValueError if it is not one of `source`.
    """
    if not (run / "recipe.json").is_file():
        return None
    recipe = from_json(read_json(run / "recipe.json"))
    start = Path(recipe.init.backbone)
    same = not start.exists() or start.resolve() == source.run.resolve()  # a run may have moved
    if not (recipe.init.backbone and same and recipe.name.startswith(f"{source.recipe.name}_w")):
        origin = recipe.init.backbone or "random weights"
        raise ValueError(
            f"{run} holds no fine-tuning of {source.run} but {recipe.name}, which started from {origin}: name the run "
            "that it belongs to, or another --out"
        )
    return recipe


def newest_fine_tuning(source: Source, *, runs: Path) -> Path | None:
    """The fine-tuning of `source` in the folder `runs` that was started or resumed last; None if there is none."""
    found = []
    for stored in runs.glob(f"{source.recipe.name}_w*/recipe.json"):
        with contextlib.suppress(ValueError):
            stored_fine_tuning(stored.parent, source=source)
            found.append(stored)
    return max(found, key=lambda stored: stored.stat().st_mtime).parent if found else None


def pack_run(run: Path) -> Path:
    """Write the network of a finished low-bit run with packed integers to `run`/packed; returns that folder."""
    return convert(from_pretrained(run / "model")).save_pretrained(run / PACKED)


def low_bit_facts(source: Source, summary: Summary, packed: Path) -> list[tuple[str, str]]:
    """Lines about a packed network: its accuracy beside that of `source`, bits by kind of layer, sizes."""
    model = from_pretrained(packed)
    found = size(model)
    stored = sum(file.stat().st_size for file in packed.iterdir())
    points = 100 * (summary.accuracy - source.accuracy)
    return [
        ("Test accuracy", f"{100 * source.accuracy:.2f} % of {source.run}"),
        ("With few bits", f"{100 * summary.accuracy:.2f} % ({points:+.2f} points)"),
        *((f"Bits, {kind}", told) for kind, told in bits_by_kind(model).items()),
        ("32-bit floats", f"{short(found.fp32_mb)} MB"),
        ("Param", f"{short(1e6 * found.paper_m)}, as the paper counts: bits/32 of each low-bit weight"),
        ("Packed", f"{short(stored / 1e6)} MB on disk: {packed}"),
    ]


def bits_by_kind(model: nn.Module) -> dict[str, str]:
    """Of each kind of layer which bits how many of them have, as `4 (12 layers), float (1 layer)`."""
    counts: dict[str, Counter[str]] = {}
    for _, layer, kind in quantizable(model):
        counts.setdefault(kind, Counter())[str(getattr(layer, "bits", FLOAT))] += 1
    return {
        kind: ", ".join(f"{bits} ({count} layer{'s' * (count != 1)})" for bits, count in sorted(found.items()))
        for kind, found in counts.items()
    }


@dataclass(frozen=True)
class Sensitivity:
    """Test accuracies 0..1 by network, "snn" or "ann", and by what has low-bit weights: a key of LABELS.

    None stands where a network has no layer of a kind. `epochs`: of fine-tuning, 0: none. `runs`: where they started.
    """

    bits: int
    epochs: int
    runs: dict[str, str]
    accuracies: dict[str, dict[str, float | None]]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: accuracy of every network in percent, and the points it lost against float."""
        header, rows = [f"{self.bits}-bit weights"], [[label] for label in LABELS.values()]
        for role, found in self.accuracies.items():
            header += [f"{role.upper()} %", "points lost"]
            for row, value in zip(rows, (found[variant] for variant in LABELS), strict=True):
                lost = "–" if value is None else f"{100 * (found[FLOAT] - value):.2f}"
                row += ["–" if value is None else f"{100 * value:.2f}", lost]
        return header, rows

    def tuning(self) -> str:
        """What was done after rounding."""
        return f"fine-tuned for {self.epochs} epoch{'s' * (self.epochs != 1)}" if self.epochs else "not fine-tuned"

    def save(self, folder: Path) -> Path:
        """Write `folder`/sensitivity.json: all of this, the versions and the command; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "sensitivity.json"
        write_json(path, dataclasses.asdict(self) | circumstances())
        return path

    def plot(self, folder: Path) -> Path:
        """Draw `folder`/sensitivity.png, bars of accuracy by what has low-bit weights, networks side by side."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        width = 0.8 / len(self.accuracies)
        for index, (role, found) in enumerate(self.accuracies.items()):
            offset = (index - (len(self.accuracies) - 1) / 2) * width
            values = [found[variant] for variant in LABELS]
            heights = [0.0 if value is None else 100 * value for value in values]
            bars = axes.bar([i + offset for i in range(len(LABELS))], heights, width, label=role.upper())
            told = ["–" if value is None else f"{100 * value:.1f}" for value in values]
            axes.bar_label(bars, told, fontsize=8)
        axes.set_xticks(range(len(LABELS)), list(LABELS.values()))
        axes.set_xlabel(f"{self.bits}-bit weights")
        axes.set_ylabel("test accuracy in %")
        axes.set_title(self.tuning(), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside right upper")
        path = folder / "sensitivity.png"
        partial = path.with_name(f".tmp-{path.name}")
        figure.savefig(partial, format="png")
        partial.replace(path)
        return path


def sensitivity(
    sources: dict[str, Source],
    *,
    out: Path,
    bits: int,
    epochs: int,
    changes: Changes = (),
    resume: bool = False,
    console: Console | None = None,
) -> Sensitivity:
    """Quantise one kind of layer at a time, then all, in every network; see `networks`, which gives `sources`.

    Each is a run of its own in `out`/NETWORK-KIND, resumed or only read where `resume` says so; with 0 `epochs` none is
    trained and nothing written. Raises ValueError as `fine_tuning` and `train` do, before the first training if it can.
    """
    plans = {}
    for role, source in sources.items():
        kinds = {kind for _, _, kind in quantizable(source.model)} | {"all"}
        for variant in LABELS.keys() & kinds:
            what = "bits" if variant == "all" else f"layers.{variant}"
            given = [(f"quantize.{what}", str(bits)), *changes]
            plans[role, variant] = fine_tuning(source, mark=f"w{bits}-{variant}", epochs=epochs or 1, changes=given)
    accuracies: dict[str, dict[str, float | None]] = {}
    for role, source in sources.items():
        plan = plans[role, "all"]
        found = accuracies[role] = dict.fromkeys(LABELS) | {FLOAT: accuracy_of(source.model, plan)}
        for variant in LABELS:
            if (plan := plans.get((role, variant))) is None:
                continue
            if not epochs:
                found[variant] = accuracy_of(prepared(source.model, plan.quantize), plan)
                continue
            if console:
                console.print(f"{role}-{variant}", markup=False, highlight=False)
            found[variant] = train(plan, run=out / f"{role}-{variant}", resume=resume, console=console).accuracy
    return Sensitivity(bits, epochs, {role: str(source.run) for role, source in sources.items()}, accuracies)


def accuracy_of(model: nn.Module, recipe: Recipe) -> float:
    """Accuracy 0..1 of a network on the whole test split of `recipe`."""
    if recipe.threads:  # as in training: sums depend on the number of threads
        torch.set_num_threads(recipe.threads)
    split = load_split(recipe.data, "test", seed=recipe.seed)
    loader = batches_of(split, batch_size=recipe.batch_size, workers=recipe.workers)
    return evaluate(model.to(PartialState().device), loader).accuracy


def networks(run: Path, *, twin: Path | None) -> dict[str, Source]:
    """The runs whose sensitivity is measured, "snn" and, if there is a `twin`, "ann".

    Raises ValueError unless both are float networks, the first spiking and the second not, with the same classes.
    """
    found = {"snn": read_source(run)} | ({} if twin is None else {"ann": read_source(twin)})
    for role, source in found.items():
        if source.model.quantization is not None:
            raise ValueError(
                f"the network of {source.run} is built with low-bit weights, so there is no float one to compare with: "
                "train it with model.options.bits=0"
            )
        spikes = any(isinstance(module, Neuron) for module in source.model.modules())
        if role == "snn" and not spikes:
            raise ValueError(
                f"{source.run} has no spiking neuron: give it as --twin, beside the run of the network that has"
            )
        if role == "ann" and spikes:
            raise ValueError(
                f"--twin must be an ANN, but {source.run} spikes (model.neuron={source.recipe.model.neuron}): train "
                "the same network with model.neuron=gelu model.steps=1 model.options.attention=softmax"
            )
        if source.classes != found["snn"].classes:
            raise ValueError(f"{source.run} and {run} know different classes: train the twin on the same data")
    return found

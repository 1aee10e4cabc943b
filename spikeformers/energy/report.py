"""The energy report: layers, stages and total of a network on images, beside the same network counted as an ANN."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from pathlib import Path

import torch
from torch import Tensor, nn

from spikeformers.energy import conventions, plots, tables
from spikeformers.energy.conventions import Charge, Convention
from spikeformers.energy.foreign import at_rest, foreign_modules, one_by_one, spiking_of
from spikeformers.energy.ops import Trace


@dataclass(frozen=True)
class Layer:
    """One counted operation, per image, averaged over the images.

    `macs`, `dense_macs`: multiply-accumulates of one time step, as executed and re-parameterised; `counted`: those that
    the convention uses.  `rate`: mean count of an input element in one step, None if the layer is not fed by spikes.
    `mac_operations`, `sops`: multiply-accumulates and additions over all steps.  `mj`, `ann_mj`: millijoules.
    `words`: of 32 bits, moved over all steps, if the convention charges for memory.  `sd_mj`: deviation over the
    images.  `rates`, `sd_rates`: mean count of an input element in each step as it was measured, whatever the
    convention, and its deviation over the images; empty if the layer is not fed by spikes.
    """

    name: str
    stage: str
    kind: str
    macs: float
    dense_macs: float
    counted: float
    steps: int
    rate: float | None
    mac_operations: float
    sops: float
    mj: float
    ann_mj: float
    words: float = 0.0
    sd_mj: float = 0.0
    rates: tuple[float, ...] = ()
    sd_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class EnergyReport:
    """Energy of a network per image under one convention; see `measure`.

    `image_mj`: millijoules of every image, in the order given.  `ann_mj`: the same network counted as an ANN.
    `firing_rate`: mean of count / levels over all elements of all neurons and steps, 0..1; 0 for an ANN.
    `spikes_per_image`: counts of all neurons and steps, mean over images.  `kinds`: of its operations (Operation.kind),
    before the convention took any of them apart.  `uncounted`: what multiplies, or may, and is in no layer here:
    "encoder.lstm (LSTM): mkldnn_rnn_layer".
    """

    layers: tuple[Layer, ...]
    rules: Convention
    steps: int
    image_mj: tuple[float, ...]
    ann_mj: float
    firing_rate: float
    spikes_per_image: float
    kinds: frozenset[str]
    uncounted: tuple[str, ...] = ()

    @property
    def convention(self) -> str:
        """Name of the convention; `rules` is the convention itself."""
        return self.rules.name

    @property
    def images(self) -> int:
        """Number of images measured."""
        return len(self.image_mj)

    @property
    def total_mj(self) -> float:
        """Millijoules of an image, mean over the images."""
        return math.fsum(self.image_mj) / self.images

    @property
    def sd_mj(self) -> float:
        """Standard deviation over the images (n - 1); 0 for one image."""
        return _deviation(self.image_mj)

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        """Mean count of an input element in each time step, of every layer that spikes feed, in network order."""
        return {layer.name: layer.rates for layer in self.layers if layer.rates}

    def stages(self) -> dict[str, dict[str, float]]:
        """Sums over the layers of each stage (first part of their names), in network order: mj, ann_mj, sops, macs."""
        sums: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            stage = sums.setdefault(layer.stage, {"mj": 0.0, "ann_mj": 0.0, "sops": 0.0, "macs": 0.0})
            stage["mj"] += layer.mj
            stage["ann_mj"] += layer.ann_mj
            stage["sops"] += layer.sops
            stage["macs"] += layer.counted
        return sums

    def table(self) -> str:
        """The report as aligned text: a line a layer, a line a stage, the totals and the convention.

        "real" in the column of rates marks a layer that real numbers feed, not spikes.
        """
        head = ("layer", "kind", "MACs M", "dense M", "T", "rate", "SOPs M", "mJ", "ANN mJ")
        rows = [head]
        for layer in self.layers:
            rate = "real" if layer.rate is None else f"{layer.rate:.4f}"
            sizes = (f"{layer.macs / 1e6:.3f}", f"{layer.dense_macs / 1e6:.3f}", str(layer.steps), rate)
            energy = (f"{layer.sops / 1e6:.3f}", f"{layer.mj:.6f}", f"{layer.ann_mj:.6f}")
            rows.append((layer.name, layer.kind, *sizes, *energy))
        rows.append(("",) * len(head))
        for name, stage in self.stages().items():
            energy = (f"{stage['sops'] / 1e6:.3f}", f"{stage['mj']:.6f}", f"{stage['ann_mj']:.6f}")
            rows.append((name, "stage", "", "", "", "", *energy))
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        aligned = (
            "  ".join(cell.rjust(width) if column > 1 else cell.ljust(width) for column, (cell, width) in cells)
            for cells in (enumerate(zip(row, widths, strict=True)) for row in rows)
        )
        times = f" ({self.ann_mj / self.total_mj:.1f} times as much)" if self.total_mj > 0 else ""
        return "\n".join(
            [
                *(line.rstrip() for line in aligned),
                f"Energy per image: {self.total_mj:.6f} mJ, sd {self.sd_mj:.6f} over {self.images} image"
                + ("s" if self.images > 1 else ""),
                f"Same network as an ANN (T=1, {self.rules.mac_pj:g} pJ each MAC): {self.ann_mj:.6f} mJ{times}",
                f"Firing rate {100 * self.firing_rate:.2f} %, {self.spikes_per_image:,.0f} spikes, T={self.steps}",
                *(f"NOT COUNTED: {each}" for each in self.uncounted),
                self.describe(),
            ]
        )

    def describe(self) -> str:
        """The convention in words, as far as it says something about this network."""
        return self.rules.describe(self.kinds)

    def to_json(self) -> dict:
        """Everything in the report as what `json.dumps` writes."""
        return {
            "convention": asdict(self.rules),
            "description": self.describe(),
            "images": self.images,
            "steps": self.steps,
            "total_mj": self.total_mj,
            "sd_mj": self.sd_mj,
            "ann_mj": self.ann_mj,
            "firing_rate": self.firing_rate,
            "spikes_per_image": self.spikes_per_image,
            "uncounted": list(self.uncounted),
            "stages": self.stages(),
            "layers": [asdict(layer) for layer in self.layers],
            "image_mj": list(self.image_mj),
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to the file `path`."""
        path = Path(path)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path

    def to_csv(self) -> str:
        """A row a layer with every field of Layer; of `rates` and `sd_rates` a column for each time step."""
        names = [field.name for field in fields_of(Layer) if field.name not in ("rates", "sd_rates")]
        rows = []
        for layer in self.layers:
            padding = [None] * (self.steps - len(layer.rates))
            of_steps = (*layer.rates, *padding, *layer.sd_rates, *padding)
            rows.append((*(getattr(layer, name) for name in names), *of_steps))
        steps = [f"{name}_step{step + 1}" for name in ("rate", "sd_rate") for step in range(self.steps)]
        return tables.as_csv((*names, *steps), rows)

    def to_latex(self) -> str:
        """A tabular with a row a layer and the total, for the package booktabs; above it the convention as comments."""
        head = ("layer", "kind", "MACs (M)", "T", "rate", "SOPs (M)", "mJ", "sd", "ANN mJ")
        rows = [
            (x.name, x.kind, x.counted / 1e6, x.steps, x.rate, x.sops / 1e6, x.mj, x.sd_mj, x.ann_mj)
            for x in self.layers
        ]
        total = ("total", None, None, self.steps, None, None, self.total_mj, self.sd_mj, self.ann_mj)
        return tables.as_latex(head, (*rows, total), note=self.describe())

    def plot(self, path: str | Path, *, kind: str = "stages") -> Path:
        """Draw the image file `path` (its ending says which format).

        `kind`: "stages", bars of stages, spiking beside ANN; "layers", a bar a layer; "rates", firing rates of layers
        over time steps.  Raises ValueError for another kind, or for rates where spikes feed no layer.
        """
        return plots.draw(self, path, kind)


def measure(
    model: nn.Module,
    images: Tensor | Iterable,
    *,
    convention: str | Convention = "meta_spikeformer",
    neurons: Sequence[type[nn.Module]] = (),
) -> EnergyReport:
    """Energy of `model` per image, mean and standard deviation over the images.

    images: one batch [B, C, H, W] or [T, B, C, H, W], or a loader of batches, or of tuples that start with a batch.
    The ANN beside it is the same network under the same convention: its counted MACs run once (T=1), each 4.6 pJ.
    The model runs in eval mode without gradients and comes back as it was.  It may be any torch model: `energy/ops.py`
    lists what is counted, `EnergyReport.uncounted` what is not.  One without neurons is an ANN (an ANN twin, say):
    every layer is multiply-accumulates, whatever the convention excepts.
    A model without a door (see neurons.Door) takes [T*B, ...], time-major.
    `neurons`: classes that spike, beside those of spikeformers.neurons and spikingjelly; see `energy/foreign.py`.  A
    model with neurons that are not ours runs image by image, and their state is at rest before and after each.
    Raises ValueError for an unknown convention, no images, images that are not finite, nothing to count, or neurons
    that fire anything but counts.
    """
    rules = conventions.get(convention)
    tally, foreign, spiking = _Tally(rules), foreign_modules(model, neurons).values(), None
    with evaluating(model):
        for batch in batches_of(images):
            placed_batch = placed(batch, model)
            for each in one_by_one(placed_batch) if foreign else (placed_batch,):
                spiking = spiking_of(model, each, neurons) if spiking is None else spiking
                tally.add(*rules.account(model, each, neurons=spiking))
                at_rest(model, foreign)
    return tally.report()


def batches_of(images: Tensor | Iterable) -> Iterator[Tensor]:
    """The images of every batch."""
    for batch in (images,) if isinstance(images, Tensor) else images:
        found = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(found, Tensor):
            raise ValueError(f"expected batches of images or tuples that start with them, got {type(found).__name__}")
        if found.shape[0] == 0:
            raise ValueError(f"a batch without images (shape {tuple(found.shape)}) has no energy per image")
        if not torch.isfinite(found).all():
            raise ValueError("the images contain NaN or infinity: check how they were read and normalised")
        yield found


def placed(images: Tensor, model: nn.Module) -> Tensor:
    """Images on the device and in the precision of the model."""
    first = next(model.parameters(), None)
    return images if first is None else images.to(first.device, first.dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Tally:
    """Charges of many batches, gathered by layer name; a layer that runs twice in a pass is one layer."""

    def __init__(self, rules: Convention) -> None:
        self.rules = rules
        self.charges: dict[str, list[tuple[list[Charge], int]]] = {}  # of each layer those of every batch, and images
        self.image_mj: list[float] = []
        self.spikes = 0.0
        self.sites = 0.0
        self.steps = 1
        self.uncounted: dict[str, None] = {}
        self.kinds: set[str] = set()

    def add(self, found: Trace, charges: Iterable[Charge]) -> None:
        """Take in one forward pass."""
        energy, layers = torch.zeros(found.images, dtype=torch.float64), {}
        for charge in charges:
            energy += torch.as_tensor(charge.mj, dtype=torch.float64, device="cpu")
            layers.setdefault(charge.operation.name, []).append(charge)
        for name, calls in layers.items():
            self.charges.setdefault(name, []).append((calls, found.images))
        self.image_mj += energy.tolist()
        self.spikes += float(found.spikes.sum())
        self.sites += found.sites * found.images
        self.steps = found.steps
        self.uncounted |= dict.fromkeys(found.uncounted)
        self.kinds |= {operation.kind for operation in found.operations}

    def report(self) -> EnergyReport:
        if not self.image_mj:
            raise ValueError("there are no images to measure: the loader is empty")
        layers = tuple(self.layer(name, batches) for name, batches in self.charges.items())
        images = len(self.image_mj)
        return EnergyReport(
            layers=layers,
            rules=self.rules,
            steps=self.steps,
            image_mj=tuple(self.image_mj),
            ann_mj=math.fsum(layer.ann_mj for layer in layers),
            firing_rate=self.spikes / self.sites if self.sites else 0.0,  # an ANN has no site
            spikes_per_image=self.spikes / images,
            kinds=frozenset(self.kinds),
            uncounted=tuple(self.uncounted),
        )

    def layer(self, name: str, batches: list[tuple[list[Charge], int]]) -> Layer:
        """Means over all images of what one layer cost."""
        charges = [(charge, images) for calls, images in batches for charge in calls]
        first = charges[0][0].operation

        def mean(value) -> float:
            return math.fsum(images * float(value(charge)) for charge, images in charges) / len(self.image_mj)

        def sops(charge: Charge) -> float:
            return float(torch.as_tensor(charge.sops, dtype=torch.float64).mean())

        counted, fed = mean(lambda c: c.counted), first.rates is not None
        additions = mean(sops)
        spent = [mj for calls, images in batches for mj in sum(_images(call.mj, images) for call in calls).tolist()]
        spent += [0.0] * (len(self.image_mj) - len(spent))  # in batches where it did not run
        rates = _step_rates(batches)
        return Layer(
            name=name,
            stage=name.split(".")[0],
            kind=first.kind,
            macs=mean(lambda c: c.operation.macs),
            dense_macs=mean(lambda c: c.operation.dense_macs),
            counted=counted,
            steps=first.steps,
            rate=additions / (counted * first.steps) if fed and counted else None,
            mac_operations=mean(lambda c: c.mac_operations),
            sops=additions,
            mj=mean(lambda c: torch.as_tensor(c.mj, dtype=torch.float64).mean()),
            ann_mj=mean(lambda c: c.ann_mj),
            words=mean(lambda c: c.words),
            sd_mj=_deviation(spent),
            rates=tuple(map(_mean, rates)),
            sd_rates=tuple(map(_deviation, rates)),
        )


def _images(value: float | Tensor, images: int) -> Tensor:
    """A number, or one for each image, as [B]."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").expand(images)


def _step_rates(batches: list[tuple[list[Charge], int]]) -> list[list[float]]:
    """Of each time step the rate of a layer's input in every image, its calls weighted by their products."""
    rates: list[Tensor] = []
    for calls, _ in batches:
        fed = [call.operation for call in calls if call.operation.step_rates is not None and call.operation.macs]
        if fed:
            total = sum(each.macs * each.step_rates.cpu().double() for each in fed)
            rates.append(total / sum(each.macs for each in fed))
    return torch.cat(rates, 1).tolist() if rates else []


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation (n - 1); 0 for one value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))

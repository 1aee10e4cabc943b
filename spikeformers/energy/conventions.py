"""How papers turn operations into energy: each way is a named object that can describe itself.

Paper: Meta-SpikeFormer, App. B.2 and Table 6; Spikformer V2, Tables 1 and 2; Spikformer, ICLR 2023; QSD-Transformer,
App. E.2; Spike2Former, Table 1.
Energies of one operation: 45 nm, 32-bit float (Horowitz, "Computing's energy problem", ISSCC 2014).
A further convention is a further entry of CONVENTIONS; a choice that none of them made yet is a further field.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from spikeformers.energy.elementwise import Extra, trace_everything
from spikeformers.energy.foreign import Spiking
from spikeformers.energy.ops import FLOAT_BITS, Operation, Trace, trace
from spikeformers.neurons.suggest import closest

MAC_PJ, AC_PJ = 4.6, 0.9

MEMORY = {"none": 0.0, "sram": 50.0, "dram": 650.0}
"""pJ to move a word of 32 bits: half of what Horowitz, 2014, gives for 64 at 45 nm (SRAM of 8 KB 10 pJ, of 32 KB 20,
of 1 MB 100, which is "sram", since weights fill megabytes; DRAM 1300 to 2600, the least of it here)."""

PRODUCTS = ("attention", "attention_map", "deformable", "product")
"""Kinds of operations that have no weights."""

FIRST_LAYER = {
    "mac": "multiply-accumulates in every time step",
    "mac_once": "multiply-accumulates in one time step only (the image does not change)",
    "ac": "additions in every time step, at rate 1",
    "free": "not counted",
}


ATTENTION = {
    "table6": "(R_Q + R_K + R_V) x N D^2 (SDSA-1/2: x N D); VSA: its products, N^2 for the scale and 2 N^2 for the "
    "softmax of a head; other kinds, and masks: products as executed",
    "table1": "its matrix products as executed; a map of real numbers: two operations to a MAC, spikes or not, and to "
    "each of the 3 N^2 of scale and softmax",
    "products": "its matrix products as executed",
    "free": "not counted, nor any other product without weights",
}


REST = (
    "  Neuron: D comparisons an element and step; if its membrane lives on, also a multiply-accumulate (leak) and an "
    "addition (reset).",
    "  Batch norm behind a layer: folded; any other norm: a MAC for each product.",
    "  Bilinear taps, masks, products and scales of maps: a MAC for each product; of spikes, an addition a count.",
    "  Softmax: a MAC and an addition an element. Shortcuts, sums and averages: an addition an element, for spikes a "
    "count. Maximum: an addition an element.",
)
TRAFFIC = (
    "  Moved: weights (at their bits) and input of each layer once a step, spikes at the bits of their largest count,",
    "  real numbers in front of a layer written too, membranes that live on read and written each step, taps a word "
    "each.",
    "  A lower bound: no layer reads a word twice in one step.",
)


@dataclass(frozen=True)
class Convention:
    """The choices behind a number of millijoules; print `describe()` beside it.

    `merged`: the kinds counted as the one dense convolution they equal at inference; others count as executed.
    `inner`: inside a kind that is not merged, a convolution whose input is not spikes is "mac" (what it is), or "ac" at
    the rate of the spikes in front of the first one.
    `attention`: "table6" is (R_Q + R_K + R_V) x N D^2 additions for SDSA-3/4 and x N D for SDSA-1/2, whatever the
    number of heads, and adds scale and softmax to VSA; "table1" counts as Spikformer V2's Table 1; "products" is the
    matrix products as executed, each at the rate of its spikes; "free" counts no product without weights, be it of an
    attention or of masks.
    `first_layer`: what the layer that reads the image costs, if it is not fed by spikes: a key of FIRST_LAYER.
    `classifier`: what the last layer costs, if it is linear and not fed by spikes (it reads an average of them): "mac",
    or "ac" at rate 1.
    `rate`: "layer" is the mean count of each layer's input; "network" that of all neurons together, at which then all
    that is counted, the image's layer too, makes additions.
    `weights`: "full" is one price for an addition; "bits" is b/32 of it in a layer whose weights have b bits.
    `rest`: what runs beside the layers is "free" or "counted", as elementwise.py lists it.
    `memory`: "none", "sram", "dram" (see MEMORY), or pJ for each word of 32 bits that moves (again elementwise.py).
    Everywhere: a layer fed by spikes is MACs x mean count of its input additions in every time step; a later layer fed
    by real numbers is MACs, and so is every layer of a network without neurons; attentions of other kinds (VSA, SDDA,
    cross attention) and the products that make masks are products as executed; biases and constants are free.
    """

    name: str
    source: str
    merged: tuple[str, ...] = ("rep_conv", "sep_conv")
    inner: Literal["mac", "ac"] = "mac"
    attention: Literal["table6", "table1", "products", "free"] = "table6"
    first_layer: Literal["mac", "mac_once", "ac", "free"] = "mac"
    classifier: Literal["mac", "ac"] = "mac"
    rate: Literal["layer", "network"] = "layer"
    weights: Literal["full", "bits"] = "full"
    rest: Literal["free", "counted"] = "free"
    memory: Literal["none", "sram", "dram"] | float = "none"
    mac_pj: float = MAC_PJ
    ac_pj: float = AC_PJ

    def __post_init__(self) -> None:
        for field, known in (
            ("inner", ("mac", "ac")),
            ("attention", tuple(ATTENTION)),
            ("first_layer", tuple(FIRST_LAYER)),
            ("classifier", ("mac", "ac")),
            ("rate", ("layer", "network")),
            ("weights", ("full", "bits")),
            ("rest", ("free", "counted")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {getattr(self, field)!r}")
        if self.memory not in MEMORY and not (type(self.memory) in (int, float) and 0 <= self.memory < math.inf):
            raise ValueError(f"memory must be one of {', '.join(MEMORY)} or pJ for a word, got {self.memory!r}")

    @property
    def memory_pj(self) -> float:
        """pJ for each word of 32 bits that moves."""
        return MEMORY[self.memory] if isinstance(self.memory, str) else self.memory

    def describe(self, kinds: Collection[str] | None = None) -> str:
        """The convention in a few plain lines: every assumption, or those about operations of these kinds."""
        shapes = {
            "rep_conv": "RepConv (1x1, depthwise 3x3, 1x1)",
            "sep_conv": "depthwise + last pointwise convolution of SepConv",
        }
        inner = "multiply-accumulates" if self.inner == "mac" else "additions at the rate of the spikes before them"
        lines = [f"Convention {self.name}: {self.source}."]
        for kind, shape in shapes.items():
            if kinds is not None and kind not in kinds:
                continue
            how = "one dense convolution" if kind in self.merged else f"as executed; its un-spiked parts: {inner}"
            lines.append(f"  {shape}: {how}.")
        if kinds is None or not set(PRODUCTS).isdisjoint(kinds):
            lines.append(f"  Attention: {ATTENTION[self.attention]}.")
        if self.rate == "network":
            lines.append("  Every layer, the image's too: MACs x mean count of all neurons x time steps additions.")
        else:
            lines += [
                f"  Layer that reads the image: {FIRST_LAYER[self.first_layer]}.",
                "  Layer fed by spikes: MACs x mean count x time steps additions; "
                "fed by real numbers: MACs x time steps.",
            ]
        if self.classifier == "ac":
            lines.append("  Classifier that reads an average of spikes: additions at rate 1.")
        if self.weights == "bits":
            lines.append("  An addition of a weight of b bits costs b/32 of that of a float.")
        if self.rest == "counted":
            lines += REST
        if self.memory_pj:
            lines += [f"  Memory: {self.memory_pj:g} pJ for each word of 32 bits that moves.", *TRAFFIC]
        free = "biases and activations free" if self.rest == "counted" else "batch norms fold; rest free"
        lines.append(f"  {self.mac_pj:g} pJ a multiply-accumulate, {self.ac_pj:g} pJ an addition; {free}.")
        return "\n".join(lines)

    def account(
        self, model: nn.Module, images: Tensor, *, neurons: Mapping[str, Spiking]
    ) -> tuple[Trace, list["Charge"]]:
        """Run `model(images)` once, with these neurons: what it did, and what this convention charges."""
        if self.rest == "counted" or self.memory_pj:
            found, extras = trace_everything(model, images, neurons=neurons)
        else:
            found, extras = trace(model, images, neurons=neurons), ()
        operations = found.operations
        if self.rate == "network" and found.outputs:
            operations = [_at(operation, found.spikes / found.outputs) for operation in operations]
        charges = self.charge(operations, spiking=found.sites > 0)
        return found, charges + [self.charge_extra(each) for each in extras if self.counts(each)]

    def counts(self, extra: Extra) -> bool:
        """True if this convention charges for what runs beside the layers."""
        return self.memory_pj > 0 if extra.kind == "memory" else self.rest == "counted"

    def charge_extra(self, extra: Extra) -> "Charge":
        """What runs beside the layers: products and additions, or words of memory."""
        passes, additions = extra.steps, extra.additions * extra.steps
        if extra.rates is not None:
            passes, additions = 0, (extra.macs + extra.additions) * extra.steps * extra.rates
        products, words = extra.macs * passes, extra.words * extra.steps
        # An ANN looks its activations up where this network has neurons.
        counted, sums = (0.0, 0.0) if extra.kind == "neuron" else (extra.macs, extra.additions)
        return Charge(extra, counted, products, additions, self, words, sums, extra.ann_words)

    def charge(self, operations: Iterable[Operation], *, spiking: bool = True) -> list["Charge"]:
        """What this convention counts of `operations`, given in order of execution.

        `spiking` False says that the network has no neuron: `first_layer` and `classifier` then except nothing.
        """
        operations, charges = list(operations), []
        for index, operation in enumerate(operations):
            real = self._exception(operation, index, len(operations)) if spiking else "mac"
            whole = self.attention == "table6" if operation.kind == "attention" else operation.kind in self.merged
            share = 0 if self.attention == "free" and operation.kind in PRODUCTS else 1
            if self.attention == "table1" and operation.kind == "attention_map":
                counted = 2 * math.fsum(part.macs for part in operation.parts)
                charges.append(self._one(replace(operation, rates=None), counted=counted, real="mac"))
                continue
            if whole or not operation.parts:
                charges.append(self._one(operation, counted=share * operation.dense_macs, real=real))
                continue
            for place, part in enumerate(operation.parts):
                if part.kind == "softmax" and self.attention != "table6":
                    continue
                rates = operation.rates if self.inner == "ac" and part.rates is None else part.rates
                # The dense form belongs to the parts together: kept on the first one, columns add up.
                part = replace(part, dense_macs=0 if place else operation.dense_macs, rates=rates)
                charges.append(self._one(part, counted=share * part.macs, real="mac" if place else real))
        return charges

    def _exception(self, operation: Operation, index: int, count: int) -> str:
        """What `operation`, the one at `index` of `count`, costs where real numbers feed it: a key of FIRST_LAYER."""
        if operation.rates is not None:
            return "mac"
        if index == 0:
            return self.first_layer
        return self.classifier if index == count - 1 and operation.kind == "linear" else "mac"

    def _one(self, operation: Operation, *, counted: float, real: str) -> "Charge":
        passes, sops = operation.steps, 0.0
        if operation.rates is not None:
            passes, sops = 0, counted * operation.steps * operation.rates
        elif real != "mac":
            passes = 1 if real == "mac_once" else 0
            sops = counted * operation.steps if real == "ac" else 0.0
        return Charge(operation, counted, counted * passes, sops, self)


@dataclass(frozen=True, eq=False)
class Charge:
    """One operation under a convention, per image: `counted` MACs of one time step, executed as `mac_operations`
    multiply-accumulates and `sops` additions (a number, or one for each image [B]), and `words` moved over all steps.
    `ann_additions`, `ann_words`: what an ANN does beside the counted MACs, once."""

    operation: Operation
    counted: float
    mac_operations: float
    sops: float | Tensor
    convention: Convention
    words: float = 0.0
    ann_additions: float = 0.0
    ann_words: float = 0.0

    @property
    def mj(self) -> float | Tensor:
        """Millijoules of an image: a number, or one for each image [B]."""
        rules = self.convention
        share = self.operation.bits / FLOAT_BITS if rules.weights == "bits" else 1
        computed = self.mac_operations * rules.mac_pj + self.sops * (rules.ac_pj * share)
        return 1e-9 * (computed + self.words * rules.memory_pj)

    @property
    def ann_mj(self) -> float:
        """Millijoules if the counted MACs, and what runs beside them, ran once, in real numbers."""
        rules = self.convention
        beside = self.ann_additions * rules.ac_pj + self.ann_words * rules.memory_pj
        return 1e-9 * (self.counted * rules.mac_pj + beside)


def _at(operation: Operation, rates: Tensor) -> Operation:
    """The operation with `rates` in place of its own."""
    return replace(operation, rates=rates, parts=tuple(_at(part, rates) for part in operation.parts))


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(
            "meta_spikeformer",
            "Meta-SpikeFormer, App. B and Table 11, the reading that gives the published energies",
        ),
        Convention(
            "as_executed",
            "what the network really does before any merging, un-spiked inner convolutions included",
            merged=(),
            attention="products",
        ),
        Convention(
            "factored",
            "like meta_spikeformer, but with factored kernels, every factor charged as additions",
            merged=(),
            inner="ac",
        ),
        Convention(
            "network_rate",
            "Meta-SpikeFormer, App. B.2, the simple way: FLOPs x the firing rate of the whole network",
            merged=(),
            attention="products",
            rate="network",
        ),
        Convention(
            "spikformer_v2",
            "Spikformer V2, Table 2: Power = 0.9 pJ x OPs for its V1 and V2 alike; additions only",
            merged=(),
            inner="ac",
            attention="products",
            first_layer="free",
            classifier="ac",
        ),
        Convention(
            "spikformer_v2_table1",
            "Spikformer V2, Table 1: like spikformer_v2, but maps of real numbers count two operations to a MAC",
            merged=(),
            inner="ac",
            attention="table1",
            first_layer="free",
            classifier="ac",
        ),
        Convention(
            "spikformer_v1",
            "Spikformer, ICLR 2023: additions, and the first convolution as multiply-accumulates",
            merged=(),
            inner="ac",
            attention="products",
            classifier="ac",
        ),
        Convention(
            "qsd_transformer",
            "QSD-Transformer, Eq. 30 as inferred: like meta_spikeformer, but an addition costs b/32",
            weights="bits",
        ),
        Convention(
            "spike2former",
            "Spike2Former, Table 1, by what its authors' tools see: layers alone, every factor charged as additions",
            merged=(),
            inner="ac",
            attention="free",
        ),
        Convention(
            "honest",
            "everything that the network does as it stands, arithmetic alone",
            merged=(),
            attention="products",
            rest="counted",
        ),
        Convention(
            "honest_sram",
            "everything that the network does as it stands, its memory an SRAM of 1 MB",
            merged=(),
            attention="products",
            rest="counted",
            memory="sram",
        ),
        Convention(
            "honest_dram",
            "everything that the network does as it stands, its memory a DRAM",
            merged=(),
            attention="products",
            rest="counted",
            memory="dram",
        ),
    )
}


def get(convention: str | Convention) -> Convention:
    """The convention of that name, or `convention` itself. Raises ValueError for an unknown name."""
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown energy convention {convention!r}; {closest(convention, CONVENTIONS)}")
    return CONVENTIONS[convention]

"""How papers turn operations into energy: each way is a named object that can describe itself.

Paper: Meta-SpikeFormer, App. B.2 and Table 6; Spikformer V2, Table 2; Spikformer, ICLR 2023; Spike2Former, Table 1.
Energies of one operation: 45 nm, 32-bit float (Horowitz, 2014).
A further convention is a further entry of CONVENTIONS; a choice that none of them made yet is a further field.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spikeformers.energy.ops import Operation
from spikeformers.neurons.suggest import closest

MAC_PJ, AC_PJ = 4.6, 0.9

PRODUCTS = ("attention", "attention_map", "deformable", "product")
"""Kinds of operations that have no weights."""

FIRST_LAYER = {
    "mac": "multiply-accumulates in every time step",
    "mac_once": "multiply-accumulates in one time step only (the image does not change)",
    "ac": "additions in every time step, at rate 1",
    "free": "not counted",
}


ATTENTION = {
    "table6": "(R_Q + R_K + R_V) x N D^2 (SDSA-1/2: x N D); other kinds, and masks: products as executed",
    "products": "its matrix products as executed",
    "free": "not counted, nor any other product without weights",
}


@dataclass(frozen=True)
class Convention:
    """The choices behind a number of millijoules; print `describe()` beside it.

    `merged`: the kinds counted as the one dense convolution they equal at inference; others count as executed.
    `inner`: inside a kind that is not merged, a convolution whose input is not spikes is "mac" (what it is), or "ac" at
    the rate of the spikes in front of the first one.
    `attention`: "table6" is (R_Q + R_K + R_V) x N D^2 additions for SDSA-3/4 and x N D for SDSA-1/2, whatever the
    number of heads; "products" is the matrix products as executed, each at the rate of its spikes; "free" counts no
    product without weights, be it of an attention or of masks.
    `first_layer`: what the layer that reads the image costs, if it is not fed by spikes: a key of FIRST_LAYER.
    `classifier`: what the last layer costs, if it is linear and not fed by spikes (it reads an average of them): "mac",
    or "ac" at rate 1.
    Everywhere: a layer fed by spikes is MACs x mean count of its input additions in every time step; a later layer fed
    by real numbers is MACs, and so is every layer of a network without neurons; attentions of other kinds (VSA, SDDA,
    cross attention) and the products that make masks are products as executed; batch norms are folded, and neurons,
    biases, pooling, interpolation and shortcuts are free.
    """

    name: str
    source: str
    merged: tuple[str, ...] = ("rep_conv", "sep_conv")
    inner: Literal["mac", "ac"] = "mac"
    attention: Literal["table6", "products", "free"] = "table6"
    first_layer: Literal["mac", "mac_once", "ac", "free"] = "mac"
    classifier: Literal["mac", "ac"] = "mac"
    mac_pj: float = MAC_PJ
    ac_pj: float = AC_PJ

    def __post_init__(self) -> None:
        for field, known in (
            ("inner", ("mac", "ac")),
            ("attention", tuple(ATTENTION)),
            ("first_layer", tuple(FIRST_LAYER)),
            ("classifier", ("mac", "ac")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {getattr(self, field)!r}")

    def describe(self) -> str:
        """The convention in a few plain lines."""
        shapes = {
            "rep_conv": "RepConv (1x1, depthwise 3x3, 1x1)",
            "sep_conv": "depthwise + last pointwise convolution of SepConv",
        }
        inner = "multiply-accumulates" if self.inner == "mac" else "additions at the rate of the spikes before them"
        lines = [f"Convention {self.name}: {self.source}."]
        for kind, shape in shapes.items():
            how = "one dense convolution" if kind in self.merged else f"as executed; its un-spiked parts: {inner}"
            lines.append(f"  {shape}: {how}.")
        lines += [
            f"  Attention: {ATTENTION[self.attention]}.",
            f"  Layer that reads the image: {FIRST_LAYER[self.first_layer]}.",
            "  Layer fed by spikes: MACs x mean count x time steps additions; fed by real numbers: MACs x time steps.",
            f"  {self.mac_pj:g} pJ a multiply-accumulate, {self.ac_pj:g} pJ an addition; batch norms fold; rest free.",
        ]
        if self.classifier == "ac":
            lines.insert(-2, "  Classifier that reads an average of spikes: additions at rate 1.")
        return "\n".join(lines)

    def charge(self, operations: Iterable[Operation], *, spiking: bool = True) -> list["Charge"]:
        """What this convention counts of `operations`, given in order of execution.

        `spiking` False says that the network has no neuron: `first_layer` and `classifier` then except nothing.
        """
        operations, charges = list(operations), []
        for index, operation in enumerate(operations):
            real = self._exception(operation, index, len(operations)) if spiking else "mac"
            whole = self.attention == "table6" if operation.kind == "attention" else operation.kind in self.merged
            share = 0 if self.attention == "free" and operation.kind in PRODUCTS else 1
            if whole or not operation.parts:
                charges.append(self._one(operation, counted=share * operation.dense_macs, real=real))
                continue
            for place, part in enumerate(operation.parts):
                rates = operation.rates if self.inner == "ac" and part.rates is None else part.rates
                # The dense form belongs to the parts together: kept on the first one, columns add up.
                part = Operation(
                    part.name, part.kind, part.macs, 0 if place else operation.dense_macs, rates, part.steps
                )
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
    multiply-accumulates and `sops` additions (a number, or one for each image [B]) over all steps."""

    operation: Operation
    counted: float
    mac_operations: float
    sops: float | Tensor
    convention: Convention

    @property
    def mj(self) -> float | Tensor:
        """Millijoules of an image: a number, or one for each image [B]."""
        return 1e-9 * (self.mac_operations * self.convention.mac_pj + self.sops * self.convention.ac_pj)

    @property
    def ann_mj(self) -> float:
        """Millijoules if the counted MACs ran once, in real numbers."""
        return 1e-9 * (self.counted * self.convention.mac_pj)


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
            "spikformer_v2",
            "Spikformer V2, Table 2: Power = 0.9 pJ x OPs for its V1 and V2 alike; additions only",
            merged=(),
            inner="ac",
            attention="products",
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
            "spike2former",
            "Spike2Former, Table 1, by what its authors' tools see: layers alone, every factor charged as additions",
            merged=(),
            inner="ac",
            attention="free",
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

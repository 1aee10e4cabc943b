"""Shortcuts: where the neuron sits around a residual branch F, and so what the residual stream carries.

Paper: Meta-SpikeFormer, Sec. 3.3 and Fig. 4; Spikformer V2, Eqs. 4-5 (SEW, its ADD) and Table 6 (IAND).
MS: Hu et al., 2024. SEW and IAND: Fang et al., 2021. VS: Zheng et al., 2021.
A shortcut owns its neuron; a branch maps spikes to currents, so that any mixer can stand inside any shortcut.
"""

from collections.abc import Callable
from typing import ClassVar

from jaxtyping import Real
from torch import Tensor, nn

from spikeformers.neurons import NeuronBuilder, as_membrane

Branch = Callable[[Tensor], Tensor]


class MembraneShortcut(nn.Module):
    """MS: U' = U + F(SN(U)). The stream is a membrane potential; the identity for F = 0."""

    carries_spikes: ClassVar[bool] = False

    def __init__(self, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        self.neuron = neuron()

    def forward(self, u: Real[Tensor, "TB C H W"], branch: Branch) -> Real[Tensor, "TB C H W"]:
        u = as_membrane(u)  # under autocast the branch comes in bfloat16, the stream must not
        return u + branch(self.neuron(u))


class SpikeElementWiseShortcut(MembraneShortcut):
    """SEW: S' = S + SN(F(S)). The stream is integer spikes that grow with depth; the identity for F = 0."""

    carries_spikes: ClassVar[bool] = True

    def forward(self, s: Real[Tensor, "TB C H W"], branch: Branch) -> Real[Tensor, "TB C H W"]:
        return s + self.neuron(branch(s))


class VanillaShortcut(MembraneShortcut):
    """VS: S' = SN(F(S) + S). The stream is binary spikes; no identity for F = 0, since the neuron is not one."""

    carries_spikes: ClassVar[bool] = True

    def forward(self, s: Real[Tensor, "TB C H W"], branch: Branch) -> Real[Tensor, "TB C H W"]:
        return self.neuron(branch(s) + s)


class IAndShortcut(MembraneShortcut):
    """IAND: S' = (1 - SN(F(S))) * S, "not the branch, and the shortcut". Binary spikes stay binary.

    The identity for F = 0; where the branch fires it erases the shortcut.  Needs a binary neuron: with counts above 1
    the factor would be negative.  Raises ValueError for one that emits more than 0 and 1.
    """

    carries_spikes: ClassVar[bool] = True

    def __init__(self, *, neuron: NeuronBuilder) -> None:
        super().__init__(neuron=neuron)
        levels, unit = getattr(self.neuron, "levels", None), getattr(self.neuron, "unit", None)
        if (levels, unit) != (1, 1.0):
            raise ValueError(f"IAND needs binary spikes (a LIF, or an I-LIF with levels=1), got {self.neuron}")

    def forward(self, s: Real[Tensor, "TB C H W"], branch: Branch) -> Real[Tensor, "TB C H W"]:
        return (1 - self.neuron(branch(s))) * s


class ResidualShortcut(nn.Module):
    """x' = x + F(x): the shortcut of an ANN, without a neuron."""

    carries_spikes: ClassVar[bool] = True  # nothing has to fire between blocks, as in SEW

    def __init__(self, *, neuron: NeuronBuilder) -> None:
        super().__init__()

    def forward(self, x: Real[Tensor, "TB C H W"], branch: Branch) -> Real[Tensor, "TB C H W"]:
        return x + branch(x)


SHORTCUTS = {
    "ms": MembraneShortcut,
    "sew": SpikeElementWiseShortcut,
    "vs": VanillaShortcut,
    "iand": IAndShortcut,
    "residual": ResidualShortcut,
}

"""The attentions that SSA is measured against: vanilla self-attention, and attention maps of real numbers.

Paper: Spikformer V2, Eqs. 9-10, Table 1 and Table 6. Q and K stay real numbers; V is spikes unless said otherwise; the
neuron on the mixture and the projection are those of SSA, since the paper keeps "the remaining network structure".
Departures from the paper: none known; its code for these rows was not released.
"""

from collections.abc import Callable
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.attention.ssa import ScaledAttention, SpikeAttention
from spikeformers.neurons import NeuronBuilder


class IdentityMap(ScaledAttention):
    """A_I: the map is scale * Q K^T of real numbers, of either sign.  Source: Table 1."""

    activation: ClassVar[Callable[[], nn.Module]] = nn.Identity

    def operand(self, name: str, *, neuron: NeuronBuilder) -> nn.Module:
        return neuron() if name == "v" else self.activation()

    def mix(
        self, q: Float[Tensor, "TB M K N"], k: Float[Tensor, "TB M K N"], v: Float[Tensor, "TB M K N"]
    ) -> Float[Tensor, "TB M K N"]:
        return (v @ (k.mT @ q)) * self.scale  # the map first: it is what the table is about


class ReLUMap(IdentityMap):
    """A_ReLU: the map is scale * ReLU(Q) ReLU(K)^T.  Source: Table 1."""

    activation = nn.ReLU


class LeakyReLUMap(IdentityMap):
    """A_LeakyReLU: the map is scale * LeakyReLU(Q) LeakyReLU(K)^T.  Source: Table 1."""

    activation = nn.LeakyReLU


class VSA(SpikeAttention):
    """A_softmax: Softmax(Q K^T / sqrt(K)) V with real Q and K and spikes V.  Source: Eq. 10."""

    def operand(self, name: str, *, neuron: NeuronBuilder) -> nn.Module:
        return neuron() if name == "v" else nn.Identity()

    def mix(
        self, q: Float[Tensor, "TB M K N"], k: Float[Tensor, "TB M K N"], v: Float[Tensor, "TB M K N"]
    ) -> Float[Tensor, "TB M K N"]:
        return F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT


class VSAFloatV(VSA):
    """VSA whose V is real numbers too.  Source: Eq. 9, Table 6 (`VSA V_F`)."""

    def operand(self, name: str, *, neuron: NeuronBuilder) -> nn.Module:
        return nn.Identity()


class SoftmaxAttention(VSAFloatV):
    """Self-attention of an ordinary transformer, no neuron anywhere: the ANN twin's.  Source: Eq. 9."""

    def mixed_neuron(self, *, neuron: NeuronBuilder) -> nn.Module:
        return nn.Identity()

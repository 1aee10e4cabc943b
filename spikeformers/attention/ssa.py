"""SSA, spiking self-attention: products of spike maps without softmax; and what every attention of this folder shares.

Paper: Spikformer V2 (and V1), Eqs. 11-13. Every operator maps spikes to currents; the neuron behind the projection of
Eq. 13 belongs to the shortcut.
Departures from the paper: the neuron of Eq. 12 has threshold 1/2, which only the authors' code says. Tokens stay pixels
of a map, so the linear layers of Eq. 11 are 1x1 convolutions.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.layers.conv_bn import ConvBN
from spikeformers.layers.side_by_side import side_by_side
from spikeformers.neurons import NeuronBuilder

Projection = Callable[[int, int], nn.Module]
ATTENTION_THRESHOLD = 0.5
SCALE = 0.125  # fixed in the authors' code whatever the head width


def learnable(number: float) -> nn.Parameter:
    """A number that is learnt from there on, or from where `attention.balance` puts it."""
    return nn.Parameter(torch.tensor(number))


def spike_attention(
    q: Float[Tensor, "TB M K N"], k: Float[Tensor, "TB M K S"], v: Float[Tensor, "TB M K S"]
) -> Float[Tensor, "TB M K N"]:
    """Q (K^T V) of spike maps with tokens last, M heads of width K: for token n, sum_m (q_n . k_m) v_m.

    Counts multiply exactly, so (Q K^T) V is the same number; the cheaper order is chosen by N against K.
    Source: Spikformer V2, Eq. 12, and Meta-SpikeFormer, Eq. 15, without their neurons.
    """
    width, tokens = q.shape[-2:]
    return (v @ k.mT) @ q if tokens > width else v @ (k.mT @ q)


class SpikeAttention(nn.Module):
    """Q, K, V from projections of the input, one more neuron on their mixture, and its projection.

    [TB, C, H, W] -> [TB, C, H, W]. Subclasses say what stands on each operand (`operand`) and how they mix (`mix`).
    `fused`: training steps compute the projections as one layer; equal but for rounding.
    """

    quantize_role: ClassVar[str] = "attention"
    operands: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    default_qkv: ClassVar[Projection] = partial(ConvBN, kernel=1)
    default_proj: ClassVar[Projection] = partial(ConvBN, kernel=1, bias=True)

    def __init__(
        self,
        dim: int,
        *,
        neuron: NeuronBuilder,
        heads: int = 8,
        qkv: Projection | None = None,
        proj: Projection | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
        self.heads = heads
        self.fused = False
        for name in self.operands:
            self.add_module(f"{name}_conv", (qkv or self.default_qkv)(dim, dim))
            self.add_module(name, self.operand(name, neuron=neuron))
        self.attn = self.mixed_neuron(neuron=neuron)
        self.proj = (proj or self.default_proj)(dim, dim)

    def operand(self, name: str, *, neuron: NeuronBuilder) -> nn.Module:
        """What turns the current of operand `name` into what is multiplied: here a neuron, into spikes."""
        return neuron()

    def mixed_neuron(self, *, neuron: NeuronBuilder) -> nn.Module:
        """What turns mixed values into spikes."""
        return neuron(threshold=ATTENTION_THRESHOLD)

    def mix(
        self, q: Float[Tensor, "TB M K N"], k: Float[Tensor, "TB M K N"], v: Float[Tensor, "TB M K N"]
    ) -> Float[Tensor, "TB M K N"]:
        """Attention of M heads, before the neuron."""
        raise TypeError(f"{type(self).__name__} must define mix()")

    def forward(self, spikes: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        q, k, v = map(self.split, self.operands_of(spikes))
        return self.proj(self.attn(self.mix(q, k, v).reshape(spikes.shape)))

    def projections(self) -> list[nn.Module]:
        """The layer in front of each operand."""
        return [getattr(self, f"{name}_conv") for name in self.operands]

    def operands_of(self, spikes: Real[Tensor, "TB C H W"]) -> list[Real[Tensor, "TB C H W"]]:
        """Projections of the input, each behind what stands on its operand."""
        if self.fused and self.training:
            currents = side_by_side(self.projections(), spikes)
        else:
            currents = [projection(spikes) for projection in self.projections()]
        return [getattr(self, name)(current) for name, current in zip(self.operands, currents, strict=True)]

    def split(self, x: Float[Tensor, "TB C H W"]) -> Float[Tensor, "TB M K N"]:
        """Channels to heads (channel c = head * K + j), pixels to tokens."""
        return x.flatten(2).unflatten(1, (self.heads, -1))


class ScaledAttention(SpikeAttention):
    """Attention whose mixture is multiplied by `scale`; `started_at` makes of it the number itself, or a parameter."""

    default_scale: ClassVar[float] = SCALE
    started_at: ClassVar[Callable[[float], float | nn.Parameter]] = float

    def __init__(
        self,
        dim: int,
        *,
        neuron: NeuronBuilder,
        heads: int = 8,
        qkv: Projection | None = None,
        proj: Projection | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, neuron=neuron, heads=heads, qkv=qkv, proj=proj)
        self.scale = self.started_at(self.usual_scale(dim // heads) if scale is None else scale)

    def usual_scale(self, width: int) -> float:
        """The scale for heads of this width, if none is asked for."""
        return self.default_scale


class SSA(ScaledAttention):
    """SN(scale * Q K^T V) per head, then the projection; linear in N where N exceeds the head width.

    Source: Spikformer V2, Eqs. 11-13.
    """

    def mix(
        self, q: Float[Tensor, "TB M K N"], k: Float[Tensor, "TB M K N"], v: Float[Tensor, "TB M K N"]
    ) -> Float[Tensor, "TB M K N"]:
        return spike_attention(q, k, v) * self.scale


class LearnableScaleSSA(SSA):
    """SSA whose scale is one learnable number a layer.  Source: Spikformer V2, Sec. 5.3.2."""

    started_at = staticmethod(learnable)


class WidthScaledSSA(SSA):
    """SSA with scale K^(-1/2) for head width K and threshold 1, as everywhere in Spike2Former."""

    def usual_scale(self, width: int) -> float:
        return width**-0.5

    def mixed_neuron(self, *, neuron: NeuronBuilder) -> nn.Module:
        return neuron()


class LearnableWidthScaledSSA(WidthScaledSSA):
    """The same with a learnable scale, for training from random weights: `balance` finds where it starts."""

    started_at = staticmethod(learnable)

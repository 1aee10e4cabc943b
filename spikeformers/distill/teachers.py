"""What the attentions of a network multiply in one forward pass: of the student, of its ANN twin, of timm's CAFormer.

Paper: QSD-Transformer, Sec. 4.3; its figure of the scheme draws arrows from q, k, v behind the student's neurons to
those of "the same ANN Transformer", and Table 1 has CAFormer as the ANN.
Departures from the paper: none known; no code of the distillation was released. Spikes of T steps are averaged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from timm.models.metaformer import Attention, MetaFormer
from torch import Tensor, nn

from spikeformers.attention import SpikeAttention
from spikeformers.energy.firing import plain_name
from spikeformers.neurons import as_membrane, temporal_modules

OPERANDS = ("q", "k", "v")


@dataclass(frozen=True)
class AttentionOperands:
    """(q, k, v), each [B, M, K, N] with the tokens of `grid` (H, W) last, rows first. Layers of a `stage` share it."""

    name: str
    stage: str
    grid: tuple[int, int]
    qkv: tuple[Float[Tensor, "B M K N"], Float[Tensor, "B M K N"], Float[Tensor, "B M K N"]]


@runtime_checkable  # so that a checker of annotations can look
class Teacher(Protocol):
    """A frozen module that says what its attentions multiply, without gradients, in the order of depth."""

    def operands(self, images: Tensor) -> list[AttentionOperands]: ...


@contextmanager
def hear(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Inside this context the last output of every module stands under its key, in the order of the calls.

    Runs eagerly, also for a compiled model, whose graphs would skip the hooks without a word.
    Raises RuntimeError at the end if one of them did not run.
    """
    outputs: dict[str, Tensor] = {}

    def keep(key: str):
        def hook(module: nn.Module, _, output: Tensor) -> None:
            outputs[key] = output

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield outputs
    finally:
        for handle in handles:
            handle.remove()
    silent = [key for key in modules if key not in outputs]
    if silent:
        raise RuntimeError(f"{silent[0]} did not run: call this same model inside the context")


def attentions(network: nn.Module) -> dict[str, SpikeAttention]:
    """The attentions of `network` by plain name. Raises ValueError if it has none, or one without q, k or v."""
    found = {plain_name(name): each for name, each in network.named_modules() if isinstance(each, SpikeAttention)}
    if not found:
        raise ValueError(f"{type(network).__name__} has no attention of spikeformers.attention to distil from or into")
    for name, attention in found.items():
        if attention.operands != OPERANDS:
            raise ValueError(
                f"{name} is {type(attention).__name__}, which multiplies {' and '.join(attention.operands)} only; "
                "distillation compares q, k and v: choose an attention that has all three, such as sdsa3"
            )
    return found


@contextmanager
def listen(network: nn.Module) -> Iterator[list[AttentionOperands]]:
    """Inside this context call `network` once; at the end the list holds one entry for each attention, in order.

    Example: `with listen(network) as layers: network(images)`. Works under gradients and for a network inside wrappers.
    Spikes of T > 1 steps are averaged over them. Raises ValueError as `attentions`, RuntimeError if nothing ran.
    """
    found = attentions(network)
    layers: list[AttentionOperands] = []
    with hear({f"{name}.{each}": getattr(found[name], each) for name in found for each in OPERANDS}) as outputs:
        yield layers
    steps = next((module.steps for module in temporal_modules(network).values()), 1)
    for name in dict.fromkeys(key.rpartition(".")[0] for key in outputs):
        q, k, v = (as_membrane(outputs[f"{name}.{each}"]).unflatten(0, (steps, -1)).mean(0) for each in OPERANDS)
        split = found[name].split
        layers.append(
            AttentionOperands(name, name.rsplit(".", 2)[0], tuple(q.shape[-2:]), (split(q), split(k), split(v)))
        )


class Twin(nn.Module):
    """A network of this package as teacher: the ANN of the student's layout, or any other with attention."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        attentions(network)
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def operands(self, images: Tensor) -> list[AttentionOperands]:
        with listen(self.network) as layers:
            self.network(images)
        return layers


class Caformer(nn.Module):
    """A MetaFormer of timm whose later stages have attention (caformer_s18 and its like) as teacher."""

    def __init__(self, network: MetaFormer) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._attentions: dict[str, str] = {  # names of the attentions, and the stage of each
            name: ".".join(name.split(".")[:2])
            for name, module in network.named_modules()
            if isinstance(module, Attention)
        }
        if not self._attentions:
            raise ValueError("this MetaFormer has no attention to distil from: take a caformer, such as caformer_s18")

    @torch.no_grad()
    def operands(self, images: Tensor) -> list[AttentionOperands]:
        modules = {name: self.network.get_submodule(f"{name}.qkv") for name in self._attentions}
        # Attention gets tokens [B, N, C] without their grid; the stage's down-sampling is the last to know it.
        for stage in dict.fromkeys(self._attentions.values()):
            modules[stage] = self.network.get_submodule(f"{stage}.downsample")
        with hear(modules) as outputs:
            self.network(images)
        layers = []
        for name, stage in self._attentions.items():
            heads = self.network.get_submodule(name).num_heads
            qkv = outputs[name].mT.unflatten(1, (3, heads, -1)).unbind(1)
            layers.append(AttentionOperands(name, stage, tuple(outputs[stage].shape[-2:]), qkv))
        return layers


def teacher_of(network: nn.Module) -> Teacher:
    """`network` as a teacher: one of this package or a MetaFormer of timm, which is frozen in place, in eval mode.

    A module with a method `operands` is a teacher already.  Raises ValueError if no attention can be heard.
    """
    if callable(getattr(network, "operands", None)):
        return network
    return Caformer(network) if isinstance(network, MetaFormer) else Twin(network)

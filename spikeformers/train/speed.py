"""How a training step is computed, not what it computes: the switches of `recipe.speed` that rearrange a network.

Each gives the numbers of the network as it was, but for rounding; what they gain: docs/guides/speed.md.
"""

import torch
from torch import Tensor, nn

from spikeformers.attention import SpikeAttention
from spikeformers.data.detection import DetectionData
from spikeformers.data.segmentation import SegmentationData
from spikeformers.layers import fuse_norms, separate_norms
from spikeformers.layers.side_by_side import can_be_one_layer
from spikeformers.train.recipe import Recipe, Speed
from spikeformers.train.recompute import recompute, undo_recompute


def check(recipe: Recipe, *, sharded: bool) -> None:
    """Raises ValueError for switches that the recipe's task, another switch or FSDP (`sharded`) rules out."""
    speed, dense = recipe.speed, isinstance(recipe.data, SegmentationData | DetectionData)
    inside = ("fused_qkv", "fused_norms", "recompute")  # these change how a layer runs
    rules = (
        (("compile",), "recompute", speed.recompute, "the compiler decides by itself what it computes again"),
        (("compile",), "fused_norms", speed.fused_norms, "the compiler fuses norms by itself"),
        (("compile",), "segmentation or detection", dense, "their heads are no single graph"),
        (("compile",), "fgd.teacher", bool(recipe.fgd.teacher), "it listens to the network by hooks"),
        (("compile",), "FSDP", sharded, "it gathers weights by hooks"),
        (("fused_qkv",), "fused_norms", speed.fused_norms, "of q, k and v they would take the same norms"),
        (inside[:2], "sync_bn", recipe.sync_bn, "synchronised norms run by themselves"),
        (inside, "quantize.exact_integer", recipe.quantize.exact_integer, "its norms round by running statistics"),
        (
            (*inside, "compile"),
            "pretrain.mask_ratio",
            bool(recipe.pretrain.mask_ratio),
            "hooks hide patches from layers",
        ),
    )
    for names, other, there, why in rules:
        for name in names:
            if getattr(speed, name) and there:
                raise ValueError(f"speed.{name}=true does not go with {other}: {why}; set speed.{name}=false")


def apply_speed(network: nn.Module, speed: Speed, images: Tensor, *, accumulate: int = 1) -> list[str]:
    """Let training steps of `network` run as `speed` says, in place; returns lines on how far that goes.

    `images` [B, C, H, W] are an example; `accumulate`: backward passes in one step. Names, parameters and what the
    network computes stay.  Raises ValueError for what the network has no use for.
    """
    notes, name = [], type(network).__name__
    if speed.fused_qkv:
        attentions = [module for module in network.modules() if isinstance(module, SpikeAttention)]
        fitting = [each for each in attentions if can_be_one_layer(each.projections())]
        if not fitting:
            raise ValueError(
                f"no attention of {name} has projections that can be one layer, of plain convolutions and batch norms: "
                "set speed.fused_qkv=false"
            )
        for attention in fitting:
            attention.fused = True
        notes.append(f"speed.fused_qkv: {len(fitting)} of {len(attentions)} attentions")
    if speed.fused_norms:
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        if not (found := fuse_norms(network, images)):
            raise ValueError(f"no batch norm of {name} is read by neurons alone: set speed.fused_norms=false")
        notes.append(f"speed.fused_norms: {len(found)} of {norms} batch norms")
    if speed.recompute:
        recompute(network)
    if speed.compile:
        notes.append("speed.compile: the second step waits for the compiler, which takes minutes")
        # CUDA graphs write gradients to the same place each time: no place for those of two backward passes.
        graphs = images.is_cuda and accumulate == 1
        network.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else "default")
    return notes


def undo_speed(network: nn.Module) -> nn.Module:
    """Undo `apply_speed`, in place, for what reads a network layer by layer (energy, export); returns `network`."""
    for module in network.modules():
        if isinstance(module, SpikeAttention):
            module.fused = False
    vars(network).pop("_compiled_call_impl", None)  # what nn.Module.compile left
    return undo_recompute(separate_norms(network))


def force_eager() -> torch.compiler.set_stance:
    """A context in which compiled networks run as they were written: for hooks, and for batches of any size."""
    return torch.compiler.set_stance("force_eager")

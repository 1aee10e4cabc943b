"""Spikformer V1 checkpoints of the authors, in their three layouts (ImageNet, CIFAR, CIFAR10-DVS): their keys to ours.

Source: ZK-Zhou/spikformer, imagenet/, cifar10/ and cifar10dvs/model.py (names only). Layers on tokens are linear or 1-D
convolutions there and 1x1 convolutions here: the same weights with axes of length 1. There is no checkpoint of V2.
"""

import re

from torch import Tensor

from spikeformers.backbones.spikformer import SIZES

STEM = {
    **{f"proj_conv{number}": f"stem.blocks.{index}.conv.conv" for index, number in enumerate(("", "1", "2", "3"))},
    **{f"proj_bn{number}": f"stem.blocks.{index}.conv.bn" for index, number in enumerate(("", "1", "2", "3"))},
    # Names of the first commit.
    **{f"block{index + 1}_conv": f"stem.blocks.{index}.conv.conv" for index in range(4)},
    **{f"block{index + 1}_bn": f"stem.blocks.{index}.conv.bn" for index in range(4)},
    "rpe_conv": "stem.rpe.conv",
    "rpe_bn": "stem.rpe.bn",
}
LAYERS = {
    f"{theirs}_{part}": f"{ours}.{name}"
    for theirs, ours in {
        **{f"attn.{operand}": f"attn.{operand}_conv" for operand in ("q", "k", "v")},
        "attn.proj": "attn.proj",
        "mlp.fc1": "mlp.conv1",
        "mlp.fc2": "mlp.conv2",
    }.items()
    for part, name in (("linear", "conv"), ("conv", "conv"), ("bn", "bn"))
}
TENSOR = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
IN_STEM = re.compile(rf"patch_embed\.({'|'.join(STEM)})\.{TENSOR}")
IN_BLOCK = re.compile(rf"block\.(\d+)\.({'|'.join(map(re.escape, LAYERS))})\.{TENSOR}")
# Built by the authors' constructors and never used in a forward pass.
UNUSED = re.compile(r"block\.\d+\.norm[12]\.(weight|bias)|norm\.(weight|bias)|pos_embed")


def own_key(key: str) -> str | None:
    """Our name of the authors' `key`, or None if the network has no such tensor."""
    if key in ("head.weight", "head.bias"):
        return key
    if match := IN_STEM.fullmatch(key):
        return f"{STEM[match[1]]}.{match[2]}"
    if match := IN_BLOCK.fullmatch(key):
        return f"blocks.{match[1]}.{LAYERS[match[2]]}.{match[3]}"
    return None


def own_tensor(key: str, tensor: Tensor) -> Tensor:
    """`tensor` of the authors' `key` in our shape."""
    if key.startswith("block.") and key.endswith(".weight") and tensor.ndim in (2, 3):
        return tensor.reshape(*tensor.shape, *[1] * (4 - tensor.ndim))
    return tensor


def describe_widths(weights: dict[str, Tensor]) -> str:
    """Which size and layout `weights` (our keys) look like, for the message when they do not fit."""
    try:
        dim = weights["stem.rpe.conv.weight"].shape[0]
        in_channels = weights["stem.blocks.0.conv.conv.weight"].shape[1]
    except KeyError:
        return "another architecture"
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    tokens = "linear" if "blocks.0.attn.q_conv.conv.bias" in weights else "conv"
    found = {"dim": dim, "depth": depth, "in_channels": in_channels, "tokens": tokens}
    sizes = ", ".join(f"{field}={value!r}" for field, value in found.items())
    for name, config in SIZES.items():
        if config.stem == "sps" and all(getattr(config, field) == value for field, value in found.items()):
            return f"{name} ({sizes})"
    return sizes

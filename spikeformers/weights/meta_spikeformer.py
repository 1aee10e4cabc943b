"""Meta-SpikeFormer checkpoints of the authors: their keys to ours.

Source: BICLab/Spike-Driven-Transformer-V2, classification/models.py (names only). Their MLPs are 1-D convolutions on
tokens, ours 1x1 on maps: the same weights with one more axis of length 1.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from spikeformers.backbones.meta_spikeformer import SIZES, MetaSpikeFormerConfig

STAGES = {
    "downsample1_1": "stage1a.down.conv",
    "downsample1_2": "stage1b.down.conv",
    "downsample2": "stage2.down.conv",
    "downsample3": "stage3.down.conv",
    "downsample4": "stage4.down.conv",
    "ConvBlock1_1.0": "stage1a.block0",
    "ConvBlock1_2.0": "stage1b.block0",
    "ConvBlock2_1.0": "stage2.block0",
    "ConvBlock2_2.0": "stage2.block1",
    **{f"block3.{i}": f"stage3.block{i}" for i in range(6)},
    **{f"block4.{i}": f"stage4.block{i}" for i in range(2)},
}
REP_CONV = {
    "0.body.0": "pw1",
    "0.body.1.bn": "bn1",
    "0.body.2.0": "dw",
    "0.body.2.1": "pw2",
    "0.body.2.2": "bn2",
    "1": "bn3",
}
LAYERS = {
    "encode_conv": "conv",
    "encode_bn": "bn",
    "Conv.pwconv1": "sep_conv.pw1.conv",
    "Conv.bn1": "sep_conv.pw1.bn",
    "Conv.dwconv": "sep_conv.dw",
    "Conv.pwconv2": "sep_conv.pw2.conv",
    "Conv.bn2": "sep_conv.pw2.bn",
    "conv1": "channel_conv.conv1.conv",
    "bn1": "channel_conv.conv1.bn",
    "conv2": "channel_conv.conv2.conv",
    "bn2": "channel_conv.conv2.bn",
    "mlp.fc1_conv": "mlp.conv1.conv",
    "mlp.fc1_bn": "mlp.conv1.bn",
    "mlp.fc2_conv": "mlp.conv2.conv",
    "mlp.fc2_bn": "mlp.conv2.bn",
    **{
        f"attn.{theirs}_conv.{part}": f"attn.{ours}.{name}"
        for theirs, ours in (("q", "q_conv"), ("k", "k_conv"), ("v", "v_conv"), ("proj", "proj"))
        for part, name in REP_CONV.items()
    },
}
# A stage, a layer in it, a tensor of the layer.
KEY = re.compile(
    rf"({'|'.join(map(re.escape, STAGES))})\."
    rf"({'|'.join(map(re.escape, sorted(LAYERS, key=len, reverse=True)))})\."
    r"(weight|bias|running_mean|running_var|num_batches_tracked)"
)
UNUSED = re.compile(r"(?!)")  # the authors' network uses all it builds


def own_key(key: str) -> str | None:
    """Our name of the authors' `key`, or None if the network has no such tensor."""
    if key in ("head.weight", "head.bias", "head_kd.weight", "head_kd.bias"):
        return key
    match = KEY.fullmatch(key)
    if match is None:
        return None
    stage, layer, tensor = match.groups()
    return f"{STAGES[stage]}.{LAYERS[layer]}.{tensor}"


def own_tensor(key: str, tensor: Tensor) -> Tensor:
    """`tensor` of the authors' `key` in our shape."""
    return tensor.unsqueeze(-1) if key.endswith("_conv.weight") and tensor.ndim == 3 else tensor


def describe_widths(weights: dict[str, Tensor], *, sizes: Mapping[str, MetaSpikeFormerConfig] = SIZES) -> str:
    """Which size `weights` (our keys) look like, for the message when they do not fit."""
    try:
        dims = tuple(weights[f"stage{stage}.down.conv.conv.weight"].shape[0] for stage in ("1b", "2", "3", "4"))
    except KeyError:
        return "another architecture"
    for name, config in sizes.items():
        if config.dims == dims:
            return f"{name} (dims={dims})"
    return f"dims={dims}"

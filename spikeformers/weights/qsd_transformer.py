"""QSD-Transformer checkpoints of the authors: their keys to ours.

Source: bollossom/QSD-Transformer, classification/models.py and quan_w.py (names only). Weights are called as in
Meta-SpikeFormer's files; a step size for each output channel and the scales of branches come on top.
"""

import re

from torch import Tensor

from spikeformers.backbones.qsd_transformer import SIZES
from spikeformers.weights import meta_spikeformer
from spikeformers.weights.meta_spikeformer import STAGES, own_tensor

__all__ = ["BITS", "UNUSED", "describe_widths", "own_key", "own_tensor", "unset_steps"]

SCALES = {"layer_scale1": "attn_scale", "layer_scale2": "mlp_scale"}
STEP, FLAG = "alpha", "init_state"
BITS = 4  # of every released file
# Flags, and a quantiser of inputs that returns its input.
UNUSED = re.compile(rf".+\.({FLAG}|act\.({STEP}|zero_point|{FLAG}|signed))")


def own_key(key: str) -> str | None:
    """Our name of the authors' `key`, or None if the network has no such tensor."""
    layer, _, tensor = key.rpartition(".")
    if tensor in SCALES and layer in STAGES:
        return f"{STAGES[layer]}.{SCALES[tensor]}"
    if tensor == STEP:
        weight = meta_spikeformer.own_key(f"{layer}.weight")
        return None if weight is None else f"{weight.removesuffix('weight')}{STEP}"
    return meta_spikeformer.own_key(key)


def unset_steps(state_dict: dict[str, Tensor]) -> list[str]:
    """The authors' keys of step sizes whose flag is 0: their first training pass has not come, they are bare memory."""
    flags = {key: tensor for key, tensor in state_dict.items() if key.endswith(f".{FLAG}") and ".act." not in key}
    return [f"{key.removesuffix(FLAG)}{STEP}" for key, flag in flags.items() if not flag.any()]


def describe_widths(weights: dict[str, Tensor]) -> str:
    """Which size `weights` (our keys) look like, for the message when they do not fit."""
    return meta_spikeformer.describe_widths(weights, sizes=SIZES)

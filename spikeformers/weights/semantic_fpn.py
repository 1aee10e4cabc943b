"""Semantic FPN's neck and decode head in checkpoints of mmsegmentation, in their two forms: their keys to ours.

Sources (names only): the LIF form, FPN_SNN and FPNHead_SNN of BICLab/Spike2Former, as Meta-SpikeFormer was segmented
with; the integer form, QFPN and QFPNHead of bollossom/QSD-Transformer and BICLab/Spike-Driven-Transformer-V3.
"""

import re

from torch import Tensor

TENSOR = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
NECK = {"lateral": "lateral", "fpn": "output"}
LIF_NECK = re.compile(rf"neck\.(lateral|fpn)_convs\.(\d)\.1\.0\.conv\.{TENSOR}")
LIF_BRANCH = re.compile(rf"decode_head\.scale_heads\.(\d)\.(\d)\.1\.0\.(conv|bn)\.{TENSOR}")
INTEGER_NECK = re.compile(rf"neck\.(lateral|fpn)_convs\.(\d)\.([01])\.{TENSOR}")
INTEGER_BRANCH = re.compile(rf"decode_head\.scale_heads\.(\d)\.([024])\.([12])\.{TENSOR}")  # up-samplings in between
CLASSIFIER = re.compile(r"decode_head\.conv_seg\.(weight|bias)")
UNUSED = re.compile(r"(?!)")  # the authors' network uses all it builds
UNTOLD: dict[str, str] = {}
"""Options that no tensor shows and a checkpoint must come with: none, each form has one neuron in paper and code."""
LAYOUT = (
    "the neck and decode_head of Semantic FPN in the LIF form (neck.lateral_convs.0.1.0.conv) and in the integer form "
    "(neck.lateral_convs.0.0)"
)


def own_key(key: str) -> str | None:
    """Our name of the authors' `key`, or None if neck and head have no such tensor."""
    if match := LIF_NECK.fullmatch(key):
        return f"head.neck.{NECK[match[1]]}.{match[2]}.conv.{match[3]}"
    if match := INTEGER_NECK.fullmatch(key):
        return f"head.neck.{NECK[match[1]]}.{match[2]}.conv.{('conv', 'bn')[int(match[3])]}.{match[4]}"
    if match := LIF_BRANCH.fullmatch(key):
        return f"head.classifier.branches.{match[1]}.{match[2]}.conv.{match[3]}.{match[4]}"
    if match := INTEGER_BRANCH.fullmatch(key):
        layer, part = int(match[2]) // 2, ("conv", "bn")[int(match[3]) - 1]
        return f"head.classifier.branches.{match[1]}.{layer}.conv.{part}.{match[4]}"
    if match := CLASSIFIER.fullmatch(key):
        return f"head.classifier.classify.{match[1]}"
    return None


def own_tensor(key: str, tensor: Tensor) -> Tensor:
    """`tensor` of the authors' `key`, which has our shape."""
    return tensor


def describe_sizes(weights: dict[str, Tensor]) -> str:
    """Which options `weights` (our keys) were built with, for the message when they do not fit; "" of another head."""
    found = {
        "neck_dim": "head.neck.output.0.conv.weight",
        "fpn_dim": "head.classifier.branches.0.0.conv.conv.weight",
        "num_classes": "head.classifier.classify.weight",
    }
    neck = "plain" if found["neck_dim"] in weights else "batch_norm"
    if neck == "batch_norm":
        found["neck_dim"] = "head.neck.output.0.conv.conv.weight"
    sizes = {name: weights[key].shape[0] for name, key in found.items() if key in weights}
    if not sizes:
        return ""
    return ", ".join([f"neck={neck!r}", *(f"{name}={size}" for name, size in sizes.items())])

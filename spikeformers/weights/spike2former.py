"""Spike2Former's decode head in checkpoints of mmsegmentation: its keys to ours.

Source: BICLab/Spike2Former, Segmentation/mmdet/models (names only). Linear layers and 1-D convolutions there are 1x1
convolutions here: the same weights with axes of length 1. The backbone's keys are Meta-SpikeFormer's.
"""

import re

from torch import Tensor

# `#` is the number of a layer or level.
ENCODER, OUR_ENCODER = "pixel_decoder.encoder.layers.#", "pixel_decoder.encoders.0.layer#"
DECODER, OUR_DECODER = "transformer_decoder.layers.#", "decoder.layers.#"
ESC = {"pwconv1": "pw1", "dwconv": "dw", "pwconv2": "pw2"}
PAIRS = {  # a convolution and its norm
    "pixel_decoder.encoder_in_proj": "pixel_decoder.input_proj.conv",
    "pixel_decoder.encoder_out_proj": "pixel_decoder.output_proj.conv",
    "pixel_decoder.lateral_convs.#": "pixel_decoder.top_down.#.lateral.conv",
    "pixel_decoder.output_convs.#": "pixel_decoder.top_down.#.output",
    **{f"{ENCODER}.Conv.{theirs}": f"{OUR_ENCODER}.esc.{ours}" for theirs, ours in ESC.items()},
    **{
        f"{ENCODER}.dcn.{side}_proj.{theirs}": f"{OUR_ENCODER}.attn.{side}_proj.{ours}"
        for side in ("input", "output")
        for theirs, ours in ESC.items()
    },
    f"{ENCODER}.dcn.dw_conv": f"{OUR_ENCODER}.attn.query.dw",
    f"{ENCODER}.dcn.offset": f"{OUR_ENCODER}.attn.offset_conv",
    f"{ENCODER}.dcn.mask": f"{OUR_ENCODER}.attn.attn_conv",
    **{
        f"{DECODER}.{kind}_attn.attn.{theirs}": f"{OUR_DECODER}.{kind}_attn.{ours}"
        for kind in ("cross", "self")
        for theirs, ours in {"q_conv": "q.conv", "k_conv": "k.conv", "v_conv": "v.conv", "out_conv": "proj"}.items()
    },
    "shortcut_conv": "embedding.shortcut.conv",
}
LAYERS = {
    **{f"{theirs}.0": f"{ours}.conv" for theirs, ours in PAIRS.items()},
    **{f"{theirs}.1": f"{ours}.bn" for theirs, ours in PAIRS.items()},
    **{
        f"{ENCODER}.ffn.fc{number}_{part}": f"{OUR_ENCODER}.mlp.mlp.conv{number}.{part}"
        for number in (1, 2)
        for part in ("conv", "bn")
    },
    **{f"{DECODER}.ffn.fc{number}": f"{OUR_DECODER}.ffn.conv{number}.conv" for number in (1, 2)},
    **{f"{DECODER}.ffn.bn{number}": f"{OUR_DECODER}.ffn.conv{number}.bn" for number in (1, 2)},
    "pixel_decoder.mask_feature": "pixel_decoder.embedding",
    "cls_embed": "embedding.classifier",
    "mask_embed.fc1": "embedding.mask_mlp.conv1",
    "mask_embed.fc2": "embedding.mask_mlp.conv2",
    "mask_embed.fc_out": "embedding.mask_mlp.conv3",
}
PARAMETERS = {
    "w": "embedding.shortcut.weight",
    "query_feat.weight": "decoder.query_features",
    "query_embed.weight": "decoder.query_positions",
    "level_embed.weight": "decoder.level_embeddings",
    f"{ENCODER}.gamma1": f"{OUR_ENCODER}.esc_scale",
    f"{ENCODER}.gamma2": f"{OUR_ENCODER}.attn_scale",
    f"{ENCODER}.gamma3": f"{OUR_ENCODER}.mlp_scale",
}
NUMBER = re.compile(r"(?<=[rv]s\.)\d+")  # in lists: layers, lateral_convs, output_convs
UNUSED = re.compile(r"(?!)")  # the authors' network uses all it builds
UNTOLD = {
    "levels": "D of the neurons, 4 in most results of the paper, 8 in the authors' code as first published",
    "alpha": "what spikes of the mask embedding are multiplied by, 4.0 in the authors' code",
    "layout": "released for whatever the authors' code has trained, fixed for a network without its slips",
}
"""Options that decide what the weights compute and that no tensor shows, and what they are in paper and code."""
LAYOUT = "the decode_head of Spike2Former with its deformable pixel decoder"


def own_key(key: str) -> str | None:
    """Our name of the authors' `key`, or None if the head has no such tensor."""
    if not key.startswith("decode_head."):
        return None
    name = key.removeprefix("decode_head.")
    found = NUMBER.search(name)
    pattern = NUMBER.sub("#", name, count=1)
    layer, _, tensor = pattern.rpartition(".")
    if pattern in PARAMETERS:
        ours = PARAMETERS[pattern]
    elif layer in LAYERS:
        ours = f"{LAYERS[layer]}.{tensor}"
    else:
        return None
    return f"head.{ours.replace('#', found[0]) if found else ours}"


def own_tensor(key: str, tensor: Tensor) -> Tensor:
    """`tensor` of the authors' `key` in our shape."""
    is_layer = key.endswith(".weight") and key.removeprefix("decode_head.") not in PARAMETERS
    if is_layer and tensor.ndim in (2, 3):
        return tensor.reshape(*tensor.shape, *[1] * (4 - tensor.ndim))
    return tensor


def describe_sizes(weights: dict[str, Tensor]) -> str:
    """Which options `weights` (our keys) were built with, for the message when they do not fit; "" of another head."""
    found = {
        "dim": ("head.decoder.query_features", 1, 0),
        "queries": ("head.decoder.query_features", 0, 0),
        "encoder_hidden": ("head.pixel_decoder.encoders.0.layer0.mlp.mlp.conv1.conv.weight", 0, 0),
        "decoder_hidden": ("head.decoder.layers.0.ffn.conv1.conv.weight", 0, 0),
        "num_classes": ("head.embedding.classifier.weight", 0, 1),  # one output is for no object
    }
    sizes = {name: weights[key].shape[axis] - less for name, (key, axis, less) in found.items() if key in weights}
    return ", ".join(f"{name}={size}" for name, size in sizes.items())

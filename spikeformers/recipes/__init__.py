"""Recipes by name; each is a function that returns a `Recipe`, in a file named after its paper."""

import difflib
from collections.abc import Callable
from functools import partial

from spikeformers.recipes import (
    bccd,
    camvid,
    events,
    meta_spikeformer,
    pennfudan,
    qsd_transformer,
    quick,
    spike2former,
    spikformer,
)
from spikeformers.train.recipe import Recipe

RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": quick.digits,
    "cifar10_small": quick.cifar10_small,
    "digits_dvs": events.digits_dvs,
    "nmnist_small": events.nmnist_small,
    "digits_mae": quick.digits_mae,
    "digits_finetune": quick.digits_finetune,
    "spikformer_cifar10_small": spikformer.cifar10_small,
    "spikformer_v2_cifar10_mae": spikformer.v2_cifar10_mae,
    "spikformer_v2_cifar10_finetune": spikformer.v2_cifar10_finetune,
    "qsd_transformer_cifar10_small": qsd_transformer.cifar10_small,
    "qsd_transformer_cifar10_small_ann": qsd_transformer.cifar10_small_ann,
    "camvid_smoke": camvid.smoke,
    "camvid_fpn_small": camvid.fpn_small,
    "camvid_spike2former_small": camvid.spike2former_small,
    "camvid_backbone": camvid.backbone,
    "camvid_fpn": camvid.fpn_gpu,
    "camvid_spike2former": camvid.spike2former_gpu,
    "bccd_yolo_small": bccd.yolo_small,
    "pennfudan_mask_rcnn_small": pennfudan.mask_rcnn_small,
    "spike2former_ade20k": spike2former.ade20k,
    "spike2former_cityscapes": spike2former.cityscapes,
    "spike2former_voc": spike2former.voc,
    "spike2former_voc_aug": spike2former.voc_aug,
    "spikformer_dvs_2_256_cifar10_dvs": spikformer.cifar10_dvs,
    "spikformer_dvs_2_256_dvs128_gesture": spikformer.dvs128_gesture,
    "meta_spikeformer_15m_har_dvs": meta_spikeformer.har_dvs,
    "meta_spikeformer_15m_imagenet": meta_spikeformer.imagenet_15m,
    "meta_spikeformer_31m_imagenet": meta_spikeformer.imagenet_31m,
    "meta_spikeformer_55m_imagenet": meta_spikeformer.imagenet_55m,
    "meta_spikeformer_15m_imagenet_t4": meta_spikeformer.imagenet_15m_t4,
    "meta_spikeformer_31m_imagenet_t4": meta_spikeformer.imagenet_31m_t4,
    "meta_spikeformer_55m_imagenet_t4": meta_spikeformer.imagenet_55m_t4,
    "meta_spikeformer_15m_imagenet_t4_distilled": meta_spikeformer.imagenet_15m_t4_distilled,
    "meta_spikeformer_31m_imagenet_t4_distilled": meta_spikeformer.imagenet_31m_t4_distilled,
    "meta_spikeformer_55m_imagenet_t4_distilled": meta_spikeformer.imagenet_55m_t4_distilled,
}
for _size in ("t", "m", "l"):
    RECIPES[f"qsd_transformer_{_size}_cifar10_dvs"] = partial(qsd_transformer.cifar10_dvs, _size)
    RECIPES[f"qsd_transformer_{_size}_imagenet"] = partial(qsd_transformer.imagenet, _size)
    RECIPES[f"qsd_transformer_{_size}_imagenet_ann"] = partial(qsd_transformer.imagenet_ann, _size)
    for _classes in (10, 100):
        RECIPES[f"qsd_transformer_{_size}_cifar{_classes}"] = partial(qsd_transformer.transfer, _size, _classes)
for _size in ("15m", "55m"):
    for _data, _fpn in (
        ("ade20k", meta_spikeformer.fpn_ade20k),
        ("voc", meta_spikeformer.fpn_voc),
        ("voc_aug", meta_spikeformer.fpn_voc_aug),
    ):
        RECIPES[f"meta_spikeformer_{_size}_fpn_{_data}"] = partial(_fpn, _size)
        RECIPES[f"meta_spikeformer_{_size}_fpn_{_data}_t4"] = partial(meta_spikeformer.fpn_t4, _size, _data)
    RECIPES[f"meta_spikeformer_{_size}_mask_rcnn_coco"] = partial(meta_spikeformer.mask_rcnn, _size)
RECIPES["meta_spikeformer_15m_yolo_coco"] = meta_spikeformer.yolo
for _size in ("t", "m"):
    RECIPES[f"qsd_transformer_{_size}_mask_rcnn_coco"] = partial(qsd_transformer.mask_rcnn, _size)
    RECIPES[f"qsd_transformer_{_size}_fpn_ade20k"] = partial(qsd_transformer.fpn_ade20k, _size)
RECIPES["spikformer_8_384_w4_imagenet"] = qsd_transformer.spikformer_imagenet
RECIPES["spikformer_8_384_w4_imagenet_ann"] = qsd_transformer.spikformer_imagenet_ann
for _size in ("8_384", "6_512", "8_512", "10_512", "8_768"):
    RECIPES[f"spikformer_{_size}_imagenet"] = partial(spikformer.v1_imagenet, _size)
for _size in ("4_256", "2_384", "4_384"):
    RECIPES[f"spikformer_{_size}_cifar10"] = partial(spikformer.cifar, _size, 10)
    RECIPES[f"spikformer_{_size}_cifar100"] = partial(spikformer.cifar, _size, 100)
for _classes in (10, 100):
    RECIPES[f"spikformer_4_384_cifar{_classes}_ann"] = partial(spikformer.cifar_ann, _classes)
for _size in ("8_384", "8_512", "12_512", "12_768", "16_768"):
    RECIPES[f"spikformer_v2_{_size}_imagenet"] = partial(spikformer.v2_imagenet, _size)
    RECIPES[f"spikformer_v2_{_size}_imagenet_t4"] = partial(spikformer.v2_imagenet_t4, _size)
# spikformer_8_512 is the paper's negative control: max-pooling stems gain nothing from pre-training.
for _name in ("spikformer_v2_12_512", "spikformer_v2_12_768", "spikformer_v2_16_768", "spikformer_8_512"):
    RECIPES[f"{_name}_imagenet_mae"] = partial(spikformer.imagenet_mae, _name)
    RECIPES[f"{_name}_imagenet_mae_finetune"] = partial(spikformer.imagenet_finetune, _name)
    RECIPES[f"{_name}_imagenet_mae_finetune_t4"] = partial(spikformer.imagenet_finetune_t4, _name)


def get(name: str) -> Recipe:
    """The recipe called `name`. Raises ValueError that lists the closest names if there is none."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"unknown recipe {name!r}; closest: {', '.join(close)}")
    return RECIPES[name]()

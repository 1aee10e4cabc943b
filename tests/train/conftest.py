"""A recipe that trains in a second: real digits at 16 pixels, the smallest Meta-SpikeFormer."""

import dataclasses
from collections.abc import Callable

import pytest

from spikeformers.data.augment import Augment
from spikeformers.data.detection import DetectionData
from spikeformers.data.detection_augment import DetectionAugment
from spikeformers.data.images import ImageData
from spikeformers.data.segmentation import SegmentationData
from spikeformers.data.segmentation_augment import SegmentationAugment
from spikeformers.train.recipe import ModelChoice, Optim, Recipe, Testing


@pytest.fixture
def tiny() -> Callable[..., Recipe]:
    """Call with fields of `Recipe` to change."""
    recipe = Recipe(
        name="tiny",
        data=ImageData(
            source="digits",
            size=16,
            in_channels=1,
            train_limit=32,
            test_limit=12,
            augment=Augment(shift=0.1, rotate=10.0),
        ),
        model=ModelChoice(
            neuron="i_lif", dims=(8, 8, 8, 8), strides=(2, 2, 2, 2, 1), blocks=(1, 1, 1, 1, 1), options={"heads": 2}
        ),
        optim=Optim(lr=2e-3, warmup_epochs=0.5, clip_grad=1.0),
        epochs=2,
        batch_size=8,
        testing=Testing(energy_images=4),
        threads=1,
    )
    return lambda **changes: dataclasses.replace(recipe, **changes)


@pytest.fixture
def segmenting(tiny, painted) -> Callable[..., Recipe]:
    """The same backbone with Semantic FPN on the painted folder; call with fields of `Recipe` to change."""
    recipe = tiny(
        name="segmenting",
        data=SegmentationData(
            source="maskfolder", root=str(painted), size=(32, 32), augment=SegmentationAugment(flip=0.5)
        ),
        model=ModelChoice(
            name="meta_spikeformer_15m_fpn_ade20k",
            neuron="ni_lif",
            dims=(8, 8, 8, 8),
            strides=(2, 2, 2, 2, 1),
            blocks=(1, 1, 1, 1, 1),
            options={"heads": 2, "neck_dim": 8, "fpn_dim": 8},
        ),
        optim=Optim(lr=5e-3, schedule="poly", rates={"head": 2.0}, clip_grad=1.0),
        batch_size=2,
        testing=Testing(energy_images=2, integer_images=2),
    )
    return lambda **changes: dataclasses.replace(recipe, **changes)


@pytest.fixture
def detecting(tiny, coco_folder) -> Callable[..., Recipe]:
    """The same backbone with a small YOLO on the pictures of `coco_folder`; call with fields of `Recipe` to change."""
    recipe = tiny(
        name="detecting",
        data=DetectionData(root=str(coco_folder), size=(32, 32), augment=DetectionAugment(flip=0.5)),
        model=ModelChoice(
            name="meta_spikeformer_15m_yolo",
            neuron="i_lif",
            dims=(8, 8, 8, 8),
            blocks=(1, 0, 0, 1, 0),
            options={"heads": 2, "dim": 8, "anchors": (8.0,) * 6 + (12.0,) * 6 + (16.0,) * 6},
        ),
        optim=Optim(lr=5e-3, clip_grad=1.0),
        batch_size=2,
        testing=Testing(energy_images=2, integer_images=2),
    )
    return lambda **changes: dataclasses.replace(recipe, **changes)


@pytest.fixture
def with_masks(detecting) -> Callable[..., Recipe]:
    """The same with a small Mask R-CNN, which also draws masks."""
    options = {"heads": 2, "region_dim": 8, "fc_dim": 8, "norm": "batch_norm", "regions": 12, "samples": 8}
    model = dataclasses.replace(detecting().model, name="meta_spikeformer_15m_mask_rcnn", options=options)
    data = dataclasses.replace(detecting().data, masks=True)
    return lambda **changes: detecting(name="with_masks", data=data, model=model, **changes)

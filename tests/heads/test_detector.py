"""What detectors are taught is checked with the images and with the loss, before it is learnt."""

import dataclasses

import pytest
import torch

from spikeformers.backbones.meta_spikeformer import SIZES
from spikeformers.heads import Detector, DetectorConfig, MaskRCNNConfig, Target, YOLOConfig

BACKBONE = dataclasses.replace(SIZES["meta_spikeformer_15m"], dims=(8, 8, 8, 16), blocks=(1, 0, 0, 1, 0))
HEADS = {
    "yolo": YOLOConfig(dim=8),
    "mask_rcnn": MaskRCNNConfig(region_dim=8, fc_dim=8, mask_head="none", regions=8, samples=4),
}
IMAGES = torch.zeros(2, 3, 32, 32)


def detector(kind: str) -> Detector:
    return DetectorConfig(BACKBONE, HEADS[kind], num_classes=3, neuron="i_lif").build()


def target(*labels: int) -> Target:
    count = len(labels)
    return {
        "boxes": torch.tensor([[2.0, 3.0, 20.0, 24.0]]).repeat(count, 1),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "size": torch.tensor([32, 32]),
        "crowd": torch.zeros(count, dtype=torch.bool),
    }


def without(name: str) -> dict:
    return {key: part for key, part in target(0).items() if key != name}


GOOD = [target(0, 2), target()]
DAMAGED = [
    ([target(0)], "2 images came with 1 targets: give one for each image"),
    ([target(0), without("crowd")], "target 1 has no crowd: add what Target names"),
    ([target(0), target(0) | {"boxes": torch.zeros(2, 4)}], r"1 labels need boxes \(1, 4\) and crowd \(1,\)"),
    ([target(0) | {"boxes": torch.full((1, 4), torch.nan)}, target(0)], "target 0 has a box with a number that is not"),
    ([target(1, 3), target(0)], "target 0 has labels 1 to 3, .* 3 classes apart, from 0: map them, .*num_classes=4$"),
    ([target(0), target(-1, 1)], "target 1 has labels -1 to 1, .* 3 classes apart, from 0: map them$"),
]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("damaged", "said"), DAMAGED)
def test_targets_that_do_not_fit_are_refused_with_the_images_and_with_the_loss(kind, damaged, said):
    model = detector(kind)
    with pytest.raises(ValueError, match=said):
        model(IMAGES, damaged)
    with pytest.raises(ValueError, match=said):
        model.loss(model(IMAGES, GOOD), damaged)


def test_masks_of_another_size_than_the_images_are_refused():
    masks = {"masks": torch.zeros(1, 8, 8, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"masks of shape \(1, 8, 8\): 1 boxes .* \(32, 32\) need \(1, 32, 32\)"):
        detector("yolo")(IMAGES, [target(0) | masks, target(0)])


@pytest.mark.parametrize("kind", HEADS)
def test_what_fits_is_learnt(kind):
    model = detector(kind)
    assert all(part.isfinite() for part in model.loss(model(IMAGES, GOOD), GOOD).values())

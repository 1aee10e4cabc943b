"""Pictures and masks are resized, cropped, flipped and padded alike, by the papers' numbers; colours change alone."""

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d, pad

from spikeformers.data.segmentation_augment import (
    IGNORE,
    Frame,
    SegmentationAugment,
    SegmentationTransform,
    resize_labels,
    resize_picture,
)

PAPER = {"scale": (0.5, 2.0), "flip": 0.5, "cat_max_ratio": 0.75}


ORIGINAL = Frame()


def transform_of(size=(16, 16), frame=ORIGINAL, mean=(0.0,) * 3, std=(1.0,) * 3, **augment) -> SegmentationTransform:
    return SegmentationTransform(
        SegmentationAugment(**augment), size=size, frame=frame, interpolation="bilinear", mean=mean, std=std
    )


def blocks(seed: int = 0, *, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels 1 to 5 in blocks, 32 x 48, and a picture with red = 40 x label."""
    labels = np.random.RandomState(seed).randint(1, 6, (32 // side, 48 // side)).repeat(side, 0).repeat(side, 1)
    labels = torch.from_numpy(labels.astype(np.uint8))
    image = torch.zeros(3, 32, 48, dtype=torch.uint8)
    image[0] = 40 * labels
    return image, labels


def interior(labels: torch.Tensor) -> torch.Tensor:
    """Pixels all of whose 5 x 5 neighbours are there with their label: no resizing blends another into them."""
    values = pad(labels[None].float(), (2,) * 4, value=-1)
    largest, least = (max_pool2d(sign * values, 5, 1) for sign in (1, -1))
    return (largest == -least)[0]


@pytest.mark.parametrize(
    "augment",
    [PAPER, {"short_sides": (16, 24, 40), "max_side": 50, "flip": 0.5}, {"scale": (1.0, 3.0)}],
    ids=["scale", "short sides", "enlarged"],
)
def test_a_picture_that_encodes_its_mask_still_does_after_resizing_cropping_flipping_and_padding(augment):
    transform = transform_of((24, 24), **augment)
    checked = padded = 0
    for seed in range(40):
        image, labels = transform(*blocks(seed))
        assert (image.shape, labels.shape) == ((3, 24, 24), (24, 24))
        assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
        inside = interior(labels) & (labels != IGNORE)
        # One level of 255: resizing rounds, and blends equal neighbours into equal values.
        assert torch.allclose(image[0][inside] * 255, 40.0 * labels[inside], atol=1)
        checked, padded = checked + int(inside.sum()), padded + int((labels == IGNORE).sum())
        assert (image[:, labels == IGNORE] == 0).all()
    assert checked > 1000
    assert (padded > 0) == (augment != {"scale": (1.0, 3.0)})


def test_padding_is_the_mean_colour_below_and_to_the_right():
    image, labels = transform_of((40, 64), mean=(0.5,) * 3, std=(0.25,) * 3)(*blocks())
    assert (labels[32:] == IGNORE).all()
    assert (labels[:, 48:] == IGNORE).all()
    assert (labels[:32, :48] == blocks()[1]).all()
    assert (image[:, labels == IGNORE] == 0).all()
    assert torch.allclose(image[1, :32, :48], torch.tensor(-2.0))  # black: (0 - 0.5) / 0.25


def test_a_mask_takes_the_pixel_nearest_to_the_new_centre_and_stays_aligned_with_its_picture():
    columns = torch.arange(40, dtype=torch.uint8).expand(40, 40).contiguous()
    small = resize_labels(columns, (10, 10))
    assert small[0].tolist() == [4 * i + 2 for i in range(10)]  # the centres are 4 i + 1.5: one of the two nearest
    picture = resize_picture(columns[None], (10, 10), interpolation="bilinear")[0]
    assert (picture[:, 1:-1].int() - small[:, 1:-1].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("frame", "picture", "factor", "size"),
    [
        (Frame(512, 2048), (512, 683), 1.0, (512, 683)),
        (Frame(512, 2048), (1024, 1366), 1.0, (512, 683)),
        (Frame(512, 2048), (300, 3000), 1.0, (205, 2048)),  # the long side decides
        (Frame(512, 2048), (300, 3000), 0.5, (102, 1024)),  # both limits shrink with the factor
        (Frame(512), (100, 50), 1.0, (1024, 512)),
        (Frame(0, 60), (100, 50), 1.0, (60, 30)),
        (Frame(0, 60), (40, 50), 1.0, (40, 50)),
        (Frame(), (360, 480), 0.5, (180, 240)),
        (Frame(fixed=(12, 34)), (360, 480), 2.0, (24, 68)),
    ],
)
def test_the_sizes_that_pictures_take(frame, picture, factor, size):
    assert frame.size(*picture, factor=factor) == size


def test_scale_draws_between_its_ends_and_short_sides_draws_each_of_them():
    scaled = transform_of(scale=(0.5, 2.0))
    heights = [scaled._drawn_size(32, 48)[0] for _ in range(300)]
    # 32 x 0.5 to 32 x 2; each end misses by more than 2 of 48 with probability (1 - 2 / 48)^300 = 3e-6
    assert 16 <= min(heights) <= 18
    assert 62 <= max(heights) <= 64
    chosen = transform_of(short_sides=(16, 20, 64), max_side=60)
    assert {chosen._drawn_size(32, 48) for _ in range(60)} == {(16, 24), (20, 30), (40, 60)}


def test_a_crop_that_one_class_dominates_is_drawn_again():
    labels = torch.zeros(32, 64, dtype=torch.uint8)
    labels[:, 48:] = 1
    labels[:8] = IGNORE  # counts for nothing

    def mixed(**augment) -> int:
        transform = transform_of((32, 16), **augment)
        crops = [transform(torch.zeros(3, 32, 64, dtype=torch.uint8), labels)[1] for _ in range(100)]
        return sum(bool(0.25 < (crop == 1).sum() / (crop != IGNORE).sum() < 0.75) for crop in crops)

    # 7 of 49 places: 14 % of single draws, 79 % of ten; each bound lies five standard deviations off
    assert mixed() < 35
    assert mixed(cat_max_ratio=0.75) > 58


def test_a_picture_of_one_class_or_of_none_is_cropped_all_the_same():
    for label in (3, IGNORE):
        labels = torch.full((32, 48), label, dtype=torch.uint8)
        cropped = transform_of(cat_max_ratio=0.75)(torch.zeros(3, 32, 48, dtype=torch.uint8), labels)[1]
        assert (cropped == label).all()


def test_half_of_the_pictures_are_mirrored():
    image, labels = blocks()
    transform = transform_of((32, 48), flip=0.5)
    mirrored = [bool((transform(image, labels)[1] == labels.flip(-1)).all()) for _ in range(100)]
    assert 25 <= sum(mirrored) <= 75  # five standard deviations
    assert not any((transform_of((32, 48))(image, labels)[1] != labels).any() for _ in range(5))


def test_distortion_changes_colours_but_no_label_and_never_swaps_channels():
    image, labels = blocks()
    transform = transform_of((32, 48), distort=1.0, hue=0.0)
    plain = image.float() / 255
    changed = 0
    for _ in range(20):
        distorted, same = transform(image, labels)
        assert torch.equal(same, labels.long())
        assert (distorted[0] >= distorted[1]).all()  # red stays red
        changed += not torch.allclose(distorted, plain, atol=0.02)
    assert changed > 10


def test_brightness_is_changed_by_an_eighth_at_most():
    image, labels = torch.full((3, 8, 8), 100, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)
    transform = transform_of((8, 8), distort=1.0, contrast=0.0, saturation=0.0, hue=0.0)
    values = {int(transform(image, labels)[0][0, 0, 0] * 255 + 0.5) for _ in range(100)}
    assert min(values) >= 87  # 100 x (1 - 32 / 255), rounded down
    assert max(values) <= 113
    assert len(values) > 10


def test_what_is_held_is_no_larger_than_what_can_be_drawn():
    image, labels = blocks()
    for transform, size in (
        (transform_of(scale=(0.5, 2.0), frame=Frame(8)), (16, 24)),
        (transform_of(scale=(0.5, 2.0), frame=Frame(fixed=(8, 8))), (16, 16)),
        (transform_of(short_sides=(8, 20)), (20, 30)),
        (transform_of(short_sides=(8, 20), max_side=24), (16, 24)),
        (transform_of(short_sides=(8, 64)), (32, 48)),
        (transform_of(scale=(0.25, 0.5)), (32, 48)),
        (transform_of(scale=(0.25, 0.5), frame=Frame(max_side=24)), (32, 48)),  # else shrunk again, by factors of it
    ):
        held = transform.shrink(image, labels)
        assert (tuple(held[0].shape[1:]), tuple(held[1].shape)) == (size, size)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"augment.scale must be a smallest and a largest factor above 0, got \(0.0, 1.0\)"),
        ({"scale": (2.0, 1.0)}, "augment.scale must be a smallest"),
        ({"scale": (0.5, 2.0), "short_sides": (320,)}, r"short_sides=\(320,\) and augment.scale=\(0.5, 2.0\) are two"),
        ({"short_sides": (0,)}, r"augment.short_sides must be at least 1, got \(0,\)"),
        ({"max_side": 9}, "augment.max_side=9 limits augment.short_sides, which is empty: data.max_side limits"),
        ({"max_side": -1, "short_sides": (8,)}, "augment.max_side must be at least 0, got -1"),
        ({"flip": 1.5}, "augment.flip must lie between 0 and 1, got 1.5"),
        ({"cat_max_ratio": 0.0}, "augment.cat_max_ratio must lie above 0 and at most at 1, got 0.0"),
        ({"hue": 0.6}, "augment.hue must lie between 0 and 0.5, got 0.6"),
    ],
)
def test_an_impossible_augmentation_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SegmentationAugment(**wrong)

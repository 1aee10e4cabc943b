"""Pictures, boxes and masks stay aligned through every step; what a crop leaves too little of is dropped."""

import pytest
import torch

from spikeformers.data import DetectionAugment
from spikeformers.data.detection_augment import DetectionTransform, Finish, Window, padded, resized, sample_of


def painted(boxes: list[list[int]], *, size: tuple[int, int] = (24, 32), masks: bool = True) -> dict:
    """A sample with objects of red 60, 120, ..."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    found = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for index, (left, top, right, bottom) in enumerate(boxes):
        image[0, top:bottom, left:right] = 60 * (index + 1)
        found[index, top:bottom, left:right] = 1
    return sample_of(
        image,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        size=size,
        masks=found if masks else None,
        labels=torch.arange(len(boxes)),
        crowd=torch.zeros(len(boxes), dtype=torch.bool),
    )


BOXES = [[1, 2, 11, 10], [14, 3, 30, 20], [2, 13, 12, 23]]


@pytest.mark.parametrize("turning", [False, True])
def test_a_picture_is_made_to_fit_and_keeps_its_ratio(turning):
    window = Window((20, 40), turning=turning)
    assert window.fitted(100, 200) == (20, 40)
    assert window.fitted(100, 150) == (20, 30)
    assert window.fitted(100, 400) == (10, 40)
    assert window.fitted(50, 100, factor=0.5) == (10, 20)
    assert window.fitted(1, 4000) == (1, 40)
    assert window.around(200, 100) == ((40, 20) if turning else (20, 40))
    assert window.fitted(200, 100) == ((40, 20) if turning else (20, 10))
    assert window.fitted(1333, 800, factor=1.0) == ((33, 20) if turning else (20, 12))


def test_colours_boxes_and_masks_agree_after_every_drawn_transform():
    """Each box that is left holds its object's colour, which is the object's mask, up to one pixel of resizing."""
    transform = DetectionTransform(DetectionAugment(scale=(0.6, 2.5), flip=0.5), window=Window((24, 32)))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        sample = transform(painted(BOXES))
        image, size = sample["image"], sample["boxes"].canvas_size
        assert tuple(image.shape[-2:]) == tuple(sample["masks"].shape[-2:]) == tuple(size)
        assert size[0] <= 24
        assert size[1] <= 32
        assert len(sample["boxes"]) == len(sample["masks"]) == len(sample["labels"]) == len(sample["crowd"])
        for box, mask, label in zip(sample["boxes"], sample["masks"], sample["labels"].tolist(), strict=True):
            left, top, right, bottom = box.tolist()
            rows, columns = mask.nonzero().unbind(1)
            edges = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
            assert max(abs(a - b) for a, b in zip(edges, box.tolist(), strict=True)) <= 1
            middle = image[0, int((top + bottom) / 2), int((left + right) / 2)]
            assert abs(int(middle) - 60 * (label + 1)) <= 1  # antialiasing rounds
        seen.add((len(sample["boxes"]), bool(sample["boxes"][0, 0] > 16) if len(sample["boxes"]) else None))
    assert len(seen) > 2  # flips, and objects lost


def test_a_flip_is_exact():
    transform = DetectionTransform(DetectionAugment(flip=1.0), window=Window((24, 32)))
    before, after = painted(BOXES), transform(painted(BOXES))
    assert torch.equal(after["image"], before["image"].flip(-1))
    assert torch.equal(after["masks"], before["masks"].flip(-1))
    assert after["boxes"].tolist() == [[32 - right, top, 32 - left, bottom] for left, top, right, bottom in BOXES]


def test_an_object_that_a_crop_leaves_too_little_of_is_dropped():
    """Twice as large, a window of 24 x 32 shows a part; a whole object stays, one outside goes, a cut one by share."""
    halves = DetectionTransform(DetectionAugment(scale=(2.0, 2.0), visible=0.5), window=Window((24, 32)))
    every = DetectionTransform(DetectionAugment(scale=(2.0, 2.0), visible=0.0), window=Window((24, 32)))
    cut = 0
    for seed in range(20):
        torch.manual_seed(seed)
        kept = halves(painted(BOXES))
        torch.manual_seed(seed)
        shown = every(painted(BOXES))
        areas = [(right - left) * (bottom - top) for left, top, right, bottom in shown["boxes"].tolist()]
        full = [4 * (box[2] - box[0]) * (box[3] - box[1]) for box in BOXES]
        assert min(areas, default=1) > 0
        enough = [area >= 0.5 * full[i] for area, i in zip(areas, shown["labels"].tolist(), strict=True)]
        assert kept["labels"].tolist() == shown["labels"][torch.tensor(enough, dtype=torch.bool)].tolist()
        cut += enough.count(False)
    assert cut > 3


def test_a_picture_without_objects_passes_every_step():
    torch.manual_seed(0)
    augment = DetectionAugment(scale=(0.5, 2.0), flip=0.5, distort=1.0)
    sample = DetectionTransform(augment, window=Window((16, 16)))(painted([]))
    assert sample["boxes"].shape == (0, 4)
    image, rest = Finish((0.5,) * 3, (0.5,) * 3)(sample, (16, 16))
    assert (image.shape, rest["masks"].shape, rest["boxes"].shape) == ((3, 16, 16), (0, 16, 16), (0, 4))


def test_distortion_changes_colours_only():
    torch.manual_seed(0)
    transform = DetectionTransform(DetectionAugment(distort=1.0), window=Window((24, 32)))
    before, after = painted(BOXES), transform(painted(BOXES))
    assert not torch.equal(after["image"], before["image"])
    assert torch.equal(after["boxes"], before["boxes"])
    assert torch.equal(after["masks"], before["masks"])


def test_masks_are_optional():
    torch.manual_seed(0)
    transform = DetectionTransform(DetectionAugment(scale=(0.5, 2.0), flip=0.5), window=Window((24, 32)))
    assert "masks" not in transform(painted(BOXES, masks=False))


def test_padding_is_zero_after_normalising_and_never_cuts():
    image, rest = Finish((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))(resized(painted(BOXES), (12, 16)), (14, 20))
    assert (image.shape, rest["masks"].shape) == ((3, 14, 20), (3, 14, 20))
    assert not image[:, 12:].any()
    assert not image[:, :, 16:].any()
    assert rest["masks"].dtype == torch.bool
    assert type(rest["boxes"]) is type(image) is torch.Tensor
    assert padded(image, (4, 4)) is image


def test_a_picture_is_shrunk_only_to_the_largest_size_that_is_drawn():
    transform = DetectionTransform(DetectionAugment(scale=(0.5, 2.0)), window=Window((20, 40)))
    assert transform.shrunk_size(100, 200) == (40, 80)
    assert transform.shrunk_size(30, 60) == (30, 60)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": (2.0, 1.0)}, r"augment.scale must be a smallest and a largest factor above 0, got \(2.0, 1.0\)"),
        ({"flip": 1.5}, "augment.flip must lie between 0 and 1, got 1.5"),
        ({"visible": -1}, "augment.visible must lie between 0 and 1, got -1"),
        ({"distort": 2}, "augment.distort must lie between 0 and 1, got 2"),
        ({"hue": 0.6}, "augment.hue must lie between 0 and 0.5, got 0.6"),
    ],
)
def test_an_impossible_augmentation_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DetectionAugment(**wrong)

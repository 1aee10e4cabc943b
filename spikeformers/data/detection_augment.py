"""Augmentation of a picture together with its boxes and masks, random by (seed, epoch, sample index) only.

Resize, crop, flip, photometric distortion, normalise, pad (bottom and right, with 0, the mean colour): the pipeline of
Mask R-CNN's training (Meta-SpikeFormer, App. C.2: flip 0.5, resized by a random ratio) and, with colours, of YOLO's.
Departures: pictures are resized with antialiasing; YOLOv5's mosaic of four pictures is not made.
Training pictures larger than the largest that can be drawn are first shrunk to that size, once if they are held."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import v2

from spikeformers.data.augment import Normalise
from spikeformers.data.photometric import Photometric
from spikeformers.data.segmentation_augment import resize_picture

Size = tuple[int, int]  # height, width
Sample = dict[str, Any]  # image, boxes, masks (not always), labels, crowd


@dataclass(frozen=True)
class DetectionAugment(Photometric):
    """What happens to training pictures and their objects; the defaults change nothing.

    scale: smallest and largest random factor of the size that a test picture would take; what then reaches out of
    data.size is cropped.  visible: an object of whose box a crop leaves a smaller share than this is dropped.
    flip: probability.  distort and what follows: see `Photometric`.

    Raises ValueError for a value out of range.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    visible: float = 0.2
    flip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augment.scale must be a smallest and a largest factor above 0, got {self.scale}")
        for name in ("visible", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} must lie between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Window:
    """The height and width that a picture must fit into; `turning`: the window turns where the picture stands."""

    size: Size
    turning: bool = False

    def around(self, height: int, width: int) -> Size:
        """Height and width of the window for a picture of `height` x `width`."""
        turned = self.turning and (height > width) != (self.size[0] > self.size[1])
        return self.size[::-1] if turned else self.size

    def fitted(self, height: int, width: int, *, factor: float = 1.0) -> Size:
        """The largest size inside the window that keeps the picture's ratio, times `factor`."""
        room = self.around(height, width)
        ratio = min(room[0] / height, room[1] / width) * factor
        return max(int(height * ratio + 0.5), 1), max(int(width * ratio + 0.5), 1)


def sample_of(image: Tensor, *, boxes: Tensor, size: Size, masks: Tensor | None, **labels: Tensor) -> Sample:
    """A picture uint8 [C,h,w] with its objects, whose `boxes` (corners) and `masks` are those of its file of `size`.

    `labels`: what each object has besides; it is left as it is.
    """
    sample: Sample = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        **labels,
    }
    return sample if masks is None else sample | {"masks": tv_tensors.Mask(masks)}


def resized(sample: Sample, size: Size) -> Sample:
    """All parts at `size` (height, width), whatever sizes they have."""
    parts = {
        "image": tv_tensors.Image(resize_picture(sample["image"], size, interpolation="bilinear")),
        "boxes": v2.functional.resize(sample["boxes"], list(size)),
    }
    if "masks" in sample:
        parts["masks"] = tv_tensors.Mask(_resized_masks(sample["masks"], size))
    return sample | parts


def _resized_masks(masks: Tensor, size: Size) -> Tensor:
    if not len(masks) or tuple(masks.shape[-2:]) == size:
        return masks.new_zeros(len(masks), *size) if not len(masks) else masks
    # As in segmentation_augment: v2's "nearest" takes the upper left pixel, which shifts masks against pictures.
    nearest = v2.InterpolationMode.NEAREST_EXACT
    return v2.functional.resize_image(masks.as_subclass(Tensor), list(size), interpolation=nearest)


class DetectionTransform:
    """Random transform of a training sample to fit into `window`; its picture stays uint8.

    Only torch's random numbers are used.
    """

    def __init__(self, augment: DetectionAugment, *, window: Window) -> None:
        self.augment, self.window = augment, window
        self.flip = v2.RandomHorizontalFlip(augment.flip)
        self.distort = augment.distortion()

    def shrunk_size(self, height: int, width: int) -> Size:
        """The largest size that can be drawn, if a picture is larger; else its own: what is worth holding."""
        largest = self.window.fitted(height, width, factor=self.augment.scale[1])
        return largest if largest[0] <= height and largest[1] <= width else (height, width)

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample["boxes"].canvas_size
        smallest, largest = self.augment.scale
        factor = smallest + (largest - smallest) * float(torch.rand(()))
        sample = resized(sample, self.window.fitted(height, width, factor=factor))
        sample = self.flip(self._cropped(sample, self.window.around(height, width)))
        return self.distort(sample) if self.augment.distort else sample

    def _cropped(self, sample: Sample, room: Size) -> Sample:
        """A random part of a sample, at most as large as `room`, without objects of which too little is left."""
        whole = sample["boxes"].canvas_size
        size = [min(side, limit) for side, limit in zip(whole, room, strict=True)]
        start = [int(torch.randint(side - kept + 1, ())) for side, kept in zip(whole, size, strict=True)]
        spatial = [name for name in ("image", "boxes", "masks") if name in sample]
        cropped = sample | {name: v2.functional.crop(sample[name], *start, *size) for name in spatial}
        before, after = (box_area(each["boxes"].as_subclass(Tensor)) for each in (sample, cropped))
        kept = (after > 0) & (after >= self.augment.visible * before)
        return {name: part if name == "image" else _chosen(part, kept) for name, part in cropped.items()}


def _chosen(part: Tensor, kept: Tensor) -> Tensor:
    found = part.as_subclass(Tensor)[kept]
    return tv_tensors.wrap(found, like=part) if isinstance(part, tv_tensors.TVTensor) else found


class Finish:
    """The end of every sample: normalised, and padded at the bottom and right to a size, all as plain tensors."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.normalise = Normalise(mean, std)

    def __call__(self, sample: Sample, size: Size) -> tuple[Tensor, Sample]:
        """Picture float32 [C,H,W], and the rest with masks bool [N,H,W]; H,W = `size`, or the picture's if larger."""
        image = self.normalise(sample["image"].as_subclass(Tensor))
        rest = {name: part.as_subclass(Tensor) for name, part in sample.items() if name != "image"}
        if "masks" in rest:
            rest["masks"] = padded(rest["masks"].bool(), size)
        return padded(image, size), rest


def padded(maps: Tensor, size: Size) -> Tensor:
    """Maps [N,h,w] with zeros below and at the right, to height and width `size` where they are smaller."""
    below, right = (max(side - own, 0) for side, own in zip(size, maps.shape[-2:], strict=True))
    return pad(maps, (0, right, 0, below)) if below or right else maps

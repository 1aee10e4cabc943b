"""Augmentation of a picture together with its mask, random by (seed, epoch, sample index) only.

The pipeline of Spike2Former's and Semantic FPN's training: resize, crop, flip, photometric distortion, normalise, pad
(bottom and right; pictures with 0, the mean colour, after normalising, and masks with IGNORE).
Departures from the papers' pipeline: pictures are resized with antialiasing; masks take the pixel nearest to each new
pixel's centre, so that they stay aligned; brightness is multiplied by 1 +- 32/255 where theirs adds +-32; contrast
blends with the picture's mean grey where theirs blends with black.
Training pictures larger than the largest that can be drawn are first shrunk to that size, once if they are held."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import v2

from spikeformers.data.augment import Normalise
from spikeformers.data.photometric import Photometric
from spikeformers.heads.masks import IGNORE

CROP_TRIES = 10  # before a crop that one class dominates is taken all the same


@dataclass(frozen=True)
class SegmentationAugment(Photometric):
    """What happens to training pictures and masks before and after the crop; the defaults change nothing.

    scale: smallest and largest random factor of the size that a test picture would take ("(2048,512) x [0.5, 2]").
    short_sides: instead, one of these lengths of the short side, its long side at most max_side (0: any).
    cat_max_ratio: a crop is drawn again, ten times at most, while one class covers more than this share of its
    labelled pixels; 1: never.  flip: probability.  distort and what follows: see `Photometric`.

    Raises ValueError for a value out of range, or two ways to resize at once.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    short_sides: tuple[int, ...] = ()
    max_side: int = 0
    cat_max_ratio: float = 1.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augment.scale must be a smallest and a largest factor above 0, got {self.scale}")
        if self.short_sides and self.scale != (1.0, 1.0):
            raise ValueError(
                f"augment.short_sides={self.short_sides} and augment.scale={self.scale} are two ways to resize: "
                "set short_sides to () or scale to (1, 1)"
            )
        if self.short_sides and min(self.short_sides) < 1:
            raise ValueError(f"augment.short_sides must be at least 1, got {self.short_sides}")
        if self.max_side and not self.short_sides:
            raise ValueError(
                f"augment.max_side={self.max_side} limits augment.short_sides, which is empty: data.max_side limits "
                "the pictures that augment.scale resizes"
            )
        if self.max_side < 0:
            raise ValueError(f"augment.max_side must be at least 0, got {self.max_side}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augment.flip must lie between 0 and 1, got {self.flip}")
        if not 0 < self.cat_max_ratio <= 1:
            raise ValueError(f"augment.cat_max_ratio must lie above 0 and at most at 1, got {self.cat_max_ratio}")


@dataclass(frozen=True)
class Frame:
    """The size that a picture takes: `fixed` (height, width), else by its sides, keeping its ratio.

    short_side: in pixels, 0 leaves it; max_side: the long side is made no longer than this, 0 is no limit.
    """

    short_side: int = 0
    max_side: int = 0
    fixed: tuple[int, ...] = ()

    def size(self, height: int, width: int, *, factor: float = 1.0) -> tuple[int, int]:
        """Height and width of a picture of `height` x `width`, both times `factor`."""
        if self.fixed:
            return tuple(max(int(side * factor + 0.5), 1) for side in self.fixed)
        ratio = self.short_side / min(height, width) if self.short_side else 1.0
        if self.max_side:
            ratio = min(ratio, self.max_side / max(height, width))
        return max(int(height * ratio * factor + 0.5), 1), max(int(width * ratio * factor + 0.5), 1)


def resize_picture(image: Tensor, size: tuple[int, int], *, interpolation: str) -> Tensor:
    """uint8 [C,H,W] to [C,h,w], antialiased."""
    if tuple(image.shape[-2:]) == size:
        return image
    return v2.functional.resize(image, list(size), interpolation=v2.InterpolationMode(interpolation))


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [H,W] to [h,w], each pixel from the one nearest to its centre."""
    if tuple(labels.shape) == size:
        return labels
    # Not v2.Resize of a tv_tensors.Mask: its "nearest" takes the upper left pixel, which shifts masks against pictures.
    nearest = v2.InterpolationMode.NEAREST_EXACT
    return v2.functional.resize_image(labels[None], list(size), interpolation=nearest)[0]


class SegmentationTransform:
    """Random transform of a training picture uint8 [C,H,W] and its labels uint8 [H,W] to `size`, float32 and int64.

    Only torch's random numbers are used.  `frame`: what `augment.scale` multiplies.
    """

    def __init__(
        self,
        augment: SegmentationAugment,
        *,
        size: tuple[int, int],
        frame: Frame,
        interpolation: str,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.augment, self.size, self.frame, self.interpolation = augment, size, frame, interpolation
        self.normalise = Normalise(mean, std)
        self.distort = augment.distortion()

    def shrunk_size(self, height: int, width: int) -> tuple[int, int]:
        """The largest size that can be drawn, if a picture is larger; else its own."""
        if self.augment.short_sides:
            largest = self._short_frame(max(self.augment.short_sides)).size(height, width)
        elif not (self.frame.short_side or self.frame.fixed):  # factors of the original size, which must stay known
            return height, width
        else:
            largest = self.frame.size(height, width, factor=self.augment.scale[1])
        return largest if largest[0] <= height and largest[1] <= width else (height, width)

    def shrink(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both at `shrunk_size`: what is worth holding in memory."""
        return self._resized(image, labels, self.shrunk_size(*labels.shape))

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, labels = self._resized(image, labels, self._drawn_size(*labels.shape))
        rows, columns = self._crop(labels)
        image, labels = image[:, rows, columns], labels[rows, columns]
        if torch.rand(()) < self.augment.flip:
            image, labels = image.flip(-1), labels.flip(-1)
        if self.augment.distort:
            image = self.distort(image)
        below, right = self.size[0] - labels.shape[0], self.size[1] - labels.shape[1]
        image, labels = self.normalise(image), labels.long()
        if below or right:
            image, labels = pad(image, (0, right, 0, below)), pad(labels, (0, right, 0, below), value=IGNORE)
        return image, labels

    def _short_frame(self, short_side: int) -> Frame:
        return Frame(short_side, self.augment.max_side)

    def _drawn_size(self, height: int, width: int) -> tuple[int, int]:
        if sides := self.augment.short_sides:
            return self._short_frame(sides[int(torch.randint(len(sides), ()))]).size(height, width)
        smallest, largest = self.augment.scale
        factor = smallest + (largest - smallest) * float(torch.rand(()))
        return self.frame.size(height, width, factor=factor)

    def _resized(self, image: Tensor, labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return resize_picture(image, size, interpolation=self.interpolation), resize_labels(labels, size)

    def _crop(self, labels: Tensor) -> tuple[slice, slice]:
        """Rows and columns of a random crop; the whole length where the picture is shorter than the crop."""
        for _ in range(CROP_TRIES):
            starts = [
                int(torch.randint(max(length - crop, 0) + 1, ()))
                for length, crop in zip(labels.shape, self.size, strict=True)
            ]
            rows, columns = (slice(start, start + crop) for start, crop in zip(starts, self.size, strict=True))
            if self.augment.cat_max_ratio == 1 or self._mixed(labels[rows, columns]):
                break
        return rows, columns

    def _mixed(self, labels: Tensor) -> bool:
        counts = torch.bincount(labels.flatten(), minlength=IGNORE + 1)[:IGNORE]
        return bool(0 < counts.max() < self.augment.cat_max_ratio * counts.sum())

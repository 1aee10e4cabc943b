"""Pictures with a label for each pixel: what to read, how to fit it to the model, and one split as a Dataset.

Training pictures are resized, cropped and distorted with their masks (segmentation_augment.py); test pictures are only
resized, and their labels stay at the original size, where scores are counted.  Sets that fit into memory are decoded
once and kept as uint8."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spikeformers.data.augment import Normalise, seeded, to_pixels
from spikeformers.data.decode import UnreadablePictureError, decode, height_width
from spikeformers.data.held import read_all, spread
from spikeformers.data.images import MEMORY_LIMIT, statistics
from spikeformers.data.segmentation_augment import (
    IGNORE,
    Frame,
    SegmentationAugment,
    SegmentationTransform,
    resize_picture,
)
from spikeformers.data.segmentation_sources import TEST_SPLITS, SegmentationListing, listing
from spikeformers.neurons.suggest import closest

T = TypeVar("T")
logger = logging.getLogger(__name__)
SEGMENTATION_SOURCES = tuple(TEST_SPLITS)
PROBED = 16  # headers, from which the memory that a whole split takes is estimated


@dataclass(frozen=True)
class SegmentationData:
    """Which pictures and masks, and what size they take.

    source: one of SEGMENTATION_SOURCES; root: its folder.  classes: names for a "maskfolder" without classes.txt.
    train_split, test_split: the source's own names of the splits ("" is its usual one: train; val, CamVid's test).
    train_limit, test_limit: this many pictures, spread evenly over the split, 0 = all.
    size: (height, width) of the training crop.  in_channels: 1 grey or 3 RGB; pictures are converted.
    short_side, max_side: a picture's sides when tested and before `augment.scale`, keeping its ratio; short_side 0
    leaves the original size, max_side 0 is no limit.  test_size: (height, width) instead, () keeps the ratio.
    interpolation: "bilinear" or "bicubic".  skip_unreadable: leave out pictures that cannot be read, or whose mask
    cannot be used, and count them.

    Raises ValueError for a value that cannot be.
    """

    source: str = "camvid"
    root: str = ""
    classes: tuple[str, ...] = ()
    train_split: str = ""
    test_split: str = ""
    train_limit: int = 0
    test_limit: int = 0
    size: tuple[int, int] = (360, 480)
    in_channels: int = 3
    short_side: int = 0
    max_side: int = 0
    test_size: tuple[int, ...] = ()
    interpolation: str = "bilinear"
    skip_unreadable: bool = False
    augment: SegmentationAugment = field(default_factory=SegmentationAugment)

    def __post_init__(self) -> None:
        if self.source not in SEGMENTATION_SOURCES:
            known = ", ".join(SEGMENTATION_SOURCES)
            raise ValueError(
                f"unknown data.source {self.source!r}; {closest(self.source, SEGMENTATION_SOURCES)} (of {known})"
            )
        if self.classes and self.source != "maskfolder":
            raise ValueError(f"data.classes are for a maskfolder: the classes of {self.source} are fixed")
        if self.in_channels not in (1, 3):
            raise ValueError(f"data.in_channels must be 1 (grey) or 3 (RGB) for pictures, got {self.in_channels}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"data.interpolation must be bicubic or bilinear, got {self.interpolation!r}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"data.size must be the height and width of the training crop, got {self.size}")
        if self.test_size and (len(self.test_size) != 2 or min(self.test_size) < 1):
            raise ValueError(f"data.test_size must be a height and a width, or () to keep the ratio: {self.test_size}")
        if self.test_size and (self.short_side or self.max_side):
            raise ValueError(
                f"data.test_size={self.test_size} beside data.short_side={self.short_side} and data.max_side="
                f"{self.max_side} are two ways to resize: set test_size to () or the sides to 0"
            )
        for name in ("train_limit", "test_limit", "short_side", "max_side"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be at least 0, got {getattr(self, name)}")

    @property
    def frame(self) -> Frame:
        """The size that a test picture takes."""
        return Frame(self.short_side, self.max_side, self.test_size)


def _fitted(pixels: Tensor, spec: SegmentationData) -> Tensor:
    return resize_picture(pixels, spec.frame.size(*pixels.shape[-2:]), interpolation=spec.interpolation)


def read_picture_for(spec: SegmentationData, path: str | Path) -> tuple[Tensor, tuple[int, int]]:
    """One picture file as the model wants it, float32 [C,h,w], and its own height and width.

    Raises ValueError naming the file.
    """
    pixels = to_pixels(decode(Path(path), name=str(path), channels=spec.in_channels))
    return Normalise(*statistics(spec))(_fitted(pixels, spec)), tuple(pixels.shape[-2:])


class SegmentationSplit(Dataset):
    """One split: `split[index]` or `split[epoch, index]` -> (image float32 [C,h,w], labels int64 [H,W]).

    A training item is a function of (seed, epoch, index) alone, in any process and order, with h,w = H,W = spec.size;
    a plain index means epoch 0.  A test item's labels keep the size of its file, so that h,w may be another.
    Global random states are as before afterwards.  `.classes` are the classes' names and `.colours` uint8 [N,3] theirs;
    `.names` (files) go by index; `.skipped` lists what could not be read and was left out.

    Raises UnreadablePictureError (a ValueError) naming the file; at access if the set does not fit into memory.
    """

    def __init__(self, found: SegmentationListing, spec: SegmentationData, *, train: bool, seed: int = 0) -> None:
        self.spec, self.seed, self.in_channels = spec, seed, spec.in_channels
        self.classes, self.colours = found.classes, found.colours
        self.skipped: list[str] = []
        self._listing, self._held = found, None
        mean, std = statistics(spec)
        self._normalise = Normalise(mean, std)
        self._transform = None
        if train:
            self._transform = SegmentationTransform(
                spec.augment, size=spec.size, frame=spec.frame, interpolation=spec.interpolation, mean=mean, std=std
            )
        if self._estimated_bytes() <= MEMORY_LIMIT:
            # Arrays, not tensors: sent to a worker process, each tensor would keep a file open.
            self._held = [(image.numpy(), labels.numpy()) for image, labels in self._kept(self._read)]
        elif spec.skip_unreadable:
            logger.info("data.skip_unreadable: decoding all %d pictures of %s once", len(found.images), spec.root)
            self._kept(lambda index: bool(self._read(index)))
        self.names = [str(image) for image in self._listing.images]
        if not self.names:
            raise ValueError(f"no picture of {spec.source} {spec.root} could be read; first: {self.skipped[0]}")

    def _estimated_bytes(self) -> float:
        """Memory of the whole split as uint8, from the headers of some of its pictures."""
        images = self._listing.images
        probed = [images[i] for i in spread(len(images), PROBED)]
        sizes = []
        for image in probed:
            try:
                height, width = height_width(image, name=str(image))
            except UnreadablePictureError:
                continue  # reading it whole says more, and may be meant to be skipped
            height_held, width_held = self._held_size(height, width)
            sizes.append(height_held * width_held * self.in_channels + height * width)
        return len(images) * sum(sizes) / max(len(sizes), 1)

    def _held_size(self, height: int, width: int) -> tuple[int, int]:
        if self._transform is None:
            return self.spec.frame.size(height, width)
        return self._transform.shrunk_size(height, width)

    def _kept(self, read: Callable[[int], T]) -> list[T]:
        """What `read` makes of every picture that can be read; the others are dropped from the listing."""
        items, self.skipped = read_all(read, len(self._listing.images), skip_unreadable=self.spec.skip_unreadable)
        if self.skipped:
            self._listing = self._listing.chosen(items)
        return list(items.values())

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        """What is the same at each access: picture uint8 [C,h,w] and labels uint8 [H,W], resized as far as may be."""
        pixels = self.picture(index)
        labels = torch.from_numpy(self._listing.labels(index, size=tuple(pixels.shape[-2:])))
        if self._transform is None:
            return _fitted(pixels, self.spec), labels
        return self._transform.shrink(pixels, labels)

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, index: int) -> Tensor:
        """The picture as its file has it, uint8 [C,H,W], for showing."""
        image = self._listing.images[index]
        return to_pixels(decode(image, name=str(image), channels=self.in_channels))

    def mask(self, index: int) -> Tensor:
        """The labels at the size of the picture's file, int64 [H,W], 255 where none counts."""
        image = self._listing.images[index]
        labels = self._listing.labels(index, size=height_width(image, name=str(image)))
        return torch.from_numpy(labels).long()

    def labels_in_memory(self) -> set[int] | None:
        """The labels that occur, 255 not counted; None for a set too large for memory, all of which would be read."""
        if self._held is None:
            return None
        occurs = sum(np.bincount(labels.ravel(), minlength=256) for _, labels in self._held)
        return set(np.flatnonzero(occurs[:IGNORE]).tolist())

    @cached_property
    def uniform(self) -> bool:
        """Whether all items have one shape, so that they can be batched; test pictures' headers are read for it."""
        if self._transform is not None:
            return True
        images = self._listing.images
        first = height_width(images[0], name=str(images[0]))
        return all(height_width(image, name=str(image)) == first for image in images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a split of {len(self)} pictures")
        image, labels = self._read(index) if self._held is None else map(torch.from_numpy, self._held[index])
        if self._transform is None:
            return self._normalise(image), labels.long()
        with seeded(self.seed, epoch, index, torch_only=True):
            return self._transform(image, labels)


def load_segmentation_split(spec: SegmentationData, split: str, *, seed: int = 0) -> SegmentationSplit:
    """The "train" split (augmented as `spec.augment` says, random by `seed`) or the "test" split (never augmented).

    Raises ValueError for missing folders or files, images without masks, and unreadable pictures, with their names.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    train = split == "train"
    name = (spec.train_split or "train") if train else (spec.test_split or TEST_SPLITS[spec.source])
    found = listing(spec.source, spec.root, name, classes=spec.classes)
    limit = spec.train_limit if train else spec.test_limit
    return SegmentationSplit(found.chosen(spread(len(found.images), limit)), spec, train=train, seed=seed)

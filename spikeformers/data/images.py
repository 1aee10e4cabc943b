"""Labelled pictures for classification: what to read, how to fit it to the model, and one split as a Dataset.

Every picture is fitted alike: short side resized to `size / eval_crop`, then the centre `size` x `size`; only random
resized crops see the original.  Sets that fit into memory after fitting are decoded once and kept as uint8."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from spikeformers.data import digits, sources
from spikeformers.data.augment import Augment, Normalise, TrainTransform, seeded, to_pixels
from spikeformers.data.decode import UnreadablePictureError, decode
from spikeformers.data.streamed import StreamedPictures
from spikeformers.neurons.suggest import closest

logger = logging.getLogger(__name__)
SOURCES = ("digits", "imagefolder", "parquet", "cifar10", "cifar100", "imagenet")
MEMORY_LIMIT = 2**30  # bytes of fitted uint8 pictures held per split; above it they are decoded at each access
_STATISTICS = {  # mean and standard deviation of training pixels in 0..1; other sources take ImageNet's
    "digits": ((0.3053,), (0.3762,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


@dataclass(frozen=True)
class ImageData:
    """Which pictures, and what shape they take.

    source: one of SOURCES; root: its folder ("digits" needs none).  size: side in pixels.  in_channels: 1 grey or
    3 RGB; pictures are converted.  train_limit, test_limit: a fixed subset of this many pictures, 0 = all (the first
    rows; from folders, each class in turn).  skip_unreadable: leave out files that cannot be read and count them.
    interpolation: "bicubic" or "bilinear".  eval_crop: share of the resized picture kept (ImageNet habit: 0.875).

    Raises ValueError for a value that cannot be.
    """

    source: str = "digits"
    root: str = ""
    size: int = 32
    in_channels: int = 3
    train_limit: int = 0
    test_limit: int = 0
    skip_unreadable: bool = False
    interpolation: str = "bicubic"
    eval_crop: float = 1.0
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown data.source {self.source!r}; {closest(self.source, SOURCES)}")
        if self.in_channels not in (1, 3):
            raise ValueError(f"data.in_channels must be 1 (grey) or 3 (RGB) for pictures, got {self.in_channels}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"data.interpolation must be bicubic or bilinear, got {self.interpolation!r}")
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"data.eval_crop must lie above 0 and at most at 1, got {self.eval_crop}")
        for name, least in (("size", 1), ("train_limit", 0), ("test_limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")


def statistics(spec: ImageData) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of a model's input before normalising, for pixels in 0..1.

    Any spec with `source` and `in_channels` will do.
    """
    mean, std = _STATISTICS.get(spec.source, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    if len(mean) == spec.in_channels:
        return tuple(mean), tuple(std)
    return (sum(mean) / len(mean),) * spec.in_channels, (sum(std) / len(std),) * spec.in_channels


def fit(picture: Image.Image, *, spec: ImageData) -> Image.Image:
    """The centre `size` x `size` of a picture whose short side was resized to `size / eval_crop`."""
    short = round(spec.size / spec.eval_crop)
    if min(picture.size) != short:
        picture = v2.functional.resize(picture, [short], interpolation=v2.InterpolationMode(spec.interpolation))
    return picture if picture.size == (spec.size,) * 2 else v2.functional.center_crop(picture, [spec.size, spec.size])


def read_image(path: str | Path, *, spec: ImageData) -> Tensor:
    """One picture file as the model wants it, float32 [C,size,size].  Raises ValueError naming the file."""
    picture = decode(Path(path), name=str(path), channels=spec.in_channels)
    return Normalise(*statistics(spec))(to_pixels(fit(picture, spec=spec)))


def spec_transform(spec: ImageData) -> TrainTransform:
    """The random training transform of `spec`; its `whole` says whether it takes original or fitted pictures."""
    mean, std = statistics(spec)
    return TrainTransform(spec.augment, size=spec.size, mean=mean, std=std, interpolation=spec.interpolation)


class ImageSplit(Dataset):
    """One split: `split[index]` or `split[epoch, index]` -> (image float32 [C,size,size], label int).

    A training picture is a function of (seed, epoch, index) alone, in any process and order; a plain index means epoch
    0.  Global random states are as before afterwards.  `.classes` names, `.labels` int64 [N] and `.names` (file or
    row) go by index; `.skipped` lists what could not be read and was left out.  `.shuffled`, if there is one, is the
    order that the sampler needs since pictures are streamed.

    Raises UnreadablePictureError (a ValueError) naming the file; at access if the set does not fit into memory.
    """

    def __init__(self, listing: sources.Listing, spec: ImageData, *, train: bool, seed: int = 0) -> None:
        self.spec, self.seed, self.classes, self.in_channels = spec, seed, listing.classes, spec.in_channels
        self.skipped: list[str] = []
        self._normalise = Normalise(*statistics(spec))
        self._transform = spec_transform(spec) if train else None
        self._whole = train and self._transform.whole
        self._listing, self._pixels = listing, None
        needed = len(listing.labels) * spec.in_channels * spec.size**2
        if not self._whole and needed <= MEMORY_LIMIT:
            self._hold()
        elif spec.skip_unreadable:
            logger.info("data.skip_unreadable: decoding all %d pictures of %s once", len(listing.labels), spec.root)
            with ThreadPoolExecutor() as pool:
                self._keep(np.array(list(pool.map(self._readable, range(len(listing.labels)))), dtype=bool))
        self.labels, self.names = self._listing.labels, self._listing.names
        pictures = self._listing.sources
        self.shuffled = pictures.shuffled if isinstance(pictures, StreamedPictures) else None
        if not len(self.labels):
            raise ValueError(f"no picture of {spec.source} {spec.root} could be read; first: {self.skipped[0]}")

    def _decoded(self, index: int) -> Image.Image:
        listing = self._listing
        return decode(listing.sources[index], name=listing.names[index], channels=self.in_channels)

    def _readable(self, index: int) -> bool:
        try:
            self._decoded(index)
        except UnreadablePictureError as error:
            self.skipped.append(str(error))
            return False
        return True

    def _keep(self, readable: np.ndarray) -> None:
        self.skipped.sort()
        if not readable.all():
            self._listing = self._listing.chosen(np.flatnonzero(readable))

    def _hold(self) -> None:
        """Decodes everything once, then forgets the encoded pictures."""
        count, size = len(self._listing.labels), self.spec.size
        pixels = torch.empty(count, self.in_channels, size, size, dtype=torch.uint8)
        readable = np.ones(count, dtype=bool)
        for index in range(count):
            try:
                pixels[index] = to_pixels(fit(self._decoded(index), spec=self.spec))
            except UnreadablePictureError as error:
                if not self.spec.skip_unreadable:
                    raise
                self.skipped.append(str(error))
                readable[index] = False
        self._keep(readable)
        self._pixels = pixels if readable.all() else pixels[torch.from_numpy(readable)]
        kept = self._listing
        self._listing = sources.Listing(kept.classes, kept.labels, (), kept.names)

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Tensor:
        """The fitted picture before augmentation and normalising, uint8 [C,size,size], for showing."""
        if self._pixels is not None:
            return self._pixels[index]
        return to_pixels(fit(self._decoded(index), spec=self.spec))

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.labels):
            raise IndexError(f"index {index} of a split of {len(self.labels)} pictures")
        label = int(self.labels[index])
        if self._transform is None:
            return self._normalise(self.picture(index)), label
        picture = self._decoded(index) if self._whole else self.picture(index)
        if not self._transform.random:
            return self._transform(picture), label
        with seeded(self.seed, epoch, index, torch_only=self._transform.torch_only):
            return self._transform(picture), label


def load_split(spec: ImageData, split: str, *, seed: int = 0) -> ImageSplit:
    """The "train" split (augmented as `spec.augment` says, random by `seed`) or the "test" split (never augmented).

    Raises ValueError for missing folders or files, empty class folders and unreadable pictures, with their names.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    train = split == "train"
    return ImageSplit(
        _listing(spec, split, spec.train_limit if train else spec.test_limit), spec, train=train, seed=seed
    )


def _listing(spec: ImageData, split: str, limit: int) -> sources.Listing:
    if spec.source == "digits":
        pixels, labels = digits.digits(split)
        count = limit or len(labels)
        names: Sequence[str] = [f"digits {split} {index}" for index in range(len(labels))]
        return sources.Listing(digits.CLASSES, labels[:count], pixels[:count], names[:count])
    if spec.source in sources.FOLDERS:
        return sources.folder(spec.root, split, source=spec.source, limit=limit)
    if spec.source == "parquet":
        return sources.parquet(spec.root, split, limit=limit)
    return sources.cifar(spec.root, split, source=spec.source, limit=limit)

"""Pictures with a box, a class and perhaps a mask for each object: what to read, how to fit it, and one split of it.

Pictures keep their ratio and lie at the top left of what the network sees.  Training pictures are resized, cropped,
flipped and distorted with their objects (detection_augment.py); test pictures are only resized, and bring along what
their annotations say, in pixels of their files, where scores are counted.
Pictures without any object teach what the background is and are kept, other than in mmdetection's and torchvision's
training, which leave them out: `skip_empty` does.  Sets that fit into memory are decoded once and kept as uint8."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired

import torch
from torch import Tensor
from torch.utils.data import Dataset

from spikeformers.data.augment import seeded, to_pixels
from spikeformers.data.decode import UnreadablePictureError, decode
from spikeformers.data.detection_augment import (
    DetectionAugment,
    DetectionTransform,
    Finish,
    Sample,
    Size,
    Window,
    padded,
    resized,
    sample_of,
)
from spikeformers.data.detection_sources import DETECTION_SOURCES, DetectionListing, Objects, listing
from spikeformers.data.held import read_all, spread
from spikeformers.data.images import MEMORY_LIMIT, statistics
from spikeformers.data.segmentation_augment import resize_picture
from spikeformers.data.segmentation_sources import checked_names, default_colours
from spikeformers.deploy import Letterbox
from spikeformers.heads.detections import Target
from spikeformers.neurons.suggest import closest

logger = logging.getLogger(__name__)
FITS = ("letterbox", "sides")
PADDED_TO = 32  # pixels: the stride of the coarsest maps of a pyramid, which batches are made a multiple of


@dataclass(frozen=True)
class DetectionData:
    """Which pictures and objects, and what size they take.

    source: one of DETECTION_SOURCES; root: its folder or zip archive.  classes: names for VOC's xml files; () takes all
    that are found there.  annotations: names of the json files (coco) or lists (voc) of training and test; () is
    COCO's usual ones, else instances_train.json and instances_test.json; for VOC train and test, else val.
    train_limit, test_limit: this many pictures, spread evenly over the split, 0 = all.
    size: (height, width) that pictures must fit into.  fit: "letterbox" pads all to that size; "sides" turns it where a
    picture stands ("1333 x 800") and pads only to the largest of a batch.
    in_channels: 1 grey or 3 RGB; pictures are converted.  masks: read the objects' masks as well as their boxes.
    skip_unreadable: leave out pictures that cannot be read or are not there, and count them.  skip_empty: leave out
    training pictures without any object that can be learnt.

    Raises ValueError for a value that cannot be.
    """

    source: str = "coco"
    root: str = ""
    classes: tuple[str, ...] = ()
    annotations: tuple[str, ...] = ()
    train_limit: int = 0
    test_limit: int = 0
    size: tuple[int, int] = (320, 320)
    fit: str = "letterbox"
    in_channels: int = 3
    masks: bool = False
    skip_unreadable: bool = False
    skip_empty: bool = False
    augment: DetectionAugment = field(default_factory=DetectionAugment)

    def __post_init__(self) -> None:
        if self.source not in DETECTION_SOURCES:
            raise ValueError(f"unknown data.source {self.source!r}; {closest(self.source, DETECTION_SOURCES)}")
        if self.classes and self.source != "voc":
            raise ValueError(f"data.classes are for voc: the classes of {self.source} stand in its json file")
        if len(self.annotations) not in (0, 2):
            raise ValueError(f"data.annotations must name training's and test's, or be (), got {self.annotations}")
        if self.fit not in FITS:
            raise ValueError(f"data.fit must be {' or '.join(FITS)}, got {self.fit!r}")
        if self.in_channels not in (1, 3):
            raise ValueError(f"data.in_channels must be 1 (grey) or 3 (RGB) for pictures, got {self.in_channels}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"data.size must be the height and width that pictures fit into, got {self.size}")
        for name in ("train_limit", "test_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be at least 0, got {getattr(self, name)}")

    @property
    def window(self) -> Window:
        """What a picture must fit into."""
        return Window(self.size, turning=self.fit == "sides")

    @property
    def padded_size(self) -> Size:
        """The height and width that every picture is padded to by itself; (1, 1): none."""
        return self.size if self.fit == "letterbox" else (1, 1)

    @property
    def letterbox(self) -> Letterbox:
        """What becomes of a test picture that comes alone, as a file for deployment tells it."""
        mean, std = statistics(self)
        told = {"channels": self.in_channels, "mean": mean, "std": std, "interpolation": "bilinear"}
        return Letterbox(window=tuple(self.size), turning=self.fit == "sides", padded_to=PADDED_TO, **told)


class DetectionTarget(Target):
    """A target with the height and width of the picture's file and its index in the split, int64; `truth`: of a test
    picture, what its annotations say."""

    original: Tensor
    index: Tensor
    truth: NotRequired[Objects]


def collate_detections(batch: Sequence[tuple[Tensor, DetectionTarget]]) -> tuple[Tensor, list[DetectionTarget]]:
    """Images [B,C,H,W], and targets with masks [N,H,W]; H and W: the largest, rounded up to PADDED_TO."""
    images, targets = zip(*batch, strict=True)
    size = rounded_up([image.shape[-2:] for image in images])
    fitting = [target | {"masks": padded(target["masks"], size)} if "masks" in target else target for target in targets]
    return torch.stack([padded(image, size) for image in images]), fitting


def rounded_up(sizes: Sequence[Size]) -> Size:
    """The largest height and the largest width, each rounded up to a multiple of PADDED_TO."""
    height, width = (-(-max(sides) // PADDED_TO) * PADDED_TO for sides in zip(*sizes, strict=True))
    return height, width


def read_picture_to_detect(told: Letterbox, path: str | Path) -> tuple[Tensor, Size, Tensor]:
    """One picture file as the model wants it, float32 [C,H,W]; its height and width in there; and the file's own
    pixels, uint8 [C,h,w].  `told`: by `DetectionData.letterbox`, or by a file for deployment.

    Raises ValueError naming the file.
    """
    pixels = to_pixels(decode(Path(path), name=str(path), channels=told.channels))
    size = Window(told.window, turning=told.turning).fitted(*pixels.shape[-2:])
    image = Finish(told.mean, told.std).normalise(resize_picture(pixels, size, interpolation=told.interpolation))
    return padded(image, told.padded(*size)), size, pixels


class DetectionSplit(Dataset):
    """One split: `split[index]` or `split[epoch, index]` -> (image float32 [C,h,w], DetectionTarget).

    A training item is a function of (seed, epoch, index) alone, in any process and order; a plain index means epoch 0.
    Batches are made by `collate`.  Global random states are as before afterwards.  `.classes` are the classes' names
    and `.colours` uint8 [N,3] theirs; `.names` (files) go by index; `.skipped` lists what could not be read and was
    left out, `.oddities` what boxes could not be taken as they are.

    Raises UnreadablePictureError (a ValueError) naming the file; at access if the set does not fit into memory.
    """

    collate = staticmethod(collate_detections)

    def __init__(self, found: DetectionListing, spec: DetectionData, *, train: bool, seed: int = 0) -> None:
        if found.absent and not spec.skip_unreadable:
            raise UnreadablePictureError(found.absent[0])
        self.spec, self.seed, self.in_channels = spec, seed, spec.in_channels
        self.classes, self.colours = found.classes, default_colours(len(found.classes))
        self._transform = DetectionTransform(spec.augment, window=spec.window) if train else None
        self._finish = Finish(*statistics(spec))
        self._listing, self._held = found, None
        needed = sum(height * width for height, width in map(self._held_size, found.sizes)) * spec.in_channels
        unreadable: list[str] = []
        if needed <= MEMORY_LIMIT:
            items, unreadable = read_all(self._read, len(found.images), skip_unreadable=spec.skip_unreadable)
            # Arrays, not tensors: sent to a worker process, each tensor would keep a file open.
            self._held = [item.numpy() for item in items.values()]
            self._listing = found.chosen(items)
        elif spec.skip_unreadable:
            logger.info("data.skip_unreadable: decoding all %d pictures of %s once", len(found.images), spec.root)
            items, unreadable = read_all(lambda i: bool(len(self._read(i))), len(found.images), skip_unreadable=True)
            self._listing = found.chosen(items)
        self.skipped = [*found.absent, *unreadable]
        self.names = [str(image) for image in self._listing.images]
        if not self.names:
            raise ValueError(f"no picture of {spec.source} {spec.root} could be read; first: {self.skipped[0]}")
        self.oddities = self._listing.oddities()

    def _held_size(self, size: Size) -> Size:
        return self.spec.window.fitted(*size) if self._transform is None else self._transform.shrunk_size(*size)

    def _read(self, index: int) -> Tensor:
        """What is the same at each access: the picture uint8 [C,h,w], resized as far as may be."""
        pixels, size = self.picture(index), self._listing.sizes[index]
        if tuple(pixels.shape[-2:]) != size:
            raise UnreadablePictureError(
                f"image {self._listing.images[index]} is {pixels.shape[-2]} x {pixels.shape[-1]} (height x width), its "
                f"annotations are for {size[0]} x {size[1]}: correct one of them"
            )
        return resize_picture(pixels, self._held_size(size), interpolation="bilinear")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def uniform(self) -> bool:
        """Whether all items have one shape, so that a batch pads none of them."""
        return self.spec.fit == "letterbox"

    def picture(self, index: int) -> Tensor:
        """The picture as its file has it, uint8 [C,H,W], for showing."""
        image = self._listing.images[index]
        return to_pixels(decode(image, name=str(image), channels=self.in_channels))

    def truth(self, index: int) -> Objects:
        """What the annotations say, in pixels of the picture's file."""
        return self._listing.objects[index]

    def original_size(self, index: int) -> Size:
        """Height and width of the picture's file."""
        return self._listing.sizes[index]

    def _sample(self, index: int) -> Sample:
        objects, size = self.truth(index), self.original_size(index)
        image = self._read(index) if self._held is None else torch.from_numpy(self._held[index])
        return sample_of(
            image,
            boxes=torch.from_numpy(objects.corners(*size)).float(),
            size=size,
            masks=torch.from_numpy(objects.dense_masks(*size)) if self.spec.masks else None,
            labels=torch.from_numpy(objects.labels),
            crowd=torch.from_numpy(objects.crowd),
        )

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, DetectionTarget]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a split of {len(self)} pictures")
        sample, original = self._sample(index), self.original_size(index)
        known = {"original": torch.tensor(original), "index": torch.tensor(index)}
        if self._transform is None:
            sample = resized(sample, self.spec.window.fitted(*original))
            known["truth"] = self.truth(index)
        else:
            with seeded(self.seed, epoch, index, torch_only=True):
                sample = self._transform(sample)
        known["size"] = torch.tensor(sample["boxes"].canvas_size)
        image, objects = self._finish(sample, self.spec.padded_size)
        return image, objects | known


def load_detection_split(spec: DetectionData, split: str, *, seed: int = 0) -> DetectionSplit:
    """The "train" split (augmented as `spec.augment` says, random by `seed`) or the "test" split (never augmented).

    Raises ValueError for what is missing, damaged or contradicts itself, naming the file and the item.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    train = split == "train"
    named = spec.annotations[0 if train else 1] if spec.annotations else ""
    found = listing(spec.source, spec.root, split, annotations=named, classes=spec.classes, masks=spec.masks)
    checked_names(found.classes, where=f"data.root {spec.root}")
    if train and spec.skip_empty:
        found = found.chosen(i for i, objects in enumerate(found.objects) if _learnable(objects, found.sizes[i]))
        if not found.images:
            raise ValueError(f"data.skip_empty leaves no picture of {spec.root}: none has an object to learn")
    limit = spec.train_limit if train else spec.test_limit
    loaded = DetectionSplit(found.chosen(spread(len(found.images), limit)), spec, train=train, seed=seed)
    for oddity in loaded.oddities:
        logger.warning("%s, %s split: %s", spec.root, split, oddity)
    return loaded


def _learnable(objects: Objects, size: Size) -> bool:
    return bool((objects.covering(*size) & ~objects.crowd).any())

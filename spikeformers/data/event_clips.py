"""Recordings of event cameras with a label each: what to read, what a clip shows, and one split as a Dataset.

A clip is [T,C,H,W], raw counts unless the representation says otherwise (events.py): the authors of Spikformer and
QSD-Transformer do not normalise them either.  Sets whose events fit into memory, packed to six bytes each, are read
once; clips are made from the events at each access, which takes less time than reading them would."""

import logging
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spikeformers.data.augment import seeded
from spikeformers.data.decode import UnreadableRecordingError
from spikeformers.data.event_augment import EventAugment
from spikeformers.data.event_files import read_of_sensor
from spikeformers.data.event_packed import Packed
from spikeformers.data.event_sources import EVENT_SOURCES, SENSORS, Disorder, listing
from spikeformers.data.events import (
    LARGEST_SIDE,
    Events,
    Size,
    check_clip,
    frames,
    three_channels,
    time_surface,
    voxel_grid,
)
from spikeformers.data.sources import Listing
from spikeformers.neurons.suggest import closest

logger = logging.getLogger(__name__)
CHANNELS = {"frames": 2, "three_channels": 3, "voxel_grid": 1, "time_surface": 2}
MEMORY_LIMIT = 2**31  # bytes of packed events held per split; above it they are read at each access


@dataclass(frozen=True)
class EventData:
    """Which recordings, and what clips are made of them.

    source: one of EVENT_SOURCES; root: its folder ("digits_dvs" needs none).  steps: T.  size: height and width of the
    frames; () takes the sensor's.  sensor: that of an eventfolder's camera; () takes what its files tell.
    representation: one of CHANNELS, see events.py.  split: slices of equal numbers of events ("count") or of equal
    durations ("time"); voxel grids are always spaced in time.  tau: microseconds in which a time surface falls to 1/e.
    train_limit, test_limit: a fixed subset of this many recordings, each class in turn, 0 = all.
    skip_unreadable: leave out recordings that cannot be read and count them.  disorder: "sort" mends files in which
    time goes backwards, "error" takes them as unreadable.

    Raises ValueError for a value that cannot be.
    """

    source: str = "digits_dvs"
    root: str = ""
    steps: int = 4
    size: tuple[int, ...] = ()
    sensor: tuple[int, ...] = ()
    representation: str = "frames"
    split: typing.Literal["count", "time"] = "count"
    tau: float = 50_000.0
    train_limit: int = 0
    test_limit: int = 0
    skip_unreadable: bool = False
    disorder: Disorder = "error"
    augment: EventAugment = field(default_factory=EventAugment)

    def __post_init__(self) -> None:
        if self.source not in EVENT_SOURCES:
            raise ValueError(f"unknown data.source {self.source!r}; {closest(self.source, EVENT_SOURCES)}")
        if self.representation not in CHANNELS:
            raise ValueError(
                f"unknown data.representation {self.representation!r}; {closest(self.representation, CHANNELS)}"
            )
        if self.split not in ("count", "time"):
            raise ValueError(f"data.split must be count or time, got {self.split!r}")
        if self.disorder not in ("error", "sort"):
            raise ValueError(f"data.disorder must be error or sort, got {self.disorder!r}")
        if len(self.size) not in (0, 2) or min(self.size, default=1) < 1:
            raise ValueError(f"data.size must be the height and width of frames, or (), got {self.size}")
        published = SENSORS.get(self.source, tuple(self.sensor))
        if len(self.sensor) not in (0, 2) or not all(1 <= side <= LARGEST_SIDE for side in self.sensor):
            raise ValueError(
                f"data.sensor must be the height and width of the camera's pixels, up to {LARGEST_SIDE}, or (), got "
                f"{self.sensor}"
            )
        if self.sensor and tuple(self.sensor) != published:
            raise ValueError(f"the sensor of {self.source} is {published}, got data.sensor={self.sensor}: leave it out")
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"data.tau must be above 0 microseconds, got {self.tau}")
        for name, least in (("steps", 1), ("train_limit", 0), ("test_limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def in_channels(self) -> int:
        """Channels of a frame, which follow from the representation."""
        return CHANNELS[self.representation]

    @property
    def frame_size(self) -> Size | None:
        """Height and width of the frames, or None for the sensor's."""
        return (self.size[0], self.size[1]) if self.size else None

    @property
    def known_sensor(self) -> Size | None:
        """Height and width of the sensor as far as settings or publishers tell them."""
        return (self.sensor[0], self.sensor[1]) if self.sensor else SENSORS.get(self.source)


def clip_of(events: Events, *, spec: EventData) -> Tensor:
    """The clip [T,C,H,W] that `spec` makes of a recording, before augmentation."""
    return _maker(spec)(events, steps=spec.steps, size=spec.frame_size)


def _maker(spec: EventData) -> Callable[..., Tensor]:
    if spec.representation == "voxel_grid":
        return voxel_grid
    if spec.representation == "time_surface":
        return partial(time_surface, tau=spec.tau, split=spec.split)
    return partial(frames if spec.representation == "frames" else three_channels, split=spec.split)


def read_recording(path: str | Path, *, spec: EventData) -> Events:
    """One file of events, of the sensor of `spec`.

    Raises ValueError naming the file if it cannot be read, needs an optional package, or is of another sensor, and if
    neither it nor `spec` tells one.
    """
    try:
        return read_of_sensor(Path(path), sensor=spec.known_sensor, disorder=spec.disorder)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error


def event_picture(events: Events, *, size: Size | None = None) -> Tensor:
    """All events as one picture, uint8 [3,H,W]: red where it became brighter, blue where darker, violet both.

    White is nothing; a colour is full where a pixel has as many events as the busiest hundredth of those with any.
    """
    off, on = frames(events, steps=1, size=size)[0]
    busy = torch.stack((off, on))
    busy = busy[busy > 0]
    full = float(np.quantile(busy, 0.99)) if len(busy) else 1.0
    off, on = (off / full).clamp(max=1), (on / full).clamp(max=1)
    return ((1 - torch.stack((off, (off + on).clamp(max=1), on))) * 255).round().to(torch.uint8)


def collate_clips(batch: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Clips [T,B,C,H,W] and labels int64 [B]."""
    clips, labels = zip(*batch, strict=True)
    return torch.stack(clips, dim=1), torch.tensor(labels)


class ClipSplit(Dataset):
    """One split: `split[index]` or `split[epoch, index]` -> (clip float32 [T,C,H,W], label int).

    A training clip is a function of (seed, epoch, index) alone, in any process and order; a plain index means epoch 0.
    Batches are made by `collate`.  Global random states are as before afterwards.  `.classes` names, `.labels` int64
    [N] and `.names` (file or row) go by index; `.size` is the height and width of the frames; `.sensor` that of the
    camera, or None where recordings of several were read; `.skipped` lists what could not be read and was left out.

    Raises UnreadableRecordingError (a ValueError) naming the file; at access if the set does not fit into memory, which
    is said as a warning.
    """

    collate = staticmethod(collate_clips)

    def __init__(self, found: Listing, spec: EventData, *, train: bool, seed: int = 0) -> None:
        self.spec, self.seed, self.classes = spec, seed, found.classes
        self.in_channels, self.steps = spec.in_channels, spec.steps
        self.skipped: list[str] = []
        self.size, self.sensor = spec.frame_size, spec.known_sensor
        self._transform = spec.augment.transform() if train else None
        self._listing, self._held = found, None
        self._load()
        self.labels, self.names = self._listing.labels, self._listing.names

    def _load(self) -> None:
        """Reads everything once where that is wanted or the events fit into memory, but at least one recording."""
        held: list[Packed] | None = []
        sensors: set[Size] = set()
        readable: list[int] = []
        total = 0
        for index in range(len(self._listing.labels)):
            try:
                events = self.recording(index)
            except UnreadableRecordingError as error:
                if not self.spec.skip_unreadable or isinstance(error.__cause__, ImportError):
                    raise
                self.skipped.append(str(error))
                continue
            self.size = check_clip(self.size or events.size, steps=self.steps, channels=self.in_channels)
            sensors.add(events.size)
            self.sensor = events.size if len(sensors) == 1 else None
            readable.append(index)
            if held is None:
                continue
            held.append(Packed.of(events))
            total += held[-1].nbytes
            if total > MEMORY_LIMIT:
                held = None
                self._say_too_large()
                if not self.spec.skip_unreadable:
                    return
        if not readable:
            raise ValueError(
                f"no recording of {self.spec.source} {self.spec.root} could be read; first: {self.skipped[0]}"
            )
        self.skipped.sort()
        self._held, self._listing = held, self._listing.chosen(np.array(readable))

    def _say_too_large(self) -> None:
        logger.warning(
            "the recordings of %s take more than %d MiB of memory, so every clip reads its whole file again: set "
            "workers=N for N processes that read ahead",
            self.spec.root,
            MEMORY_LIMIT >> 20,
        )
        if self.spec.skip_unreadable:
            logger.info(
                "data.skip_unreadable: reading all %d recordings of %s once", len(self._listing.labels), self.spec.root
            )

    def __len__(self) -> int:
        return len(self.labels)

    def recording(self, index: int) -> Events:
        """The events, as the file has them.  Raises UnreadableRecordingError naming it."""
        if self._held is not None:
            return self._held[index].events()
        name = self._listing.names[index]
        try:
            events = self._listing.sources[index].read()
        except (ValueError, OSError, ImportError) as error:
            reason = str(error).replace("\n", " ")
            raise UnreadableRecordingError(reason if name in reason else f"cannot read {name}: {reason}") from error
        if not self.spec.size and self.size not in (None, events.size):
            raise UnreadableRecordingError(
                f"recording {name} is of a sensor of {events.size} (height, width), the first one of {self.size}: set "
                "data.size to the size of all frames"
            )
        return events

    def picture(self, index: int) -> Tensor:
        """The whole recording as one picture, uint8 [3,H,W], for showing; colours as in `event_picture`."""
        return event_picture(self.recording(index), size=self.size)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self.labels):
            raise IndexError(f"index {index} of a split of {len(self.labels)} recordings")
        clip, label = clip_of(self.recording(index), spec=self.spec), int(self.labels[index])
        if self._transform is None:
            return clip, label
        with seeded(self.seed, epoch, index, torch_only=True):
            return self._transform(clip), label


def load_clip_split(spec: EventData, split: str, *, seed: int = 0) -> ClipSplit:
    """The "train" split (augmented as `spec.augment` says, random by `seed`) or the "test" split (never augmented).

    Raises ValueError for missing folders or files, empty class folders and unreadable recordings, with their names.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    train = split == "train"
    limit = spec.train_limit if train else spec.test_limit
    found = listing(spec.source, spec.root, split, limit=limit, disorder=spec.disorder, sensor=spec.known_sensor)
    return ClipSplit(found, spec, train=train, seed=seed)

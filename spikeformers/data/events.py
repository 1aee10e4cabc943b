"""Recordings of event cameras: the record, its slices in time, and the frames that networks take.

Frames by equal numbers or equal times are cut as spikingjelly cuts them, which the papers' DVS results use: the part
that does not divide goes to the last slice. Three channels: QSD-Transformer, App. G.4. Voxel grid: Zhu et al.,
"Unsupervised Event-based Learning of Optical Flow, Depth, and Egomotion", CVPR 2019, Eqs. 1-3. Time surface: Lagorce et
al., "HOTS", TPAMI 2017, Eqs. 1-3, read at the end of each slice. Frames may be smaller or larger than the sensor:
coordinates are scaled with integers, so no event is lost or counted twice.
"""

import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Size = tuple[int, int]  # height, width
Cut = typing.Literal["count", "time"]

LARGEST_SIDE = 2**15  # coordinates are int16
LONGEST = 2**53  # microseconds, 285 years: differences of times are exact in float64
LARGEST_CLIP = 2**28  # numbers, 1 GiB in float32; the pixels of a frame can be numbered in int32
CHUNK = 2**18  # events at once: the temporary indices stay in the cache


@dataclass(frozen=True, eq=False)
class Events:
    """Events of one recording in the order of their times; N of them.

    x, y: column and row [N], kept as int16.  p: polarity [N], kept as bool, True where it became brighter.
    t: microseconds [N], kept as int64, never decreasing.  size: height and width of the sensor.
    Arrays of any integer type are taken (p also as 0 and 1).  `events[part]` with a slice, a mask, or indices in
    increasing order is another record of the same sensor.

    Raises ValueError for lengths that differ, other types, an event outside the sensor, or time that goes backwards.
    """

    x: np.ndarray
    y: np.ndarray
    p: np.ndarray
    t: np.ndarray
    size: Size

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(1 <= side <= LARGEST_SIDE for side in self.size):
            raise ValueError(f"size must be a height and a width from 1 to {LARGEST_SIDE}, got {self.size}")
        shapes = {name: np.shape(getattr(self, name)) for name in "xypt"}
        if len(set(shapes.values())) > 1 or len(shapes["x"]) != 1:
            raise ValueError(f"x, y, p and t must be arrays of one length, got shapes {shapes}")
        height, width = self.size
        self._keep("x", np.int16, end=width, cure=f"inside the width {width} of the sensor")
        self._keep("y", np.int16, end=height, cure=f"inside the height {height} of the sensor")
        self._keep("p", np.bool_, end=2, cure="0 or 1 (False or True)")
        self._keep("t", np.int64, end=None, cure="whole microseconds")
        late = self.t[1:] < self.t[:-1]
        if late.any():
            first = int(late.argmax()) + 1
            raise ValueError(
                f"time goes backwards at event {first}: {self.t[first]} us after {self.t[first - 1]} us; sort the "
                "events by time first"
            )
        if len(self) and int(self.t[-1]) - int(self.t[0]) > LONGEST:
            raise ValueError(f"the recording lasts from {self.t[0]} to {self.t[-1]} us: t must be in microseconds")

    def _keep(self, name: str, kind: type, *, end: int | None, cure: str) -> None:
        values = getattr(self, name)
        if values.dtype != np.bool_ and not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be {cure} in an integer type, got {values.dtype}")
        if end is not None and len(values) and not 0 <= values.min() <= values.max() < end:
            first = int(((values < 0) | (values >= end)).argmax())
            raise ValueError(f"{name} of event {first} is {values[first]}, and must be {cure}")
        object.__setattr__(self, name, values.astype(kind, copy=False))

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, part: slice | np.ndarray) -> "Events":
        return Events(self.x[part], self.y[part], self.p[part], self.t[part], self.size)

    @property
    def duration(self) -> int:
        """Microseconds from the first event to the last; 0 without events."""
        return int(self.t[-1] - self.t[0]) if len(self) else 0


def by_count(events: Events, *, steps: int) -> list[Events]:
    """`steps` records of N // steps events each; the last one also has the rest. Raises ValueError if steps < 1."""
    return _parts(events, _bounds(events, steps=steps, split="count"))


def by_time(events: Events, *, steps: int) -> list[Events]:
    """`steps` records that last equally long, in whole microseconds; the last one also has the rest.

    Raises ValueError if steps < 1.
    """
    return _parts(events, _bounds(events, steps=steps, split="time"))


def windows(events: Events, *, microseconds: int) -> Iterator[Events]:
    """Records of a fixed duration, one after the other from the first event on, as a stream gives them.

    A window without events is given too; the last one ends after the last event.  Raises ValueError if
    microseconds < 1.
    """
    if microseconds < 1:
        raise ValueError(f"microseconds must be at least 1, got {microseconds}")
    start = 0
    for window in range(events.duration // microseconds + 1 if len(events) else 0):
        end = int(np.searchsorted(events.t, events.t[0] + (window + 1) * microseconds))
        yield events[start:end]
        start = end


def frames(
    events: Events, *, steps: int, size: Size | None = None, split: Cut = "count"
) -> Float[Tensor, "T 2 height width"]:
    """Numbers of events, float32 [T,2,H,W]: channel 0 where it became darker, channel 1 where it became brighter.

    `size`: height and width of the frames where they are not the sensor's.  `split`: slices of equal numbers
    ("count") or of equal durations ("time").

    Raises ValueError for fewer than one step, a split of another name, or a clip of more than LARGEST_CLIP numbers.
    """
    height, width = check_clip(size or events.size, steps=steps, channels=2)
    bounds = _bounds(events, steps=steps, split=split)
    counts = torch.zeros(steps, 2 * height * width)
    for step in range(steps):
        for start in range(bounds[step], bounds[step + 1], CHUNK):
            part = slice(start, min(start + CHUNK, bounds[step + 1]))
            index = torch.from_numpy(_pixels(events, part, size=(height, width), polar=True))
            counts[step] += torch.bincount(index, minlength=2 * height * width)
    return counts.view(steps, 2, height, width)


def three_channels(
    events: Events, *, steps: int, size: Size | None = None, split: Cut = "count"
) -> Float[Tensor, "T 3 height width"]:
    """Numbers of positive, of negative, and of all events, float32 [T,3,H,W]; arguments and errors as in `frames`.

    Source: QSD-Transformer, App. G.4.
    """
    check_clip(size or events.size, steps=steps, channels=3)
    off, on = frames(events, steps=steps, size=size, split=split).unbind(1)
    return torch.stack((on, off, on + off), dim=1)


def voxel_grid(events: Events, *, steps: int, size: Size | None = None) -> Float[Tensor, "T 1 height width"]:
    """Sums of polarities (-1 or 1), float32 [T,1,H,W], each shared by the two nearest of T times in linear proportion.

    The first of these times is the first event's, the last is the last event's; with one step all weights are 1.

    Raises ValueError for fewer than one step, or a clip of more than LARGEST_CLIP numbers.
    Source: Zhu et al., CVPR 2019, Eqs. 1-3.
    """
    height, width = check_clip(size or events.size, steps=steps, channels=1)
    grid = torch.zeros(steps, height * width, dtype=torch.float64)
    scale = (steps - 1) / max(events.duration, 1)
    # Events whose times lie between the same two grid points are neighbours, since time never goes backwards.
    starts = np.searchsorted((events.t - events.t[:1]) * scale, np.arange(steps))
    bounds = [*starts.tolist(), len(events)]
    for step in range(steps):
        for start in range(bounds[step], bounds[step + 1], CHUNK):
            part = slice(start, min(start + CHUNK, bounds[step + 1]))
            index = torch.from_numpy(_pixels(events, part, size=(height, width), polar=False))
            later = torch.from_numpy((events.t[part] - events.t[0]) * scale - step)
            sign = torch.from_numpy(np.where(events.p[part], 1.0, -1.0))
            grid[step] += torch.bincount(index, weights=sign * (1 - later), minlength=height * width)
            if step + 1 < steps:
                grid[step + 1] += torch.bincount(index, weights=sign * later, minlength=height * width)
    return grid.float().view(steps, 1, height, width)


def time_surface(
    events: Events, *, steps: int, tau: float, size: Size | None = None, split: Cut = "count"
) -> Float[Tensor, "T 2 height width"]:
    """exp(-(end - last) / tau), float32 [T,2,H,W]: `last` is the time of a pixel's last event of a polarity so far.

    `tau`: microseconds.  `end`: the time of the slice's last event, or where durations are equal the slice's end.
    Where nothing has happened yet the surface is 0; earlier slices count.  Channels, `size` and `split` as in `frames`.

    Raises ValueError for a tau not above 0, and as `frames` does.
    Source: Lagorce et al., TPAMI 2017, Eqs. 1-3.
    """
    if not tau > 0:
        raise ValueError(f"tau must be above 0 microseconds, got {tau}")
    height, width = check_clip(size or events.size, steps=steps, channels=2)
    bounds = _bounds(events, steps=steps, split=split)
    last = np.full(2 * height * width, -np.inf)
    surfaces = torch.zeros(steps, 2 * height * width)
    if len(events):
        elapsed = events.t - events.t[0]
        ends = elapsed[np.maximum(bounds[1:], 1) - 1]
        if split == "time":
            ends[:-1] = np.arange(1, steps) * (events.duration // steps)
        for step in range(steps):
            for start in range(bounds[step], bounds[step + 1], CHUNK):
                part = slice(start, min(start + CHUNK, bounds[step + 1]))
                # Of several events of one pixel numpy keeps the last, which is the latest.
                last[_pixels(events, part, size=(height, width), polar=True)] = elapsed[part]
            surfaces[step] = torch.from_numpy(np.exp((last - ends[step]) / tau))
    return surfaces.view(steps, 2, height, width)


def check_clip(size: Size, *, steps: int, channels: int) -> Size:
    """Height and width of frames that make a clip of a size that can be held.

    Raises ValueError for fewer than one step, empty frames, or more than LARGEST_CLIP numbers.
    """
    _check_steps(steps)
    height, width = size
    if height < 1 or width < 1 or steps * channels * height * width > LARGEST_CLIP:
        raise ValueError(
            f"clips of {steps} x {channels} x {height} x {width} (steps, channels, height, width) are empty or of more "
            f"than {LARGEST_CLIP:,} numbers: set data.size, in Python size=(height, width), to smaller frames"
        )
    return height, width


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _bounds(events: Events, *, steps: int, split: Cut) -> np.ndarray:
    """[T+1] where slices begin, and the number of events."""
    _check_steps(steps)
    first = np.arange(steps)
    if split == "count":
        starts = first * (len(events) // steps)
    elif split == "time":
        begin = events.t[0] if len(events) else 0
        starts = np.searchsorted(events.t, begin + first * (events.duration // steps))
    else:
        raise ValueError(f"split must be count or time, got {split!r}")
    return np.append(starts, len(events))


def _parts(events: Events, bounds: np.ndarray) -> list[Events]:
    return [events[start:end] for start, end in itertools.pairwise(bounds)]


def _pixels(events: Events, part: slice, *, size: Size, polar: bool) -> np.ndarray:
    """int32 index of each event into [H,W], or into [2,H,W] if `polar`."""
    index = _scaled(events.y[part], events.size[0], size[0]).astype(np.int32)
    index *= size[1]
    index += _scaled(events.x[part], events.size[1], size[1])
    if polar:
        index += events.p[part] * np.int32(size[0] * size[1])
    return index


def _scaled(coordinates: np.ndarray, side: int, wanted: int) -> np.ndarray:
    return coordinates if side == wanted else (np.arange(side) * wanted // side).astype(np.int32)[coordinates]

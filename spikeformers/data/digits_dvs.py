"""The offline default of event data: scikit-learn's digits, moved in front of a simulated event camera.

A pixel fires each time that the logarithm of its light has changed by a threshold since its last event, with the
light linear in log between two pictures: Rebecq et al., "ESIM", CoRL 2018, section 3.1.  Thresholds that differ between
pixels and false events: Hu et al., "v2e", CVPR workshops 2021.  The camera looks at a digit in three eye movements that
lead back to their start, as for N-MNIST: Orchard et al., Front. Neurosci. 2015.  A recording is a function of its split
and index alone, and the split is that of the digits (digits.py)."""

from dataclasses import dataclass

import numpy as np

from spikeformers.data.augment import seed_of
from spikeformers.data.events import Events

SENSOR = (32, 32)
DARKEST = 1e-3  # added to light before its logarithm (ESIM's log_eps): black has one then
THRESHOLD = 0.2  # natural logarithm; real sensors: 0.1 to 0.5
THRESHOLD_SPREAD = 0.03  # standard deviation between pixels (v2e)
NOISE_HZ = 1.0  # false events of a pixel in a second, as in dim light
BLACK = 0.3  # light of the ground beside the white digit's 1
PITCH = 2.5  # pixels of the sensor between two of the digit
FRAMES = 48  # of the film that the camera sees
MOVEMENT_US = 100_000  # average of one of the three movements


def simulate(video: np.ndarray, times: np.ndarray, *, threshold: float | np.ndarray = THRESHOLD) -> Events:
    """What an event camera makes of a grey video [F,H,W] with light in 0..1, seen at `times` [F] in microseconds.

    `threshold`: change of the logarithm of light + DARKEST from one event to the next, for all pixels or [H,W].
    Several events of one pixel between two pictures are spread in time; the first picture fires nothing.

    Raises ValueError for another shape, light outside 0..1, times that do not increase, or a threshold not above 0.
    Source: ESIM, section 3.1.
    """
    times = np.asarray(times)
    if video.ndim != 3 or not len(video) or times.shape != video.shape[:1]:
        raise ValueError(f"video must be [F,H,W] with a time for each picture, got {video.shape} and {times.shape}")
    if not np.issubdtype(times.dtype, np.integer) or (np.diff(times) <= 0).any():
        raise ValueError(f"times must be whole microseconds that increase, got {times.tolist()[:5]} ... {times.dtype}")
    if not 0 <= video.min() <= video.max() <= 1:
        raise ValueError(f"light must lie in 0..1, got {video.min()} to {video.max()}: divide by the brightest")
    if not np.min(threshold) > 0:
        raise ValueError(f"threshold must be above 0, got {np.min(threshold)}")
    light = np.log(video.astype(np.float64) + DARKEST)
    light = (light - light[0]) / threshold
    return _crossings(light, times)


def _crossings(light: np.ndarray, times: np.ndarray) -> Events:
    """Events of light [F,H,W] in units of the thresholds, which starts at 0."""
    # A pixel's level: the whole number of thresholds at its last event. It stays while the light is less than one away.
    low, high = np.floor(light).astype(np.int32), np.ceil(light).astype(np.int32)
    level = np.zeros_like(low)
    for step in range(1, len(level)):
        np.minimum(np.maximum(level[step - 1], low[step]), high[step], out=level[step])
    change = level[1:] - level[:-1]
    flat = np.flatnonzero(change)
    change, before = change.ravel()[flat], level[:-1].ravel()[flat]
    counts = np.abs(change)
    each = np.repeat(np.arange(len(flat)), counts)
    nth = np.arange(1, len(each) + 1) - np.repeat(counts.cumsum() - counts, counts)
    step, row, column = np.unravel_index(flat[each], light[1:].shape)
    start, end = light[:-1].ravel()[flat[each]], light[1:].ravel()[flat[each]]
    on = change[each] > 0
    crossed = before[each] + np.where(on, nth, -nth)
    share = (crossed - start) / (end - start)
    t = times[step] + np.rint(share * (times[step + 1] - times[step])).astype(np.int64)
    order = np.argsort(t, kind="stable")
    return Events(column[order], row[order], on[order], t[order], light.shape[1:])


def add_noise(events: Events, *, hz: float, end: int, random: np.random.RandomState) -> Events:
    """The same record with false events from 0 to `end` microseconds: Poisson, `hz` a second in each pixel."""
    height, width = events.size
    count = random.poisson(hz * end * 1e-6 * height * width)
    false = (random.randint(side, size=count) for side in (width, height, 2, end))
    x, y, p, t = (np.concatenate(both) for both in zip((events.x, events.y, events.p, events.t), false, strict=True))
    order = np.argsort(t, kind="stable")
    return Events(x[order], y[order], p[order].astype(bool), t[order], events.size)


def path(random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Where the middle of a digit is, [F,2] down and right of the sensor's in pixels, and when, [F] in microseconds.

    Round the corners of a triangle, either way, from any of them; slow at the corners and fast between them.
    """
    angles = np.sort(random.uniform(-0.3, 0.3, 3) + np.arange(3) * (2 * np.pi / 3)) + random.uniform(2 * np.pi)
    corners = random.uniform(2.5, 4) * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    corners = corners[:: random.choice([-1, 1])] + random.uniform(-1, 1, 2)
    lasting = random.uniform(0.7, 1.3, 3) * MOVEMENT_US
    times = np.linspace(0, lasting.sum(), FRAMES).astype(np.int64)
    begins = np.append(0, lasting.cumsum())
    movement = np.searchsorted(begins[1:3], times, side="right")
    share = (times - begins[movement]) / lasting[movement]
    eased = (0.5 - 0.5 * np.cos(np.pi * share))[:, None]
    return corners[movement] * (1 - eased) + corners[(movement + 1) % 3] * eased, times


def film(pixels: np.ndarray, middles: np.ndarray) -> np.ndarray:
    """Light float64 [F,H,W] of a grey uint8 [8,8] picture, enlarged bilinearly, with its middle at `middles` [F,2]."""
    rows, columns = (
        _tents(side, count, middles[:, axis])
        for axis, (side, count) in enumerate(zip(SENSOR, pixels.shape, strict=True))
    )
    return BLACK + (1 - BLACK) * (rows @ (pixels / 255) @ columns.transpose(0, 2, 1))


def _tents(side: int, count: int, middle: np.ndarray) -> np.ndarray:
    """Bilinear weights [F,side,count] of a picture's rows in the sensor's; beside the picture there is nothing."""
    seen = (np.arange(side) - (side - 1) / 2 - middle[:, None]) / PITCH + (count - 1) / 2
    return np.maximum(0, 1 - np.abs(seen[..., None] - np.arange(count)))


@dataclass(frozen=True)
class MovingDigit:
    """A recording that is simulated where it is read: a digit uint8 [8,8] and its number in its split."""

    pixels: np.ndarray
    split: str
    index: int

    def read(self) -> Events:
        """The same events at every call, in any process."""
        random = np.random.RandomState(seed_of("digits_dvs", self.split, self.index))
        middles, times = path(random)
        # Clipped, since nobody builds a pixel that fires without end.
        threshold = np.maximum(THRESHOLD + THRESHOLD_SPREAD * random.standard_normal(SENSOR), THRESHOLD / 2)
        events = simulate(film(self.pixels, middles), times, threshold=threshold)
        return add_noise(events, hz=NOISE_HZ, end=int(times[-1]), random=random)

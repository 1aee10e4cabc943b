"""Records refuse what is no recording; slices and frames count every event once, where and when it happened."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from spikeformers.data.events import (
    CHUNK,
    Events,
    by_count,
    by_time,
    frames,
    three_channels,
    time_surface,
    voxel_grid,
    windows,
)


def drawn(count: int, *, size: tuple[int, int] = (6, 9), seed: int = 0, until: int = 10_000) -> Events:
    """Random events, some at the same time and place."""
    random = np.random.RandomState(seed)
    return Events(
        x=random.randint(size[1], size=count),
        y=random.randint(size[0], size=count),
        p=random.randint(2, size=count),
        t=np.sort(random.randint(until, size=count)) + 500,
        size=size,
    )


def listed(*events: tuple[int, int, int, int], size: tuple[int, int] = (2, 3)) -> Events:
    """Events from rows (t, x, y, p)."""
    t, x, y, p = np.array(events, dtype=np.int64).reshape(-1, 4).T
    return Events(x=x, y=y, p=p, t=t, size=size)


def test_a_record_keeps_small_types_and_its_parts_are_records():
    events = listed((5, 2, 1, 1), (7, 0, 0, 0), (7, 1, 1, 1))
    assert (events.x.dtype, events.y.dtype, events.p.dtype, events.t.dtype) == (np.int16, np.int16, bool, np.int64)
    assert (len(events), events.duration) == (3, 2)
    for part in (slice(1, None), np.array([False, True, True]), np.array([1, 2])):
        assert events[part].t.tolist() == [7, 7]
        assert events[part].size == (2, 3)
    assert len(events[:0]) == events[:0].duration == 0
    with pytest.raises(ValueError, match="time goes backwards at event 1: 5 us after 7 us"):
        events[1::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [0, 3, 1]}, "x of event 1 is 3, and must be inside the width 3"),
        ({"y": [0, 0, -1]}, "y of event 2 is -1, and must be inside the height 2"),
        ({"p": [1, 0, -1]}, "p of event 2 is -1, and must be 0 or 1"),
        ({"t": [1, 3, 2]}, "time goes backwards at event 2: 2 us after 3 us"),
        ({"t": [0, 1, 2**60]}, "must be in microseconds"),
        ({"t": [0.5, 1.0, 2.0]}, "t must be whole microseconds in an integer type, got float64"),
        ({"x": [0, 1]}, "arrays of one length"),
        ({"x": [[0, 1, 2]], "y": [[0, 1, 1]], "p": [[0, 1, 1]], "t": [[0, 1, 1]]}, "arrays of one length"),
    ],
)
def test_a_record_names_the_first_event_that_cannot_be(change, message):
    fields = {"x": [0, 1, 2], "y": [0, 1, 1], "p": [0, 1, 1], "t": [0, 1, 1]} | change
    with pytest.raises(ValueError, match=message):
        Events(**{name: np.array(values) for name, values in fields.items()}, size=(2, 3))


@pytest.mark.parametrize("size", [(0, 3), (2, 2**15 + 1), (2,)])
def test_a_sensor_has_a_height_and_a_width(size):
    with pytest.raises(ValueError, match="size must be a height and a width"):
        listed((0, 0, 0, 0), size=size)


def test_slices_of_equal_numbers_leave_the_rest_to_the_last():
    events = drawn(23)
    assert [len(part) for part in by_count(events, steps=5)] == [4, 4, 4, 4, 7]
    assert np.concatenate([part.t for part in by_count(events, steps=5)]).tolist() == events.t.tolist()
    assert [len(part) for part in by_count(drawn(2), steps=3)] == [0, 0, 2]


def test_slices_of_equal_duration_leave_the_rest_to_the_last():
    events = listed(*((t, 0, 0, 0) for t in (10, 12, 13, 13, 15, 16, 19, 20)))
    assert [part.t.tolist() for part in by_time(events, steps=3)] == [[10, 12], [13, 13, 15], [16, 19, 20]]
    assert [len(part) for part in by_time(events, steps=20)] == [0] * 19 + [8]


def test_windows_follow_one_another_and_may_be_empty():
    events = listed(*((t, 0, 0, 0) for t in (10, 12, 15, 31)))
    assert [part.t.tolist() for part in windows(events, microseconds=5)] == [[10, 12], [15], [], [], [31]]
    assert list(windows(events[:0], microseconds=5)) == []


@pytest.mark.parametrize("split", ["count", "time"])
@pytest.mark.parametrize("size", [None, (3, 4), (12, 9)])
def test_frames_count_every_event_of_their_slice(split, size):
    events = drawn(1000)
    height, width = size or events.size
    expected = torch.zeros(7, 2, height, width)
    for step, part in enumerate({"count": by_count, "time": by_time}[split](events, steps=7)):
        for x, y, p in zip(part.x.tolist(), part.y.tolist(), part.p.tolist(), strict=True):
            expected[step, int(p), y * height // 6, x * width // 9] += 1
    result = frames(events, steps=7, size=size, split=split)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    positive_negative_all = torch.stack((expected[:, 1], expected[:, 0], expected.sum(1)), dim=1)
    assert torch.equal(three_channels(events, steps=7, size=size, split=split), positive_negative_all)


def test_recordings_longer_than_a_chunk_are_counted_whole():
    events = drawn(2 * CHUNK + 3, size=(2, 2))
    assert frames(events, steps=1).sum() == len(events)
    assert voxel_grid(events, steps=1).sum() == 2 * events.p.sum() - len(events)


def test_a_voxel_grid_shares_each_polarity_between_two_times():
    events = listed((100, 0, 0, 1), (125, 1, 0, 1), (150, 1, 0, 0), (190, 2, 1, 1), (200, 2, 1, 1))
    expected = torch.zeros(3, 1, 2, 3)  # at 100, 150 and 200 microseconds
    expected[0, 0, 0, 0] = 1
    expected[0, 0, 0, 1] = 0.5
    expected[1, 0, 0, 1] = 0.5 - 1
    expected[1, 0, 1, 2] = 0.2
    expected[2, 0, 1, 2] = 0.8 + 1
    torch.testing.assert_close(voxel_grid(events, steps=3), expected)  # 0.2 is no binary fraction
    assert torch.equal(voxel_grid(events, steps=1)[0, 0], torch.tensor([[1.0, 0, 0], [0, 0, 2]]))
    assert torch.equal(voxel_grid(events[:1], steps=3)[:, 0, 0, 0], torch.tensor([1.0, 0, 0]))


def test_a_voxel_grid_equals_the_kernel_of_its_paper():
    events = drawn(300)
    time = torch.from_numpy((events.t - events.t[0]) / events.duration * 4)
    expected = torch.zeros(5, 1, 6, 9, dtype=torch.float64)
    for step in range(5):
        weight = (1 - (time - step).abs()).clamp(min=0)
        for n in range(300):
            expected[step, 0, events.y[n], events.x[n]] += (1.0 if events.p[n] else -1.0) * weight[n]
    torch.testing.assert_close(voxel_grid(events, steps=5), expected.float())  # sums in another order


def test_a_time_surface_decays_from_the_last_event_of_each_pixel_and_polarity():
    events = listed((0, 0, 0, 1), (30, 0, 0, 1), (40, 1, 0, 0), (50, 2, 1, 1), (70, 0, 0, 0), (100, 1, 1, 0))
    surface = time_surface(events, steps=2, tau=10.0)  # slices end at 40 and 100
    expected = torch.zeros(2, 2, 2, 3)
    expected[0, 1, 0, 0] = math.exp(-1)
    expected[0, 0, 0, 1] = 1
    for (channel, y, x), last in {(1, 0, 0): 30, (0, 0, 1): 40, (1, 1, 2): 50, (0, 0, 0): 70, (0, 1, 1): 100}.items():
        expected[1, channel, y, x] = math.exp((last - 100) / 10)
    torch.testing.assert_close(surface, expected)
    halves = time_surface(events, steps=2, tau=10.0, split="time")  # the first ends at 50, where the second begins
    torch.testing.assert_close(halves[0, 0, 0, 1], torch.tensor(math.exp(-1)))
    assert halves[0, 1, 1, 2] == 0
    torch.testing.assert_close(halves[1], expected[1])


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("split", ["count", "time"])
def test_recordings_with_hardly_any_events_become_frames_too(count, split):
    events = drawn(count)
    assert frames(events, steps=4, split=split).sum() == count
    assert three_channels(events, steps=4, split=split).sum() == 2 * count
    assert voxel_grid(events, steps=4).shape == (4, 1, 6, 9)
    surface = time_surface(events, steps=4, tau=100.0, split=split)
    assert bool(surface.any()) == bool(count)
    assert surface.isfinite().all()


def test_arguments_out_of_range_are_refused():
    events = drawn(5)
    for function in (by_count, by_time, frames, three_channels, voxel_grid):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            function(events, steps=0)
    with pytest.raises(ValueError, match="split must be count or time, got 'number'"):
        frames(events, steps=2, split="number")
    with pytest.raises(ValueError, match="tau must be above 0 microseconds, got 0"):
        time_surface(events, steps=2, tau=0.0)
    with pytest.raises(ValueError, match="microseconds must be at least 1, got 0"):
        next(windows(events, microseconds=0))


@pytest.mark.parametrize(
    ("function", "channels"),
    [(frames, 2), (three_channels, 3), (voxel_grid, 1), (partial(time_surface, tau=1.0), 2)],
)
def test_clips_that_are_empty_or_fill_the_memory_are_refused_with_their_size(monkeypatch, function, channels):
    monkeypatch.setattr("spikeformers.data.events.LARGEST_CLIP", 4 * channels * 40 * 50)
    events = drawn(5)
    assert function(events, steps=4, size=(40, 50)).numel() == 4 * channels * 40 * 50
    for size in ((0, 4), (41, 50)):
        with pytest.raises(ValueError, match=rf"clips of 4 x {channels} x {size[0]} x {size[1]} .*: set data.size"):
            function(events, steps=4, size=size)


def test_one_event_in_the_corner_of_the_largest_sensor_does_not_make_a_clip_of_gigabytes():
    one = Events(*(np.array([value]) for value in (2**15 - 1, 2**15 - 1, 1, 0)), size=(2**15, 2**15))
    with pytest.raises(ValueError, match="of more than 268,435,456 numbers"):
        frames(one, steps=4)

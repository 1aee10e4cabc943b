"""How pictures are prepared, as files tell it: what cannot be is refused, and what networks are given is known."""

import dataclasses

import pytest

from spikeformers.deploy import Framing, Letterbox, Preprocessing
from spikeformers.deploy.pictures import told_by

NUMBERS = {"channels": 1, "mean": (0.3,), "std": (0.4,)}
GREY = Preprocessing(size=32, crop=0.875, **NUMBERS)
FRAME = Framing(short_side=48, max_side=100, **NUMBERS)
BOX = Letterbox(window=(40, 60), **NUMBERS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 0}, "size=0"),
        ({"size": 2.0}, "size=2.0"),
        ({"size": 10**9}, "size=1000000000"),
        ({"crop": 1e-9}, "crop=1e-09"),
        ({"crop": float("nan")}, "crop=nan"),
        ({"channels": 2}, "channels=2"),
        ({"channels": True}, "channels=True"),
        ({"mean": (0.1, 0.2)}, "mean must be a tuple of 1 numbers"),
        ({"mean": ("0",)}, "mean must be"),
        ({"std": (0.0,)}, "std must be"),
        ({"std": (float("inf"),)}, "std must be"),
        ({"interpolation": "nearest"}, "bicubic or bilinear, got 'nearest'"),
    ],
)
def test_squares_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(GREY, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"short_side": -1}, "short_side must be 0 to 4096 pixels, got -1"),
        ({"max_side": 5000}, "max_side must be 0 to 4096 pixels, got 5000"),
        ({"max_side": True}, "max_side must be 0 to 4096 pixels, got True"),
        ({"fixed": (32, 32)}, "two ways to resize"),
        ({"short_side": 0, "max_side": 0, "fixed": (32,)}, "fixed must be a height and a width"),
        ({"short_side": 0, "max_side": 0, "fixed": [32, 32]}, "fixed must be a height and a width"),
        ({"window": (0, 32), "stride": (1, 1)}, "window must be a height and a width"),
        ({"window": (32, 32)}, r"stride=\(\) does not cover pictures by window=\(32, 32\)"),
        ({"stride": (32, 32)}, "does not cover"),
        ({"window": (32, 32), "stride": (32, 33)}, "does not cover"),
        ({"window": (32, 32), "stride": (1, 1), "short_side": 96}, "in 4225 steps .* at most 4096"),
        ({"window": (32, 32), "stride": (1, 1), "short_side": 0, "max_side": 96}, "in 4225 steps"),
        ({"window": (8, 8), "stride": (8, 8), "short_side": 0, "max_side": 0}, r"of \(1024, 1024\) in 16384 steps"),
        ({"window": (1, 1), "stride": (1, 1), "short_side": 0, "max_side": 0, "fixed": (64, 65)}, "in 4160 steps"),
        ({"std": (0.0,)}, "std must be"),
    ],
)
def test_frames_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(FRAME, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": (40,)}, r"window must be a height and a width, 1 to 4096, got \(40,\)"),
        ({"window": [40, 60]}, "window must be a height and a width"),
        ({"window": (40, 4097)}, "window must be a height and a width"),
        ({"window": (0, 60)}, "window must be a height and a width"),
        ({"window": (40, True)}, "window must be a height and a width"),
        ({"window": (40.0, 60)}, "window must be a height and a width"),
        ({"turning": 1}, "turning must be True or False, got 1"),
        ({"padded_to": 0}, "padded_to must be 1 to 256 pixels, got 0"),
        ({"padded_to": 10**9}, "padded_to must be 1 to 256 pixels, got 1000000000"),
        ({"padded_to": True}, "padded_to must be 1 to 256 pixels, got True"),
        ({"mean": (0.1, 0.2)}, "mean must be a tuple of 1 numbers"),
        ({"interpolation": ""}, "bicubic or bilinear"),
    ],
)
def test_letterboxes_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(BOX, **changes)


def test_a_letterbox_pads_to_its_window_or_where_that_turns_to_a_multiple():
    assert BOX.seen == (64, 64)
    assert dataclasses.replace(BOX, padded_to=1).seen == (40, 60)
    assert BOX.padded(40, 30) == (64, 64)
    turning = dataclasses.replace(BOX, turning=True)
    assert turning.seen is None
    assert turning.padded(60, 20) == (64, 32)
    assert dataclasses.replace(turning, padded_to=1).padded(60, 20) == (60, 20)


def test_as_many_windows_as_a_network_may_be_run_for_are_no_error():
    assert Framing(fixed=(64, 64), window=(1, 1), stride=(1, 1), **NUMBERS).seen == (1, 1)
    assert dataclasses.replace(FRAME, window=(4096, 4096), stride=(1, 1)).seen == (4096, 4096)


def test_what_the_network_is_given_is_known_where_it_does_not_depend_on_the_picture():
    fixed = Framing(fixed=(48, 64), **NUMBERS)
    windows = {"window": (32, 80), "stride": (32, 80)}
    assert GREY.seen == (32, 32)
    assert FRAME.seen is None
    assert fixed.seen == (48, 64)
    assert dataclasses.replace(FRAME, **windows).seen == (32, 80)
    assert dataclasses.replace(fixed, **windows).seen == (32, 64)


@pytest.mark.parametrize("told", [GREY, FRAME, BOX], ids=["square", "frame", "letterbox"])
def test_all_come_back_from_plain_values(told):
    stored = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(told).items()}
    assert told_by(stored) == told

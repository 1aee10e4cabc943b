"""Recordings come out of memory as they went in, at six bytes an event."""

import numpy as np
import pytest

from spikeformers.data.event_packed import Packed
from spikeformers.data.events import Events


@pytest.mark.parametrize(
    ("size", "duration", "nbytes"),
    [((128, 128), 6_000_000, 6), ((256, 346), 2**31 - 1, 7), ((720, 1280), 2**31, 12), ((2, 2), 0, 6)],
)
@pytest.mark.parametrize("start", [0, -5, 1_605_537_493_718_345])
def test_a_packed_recording_is_the_same_one_in_few_bytes(size, duration, nbytes, start):
    t = start + np.array([0, duration // 3, duration // 2, duration])
    ends = np.array([0, 1])
    events = Events(ends.repeat(2) * (size[1] - 1), np.tile(ends, 2) * (size[0] - 1), np.array([1, 0, 0, 1]), t, size)
    packed = Packed.of(events)
    assert packed.nbytes == 4 * nbytes
    found = packed.events()
    assert found.size == size
    for name in "xypt":
        assert getattr(found, name).tolist() == getattr(events, name).tolist()
        assert getattr(found, name).dtype == getattr(events, name).dtype


def test_a_recording_without_events_is_packed_too():
    none = np.zeros(0, int)
    packed = Packed.of(Events(none, none, none, none, (3, 4)))
    assert (packed.nbytes, len(packed.events()), packed.events().size) == (0, 0, (3, 4))

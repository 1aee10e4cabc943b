"""Recordings as they are held in memory: six bytes an event where the sensor and the time are of usual size, not 13."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from spikeformers.data.events import Events, Size

SIDE_OF_BYTE = 2**8
LONGEST_OF_WORD = 2**31 - 1  # microseconds, 36 minutes


@dataclass(frozen=True, eq=False)
class Packed:
    """Events of one recording: x and y [N] in a byte each if the sensor allows; `elapsed` [N] is 2 (t - start) + p."""

    x: np.ndarray
    y: np.ndarray
    elapsed: np.ndarray
    start: int
    size: Size

    @classmethod
    def of(cls, events: Events) -> Self:
        """Copies, which keep nothing else in memory."""
        start = int(events.t[0]) if len(events) else 0
        word = np.uint32 if events.duration <= LONGEST_OF_WORD else np.int64
        x, y = (
            column.astype(np.uint8 if side <= SIDE_OF_BYTE else np.int16)
            for column, side in ((events.x, events.size[1]), (events.y, events.size[0]))
        )
        return cls(x, y, ((events.t - start) << 1 | events.p).astype(word), start, events.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.x.nbytes + self.y.nbytes + self.elapsed.nbytes

    def events(self) -> Events:
        """The recording, exactly as it was packed."""
        t = (self.elapsed >> 1).astype(np.int64) + self.start
        return Events(self.x, self.y, (self.elapsed & 1).astype(bool), t, self.size)

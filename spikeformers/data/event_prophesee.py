"""Readers of Prophesee's files: .dat with change detection events, and .raw with EVT 2.0 and EVT 3.0.

Bit fields are those of Prophesee's description of its formats. As its decoder does, events before the first word that
tells the time are left out, the clocks' wrap-arounds (34 bits in EVT 2.0, 24 in EVT 3.0) are undone, and a new upper
part of the time starts its lower part at 0.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spikeformers.data.event_columns import Columns, header_of, joined, records
from spikeformers.data.events import Size

CHANGES = (0x00, 0x0C)  # types of .dat events: of the first cameras, of the later ones
EVENT_DAT = np.dtype([("t", "<u4"), ("address", "<u4")])
OFF_2, ON_2, TIME_HIGH_2 = 0x0, 0x1, 0x8
TIME_HIGH_BITS_2 = 28
ROW, OTHER_ROW, COLUMN, BASE, VECTOR_12, VECTOR_8, TIME_LOW, TIME_HIGH = 0x0, 0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x8
TIME_BITS = 12  # in each of the two time words of EVT 3.0
VECTOR_WIDTHS, VALID_BITS = np.zeros((2, 16), np.int16)  # by type of word: columns that it passes, bits that are events
VECTOR_WIDTHS[[VECTOR_12, VECTOR_8]] = 12, 8
VALID_BITS[[COLUMN, VECTOR_12, VECTOR_8]] = 1, 0xFFF, 0xFF
WORDS = 2**18  # decoded at once, so that what is worked out about them stays in the cache


def read_dat(content: bytes) -> Columns:
    """Events of a Prophesee .dat file.  Raises ValueError for events of another kind, or a broken file."""
    lines, start = header_of(content, mark=b"% ", end=b"% end")
    kind, bytes_each = _event_kind(content, start) if lines else (CHANGES[0], EVENT_DAT.itemsize)
    if kind not in CHANGES or bytes_each != EVENT_DAT.itemsize:
        raise ValueError(
            f"its events are of type {kind:#x} with {bytes_each} bytes; read are change detection events, type 0x0 or "
            "0xc with 8 bytes"
        )
    version = next((int(line.split()[-1]) for line in lines if re.fullmatch(r"% Version \d+", line)), 1)
    events = records(content, EVENT_DAT, start=start + 2 if lines else start)
    address = events["address"]
    if version < 2:
        return Columns(address & 0x1FF, address >> 9 & 0xFF, (address & 0x20000) != 0, events["t"], _size(lines))
    return Columns(
        (address & 0x3FFF).astype(np.int16),
        (address >> 14 & 0x3FFF).astype(np.int16),
        (address & 0x10000000) != 0,
        events["t"],
        _size(lines),
    )


def _event_kind(content: bytes, start: int) -> tuple[int, int]:
    if len(content) < start + 2:
        raise ValueError(f"it ends at offset {len(content)}, after its header: fetch it again")
    return content[start], content[start + 1]


def read_raw(content: bytes) -> Columns:
    """Events of a Prophesee .raw file in EVT 2.0 or EVT 3.0.  Raises ValueError for another or a broken one."""
    lines, start = header_of(content, mark=b"% ", end=b"% end")
    header = "\n".join(lines)
    form = re.search(r"^% (?:format EVT|evt )([\d.]+)", header, re.MULTILINE)
    if form is None:
        raise ValueError("its header does not tell the format (% evt 3.0 or % format EVT3): fetch it again")
    if form[1] not in DECODERS:
        raise ValueError(f"its format is EVT {form[1]}; read are EVT 2.0 and 3.0: convert it with Prophesee's tools")
    kind, decode = DECODERS[form[1]]
    words = records(content, np.dtype(kind), start=start)
    state, parts = State(), []
    for first in range(0, len(words), WORDS):
        part, state = decode(words[first : first + WORDS], state)
        parts.append(part)
    return joined(parts, size=_size(lines))


def _size(lines: list[str]) -> Size | None:
    """Height and width, as headers of different ages tell them."""
    header = "\n".join(lines)
    geometry = re.search(r"^% geometry (\d+)x(\d+)", header, re.MULTILINE)
    if geometry:
        return int(geometry[2]), int(geometry[1])
    height, width = (re.search(rf"\b{side}[ =](\d+)", header, re.IGNORECASE) for side in ("height", "width"))
    return (int(height[1]), int(width[1])) if height and width else None


def _unwrapped(values: np.ndarray, bits: int, last: int) -> np.ndarray:
    """Readings of a clock of so many bits that starts again after its end; `last`: the reading before, if not < 0.

    Only a jump back by more than half of its range is a new start; a smaller one is an error of the recording.
    """
    if not len(values):
        return values
    before = np.concatenate(([last if last >= 0 else values[0]], values))
    starts = (before[:-1] & (2**bits - 1)) - values >= 2 ** (bits - 1)
    loops = max(last, 0) >> bits
    return values + ((np.cumsum(starts) + loops) << bits)


class State(NamedTuple):
    """What words leave to the words behind them; -1 is not told yet.

    high: upper part of the time, with wrap-arounds.  The rest is of EVT 3.0.  row: also -1 where the events are not of
    changes.  base: column of the next vector, far below 0 as long as it is not told.  on: polarity of vectors.
    """

    high: int = -1
    low: int = 0
    row: int = -1
    base: int = -(2**40)
    on: int = 0


def _held(places: np.ndarray, values: np.ndarray, before: int, *, at: np.ndarray) -> np.ndarray:
    """What holds at some words: the last of `values`, which the words marked by `places` set, or what held `before`."""
    return np.concatenate(([before], values))[np.cumsum(places, dtype=np.int32)[at]]


def _last(values: np.ndarray, before: int) -> int:
    return int(values[-1]) if len(values) else before


def _evt_2(words: np.ndarray, state: State) -> tuple[Columns, State]:
    kind = (words >> 28).astype(np.uint8)
    clock = kind == TIME_HIGH_2
    high = _unwrapped((words[clock] & (2**TIME_HIGH_BITS_2 - 1)).astype(np.int64), TIME_HIGH_BITS_2, state.high)
    change = np.flatnonzero(kind <= ON_2)
    time = _held(clock, high, state.high, at=change)
    change, time = change[time >= 0], time[time >= 0]
    events = words[change]
    x, y = (events >> 11 & 0x7FF).astype(np.int16), (events & 0x7FF).astype(np.int16)
    return Columns(x, y, kind[change] == ON_2, (time << 6) + (events >> 22 & 0x3F)), State(_last(high, state.high))


def _evt_3(words: np.ndarray, state: State) -> tuple[Columns, State]:
    kind, payload = (words >> 12).astype(np.uint8), (words & 0xFFF).astype(np.int16)
    is_high, is_row, is_base = kind == TIME_HIGH, kind <= OTHER_ROW, kind == BASE
    high = _unwrapped(payload[is_high].astype(np.int64), TIME_BITS, state.high)
    changed = np.zeros(len(words), bool)
    changed[is_high] = np.diff(high, prepend=state.high) != 0
    is_low = (kind == TIME_LOW) | changed
    low = np.where(changed[is_low], 0, payload[is_low])
    row = np.where(kind[is_row] == ROW, payload[is_row] & 0x7FF, -1)
    passed = np.cumsum(VECTOR_WIDTHS[kind], dtype=np.int32)
    # A vector's column is its base and the widths of the vectors since, so each base is kept less what it has passed.
    base = (payload[is_base] & 0x7FF) - passed[is_base]
    on = payload[is_base] >> 11

    emits = np.flatnonzero((VALID_BITS != 0)[kind])
    time = _held(is_high, high, state.high, at=emits) << TIME_BITS
    y = _held(is_row, row, state.row, at=emits)
    told = payload[emits]
    single = kind[emits] == COLUMN
    start = _held(is_base, base, state.base, at=emits) + passed[emits] - VECTOR_WIDTHS[kind[emits]]
    x = np.where(single, told & 0x7FF, start)
    valid = np.where(single, 1, told & VALID_BITS[kind[emits]])
    valid[(time < 0) | (y < 0) | (x < 0)] = 0
    bits = np.flatnonzero(np.unpackbits(valid.astype("<u2").view(np.uint8), bitorder="little").view(np.bool_))
    event, bit = bits >> 4, bits & 15
    time += _held(is_low, low, state.low, at=emits)
    p = np.where(single, told >> 11, _held(is_base, on, state.on, at=emits))
    next_base = _last(base, state.base) + _last(passed, 0)
    state = State(_last(high, state.high), _last(low, state.low), _last(row, state.row), next_base, _last(on, state.on))
    return Columns((x[event] + bit).astype(np.int32), y[event], p[event] == 1, time[event]), state


DECODERS: dict[str, tuple[str, Callable[[np.ndarray, State], tuple[Columns, State]]]] = {
    **dict.fromkeys(("2", "2.0"), ("<u4", _evt_2)),
    **dict.fromkeys(("3", "3.0"), ("<u2", _evt_3)),
}

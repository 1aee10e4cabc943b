"""What the readers of event files share: columns of events, text headers, and limits before memory is taken."""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

import numpy as np

from spikeformers.data.events import Size

SMALL_UNPACKED = 2**26  # bytes that any packed file may grow to
LARGEST_RATIO = 64  # bytes unpacked for each stored one; recordings reach 10, files made to fill the memory 1000
LONGEST_SECONDS = 10_000  # nearly three hours; as many microseconds are less than any recording
NAMES = {
    "x": ("x", "xs", "x_pos"),
    "y": ("y", "ys", "y_pos"),
    "p": ("p", "ps", "pol", "polarity", "polarities", "on"),
    "t": ("t", "ts", "time", "times", "timestamp", "timestamps"),
}


class Columns(NamedTuple):
    """Events as a file has them: whole numbers [N], p True where brighter, t in microseconds; size as far as told."""

    x: np.ndarray
    y: np.ndarray
    p: np.ndarray
    t: np.ndarray
    size: Size | None = None


def joined(parts: list[Columns], *, size: Size | None) -> Columns:
    """One set of columns after the other."""
    if not parts:
        none = np.zeros(0, np.int64)
        return Columns(none, none, none, none, size)
    x, y, p, t = (np.concatenate(columns) for columns in zip(*(part[:4] for part in parts), strict=True))
    return Columns(x, y, p, t, size)


def records(content: bytes, kind: np.dtype, *, start: int, end: int | None = None) -> np.ndarray:
    """The events of fixed size between two offsets.  Raises ValueError if the last one is not whole."""
    length = (len(content) if end is None else end) - start
    count, rest = divmod(length, kind.itemsize)
    if rest:
        raise ValueError(
            f"event {count} at offset {start + count * kind.itemsize} has {rest} of {kind.itemsize} bytes: the file "
            "was cut, fetch it again"
        )
    return np.frombuffer(content, kind, count, start)


def header_of(content: bytes, *, mark: bytes, end: bytes) -> tuple[list[str], int]:
    """The lines of text that begin with `mark`, up to a line that begins with `end`, and the offset behind them.

    Where no such end is written, the first line of another kind, or with control characters, belongs to the data.
    """
    lines: list[str] = []
    offset = 0
    while content.startswith(mark, offset):
        stop = content.find(b"\n", offset)
        line = content[offset : stop if stop >= 0 else len(content)]
        if stop < 0 or any(byte < 32 and byte not in b"\t\r" for byte in line):
            break
        lines.append(line.decode("latin-1").strip())
        offset = stop + 1
        if line.startswith(end):
            break
    return lines, offset


def unpacked_limit(stored: int) -> int:
    """Bytes that `stored` packed ones may grow to."""
    return max(SMALL_UNPACKED, LARGEST_RATIO * stored)


def too_large(stored: int) -> ValueError:
    """The error for what unpacks to more than that."""
    return ValueError(
        f"its {stored} bytes unpack to more than {unpacked_limit(stored)}, which no recording does: do not trust this "
        "file, or store it unpacked"
    )


def extra(module: str) -> ModuleType:
    """An optional package.  Raises ImportError with the way to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this file needs {module}: pip install "spikeformers[events]"') from error


def named(columns: Mapping[str, np.ndarray], *, seconds: bool = False) -> Columns | None:
    """Columns by any of their usual names, or None where one is missing.

    t counts seconds if `seconds`, or if it has fractions; else microseconds.  Raises ValueError for numbers that are no
    coordinates, polarities or times, and for seconds that begin after LONGEST_SECONDS or last longer, which may be
    microseconds with fractions.
    """
    lower = {name.lower(): name for name in columns}
    found = {key: next((lower[name] for name in names if name in lower), None) for key, names in NAMES.items()}
    if None in found.values():
        return None
    x, y, p, t = (np.asarray(columns[name]).reshape(-1) for name in found.values())
    if seconds or (t.dtype.kind == "f" and (t % 1 != 0).any()):
        t = _microseconds(t)
    return Columns(whole(x, "x"), whole(y, "y"), polarity(p), whole(t, "t"))


def _microseconds(seconds: np.ndarray) -> np.ndarray:
    if len(seconds) and (abs(seconds[0]) > LONGEST_SECONDS or seconds.max() - seconds.min() > LONGEST_SECONDS):
        raise ValueError(
            f"t goes from {seconds.min()} to {seconds.max()} with a decimal point, which stands for seconds, and no "
            f"recording takes or begins after {LONGEST_SECONDS} s: store whole microseconds, or seconds from 0 on"
        )
    return np.round(seconds * 1e6)


def whole(values: np.ndarray, name: str) -> np.ndarray:
    """Whole numbers in an integer type.  Raises ValueError for others, with the first one."""
    if values.dtype.kind in "biu":
        return values
    if values.dtype.kind != "f":
        raise ValueError(f"{name} holds {values.dtype}, and must hold numbers")
    broken = ~(np.abs(values) <= 2**53) | (values % 1 != 0)
    if broken.any():
        first = int(broken.argmax())
        raise ValueError(f"{name} of event {first} is {values[first]}, and must be a whole number")
    return values.astype(np.int64)


def polarity(values: np.ndarray) -> np.ndarray:
    """True where brighter, from 0 and 1 or from -1 and 1.  Raises ValueError for other values, with the first one."""
    if values.dtype == np.bool_:
        return values
    values = whole(values, "p")
    off = -1 if len(values) and values.min() < 0 else 0
    broken = (values != off) & (values != 1)
    if broken.any():
        first = int(broken.argmax())
        raise ValueError(f"p of event {first} is {values[first]}, and must be 1, or {off} as in other events")
    return values == 1

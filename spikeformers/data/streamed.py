"""Pictures in parquet files that do not fit into memory: read a row group at a time, in an order that makes it cheap.

An epoch shuffles row groups, fills windows of WINDOW bytes with them, and shuffles the pictures of each window.  The
order is a function of (seed, epoch) as ever, so a run goes on from the middle of an epoch."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WINDOW = 2**28  # bytes of encoded pictures that a process holds, and among which an epoch is shuffled


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file: the struct with its pictures, how many rows, and bytes of pictures when unpacked."""

    file: Path
    number: int
    column: str
    rows: int
    size: int


class StreamedPictures(Sequence[bytes]):
    """Encoded pictures of all rows of `groups`, in order; a process holds a window of them.

    Raises ValueError for a row group that is larger than a window.
    """

    def __init__(self, groups: Sequence[RowGroup]) -> None:
        self.groups = tuple(groups)
        for group in self.groups:
            if group.size > WINDOW:
                raise ValueError(
                    f"row group {group.number} of {group.file} has {group.size} bytes of pictures, more than the "
                    f"{WINDOW} that are read at once: write the file again with smaller ones (pyarrow.parquet."
                    "write_table(..., row_group_size=100))"
                )
        self.starts = np.cumsum([0, *(group.rows for group in self.groups)])
        self.rows = np.arange(self.starts[-1])  # those of this split, counted through all files
        self._start_empty()

    def _start_empty(self) -> None:
        self._held: dict[int, list[bytes]] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_held", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> bytes:
        """Raises ValueError naming the file if that has become unreadable."""
        group, row = self._place(index)
        with self._lock:  # threads would read the same group twice
            if group not in self._held:
                self._read(group)
            return self._held[group][row]

    def _place(self, index: int) -> tuple[int, int]:
        row = self.rows[index]
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        return group, int(row - self.starts[group])

    def _read(self, group: int) -> None:
        wanted = self.groups[group]
        while self._held and sum(self.groups[each].size for each in self._held) + wanted.size > WINDOW:
            self._held.pop(next(iter(self._held)))  # the oldest: within a window nothing is read twice
        with opened_parquet(wanted.file) as reader:
            table = reader.read_row_group(wanted.number, columns=[f"{wanted.column}.bytes"])
        # Python's bytes, since arrow's buffers are up to twice as long as what is in them.
        self._held[group] = [(each or {}).get("bytes") or b"" for each in table.column(wanted.column).to_pylist()]

    def name(self, index: int) -> str:
        """Row and file, for messages."""
        group, row = self._place(index)
        return f"row {row} in row group {self.groups[group].number} of {self.groups[group].file}"

    def chosen(self, indices: np.ndarray) -> "StreamedPictures":
        """The same with only these pictures."""
        fewer = StreamedPictures(self.groups)
        fewer.rows = self.rows[indices]
        return fewer

    def shuffled(self, random: np.random.RandomState) -> np.ndarray:
        """All indices, int64, window by window."""
        window_of = np.empty(len(self.groups), dtype=np.int64)
        window = filled = 0
        for group in random.permutation(len(self.groups)).tolist():
            size = self.groups[group].size
            if filled and filled + size > WINDOW:
                window, filled = window + 1, 0
            window_of[group], filled = window, filled + size
        order = random.permutation(len(self.rows))
        groups = np.searchsorted(self.starts, self.rows[order], side="right") - 1
        return order[np.argsort(window_of[groups], kind="stable")]


@dataclass(frozen=True)
class RowNames(Sequence[str]):
    """The names of streamed pictures, made when they are wanted."""

    pictures: StreamedPictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> str:
        return self.pictures.name(index)


@contextmanager
def opened_parquet(file: Path) -> Iterator[pq.ParquetFile]:
    """The file, open.  Raises ValueError naming it for whatever goes wrong in reading it."""
    try:
        with pq.ParquetFile(file) as reader:
            yield reader
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no readable parquet file: {error}".replace("\n", " ")) from error

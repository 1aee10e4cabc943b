"""Reading one recording of an event camera, in any of the formats that published sets come in.

| suffix | format |
|---|---|
| .bin | ATIS, as N-MNIST and N-Caltech101 have it: Orchard et al., Frontiers in Neuroscience 2015 |
| .aedat, .aedat4 | AEDAT 2.0, 3.1, 4.0 of iniVation (`event_aedat.py`) |
| .dat, .raw | Prophesee's .dat, EVT 2.0 and EVT 3.0 (`event_prophesee.py`); .dat also AEDAT |
| .npz, .h5, .hdf5 | arrays x, y, p, t under their usual names, in any group |
| .mat | the same; taxels of ST-MNIST; the six columns that jAER's dat2mat makes (CIFAR10-DVS) |
| .txt, .csv, also with .gz | a line for each event: t x y p, or the order that a first line of names tells |
"""

import io
import math
import re
import struct
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat, whosmat

from spikeformers.data.decode import Stored
from spikeformers.data.event_aedat import read_aedat
from spikeformers.data.event_columns import (
    NAMES,
    Columns,
    extra,
    named,
    polarity,
    records,
    too_large,
    unpacked_limit,
    whole,
)
from spikeformers.data.event_prophesee import read_dat, read_raw
from spikeformers.data.events import Events, Size

Disorder = typing.Literal["error", "sort"]
SENSOR_BIN = (34, 34)  # N-MNIST; the larger pictures of N-Caltech101 have no common sensor
OVERFLOW_ROW, OVERFLOW_US = 240, 2**13
TAXELS = 10  # a side of ST-MNIST's square of touch sensors
SIDE_DAT2MAT = 128
DEEPEST_GROUP = 3
MAT_HEADER, MAT_COMPRESSED = 128, 15  # bytes; type of a compressed element
MAT_NUMBERS = frozenset(
    ("double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
)
ZIP_KINDS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes


def read_events(path: Stored | str, *, size: Size | None = None, disorder: Disorder = "error") -> Events:
    """The events of a file, by its suffix and first bytes.

    `path`: a path, or a member of an archive.  `size`: height and width of the sensor; without it they are what the
    file tells, else the largest coordinates + 1.  `disorder`: what happens where time goes backwards, as it may where
    a camera's data was sent in blocks: an error, or the events are sorted by time (those of one time keep their order).

    Times in formats that hold seconds become whole microseconds.  Raises ValueError, which names the file, for an
    unknown format, a broken or cut file, an event outside the sensor, or time that goes backwards; ImportError with
    the way to install it if the format needs an optional package.
    """
    with _named(path):
        columns = _columns(path, disorder)
        return Events(*columns[:4], size=size or columns.size or _reach(columns))


def read_of_sensor(path: Stored | str, *, sensor: Size | None, disorder: Disorder = "error") -> Events:
    """As `read_events`, for files of one sensor, `sensor`; of any sensor that the file tells if that is None.

    Raises ValueError also for a file that tells another sensor, or none where `sensor` is None.
    """
    with _named(path):
        columns = _columns(path, disorder)
        size = sensor or columns.size
        if size is None:
            raise ValueError(
                "it tells no sensor: train with data.sensor=HEIGHT,WIDTH, the rows and columns of the camera's pixels"
            )
        if columns.size not in (None, size):
            raise ValueError(
                f"its sensor has {columns.size[0]} x {columns.size[1]} pixels (height x width), and wanted are "
                f"recordings of {size[0]} x {size[1]}: take another recording, or train on such ones"
            )
        return Events(*columns[:4], size=size)


@contextmanager
def _named(path: Stored | str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _columns(path: Stored | str, disorder: Disorder) -> Columns:
    """What the file says, in the order of time if that is asked for."""
    if disorder not in ("error", "sort"):
        raise ValueError(f"disorder must be error or sort, got {disorder!r}")
    content = (Path(path) if isinstance(path, str) else path).read_bytes()
    columns = _reader(str(path), content)(content)
    if disorder == "error":
        return columns
    order = np.argsort(columns.t, kind="stable")
    return Columns(*(column[order] for column in columns[:4]), size=columns.size)


def _reader(name: str, content: bytes) -> Callable[[bytes], Columns]:
    suffix = next((suffix for suffix in _READERS if name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"its suffix is none of {', '.join(SUFFIXES)}: rename or convert it")
    if not content:
        raise ValueError("the file is empty: fetch it again")
    return read_aedat if suffix == ".dat" and content.startswith(b"#!AER-DAT") else _READERS[suffix]


def _reach(columns: Columns) -> Size:
    if not len(columns.t):
        raise ValueError("it holds no events and tells no sensor: give size=(height, width)")
    return int(columns.y.max(initial=0)) + 1, int(columns.x.max(initial=0)) + 1


def _read_bin(content: bytes) -> Columns:
    """Five bytes an event: column, row, then a bit of polarity and 23 bits of microseconds, the largest first."""
    x, y, *rest = records(content, np.dtype("5u1"), start=0).T
    t = (rest[0] & 0x7F).astype(np.int64) << 16 | rest[1].astype(np.int64) << 8 | rest[2]
    overflow = y == OVERFLOW_ROW
    t += np.cumsum(overflow) * OVERFLOW_US
    events = Columns(x[~overflow], y[~overflow], rest[0][~overflow] >= 0x80, t[~overflow], SENSOR_BIN)
    height, width = _reach(events) if len(events.t) else SENSOR_BIN
    return events if height <= SENSOR_BIN[0] and width <= SENSOR_BIN[1] else events._replace(size=None)


def npz_arrays(content: bytes) -> dict[str, np.ndarray]:
    """All arrays of an npz file, by name.  Raises ValueError for a broken file, or one that unpacks to too much."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = {}
            if sum(entry.file_size for entry in archive.infolist()) > unpacked_limit(len(content)):
                raise too_large(len(content))
            for entry in archive.infolist():
                if entry.compress_type not in ZIP_KINDS:
                    raise ValueError(
                        f"{entry.filename} is packed in another way than numpy does: store it with np.savez"
                    )
                arrays[entry.filename.removesuffix(".npy")] = _npy(entry.filename, archive.read(entry))
            return arrays
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as error:
        raise ValueError(f"no readable npz file ({error}): fetch it again") from error


def _npy(name: str, content: bytes) -> np.ndarray:
    """An array whose header claims as many bytes as there are."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, kind = header(stream)
    except Exception as error:  # Python's parser raises SyntaxError, TokenError, MemoryError, RecursionError and more
        raise ValueError(f"{name} has no readable header ({error}): fetch the file again") from error
    if kind.hasobject:
        raise ValueError(f"{name} holds Python objects, which can run code when they are read: store plain numbers")
    count = int(np.prod([int(side) for side in shape], dtype=object))
    if min(shape, default=0) < 0 or count * kind.itemsize != len(content) - stream.tell():
        raise ValueError(
            f"{name} claims {shape} numbers of {kind.itemsize} bytes and has {len(content) - stream.tell()} bytes: "
            "fetch the file again"
        )
    return np.frombuffer(content, kind, count, stream.tell()).reshape(shape, order="F" if fortran else "C")


def _of_arrays(arrays: Mapping[str, np.ndarray]) -> Columns:
    """Events from named arrays, or from one array with named fields."""
    for array in arrays.values():
        if array.dtype.names:
            columns = named({name: array[name] for name in array.dtype.names})
            if columns:
                return columns
    columns = named(arrays)
    if columns is None:
        raise ValueError(f"no x, y, p and t under their usual names among {sorted(arrays)}: rename the arrays")
    return columns


def _read_h5(content: bytes) -> Columns:
    h5py = extra("h5py")
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            columns = _of_group(file, h5py, limit=unpacked_limit(len(content)), deepest=DEEPEST_GROUP)
    except (OSError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"no readable HDF5 file ({error}): fetch it again") from error
    if columns is None:
        raise ValueError("no x, y, p and t under their usual names in one of its groups: rename the datasets")
    return columns


def _of_group(group: Any, h5py: Any, *, limit: int, deepest: int) -> Columns | None:
    """Events of an HDF5 group, or of the first one below that has them; links to elsewhere are not followed."""
    members = [group[name] for name in group if isinstance(group.get(name, getlink=True), h5py.HardLink)]
    datasets = {member.name.rpartition("/")[2]: member for member in members if isinstance(member, h5py.Dataset)}
    arrays: dict[str, np.ndarray] = {}
    for name, dataset in datasets.items():
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"{dataset.name} keeps its numbers in another file: store them in this one")
        if dataset.ndim and dataset.dtype.kind in "biufV":
            if dataset.dtype.hasobject:
                raise ValueError(f"{dataset.name} has fields of varying length: store plain numbers")
            # The library unpacks whole chunks, however few of their numbers the dataset has.
            needed = max(dataset.nbytes, math.prod(dataset.chunks or ()) * dataset.dtype.itemsize)
            limit -= needed
            if limit < 0:
                raise ValueError(
                    f"{dataset.name} claims {needed} bytes, far more than the file has: do not trust this file, or "
                    "store it unpacked"
                )
            arrays[name] = dataset[()]
    try:
        return _of_arrays(arrays)
    except ValueError:
        pass
    found = (
        _of_group(member, h5py, limit=limit, deepest=deepest - 1)
        for member in members
        if isinstance(member, h5py.Group) and deepest
    )
    return next((columns for columns in found if columns), None)


def _read_mat(content: bytes) -> Columns:
    if content.startswith(b"MATLAB 7.3"):
        return _read_h5(content)
    unpacked = _mat_unpacked(content)
    try:
        arrays = _mat_arrays(unpacked)
    except Exception as error:  # scipy's reader raises TypeError, KeyError, MemoryError, struct.error and more
        raise ValueError(f"no readable MATLAB file ({error}): fetch it again") from error
    if "spiketrain" in arrays:
        return _of_taxels(arrays["spiketrain"])
    for array in arrays.values():
        if array.ndim == 2 and array.shape[1] == 6:
            return _of_dat2mat(array)
    return _of_arrays(arrays)


def _mat_arrays(unpacked: bytes) -> dict[str, np.ndarray]:
    """Arrays of real numbers.  Of others, such as cells, scipy would take the memory that their header claims."""
    shapes = {name: shape for name, shape, kind in whosmat(io.BytesIO(unpacked)) if kind in MAT_NUMBERS}
    for name, shape in shapes.items():
        if math.prod(map(int, shape)) > len(unpacked):
            raise ValueError(f"{name} claims {shape} numbers, more than its {len(unpacked)} bytes")
    found = loadmat(io.BytesIO(unpacked), variable_names=list(shapes))
    return {name: found[name] for name in shapes if found[name].dtype.kind in "biuf"}


def _mat_unpacked(content: bytes) -> bytes:
    """A MATLAB 5 file without compression, so that its reader takes no more memory than there are bytes."""
    if len(content) < MAT_HEADER:
        raise ValueError(f"it has {len(content)} bytes, less than a MATLAB header: fetch it again")
    order = ">" if content[126:128] == b"MI" else "<"
    found, left, offset = [content[:MAT_HEADER]], unpacked_limit(len(content)), MAT_HEADER
    while offset < len(content):
        if offset + 8 > len(content):
            raise ValueError(f"it ends inside the element at offset {offset}: it was cut, fetch it again")
        kind, length = struct.unpack_from(f"{order}II", content, offset)
        if offset + 8 + length > len(content):
            raise ValueError(f"the element at offset {offset} claims {length} bytes: the file was cut, fetch it again")
        element = content[offset : offset + 8 + length]
        if kind == MAT_COMPRESSED:
            element, _ = _inflated(element[8:], zlib.MAX_WBITS, limit=left, stored=len(content))
        left -= len(element)
        found.append(element)
        offset += 8 + length
    return b"".join(found)


def _inflated(packed: bytes, window: int, *, limit: int, stored: int) -> tuple[bytes, bytes]:
    """zlib's or gzip's data, and what follows.  Raises ValueError if it is broken, cut, or more than `limit` bytes."""
    reader = zlib.decompressobj(window)
    try:
        content = reader.decompress(packed, limit + 1)
    except zlib.error as error:
        raise ValueError(f"broken packed data ({error}): fetch it again") from error
    if len(content) > limit:
        raise too_large(stored)
    if not reader.eof:
        raise ValueError("the packed data ends too early: the file was cut, fetch it again")
    return content, reader.unused_data


def _gunzipped(packed: bytes) -> bytes:
    """The content of a gzip file, whose parts follow one another where several processes have packed it."""
    stored, limit = len(packed), unpacked_limit(len(packed))
    found: list[bytes] = []
    while packed:
        content, packed = _inflated(packed, zlib.MAX_WBITS | 16, limit=limit, stored=stored)
        limit -= len(content)
        found.append(content)
    return b"".join(found)


def _of_taxels(spikes: np.ndarray) -> Columns:
    """ST-MNIST: a row for each touch sensor with -1, 0 or 1, and a last row of seconds."""
    if spikes.ndim != 2 or len(spikes) != TAXELS**2 + 1:
        raise ValueError(
            f"spiketrain must have {TAXELS**2 + 1} rows, {TAXELS**2} sensors and the time, got {spikes.shape}"
        )
    moment, taxel = np.nonzero(spikes[:-1].T)
    t = whole(np.round(spikes[-1] * 1e6), "t")
    return Columns(taxel % TAXELS, taxel // TAXELS, polarity(spikes[taxel, moment]), t[moment], (TAXELS, TAXELS))


def _of_dat2mat(table: np.ndarray) -> Columns:
    """Columns t, -, -, x, y, p as jAER's dat2mat writes them, turned as the AEDAT files are (`event_aedat.py`)."""
    t, _, _, x, y, p = table.T
    size = (SIDE_DAT2MAT, SIDE_DAT2MAT)
    return Columns(SIDE_DAT2MAT - 1 - whole(y, "y"), whole(x, "x"), polarity(p), whole(t, "t"), size)


def _read_text(content: bytes) -> Columns:
    text = content.decode("latin-1")
    first, _, rest = text.partition("\n")
    fields = first.replace(",", " ").split()
    names, size = ["t", "x", "y", "p"], None
    if len(fields) == 2 and all(field.isdecimal() for field in fields):
        size, text = (int(fields[1]), int(fields[0])), rest  # width and height, as E2VID's files begin
    elif fields and not first.startswith("#") and not fields[0][-1].isdigit():
        names, text = [field.strip('"') for field in fields], rest
    row = next((line for line in io.StringIO(text) if line.strip() and not line.startswith("#")), "")
    if not row:
        raise ValueError("it holds no events: fetch it again")
    table = np.loadtxt(io.StringIO(text), delimiter="," if "," in row else None, ndmin=2)
    if table.shape[1] != len(names):
        raise ValueError(f"its lines have {table.shape[1]} numbers, and must have {len(names)}: {' '.join(names)}")
    values = dict(zip(names, row.replace(",", " ").split(), strict=True))
    seconds = any(re.fullmatch(r"-?\d+\.\d*", values[name]) for name in names if name.lower() in NAMES["t"])
    columns = named(dict(zip(names, table.T, strict=True)), seconds=seconds)
    if columns is None:
        raise ValueError(f"its first line names {' '.join(names)}, and must name t, x, y and p")
    return columns._replace(size=size)


_READERS: dict[str, Callable[[bytes], Columns]] = {
    **{".bin": _read_bin, ".aedat": read_aedat, ".aedat4": read_aedat, ".dat": read_dat, ".raw": read_raw},
    **{".npz": lambda content: _of_arrays(npz_arrays(content)), ".h5": _read_h5, ".hdf5": _read_h5, ".mat": _read_mat},
    **dict.fromkeys((".txt", ".csv"), _read_text),
    **dict.fromkeys((".txt.gz", ".csv.gz"), lambda packed: _read_text(_gunzipped(packed))),
}
SUFFIXES = tuple(_READERS)

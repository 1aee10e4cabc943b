"""Readers of iniVation's files: AEDAT 2.0 (jAER), AEDAT 3.1 (cAER) and AEDAT 4.0 (DV).

Addresses are those of jAER's chip classes and of iniVation's description of its formats. Rows count from the top. A
DVS128 in AEDAT 2.0 is turned as spikingjelly turns CIFAR10-DVS, so that its pictures stand upright and frames are those
that the papers train on. Special events (triggers, frames, inertia) are left out, and of several streams in AEDAT 4.0
the first one with events is read.
"""

import re
import struct
from collections.abc import Iterator
from functools import partial
from xml.etree import ElementTree

import numpy as np

from spikeformers.data.event_columns import Columns, extra, header_of, joined, records, too_large, unpacked_limit
from spikeformers.data.events import Size

CHIPS = {
    "dvs128": (128, 128),
    "davis128": (128, 128),
    "davis208": (192, 208),
    "davis240": (180, 240),
    "davis346": (260, 346),
    "davis640": (480, 640),
    "davisrgb640": (480, 640),
}
PACKET_3 = struct.Struct("<hhiiiiii")  # type, source, event size, time offset, overflows, capacity, number, valid
POLARITY_EVENTS = 1
PACKET_4 = struct.Struct("<ii")  # stream, bytes
COMPRESSIONS = ("none", "lz4", "lz4", "zstd", "zstd")
CHUNK_BYTES = 2**20  # unpacked at once, so that no memory is taken for more than is there
EVENT_2 = np.dtype([("address", ">u4"), ("t", ">i4")])
EVENT_3 = np.dtype([("address", "<u4"), ("t", "<i4")])
EVENT_4 = np.dtype(
    {"names": ["t", "x", "y", "on"], "formats": ["<i8", "<i2", "<i2", "u1"], "offsets": [0, 8, 10, 12], "itemsize": 16}
)


def read_aedat(content: bytes) -> Columns:
    """Events of an AEDAT file of version 2.0, 3.1 or 4.0.  Raises ValueError for another one, or a broken one."""
    for magic, reader in ((b"2.0", _version_2), (b"3.1", _version_3), (b"4.0", _version_4)):
        if content.startswith(b"#!AER-DAT" + magic):
            return reader(content)
    raise ValueError(f"an AEDAT file begins with #!AER-DAT2.0, 3.1 or 4.0, not with {content[:12]!r}: convert it")


def _version_2(content: bytes) -> Columns:
    lines, start = header_of(content, mark=b"#", end=b"#End Of ASCII Header")
    if not lines:
        raise ValueError("its first line has no end: the file was cut, fetch it again")
    events = records(content, EVENT_2, start=start)
    address, t = events["address"].astype(np.uint32), events["t"].astype(np.int32)
    chip = next((re.split(r"[.:\s]", line)[-1] for line in lines if line.startswith("# AEChip:")), "DVS128")
    height, width = size = _chip_size(chip)
    if chip.lower().startswith("dvs128"):
        pixels = (address & 0x80008000) == 0
        address, t = address[pixels], t[pixels]
        x, y = 127 - (address >> 8 & 0x7F).astype(np.int16), 127 - (address >> 1 & 0x7F).astype(np.int16)
        return Columns(x, y, (address & 1) == 0, t, size)
    pixels = (address & 0x80000400) == 0
    address, t = address[pixels], t[pixels]
    x, y = width - 1 - (address >> 12 & 0x3FF).astype(np.int16), height - 1 - (address >> 22 & 0x1FF).astype(np.int16)
    return Columns(x, y, (address & 0x800) != 0, t, size)


def _chip_size(name: str) -> Size:
    for chip, size in CHIPS.items():
        if name.lower().startswith(chip):
            return size
    raise ValueError(f"the camera is a {name}, whose addresses are not known here; known are {', '.join(CHIPS)}")


def _version_3(content: bytes) -> Columns:
    lines, offset = header_of(content, mark=b"#", end=b"#!END-HEADER")
    if not any(line.startswith("#!END-HEADER") for line in lines):
        raise ValueError(f"the header does not end with #!END-HEADER before offset {offset}: fetch the file again")
    source = next((line.partition(":")[2] for line in lines if line.startswith("#Source")), "")
    chip = re.search(r"(dvs|davis)[a-z]*\d+", source, re.IGNORECASE)
    parts = []
    while offset < len(content):
        kind, _, size, _, overflows, capacity, number, _ = _unpacked(PACKET_3, content, offset)
        start, end = offset + PACKET_3.size, offset + PACKET_3.size + size * capacity
        if size < 1 or not 0 <= number <= capacity or end > len(content):
            raise ValueError(
                f"the packet at offset {offset} claims {number} of {capacity} events of {size} bytes, of which the "
                f"file has {len(content) - start} bytes: it was cut or broken, fetch it again"
            )
        if kind == POLARITY_EVENTS:
            if size != EVENT_3.itemsize:
                raise ValueError(f"the events of the packet at offset {offset} have {size} bytes instead of 8")
            parts.append(_polarity_events(records(content, EVENT_3, start=start, end=start + 8 * number), overflows))
        offset = end
    return joined(parts, size=_chip_size(chip[0]) if chip else None)


def _polarity_events(events: np.ndarray, overflows: int) -> Columns:
    events = events[events["address"] & 1 == 1]  # others were marked as not valid
    address = events["address"]
    x, y = (address >> 17).astype(np.int16), (address >> 2 & 0x7FFF).astype(np.int16)
    return Columns(x, y, (address & 2) != 0, events["t"] + (np.int64(overflows) << 31))


def _version_4(content: bytes) -> Columns:
    start = len(b"#!AER-DAT4.0\r\n")
    header = _Table.root(content, start, "IOHE")
    compression, table, info = header.number(0, "<i", 0), header.number(1, "<q", -1), header.text(2)
    if not 0 <= compression < len(COMPRESSIONS):
        raise ValueError(f"its compression {compression} is not known: store it with LZ4 or ZSTD")
    if table > len(content):
        raise ValueError(f"its packets reach to offset {table}, the file to {len(content)}: it was cut, fetch it again")
    stream, size = _event_stream(info)
    first = start + 4 + _unpacked(struct.Struct("<I"), content, start)[0]
    left = unpacked_limit(len(content))
    parts = []
    for offset, packed in _packets(content, first, len(content) if table < 0 else table, stream):
        try:
            packet = _decompressed(packed, COMPRESSIONS[compression], limit=left)
            if len(packet) > left:
                raise too_large(len(content))
            events = _Table.root(packet, 0, "EVTS").structs(0, EVENT_4)
        except ValueError as error:
            raise ValueError(f"the packet at offset {offset}: {error}") from error
        left -= len(packet)
        parts.append(Columns(events["x"], events["y"], events["on"] != 0, events["t"]))
    return joined(parts, size=size)


def _packets(content: bytes, offset: int, end: int, wanted: int) -> Iterator[tuple[int, bytes]]:
    """Offset and stored bytes of each packet of a stream."""
    while offset < end:
        stream, length = _unpacked(PACKET_4, content, offset)
        start = offset + PACKET_4.size
        if not 0 <= length <= end - start:
            raise ValueError(
                f"the packet at offset {offset} claims {length} bytes of {end - start}: the file was cut, fetch it "
                "again"
            )
        if stream == wanted:
            yield offset, content[start : start + length]
        offset = start + length


def _event_stream(info: str) -> tuple[int, Size | None]:
    """Number and sensor of the first stream of events, from the description of all streams."""
    if "<!" in info:  # a description needs no declarations, and these can make a parser fill the memory
        raise ValueError("the description of its streams has declarations (<!): do not trust this file")
    try:
        nodes = ElementTree.fromstring(info).findall("./node[@name='outInfo']/node")
    except ElementTree.ParseError as error:
        raise ValueError(f"the description of its streams is broken ({error}): fetch the file again") from error
    for node in nodes:
        if _attribute(node, "typeIdentifier") == "EVTS" and node.get("name", "").isdecimal():
            width, height = (_attribute(node, f"node[@name='info']/{axis}") for axis in ("sizeX", "sizeY"))
            return int(node.get("name", "")), (int(height), int(width)) if height and width else None
    raise ValueError("it has no stream of events: record the camera's events output")


def _attribute(node: ElementTree.Element, path: str) -> str:
    place, _, key = path.rpartition("/")
    return node.findtext(f"./{place}/attr[@key='{key}']" if place else f"./attr[@key='{key}']", "")


def _decompressed(packed: bytes, compression: str, *, limit: int) -> bytes:
    """The packet, or a little more than its first `limit` bytes."""
    if compression == "none":
        return packed
    chunks = {"lz4": _lz4_chunks, "zstd": _zstd_chunks}[compression](packed)
    found: list[bytes] = []
    while limit >= 0 and (chunk := next(chunks, b"")):
        found.append(chunk)
        limit -= len(chunk)
    return b"".join(found)


def _lz4_chunks(packed: bytes) -> Iterator[bytes]:
    lz4 = extra("lz4.frame")
    reader = lz4.LZ4FrameDecompressor()
    try:
        chunk = reader.decompress(packed, max_length=CHUNK_BYTES)
        while chunk:
            yield chunk
            chunk = b"" if reader.eof or reader.needs_input else reader.decompress(b"", max_length=CHUNK_BYTES)
    except RuntimeError as error:
        raise ValueError(f"broken LZ4 data ({error}): fetch the file again") from error


def _zstd_chunks(packed: bytes) -> Iterator[bytes]:
    zstandard = extra("zstandard")
    try:
        yield from iter(partial(zstandard.ZstdDecompressor().stream_reader(packed).read, CHUNK_BYTES), b"")
    except zstandard.ZstdError as error:
        raise ValueError(f"broken ZSTD data ({error}): fetch the file again") from error


class _Table:
    """A table of the flatbuffers format; every offset is checked against the bytes that are there."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        self.fields = position - self._at("<i", position)
        self.end = self.fields + self._at("<H", self.fields)

    @classmethod
    def root(cls, data: bytes, start: int, identifier: str) -> "_Table":
        """The table of a buffer with its length in front.  Raises ValueError if it is cut, or has another identifier.

        `start`: offset of the length.
        """
        length, root = _unpacked(struct.Struct("<II"), data, start)
        if start + 4 + length > len(data):
            raise ValueError(f"{length} bytes are claimed at offset {start} of {len(data)}: the file was cut")
        found = data[start + 8 : start + 12]
        if found != identifier.encode():
            raise ValueError(f"it holds {found!r} where {identifier} belongs: fetch the file again")
        return cls(data, start + 4 + root)

    def _at(self, form: str, position: int) -> int:
        return _unpacked(struct.Struct(form), self.data, position)[0]

    def _place(self, field: int) -> int | None:
        """Where the value of a field stands, if it is stored."""
        slot = self.fields + 4 + 2 * field
        offset = self._at("<H", slot) if slot + 2 <= self.end else 0
        return self.position + offset if offset else None

    def number(self, field: int, form: str, default: int) -> int:
        place = self._place(field)
        return default if place is None else self._at(form, place)

    def structs(self, field: int, kind: np.dtype) -> np.ndarray:
        """A list of structs of fixed size; empty where it is not stored."""
        place = self._place(field)
        if place is None:
            return np.zeros(0, kind)
        start = place + self._at("<I", place)
        count = self._at("<I", start)
        if start + 4 + count * kind.itemsize > len(self.data):
            raise ValueError(
                f"{count} elements of {kind.itemsize} bytes are claimed, more than its {len(self.data)} bytes"
            )
        return np.frombuffer(self.data, kind, count, start + 4)

    def text(self, field: int) -> str:
        return self.structs(field, np.dtype("u1")).tobytes().decode("utf-8", "replace")


def _unpacked(form: struct.Struct, content: bytes, offset: int) -> tuple:
    """Numbers at an offset.  Raises ValueError where the bytes end before."""
    if not 0 <= offset <= len(content) - form.size:
        raise ValueError(
            f"{form.size} bytes belong at offset {offset} of {len(content)}: the file was cut, fetch it again"
        )
    return form.unpack_from(content, offset)

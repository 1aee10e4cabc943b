"""The bytes of an artifact: preamble, JSON header, aligned tensors; with a SHA-256 of each part and of these sums.

    0  magic 8, version u32, zero u32, header bytes u64, payload bytes u64       little-endian, as all numbers are
    32 SHA-256 of the header, of the payload, and of the 96 bytes so far         the preamble, 128 bytes in any version
    128 header: UTF-8 JSON, filled with spaces to a multiple of 64
        payload: each tensor at the next multiple of 64, offsets in the header counted from here

Whole numbers of 8 bits are packed to the fewest bits that hold a tensor, 2 to 8. Nothing is taken from a file before
its size, type and place are known to be right; what a file says is data, never a name to import or code to run.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spikeformers.quantize import pack, unpack
from spikeformers.quantize.lsq import FEWEST_BITS, MOST_BITS, integer_range

MAGIC = b"\x89SPK\r\n\x1a\n"  # as PNG's: a transfer as text would change it
VERSION = 1
SIZES = struct.Struct("<8sIIQQ32s32s")
PREAMBLE = SIZES.size + 32
ALIGNMENT = 64
MOST_HEADER, MOST_PAYLOAD = 2**22, 2**32  # bytes
MOST_DIMENSIONS = 8
MOST_INTEGER = 2**63 - 1
PACKED = {f"int{bits}": bits for bits in range(FEWEST_BITS, MOST_BITS)}
PLAIN = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a payload. `kind`: int2..int7 (packed) or a type of torch; `offset`, `size`: bytes."""

    kind: str
    shape: tuple[int, ...]
    channels_last: bool
    offset: int
    size: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor in memory."""
        return PLAIN.get(self.kind, torch.int8)

    @property
    def full_size(self) -> int:
        """Bytes that a tensor of this kind and shape takes in a payload."""
        numbers = math.prod(self.shape)
        bits = PACKED[self.kind] if self.kind in PACKED else 8 * self.dtype.itemsize
        return -(-numbers * bits // 8)


@dataclass(frozen=True)
class Content:
    """What a file holds: its header without the table of tensors, that table by name, and the bytes it points into."""

    header: dict[str, Any]
    table: dict[str, Stored]
    payload: memoryview

    def tensor(self, name: str) -> Tensor:
        """One tensor, unpacked, in memory of its own. Raises ValueError for floats that are not finite."""
        stored = self.table[name]
        raw = self.payload[stored.offset : stored.offset + stored.size]
        flat = torch.frombuffer(raw, dtype=torch.uint8) if stored.size else torch.empty(0, dtype=torch.uint8)
        if stored.kind in PACKED:
            flat = unpack(flat, bits=PACKED[stored.kind], shape=stored.shape)
        else:
            flat = flat.view(stored.dtype).view(stored.shape)
        if flat.is_floating_point() and not bool(flat.isfinite().all()):
            raise ValueError(f"tensor {name} holds numbers that are not finite")
        order = torch.channels_last if stored.channels_last else torch.contiguous_format
        return torch.empty(stored.shape, dtype=stored.dtype, memory_format=order).copy_(flat)


def encode(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a file. The same header and tensors give the same bytes.

    Raises ValueError for what a file cannot hold: a type of tensor, numbers that are not finite, a header that is not
    plain JSON or too large.
    """
    table, payload = {}, bytearray()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        kind, raw = _encode_tensor(name, tensor)
        payload += bytes(-len(payload) % ALIGNMENT)
        last = _is_channels_last(tensor)
        table[name] = asdict(Stored(kind, tuple(tensor.shape), last, offset=len(payload), size=len(raw)))
        payload += raw
    try:
        text = json.dumps(header | {"tensors": table}, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the header of an artifact is plain JSON with finite numbers: {error}") from error
    text += b" " * (-len(text) % ALIGNMENT)
    for what, size, most in (("header", len(text), MOST_HEADER), ("tensors", len(payload), MOST_PAYLOAD)):
        if size > most:
            raise ValueError(f"the {what} of an artifact may take {most:,} bytes, these take {size:,}")
    return seal(text, payload)


def seal(header: bytes, payload: bytes | bytearray) -> bytes:
    """Preamble, header and payload in one."""
    sizes = SIZES.pack(MAGIC, VERSION, 0, len(header), len(payload), _digest(header), _digest(payload))
    return b"".join((sizes, _digest(sizes), header, payload))


def read(path: Path) -> Content:
    """Read and check a file. Raises ValueError if it is missing, no artifact, damaged, or of a newer version."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        preamble = file.read(PREAMBLE)
        _check_preamble(preamble, total, name=str(path))
        rest = bytearray(total - PREAMBLE)
        rest = memoryview(rest)[: file.readinto(rest)]
    return parse(preamble, rest, name=str(path))


def parse(preamble: bytes, rest: memoryview, *, name: str) -> Content:
    """The content of a file called `name`, from its preamble and the bytes behind. Raises ValueError as `read` does."""
    length, header_sum, payload_sum = _check_preamble(preamble, len(preamble) + len(rest), name=name)
    text, payload = rest[:length], rest[length:]
    for part, found, wanted in (("header", text, header_sum), ("tensors", payload, payload_sum)):
        if _digest(found) != wanted:
            raise ValueError(f"{name} is damaged: the {part} changed after it was written (SHA-256 differs)")
    try:
        header = _parse_json(bytes(text))
        table = _read_table(header.pop("tensors", None), len(payload))
    except ValueError as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    return Content(header, table, payload)


def _check_preamble(preamble: bytes, total: int, *, name: str) -> tuple[int, bytes, bytes]:
    """Length of the header and the sums of header and payload, of a file of `total` bytes."""
    if preamble[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{name} is not a spikeformers artifact: it does not begin as one")
    if len(preamble) < PREAMBLE:
        raise ValueError(f"{name} is damaged: it ends after {total} bytes")
    if _digest(preamble[: SIZES.size]) != preamble[SIZES.size :]:
        raise ValueError(f"{name} is damaged: its first {PREAMBLE} bytes changed after they were written")
    _, version, zero, length, payload, header_sum, payload_sum = SIZES.unpack(preamble[: SIZES.size])
    if version > VERSION:
        raise ValueError(
            f"{name} was written by a newer version (format {version}, this one reads {VERSION}): upgrade spikeformers"
        )
    if version != VERSION or zero or length % ALIGNMENT:
        raise ValueError(f"{name} is damaged: its preamble says what no version writes")
    if length > MOST_HEADER or payload > MOST_PAYLOAD:
        raise ValueError(f"{name} is damaged: it claims a header of {length:,} bytes and tensors of {payload:,}")
    if PREAMBLE + length + payload != total:
        wanted = PREAMBLE + length + payload
        raise ValueError(f"{name} is damaged: it has {total:,} bytes, not the {wanted:,} that were written")
    return length, header_sum, payload_sum


def _parse_json(text: bytes) -> dict[str, Any]:
    """One JSON object without doubled keys, infinities or whole numbers beyond 64 bits."""
    try:
        found = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("its header is no JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a key twice")
    return found


def _integer(text: str) -> int:
    if len(text) > len(str(-MOST_INTEGER)) or abs(int(text)) > MOST_INTEGER:
        raise ValueError("its header has a whole number beyond 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"its header has a number that is not finite ({text[:20]})")
    return float(text)


def _read_table(table: Any, payload: int) -> dict[str, Stored]:
    """The tensors of a header, which must fill `payload` bytes one behind the other."""
    if not isinstance(table, dict):
        raise ValueError("its header has no table of tensors")
    found, end = {}, 0
    for name, row in table.items():
        if not isinstance(row, dict) or row.keys() != {each.name for each in fields(Stored)}:
            raise ValueError(f"tensor {name[:80]!r} is not described as one")
        shape, kind = row["shape"], row["kind"]
        if not (isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS and all(map(_is_size, shape))):
            raise ValueError(f"tensor {name[:80]!r} has the shape {str(shape)[:60]}")
        if not isinstance(kind, str) or (kind not in PACKED and kind not in PLAIN):
            raise ValueError(f"tensor {name[:80]!r} is of an unknown kind, {str(kind)[:60]!r}")
        if not (_is_size(row["offset"]) and _is_size(row["size"]) and type(row["channels_last"]) is bool):
            raise ValueError(f"tensor {name[:80]!r} is not described as one")
        stored = Stored(**row | {"shape": tuple(shape)})
        if stored.channels_last and len(shape) != 4:
            raise ValueError(f"tensor {name[:80]!r} has {len(shape)} dimensions and cannot lie channels last")
        if stored.size != stored.full_size:
            raise ValueError(f"tensor {name[:80]!r} of shape {shape} takes {stored.full_size} bytes, not {stored.size}")
        if stored.offset != end + -end % ALIGNMENT:
            raise ValueError(f"tensor {name[:80]!r} does not begin where the one before it ends")
        end = stored.offset + stored.size
        found[name] = stored
    if end != payload:
        raise ValueError(f"its tensors take {end} bytes, and {payload} are there")
    return found


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _encode_tensor(name: str, tensor: Tensor) -> tuple[str, bytes]:
    """Kind and bytes of one tensor."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in PLAIN:
        raise ValueError(f"tensor {name} is of type {tensor.dtype}, which an artifact does not hold")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"tensor {name} holds numbers that are not finite: the model is broken, train it again")
    if tensor.dtype == torch.int8:
        kind = _fewest_bits(tensor)
    if kind in PACKED:
        return kind, pack(tensor.contiguous(), bits=PACKED[kind]).numpy().tobytes()
    return kind, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _fewest_bits(tensor: Tensor) -> str:
    """The kind of the fewest bits that hold whole numbers of 8 bits."""
    low, high = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
    ranges = {kind: integer_range(bits) for kind, bits in PACKED.items()}
    return next((kind for kind, (least, most) in ranges.items() if least <= low and high <= most), "int8")


def _is_channels_last(tensor: Tensor) -> bool:
    """True if the strides are those of channels last and no others: the layout decides how convolutions round."""
    if tensor.ndim != 4:
        return False
    last = torch.empty(tensor.shape, device="meta", memory_format=torch.channels_last).stride()
    return tensor.stride() == last and tensor.stride() != torch.empty(tensor.shape, device="meta").stride()


def _digest(content: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(content).digest()

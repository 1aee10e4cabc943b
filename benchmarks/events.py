"""Events a second, on one core: every representation of a recording, and every reader of a file.

The recording is drawn at random, evenly over a sensor of 128 x 128 and over eight seconds, which is the hardest case
for caches and for packing. It is written in each format (by the writers below, since the package only reads) into a
folder that is removed afterwards, read once to see that the events are the same, and then timed; files come from the
system's cache. Medians over the repeats.

    pip install -e ".[events]" && python benchmarks/events.py --json benchmarks/results/events.json
"""

import argparse
import io
import json
import os
import platform
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import h5py
import lz4.frame
import numpy as np
import torch
import zstandard
from scipy.io import savemat

from spikeformers.data.event_files import read_events
from spikeformers.data.events import Events, frames, three_channels, time_surface, voxel_grid
from spikeformers.train.summary import hardware

SENSOR = (128, 128)
MICROSECONDS = 2**23 - 1  # as long as the 23 bits of .bin allow
PACKET = 8192  # events in a packet of AEDAT
INFO = (
    '<dv version="2.0"><node name="outInfo"><node name="0"><attr key="typeIdentifier" type="string">EVTS</attr>'
    '<node name="info"><attr key="sizeX" type="int">128</attr><attr key="sizeY" type="int">128</attr></node>'
    "</node></node></dv>"
)


def recording(count: int) -> Events:
    random = np.random.default_rng(0)
    x, y = (random.integers(side, size=count) for side in SENSOR)
    p, t = random.integers(2, size=count), np.sort(random.integers(MICROSECONDS, size=count))
    return Events(x, y, p, t, SENSOR)


def packed(kind: list[tuple], **columns: np.ndarray) -> bytes:
    """Records of fixed size, one for each event."""
    table = np.zeros(len(next(iter(columns.values()))), np.dtype(kind))
    for name, values in columns.items():
        table[name] = values
    return table.tobytes()


def as_bin(events: Events) -> bytes:
    last = events.p.astype(np.int64) << 23 | events.t
    columns = {"x": events.x, "y": events.y, "a": last >> 16, "b": last >> 8 & 0xFF, "c": last & 0xFF}
    return packed([(name, "u1") for name in columns], **columns)


def as_aedat_2(events: Events) -> bytes:
    address = (127 - events.x.astype(np.int64)) << 8 | (127 - events.y) << 1 | ~events.p
    return b"#!AER-DAT2.0\r\n" + packed([("address", ">u4"), ("t", ">i4")], address=address, t=events.t)


def as_aedat_3(events: Events) -> bytes:
    parts = [b"#!AER-DAT3.1\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"]
    for start in range(0, len(events), PACKET):
        part = events[start : start + PACKET]
        address = part.x.astype(np.int64) << 17 | part.y.astype(np.int64) << 2 | part.p << 1 | 1
        parts.append(struct.pack("<hhiiiiii", 1, 1, 8, 4, 0, len(part), len(part), len(part)))
        parts.append(packed([("address", "<u4"), ("t", "<i4")], address=address, t=part.t))
    return b"".join(parts)


def flat(identifier: bytes, *, first: bytes, vector: bytes, count: int) -> bytes:
    """A flatbuffers table of an inline field, if it is not empty, and a vector, with its length in front."""
    # The header's fields are its compression, the place of a table of all packets (left out), and its description.
    fields = struct.pack("<3H", 4, 0, 4 + len(first)) if first else struct.pack("<H", 4)
    body = struct.pack("<HH", 4 + len(fields), 8 + len(first)) + fields
    body = struct.pack("<I4s", 8 + len(body), identifier) + body + struct.pack("<i", len(body)) + first
    body += struct.pack("<II", 4, count) + vector
    return struct.pack("<I", len(body)) + body


def as_aedat_4(events: Events, *, code: int, compress: Callable[[bytes], bytes]) -> bytes:
    info = INFO.encode()
    parts = [b"#!AER-DAT4.0\r\n", flat(b"IOHE", first=struct.pack("<i", code), vector=info, count=len(info))]
    for start in range(0, len(events), PACKET):
        part = events[start : start + PACKET]
        kind = [("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "?"), ("rest", "V3")]
        body = packed(kind, t=part.t, x=part.x, y=part.y, p=part.p)
        content = compress(flat(b"EVTS", first=b"", vector=body, count=len(part)))
        parts += [struct.pack("<ii", 0, len(content)), content]
    return b"".join(parts)


def as_dat(events: Events) -> bytes:
    address = events.x.astype(np.int64) | events.y.astype(np.int64) << 14 | events.p.astype(np.int64) << 28
    return b"% Version 2\n% Height 128\n% Width 128\n\x0c\x08" + packed(
        [("t", "<u4"), ("address", "<u4")], t=events.t, address=address
    )


def as_evt_2(events: Events) -> bytes:
    """A word of the upper part of the time in front of every event, more than a camera writes."""
    high = 0x8 << 28 | events.t >> 6
    change = events.p.astype(np.int64) << 28 | (events.t & 63) << 22 | events.x.astype(np.int64) << 11 | events.y
    words = np.stack((high, change), axis=1).astype("<u4")
    return b"% evt 2.0\n% geometry 128x128\n% end\n" + words.tobytes()


def as_evt_3(events: Events) -> bytes:
    """Five words for every event, the upper part of the time, the lower part, row, base, and a vector of one event."""
    p = events.p.astype(np.int64) << 11
    words = (0x8000 | events.t >> 12, 0x6000 | events.t & 0xFFF, events.y, 0x3000 | p | events.x, 0 * p + 0x5001)
    return b"% evt 3.0\n% geometry 128x128\n% end\n" + np.stack(words, axis=1).astype("<u2").tobytes()


def as_npz(events: Events) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=events.x, y=events.y, p=events.p, t=events.t)
    return stream.getvalue()


def as_h5(events: Events) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name in "xypt":
            file.create_dataset(f"events/{name}", data=getattr(events, name), compression="gzip")
    return stream.getvalue()


def as_mat(events: Events) -> bytes:
    stream = io.BytesIO()
    savemat(stream, {name: getattr(events, name)[:, None] for name in "xypt"}, do_compression=True)
    return stream.getvalue()


def as_text(events: Events) -> bytes:
    rows = np.stack((events.t, events.x, events.y, events.p), axis=1)
    return "\n".join(map("{0[0]} {0[1]} {0[2]} {0[3]}".format, rows.tolist())).encode()


FORMATS: dict[str, tuple[str, Callable[[Events], bytes]]] = {
    ".bin (N-MNIST)": (".bin", as_bin),
    "AEDAT 2.0": (".aedat", as_aedat_2),
    "AEDAT 3.1": (".aedat", as_aedat_3),
    "AEDAT 4.0, plain": (".aedat4", lambda events: as_aedat_4(events, code=0, compress=bytes)),
    "AEDAT 4.0, LZ4": (".aedat4", lambda events: as_aedat_4(events, code=1, compress=lz4.frame.compress)),
    "AEDAT 4.0, ZSTD": (".aedat4", lambda events: as_aedat_4(events, code=3, compress=zstandard.compress)),
    "Prophesee .dat": (".dat", as_dat),
    "EVT 2.0": (".raw", as_evt_2),
    "EVT 3.0": (".raw", as_evt_3),
    ".npz, compressed": (".npz", as_npz),
    "HDF5, gzip": (".h5", as_h5),
    ".mat, compressed": (".mat", as_mat),
    "text": (".txt", as_text),
}
REPRESENTATIONS: dict[str, Callable[[Events, int], torch.Tensor]] = {
    "frames": lambda events, steps: frames(events, steps=steps),
    "frames, by time": lambda events, steps: frames(events, steps=steps, split="time"),
    "frames, 48 x 48": lambda events, steps: frames(events, steps=steps, size=(48, 48)),
    "three_channels": lambda events, steps: three_channels(events, steps=steps),
    "voxel_grid": lambda events, steps: voxel_grid(events, steps=steps),
    "time_surface": lambda events, steps: time_surface(events, steps=steps, tau=50_000.0),
}


def check_equal(ours: Events, written: Events, *, name: str) -> None:
    """Raises ValueError unless a file gives back the events that were written."""
    for column in "xypt":
        if not np.array_equal(getattr(ours, column), getattr(written, column)):
            raise ValueError(f"{name}: {column} differs from what was written; the time of a wrong reader says nothing")


def seconds_of(work: Callable[[], object], *, repeats: int) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def row_of(name: str, count: int, times: list[float]) -> dict:
    """Printed as it comes."""
    middle = statistics.median(times)
    row = {
        "name": name,
        "events": count,
        "ms": round(1e3 * middle, 2),
        "million_events_per_s": round(count / middle / 1e6, 2),
    }
    print(f"{name:20}{count:>10}{row['ms']:>10.2f} ms{row['million_events_per_s']:>10.2f} M events/s", flush=True)
    return row


def representations(options: argparse.Namespace) -> list[dict]:
    """One long recording, and one of the length of CIFAR10-DVS's, whose frames are more work than its events."""
    rows = []
    for count in (options.events, options.short):
        events = recording(count)
        for name, make in REPRESENTATIONS.items():
            times = seconds_of(lambda make=make, events=events: make(events, options.steps), repeats=options.repeats)
            rows.append(row_of(name, count, times) | {"steps": options.steps})
    return rows


def readers(options: argparse.Namespace) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (suffix, content_of) in FORMATS.items():
            events = recording(options.events if suffix != ".txt" else options.short)
            path = Path(folder) / f"1{suffix}"
            path.write_bytes(content_of(events))
            check_equal(read_events(path, size=SENSOR), events, name=name)
            times = seconds_of(lambda path=path: read_events(path, size=SENSOR), repeats=options.repeats)
            rows.append(
                row_of(name, len(events), times) | {"bytes_per_event": round(path.stat().st_size / len(events), 2)}
            )
    return rows


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Events a second of representations and readers, on one core.")
    parser.add_argument("--events", type=int, default=4_000_000, help="of the long recording")
    parser.add_argument("--short", type=int, default=200_000, help="events of the short recording, and of text")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    machine = f"{hardware()}, {os.cpu_count()} cores"
    print(f"{machine}; one thread; {options.repeats} repeats; torch {version('torch')}, numpy {version('numpy')}")
    load_before = os.getloadavg()[0]
    result = {
        "command": " ".join(["python", "benchmarks/events.py", *sys.argv[1:]]),
        "hardware": machine,
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "spikeformers", "h5py", "lz4", "zstandard", "scipy")},
        },
        "sensor": SENSOR,
        "repeats": options.repeats,
        "representations": representations(options),
        "readers": readers(options),
        "load_average_before_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()

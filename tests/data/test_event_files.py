"""Files written byte by byte give back their events; broken ones are refused with the file, the place, the cure."""

import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from spikeformers.data import event_files
from spikeformers.data.archive import ZipMember
from spikeformers.data.event_files import SUFFIXES, read_events, read_of_sensor
from spikeformers.data.events import Events

X, Y, P, T = [3, 33, 0, 5], [7, 0, 33, 7], [1, 0, 1, 1], [10, 10, 70_000, 70_001]


def rows_of(events: Events) -> list[tuple[int, int, int, int]]:
    """(t, x, y, p) of every event."""
    columns = (events.t, events.x, events.y, events.p.astype(int))
    return list(zip(*(column.tolist() for column in columns), strict=True))


ROWS = list(zip(T, X, Y, P, strict=True))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def bin_of(rows: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(
        struct.pack(">BBI", x, y, p << 23 | t)[:2] + (p << 23 | t).to_bytes(3, "big") for t, x, y, p in rows
    )


def npz_of(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


ARRAYS = {name: np.array(values) for name, values in zip("xypt", (X, Y, P, T), strict=True)}


def test_n_mnist_files_have_five_bytes_an_event(tmp_path):
    events = read_events(written(tmp_path / "1.bin", bin_of(ROWS)))
    assert rows_of(events) == ROWS
    assert events.size == (34, 34)
    assert bin_of(ROWS)[:5] == bytes([3, 7, 0x80, 0, 10])
    assert read_events(str(tmp_path / "1.bin"), size=(40, 50)).size == (40, 50)


def test_overflows_of_n_mnist_add_8192_microseconds_to_all_that_follow(tmp_path):
    overflow = (0, 0, 240, 0)
    content = bin_of([(5, 1, 2, 1), overflow, (6, 1, 2, 0), overflow, overflow, (7, 1, 2, 0)])
    times = read_events(written(tmp_path / "1.bin", content)).t
    assert times.tolist() == [5, 6 + 8192, 7 + 3 * 8192]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "1.bin: the file is empty"),
        (bin_of(ROWS)[:-2], "event 3 at offset 15 has 3 of 5 bytes: the file was cut"),
        (bin_of([(5, 1, 2, 1), (4, 1, 2, 1)]), "time goes backwards at event 1: 4 us after 5 us; sort"),
    ],
)
def test_a_broken_recording_is_named_with_its_place(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_events(written(tmp_path / "1.bin", content))


def test_larger_files_of_five_bytes_an_event_tell_no_sensor(tmp_path):
    path = written(tmp_path / "1.bin", bin_of([(0, 1, 2, 1), (1, 34, 2, 1)]))
    assert read_of_sensor(path, sensor=(180, 240)).size == (180, 240)
    with pytest.raises(ValueError, match=r"1\.bin: it tells no sensor: train with data.sensor=HEIGHT,WIDTH"):
        read_of_sensor(path, sensor=None)
    with pytest.raises(ValueError, match="x of event 1 is 34, and must be inside the width 34"):
        read_of_sensor(path, sensor=(34, 34))


def test_a_file_of_another_sensor_is_refused_and_one_that_tells_none_takes_the_callers(tmp_path):
    told = written(tmp_path / "1.txt", b"50 40\n1 2 3 1\n")
    untold = written(tmp_path / "2.txt", b"1 2 3 1\n")
    assert read_of_sensor(told, sensor=None).size == read_of_sensor(untold, sensor=(40, 50)).size == (40, 50)
    with pytest.raises(
        ValueError, match=r"1.txt: its sensor has 40 x 50 pixels .* recordings of 34 x 34: take another"
    ):
        read_of_sensor(told, sensor=(34, 34))
    with pytest.raises(ValueError, match=r"2\.txt: it tells no sensor"):
        read_of_sensor(untold, sensor=None)


def test_events_out_of_order_are_sorted_where_that_is_asked_for(tmp_path):
    rows = [(5, 1, 2, 1), (4, 2, 2, 1), (5, 3, 2, 0), (4, 4, 2, 0)]
    path = written(tmp_path / "1.bin", bin_of(rows))
    assert rows_of(read_events(path, disorder="sort")) == [rows[1], rows[3], rows[0], rows[2]]
    with pytest.raises(ValueError, match="disorder must be error or sort, got 'ignore'"):
        read_events(path, disorder="ignore")


def test_another_suffix_is_refused_with_those_that_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"1\.xyz: its suffix is none of \.bin, \.aedat"):
        read_events(written(tmp_path / "1.xyz", b"1"))
    assert ".txt.gz" in SUFFIXES


def test_members_of_archives_are_read_like_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("train/1.bin", bin_of(ROWS))
    assert rows_of(read_events(ZipMember(tmp_path / "all.zip", "train/1.bin"))) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{t} {x} {y} {p}" for t, x, y, p in ROWS),
        "# t x y p\n" + "\n".join(f"{t / 1e6:.9f} {x} {y} {2 * p - 1}" for t, x, y, p in ROWS) + "\n",
        "\n".join(f"{t},{x},{y},{p}" for t, x, y, p in ROWS),
        "x,y,polarity,timestamp\r\n" + "\r\n".join(f"{x},{y},{p},{t}" for t, x, y, p in ROWS),
        "50 40\n" + "\n".join(f"{t / 1e6:f} {x} {y} {p}" for t, x, y, p in ROWS),
        "\n".join(f"{t:.18e} {x:.18e} {y:.18e} {p:.18e}" for t, x, y, p in ROWS),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".txt.gz", ".csv.gz"])
def test_text_is_read_with_any_separator_order_unit_and_packing(tmp_path, text, suffix):
    content = gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode()
    events = read_events(written(tmp_path / f"1{suffix}", content))
    assert rows_of(events) == ROWS
    assert events.size == ((40, 50) if text.startswith("50 40") else (34, 34))


def test_seconds_are_told_by_their_point_even_where_they_are_whole(tmp_path):
    assert read_events(written(tmp_path / "1.txt", b"1.0 2 3 1\n2.0 2 3 1\n")).t.tolist() == [1_000_000, 2_000_000]
    assert read_events(written(tmp_path / "2.txt", b"1 2 3 1\n2 2 3 1\n")).t.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n", "its lines have 3 numbers, and must have 4: t x y p"),
        ("1 2 3 1\n2 2 3\n", "number of columns changed"),
        ("1 2 3 1\n2 a 3 1\n", "could not convert string 'a'"),
        ("1 2 3 1\n2 2.5 3 1\n", "x of event 1 is 2.5, and must be a whole number"),
        ("1 2 3 1\n2 2 3 2\n", "p of event 1 is 2, and must be 1, or 0"),
        ("1 2 3 -1\n2 2 3 0\n", "p of event 1 is 0, and must be 1, or -1"),
        ("1 2 3 1\nnan 2 3 1\n", "t of event 1 is nan"),
        ("1e300 2 3 1\n", "t of event 0 is 1e.300"),
        ("1 -2 3 1\n", "x of event 0 is -2, and must be inside the width"),
        ("1 99999 3 1\n", "size must be a height and a width from 1 to 32768"),
        ("a,b,c,d\n1,2,3,1\n", "its first line names a b c d, and must name t, x, y and p"),
        ("# nothing\n", "it holds no events"),
    ],
)
def test_text_that_holds_no_events_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_events(written(tmp_path / "1.txt", text.encode()))


def test_all_parts_of_a_gzip_file_are_read(tmp_path):
    parts = gzip.compress(b"1 2 3 1\n2 2 3") + gzip.compress(b" 0\n3 2 3 1\n")
    assert rows_of(read_events(written(tmp_path / "1.txt.gz", parts))) == [(1, 2, 3, 1), (2, 2, 3, 0), (3, 2, 3, 1)]


def test_packed_text_that_fills_the_memory_or_was_cut_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("spikeformers.data.event_columns.SMALL_UNPACKED", 2**16)
    bomb = gzip.compress(b"0 0 0 0\n" * 100_000)
    with pytest.raises(ValueError, match=f"its {len(bomb)} bytes unpack to more than .*do not trust this file"):
        read_events(written(tmp_path / "1.txt.gz", bomb))
    with pytest.raises(ValueError, match="ends too early: the file was cut"):
        read_events(written(tmp_path / "2.txt.gz", gzip.compress(b"0 0 0 0\n")[:-9]))
    with pytest.raises(ValueError, match="broken packed data"):
        read_events(written(tmp_path / "3.txt.gz", b"0 0 0 0\n"))


@pytest.mark.parametrize(
    "arrays",
    [
        ARRAYS,
        {"xs": ARRAYS["x"], "ys": ARRAYS["y"], "polarity": ARRAYS["p"] * 2 - 1, "Timestamp": ARRAYS["t"]},
        {"x": ARRAYS["x"], "y": ARRAYS["y"], "p": ARRAYS["p"] > 0, "ts": ARRAYS["t"] / 1e6},
        {"events": np.array(ROWS, dtype=object).astype("U9")},
    ],
    ids=["plain", "names", "seconds", "fields"],
)
def test_npz_files_may_use_any_of_the_usual_names(tmp_path, arrays):
    if "events" in arrays:
        kind = [("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "?")]
        arrays = {"events": np.array(ROWS, dtype=kind)}
    assert rows_of(read_events(written(tmp_path / "1.npz", npz_of(**arrays)))) == ROWS


def repacked(name: str, content: bytes, *, kind: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def npy_of(array: np.ndarray, *, shape: tuple[int, ...] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    )
    return stream.getvalue() + (array.tobytes() if array.dtype != object else b"cos\nsystem\n(S'true'\ntR.")


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz_of(**ARRAYS)[:-30], "no readable npz file"),
        (
            npz_of(x=ARRAYS["x"], y=ARRAYS["y"], p=ARRAYS["p"]),
            "no x, y, p and t under their usual names among .*rename",
        ),
        (repacked("x.npy", npy_of(np.zeros(3), shape=(2**40,))), r"x.npy claims \(1099511627776,\) numbers of 8 bytes"),
        (repacked("x.npy", npy_of(np.zeros(3), shape=(-3,))), "x.npy claims"),
        (repacked("x.npy", npy_of(np.zeros(1, dtype=object))), "x.npy holds Python objects, which can run code"),
        (repacked("x.npy", b"nothing at all"), "magic string is not correct"),
        (repacked("x.npy", npy_header("(" * 900)), "x.npy has no readable header"),
        (repacked("x.npy", npy_header("'''")), "x.npy has no readable header"),
        (repacked("x.npy", b"\x93NUMPY\x02\x00\x01"), "x.npy has no readable header"),
        (repacked("x.npy", npy_of(np.zeros(3)), kind=zipfile.ZIP_LZMA), "x.npy is packed in another way than numpy"),
    ],
)
def test_npz_files_that_are_cut_or_claim_too_much_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_events(written(tmp_path / "1.npz", content))


def test_npz_files_that_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("spikeformers.data.event_columns.SMALL_UNPACKED", 2**16)
    with pytest.raises(ValueError, match="unpack to more than"):
        read_events(written(tmp_path / "1.npz", npz_of(x=np.zeros(10**6))))


@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
@pytest.mark.parametrize("place", ["x", "events/x", "data/CD/x", "CD/events"])
def test_hdf5_files_may_keep_the_events_in_any_group(tmp_path, suffix, place):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / f"1{suffix}"
    with h5py.File(path, "w") as file:
        file["label"] = "cat"
        file["other/numbers"] = np.arange(3)
        if place == "CD/events":
            file[place] = np.array(ROWS, dtype=[("t", "<i8"), ("x", "<u2"), ("y", "<u2"), ("p", "<i2")])
        else:
            for name, values in ARRAYS.items():
                file.create_dataset(place[:-1] + name, data=values, compression="gzip")
    assert rows_of(read_events(path)) == ROWS


def test_hdf5_files_that_lead_elsewhere_or_claim_too_much_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        for name, values in ARRAYS.items():
            file[f"there/{name}"] = values
        file["here/x"] = h5py.ExternalLink("linked.h5", "there/x")
    with h5py.File(tmp_path / "1.h5", "w") as file:
        file["events"] = h5py.ExternalLink(str(tmp_path / "linked.h5"), "there")
    with pytest.raises(ValueError, match="no x, y, p and t under their usual names in one of its groups"):
        read_events(tmp_path / "1.h5")
    with h5py.File(tmp_path / "2.h5", "w") as file:
        file.create_dataset("x", shape=(8,), dtype="u1", external=[(str(tmp_path / "linked.h5"), 0, 8)])
    with pytest.raises(ValueError, match="/x keeps its numbers in another file"):
        read_events(tmp_path / "2.h5")
    with h5py.File(tmp_path / "3.h5", "w") as file:
        file.create_dataset("x", shape=(2**40,), dtype="u1", chunks=(2**16,))
    with pytest.raises(ValueError, match="/x claims 1099511627776 bytes, far more than the file has"):
        read_events(tmp_path / "3.h5")
    with h5py.File(tmp_path / "5.h5", "w") as file:  # nothing is stored of it
        file.create_dataset("x", shape=(8,), dtype="u1", chunks=(2**28,), maxshape=(None,))
    with pytest.raises(ValueError, match="/x claims 268435456 bytes, far more than the file has"):
        read_events(tmp_path / "5.h5")
    with h5py.File(tmp_path / "6.h5", "w") as file:
        file.create_dataset("events", shape=(8,), dtype=[("x", "i4"), ("name", h5py.string_dtype())])
    with pytest.raises(ValueError, match="/events has fields of varying length: store plain numbers"):
        read_events(tmp_path / "6.h5")
    with pytest.raises(ValueError, match="no readable HDF5 file"):
        read_events(written(tmp_path / "4.h5", (tmp_path / "linked.h5").read_bytes()[:600]))


def test_a_format_that_needs_an_extra_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r'this file needs h5py: pip install "spikeformers\[events\]"'):
        read_events(written(tmp_path / "1.h5", b"1"))


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files_hold_columns_taxels_or_the_table_of_dat2mat(tmp_path, compressed):
    savemat(tmp_path / "1.mat", {name: values[:, None] for name, values in ARRAYS.items()}, do_compression=compressed)
    assert rows_of(read_events(tmp_path / "1.mat")) == ROWS

    taxels = np.zeros((101, 3))
    taxels[[0, 23, 99], [0, 1, 2]] = [1, -1, 1]
    taxels[100] = [0.1, 0.25, 0.250001]
    savemat(tmp_path / "2.mat", {"spiketrain": taxels}, do_compression=compressed)
    events = read_events(tmp_path / "2.mat")
    assert rows_of(events) == [(100_000, 0, 0, 1), (250_000, 3, 2, 0), (250_001, 9, 9, 1)]
    assert events.size == (10, 10)

    table = np.array([[5, -1, -1, 2, 100, 1], [9, -1, -1, 3, 0, -1]], dtype=float)
    savemat(tmp_path / "3.mat", {"out1": table}, do_compression=compressed)
    events = read_events(tmp_path / "3.mat")
    assert rows_of(events) == [(5, 27, 2, 1), (9, 127, 3, 0)]
    assert events.size == (128, 128)


def mat_of(elements: bytes) -> bytes:
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + elements


def matrix_of(kind: int, shape: tuple[int, int]) -> bytes:
    """A MATLAB matrix called c of a class by number, without its content."""
    content = struct.pack("<IIIIIIii", 6, 8, kind, 0, 5, 8, *shape) + struct.pack("<II8s", 1, 1, b"c")
    return struct.pack("<II", 14, len(content)) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (mat_of(matrix_of(1, (2**20, 2**20))), r"no x, y, p and t under their usual names among \[\]"),  # cells
        (mat_of(matrix_of(6, (2**20, 2**20))), r"c claims \(1048576, 1048576\) numbers, more than its 184 bytes"),
        (mat_of(matrix_of(6, (2, 2))), "no readable MATLAB file"),
        (b"MATLAB 5.0", "less than a MATLAB header"),
        (mat_of(struct.pack("<II", 14, 2**31)), "the element at offset 128 claims 2147483648 bytes: the file was cut"),
        (mat_of(b"\x0e\x00"), "it ends inside the element at offset 128"),
        (mat_of(struct.pack("<II", 15, 4) + b"xxxx"), "broken packed data"),
        (mat_of(b""), r"no x, y, p and t under their usual names among \[\]"),
    ],
)
def test_matlab_files_that_are_cut_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_events(written(tmp_path / "1.mat", content))


def test_matlab_files_that_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("spikeformers.data.event_columns.SMALL_UNPACKED", 2**16)
    packed = zlib.compress(struct.pack("<II", 14, 10**6) + bytes(10**6))
    content = mat_of(struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(ValueError, match="unpack to more than"):
        read_events(written(tmp_path / "1.mat", content))
    savemat(tmp_path / "2.mat", {"spiketrain": np.zeros((100, 3))})
    with pytest.raises(ValueError, match=r"spiketrain must have 101 rows"):
        read_events(tmp_path / "2.mat")


@pytest.mark.parametrize("suffix", sorted(set(SUFFIXES) - {".h5", ".hdf5"}))
def test_no_damage_to_a_file_raises_anything_but_a_value_error(tmp_path, suffix):
    """Random bytes, behind each format's own beginning or not; HDF5 is left to its library."""
    random = np.random.RandomState(0)
    beginnings = {
        **{
            ".aedat": b"#!AER-DAT3.1\r\n#!END-HEADER\r\n",
            ".aedat4": b"#!AER-DAT4.0\r\n",
            ".dat": b"% Version 2\n\x0c\x08",
        },
        **{".raw": b"% evt 3.0\n% end\n", ".npz": npz_of(**ARRAYS)[:200], ".mat": mat_of(b"")},
    }
    messages = []
    for trial in range(40):
        beginning = beginnings.get(suffix, b"") if trial % 4 else b""
        content = beginning + random.bytes(random.randint(1, 200))
        try:
            read_events(written(tmp_path / f"1{suffix}", content), disorder="sort", size=(2**15, 2**15))
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert all(f"1{suffix}: " in message for message in messages)


SAMPLES = {  # name: events, size, rows of the first and the last one
    "NCARS_obj_004397_td.dat": (4407, (61, 54), (0, 6, 18, 1), None),
    "sample.aedat4": (111_954, (240, 320), (1605537493718345, 154, 204, 0), None),
    "sample_aedat_header.aedat": (0, (260, 346), None, None),
    "sample_ncars.dat": (2009, (42, 78), (0, 25, 8, 0), None),
    "sample_nmnist.bin": (4325, (34, 34), (654, 7, 15, 1), None),
    "sample_stmnist.mat": (2346, (10, 10), (196_626, 5, 4, 0), None),
    "slider_depth_events_chunk.txt.gz": (50_000, (180, 240), (3811, 96, 133, 0), (174_156, 70, 103, 1)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_real_files_are_read(shared_data, name):
    if name == "sample.aedat4":
        pytest.importorskip("lz4")
    count, size, first, last = SAMPLES[name]
    events = read_events(shared_data / "event_samples" / name)
    assert len(events) == count
    assert events.size == size
    assert first is None or rows_of(events[:1]) == [first]
    assert last is None or rows_of(events[-1:]) == [last]


def test_recordings_in_the_text_files_of_a_set_all_are_known(shared_data):
    names = {path.name for path in (shared_data / "event_samples").iterdir()}
    assert names == set(SAMPLES)
    assert all(name.endswith(event_files.SUFFIXES) for name in names)

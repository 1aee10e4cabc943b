"""AEDAT files of three versions, written here, give back their events; broken ones are refused with the place."""

import struct

import numpy as np
import pytest

from spikeformers.data.event_files import read_events

HEAD_2 = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n"
HEAD_3 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
ROWS = [(10, 3, 7, 1), (10, 100, 0, 0), (700, 0, 127, 1), (701, 5, 7, 1)]


def rows_of(events):
    columns = (events.t, events.x, events.y, events.p.astype(int))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def read(tmp_path, content, suffix=".aedat", **arguments):
    path = tmp_path / f"1{suffix}"
    path.write_bytes(content)
    return read_events(path, **arguments)


def dvs128(rows):
    """The address bits of spikingjelly's CIFAR10-DVS: column 127 - bits 8..14, row 127 - bits 1..7, off in bit 0."""
    return b"".join(struct.pack(">Ii", (127 - x) << 8 | (127 - y) << 1 | (1 - p), t) for t, x, y, p in rows)


def davis(rows, *, size):
    """jAER's address bits: rows from below in bits 22..30, columns from the right in bits 12..21, on in bit 11."""
    height, width = size
    return b"".join(
        struct.pack(">Ii", (height - 1 - y) << 22 | (width - 1 - x) << 12 | p << 11, t) for t, x, y, p in rows
    )


@pytest.mark.parametrize("head", [HEAD_2, HEAD_2.replace(b"\r", b""), HEAD_2 + b"# AEChip: ch.unizh.ini.DVS128\r\n"])
def test_a_dvs128_in_version_2_is_turned_upright(tmp_path, head):
    events = read(tmp_path, head + dvs128(ROWS))
    assert rows_of(events) == ROWS
    assert events.size == (128, 128)


@pytest.mark.parametrize(
    ("chip", "size"), [("DAViS240", (180, 240)), ("Davis346red", (260, 346)), ("DavisRGB640", (480, 640))]
)
def test_a_davis_in_version_2_is_told_by_its_header(tmp_path, chip, size):
    head = HEAD_2 + f"# AEChip: eu.seebetter.ini.chips.davis.{chip}\r\n".encode()
    events = read(tmp_path, head + davis(ROWS, size=size))
    assert rows_of(events) == ROWS
    assert events.size == size


def test_special_events_are_left_out_in_version_2(tmp_path):
    special = struct.pack(">Ii", 0x8000, 20) + struct.pack(">Ii", 0x80000000, 20)
    assert rows_of(read(tmp_path, HEAD_2 + dvs128(ROWS[:2]) + special + dvs128(ROWS[2:]))) == ROWS
    head = HEAD_2 + b"# AEChip: Davis240C\r\n"
    frames_and_triggers = struct.pack(">Ii", 0x80000000, 20) + struct.pack(">Ii", 0x400, 20)
    assert rows_of(read(tmp_path, head + frames_and_triggers + davis(ROWS, size=(180, 240)))) == ROWS


def test_an_address_that_looks_like_a_header_is_data_in_version_2(tmp_path):
    """The first byte of an address in row 39 from the top of 180 is the # of a header."""
    head = HEAD_2 + b"# AEChip: Davis240C\r\n"
    rows = [(0x0A0A, 239, 39, 0), (0x0A0B, 1, 2, 1)]
    content = davis(rows, size=(180, 240))
    assert content.startswith(b"#")
    assert rows_of(read(tmp_path, head + content)) == rows
    assert rows_of(read(tmp_path, head + b"#End Of ASCII Header\r\n" + content)) == rows


def test_a_version_2_file_may_have_no_events(tmp_path):
    assert len(read(tmp_path, HEAD_2)) == 0


def test_a_dat_file_of_jaer_is_read_too(tmp_path):
    assert rows_of(read(tmp_path, HEAD_2 + dvs128(ROWS), suffix=".dat")) == ROWS


def packet_3(rows, *, kind=1, capacity=None, number=None, overflows=0, size=8, valid=1):
    body = b"".join(struct.pack("<Ii", x << 17 | y << 2 | p << 1 | valid, t) for t, x, y, p in rows)
    count = len(rows) if number is None else number
    capacity = len(rows) if capacity is None else capacity
    return struct.pack("<hhiiiiii", kind, 1, size, 4, overflows, capacity, count, count) + body


def test_packets_of_version_3_follow_one_another(tmp_path):
    other = packet_3([(5, 1, 1, 1)], kind=3)
    marked = packet_3([(11, 9, 9, 1)], valid=0)
    spare = packet_3([*ROWS[2:], (0, 0, 0, 0)], number=2)
    events = read(tmp_path, HEAD_3 + packet_3(ROWS[:2]) + other + marked + spare)
    assert rows_of(events) == ROWS
    assert events.size == (128, 128)
    assert len(read(tmp_path, HEAD_3)) == 0


def test_overflows_of_version_3_add_31_bits(tmp_path):
    events = read(tmp_path, HEAD_3 + packet_3([(2**31 - 1, 1, 2, 1)]) + packet_3([(3, 1, 2, 1)], overflows=1))
    assert events.t.tolist() == [2**31 - 1, 2**31 + 3]


def test_version_3_tells_the_sensor_by_its_source(tmp_path):
    head = HEAD_3.replace(b"DVS128", b"DAVIS240C")
    assert read(tmp_path, head + packet_3(ROWS)).size == (180, 240)
    for other in (HEAD_3.replace(b"DVS128", b"File"), HEAD_3.replace(b": DVS128", b"")):
        assert read(tmp_path, other + packet_3(ROWS)).size == (128, 101)


def flat(identifier, *fields):
    """A flatbuffers table with its length in front; a field is bytes inside, (count, bytes) of a vector, or None."""
    vtable, inline, vectors = b"", b"", []
    for field in fields:
        vtable += struct.pack("<H", 0 if field is None else 4 + len(inline))
        if isinstance(field, tuple):
            vectors.append((len(inline), field))
        inline += b"" if field is None else field if isinstance(field, bytes) else bytes(4)
    table = 8 + 4 + len(vtable)
    end = table + 4 + len(inline)
    for place, (_, data) in vectors:
        inline = inline[:place] + struct.pack("<I", end - (table + 4 + place)) + inline[place + 4 :]
        end += 4 + len(data)
    body = struct.pack("<I", table) + identifier + struct.pack("<HH", 4 + len(vtable), 4 + len(inline)) + vtable
    body += struct.pack("<i", table - 8) + inline
    body += b"".join(struct.pack("<I", count) + data for _, (count, data) in vectors)
    return struct.pack("<I", len(body)) + body


INFO = """<dv version="2.0"><node name="outInfo" path="/">
<node name="1"><attr key="typeIdentifier" type="string">IMUS</attr></node>
<node name="3"><attr key="typeIdentifier" type="string">EVTS</attr>
<node name="info"><attr key="sizeX" type="int">346</attr><attr key="sizeY" type="int">260</attr></node></node>
</node></dv>"""


def head_4(*, compression=0, table=None, info=INFO):
    header = flat(
        b"IOHE",
        struct.pack("<i", compression),
        None if table is None else struct.pack("<q", table),
        (len(info), info.encode()),
    )
    return b"#!AER-DAT4.0\r\n" + header


def events_4(rows, *, count=None):
    body = b"".join(struct.pack("<qhh?3x", t, x, y, p) for t, x, y, p in rows)
    return flat(b"EVTS", (len(rows) if count is None else count, body))


def packet_4(body, *, stream=3, length=None):
    return struct.pack("<ii", stream, len(body) if length is None else length) + body


def packed(body, compression):
    if compression == "lz4":
        return pytest.importorskip("lz4.frame").compress(body)
    if compression == "zstd":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(body)
    return body


@pytest.mark.parametrize(("code", "compression"), [(0, "none"), (1, "lz4"), (2, "lz4"), (3, "zstd"), (4, "zstd")])
def test_packets_of_version_4_are_unpacked(tmp_path, code, compression):
    content = head_4(compression=code)
    content += packet_4(packed(events_4(ROWS[:2]), compression)) + packet_4(b"another stream", stream=1)
    content += packet_4(packed(events_4([]), compression)) + packet_4(packed(events_4(ROWS[2:]), compression))
    events = read(tmp_path, content, suffix=".aedat4")
    assert rows_of(events) == ROWS
    assert events.size == (260, 346)


def test_packets_larger_than_a_chunk_are_unpacked_whole(tmp_path):
    rows = [(t, t % 346, t % 260, t % 2) for t in range(70_000)]
    for code, compression in ((1, "lz4"), (3, "zstd")):
        content = head_4(compression=code) + packet_4(packed(events_4(rows), compression))
        assert rows_of(read(tmp_path, content, suffix=".aedat4")) == rows


def test_what_follows_the_packets_of_version_4_is_not_read(tmp_path):
    end = len(head_4(table=0)) + len(packet_4(events_4(ROWS)))
    content = head_4(table=end) + packet_4(events_4(ROWS)) + b"the table of all packets"
    assert rows_of(read(tmp_path, content, suffix=".aedat4")) == ROWS
    assert len(read(tmp_path, head_4(), suffix=".aedat4")) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#!AER-DAT1.0\r\n", "begins with #!AER-DAT2.0, 3.1 or 4.0, not with b'#!AER-DAT1.0'"),
        (b"#!AER-DAT2.0 and no end of the line", "its first line has no end"),
        (HEAD_2 + dvs128(ROWS)[:-3], "event 3 at offset .* has 5 of 8 bytes: the file was cut"),
        (HEAD_2 + b"# AEChip: a.b.Unknown\r\n", "the camera is a Unknown, whose addresses are not known"),
        (HEAD_2 + dvs128(ROWS[::-1]), "time goes backwards at event 1: 700 us after 701 us"),
        (HEAD_3[:40], "does not end with #!END-HEADER"),
        (HEAD_3 + packet_3(ROWS)[:20], f"28 bytes belong at offset {len(HEAD_3)}"),
        (HEAD_3 + packet_3(ROWS)[:-1], "claims 4 of 4 events of 8 bytes, of which the file has 31 bytes"),
        (HEAD_3 + packet_3(ROWS, capacity=2**31 - 1), "claims 4 of 2147483647 events"),
        (HEAD_3 + packet_3(ROWS, number=5), "claims 5 of 4 events"),
        (HEAD_3 + packet_3(ROWS, number=-1), "claims -1 of 4 events"),
        (HEAD_3 + packet_3([], size=0), "claims 0 of 0 events of 0 bytes"),
        (HEAD_3 + packet_3(ROWS, size=4), "have 4 bytes instead of 8"),
        (HEAD_3 + packet_3([(1, 128, 2, 1)]), "x of event 0 is 128, and must be inside the width 128"),
        (b"#!AER-DAT4.0\r\n", "8 bytes belong at offset 14"),
        (head_4()[:-9], "are claimed at offset 14"),
        (head_4().replace(b"IOHE", b"IOHO"), "it holds b'IOHO' where IOHE belongs"),
        (head_4(compression=9), "its compression 9 is not known"),
        (head_4(table=10**9), "its packets reach to offset 1000000000"),
        (head_4(info="<dv>"), "the description of its streams is broken"),
        (head_4(info='<!DOCTYPE a [<!ENTITY b "c">]><dv>&b;</dv>'), "has declarations .*do not trust this file"),
        (head_4(info=INFO.replace("EVTS", "FRME")), "it has no stream of events"),
        (head_4() + packet_4(events_4(ROWS))[:5], "8 bytes belong at offset"),
        (head_4() + packet_4(events_4(ROWS), length=10**9), "claims 1000000000 bytes of .*: the file was cut"),
        (head_4() + packet_4(events_4(ROWS), length=-5), "claims -5 bytes"),
        (head_4() + packet_4(events_4(ROWS, count=10**9)), "1000000000 elements of 16 bytes are claimed"),
        (head_4() + packet_4(flat(b"IMUS")), "it holds b'IMUS' where EVTS belongs"),
        (head_4(compression=1) + packet_4(b"nothing"), "broken LZ4 data"),
        (head_4(compression=3) + packet_4(b"nothing"), "broken ZSTD data"),
        (head_4() + packet_4(events_4([(1, 346, 2, 1)])), "x of event 0 is 346"),
    ],
)
def test_broken_files_are_refused_with_the_place(tmp_path, content, message):
    for module in ("lz4", "zstandard"):
        pytest.importorskip(module)
    with pytest.raises(ValueError, match=rf"1\.aedat: .*{message}"):
        read(tmp_path, content)


@pytest.mark.parametrize(("code", "compression"), [(1, "lz4"), (3, "zstd")])
def test_packets_that_fill_the_memory_are_refused(tmp_path, monkeypatch, code, compression):
    monkeypatch.setattr("spikeformers.data.event_columns.SMALL_UNPACKED", 2**20)
    bomb = packet_4(packed(bytes(10**6), compression)) * 2  # each of them alone is within the limit
    with pytest.raises(ValueError, match=r"EVTS belongs|unpack to more than"):
        read(tmp_path, head_4(compression=code) + bomb)
    half = packet_4(packed(flat(b"EVTS", (40_000, bytes(640_000))), compression))
    assert len(read(tmp_path, head_4(compression=code) + half)) == 40_000
    with pytest.raises(ValueError, match=r"unpack to more than .*do not trust this file"):
        read(tmp_path, head_4(compression=code) + half * 2)


@pytest.mark.parametrize("keep", [1, 5, 9, 13, 20])
def test_cut_packets_of_version_4_are_refused(tmp_path, keep):
    for code, compression in ((0, "none"), (1, "lz4"), (3, "zstd")):
        body = packed(events_4(ROWS), compression)
        with pytest.raises(ValueError, match="the packet at offset"):
            read(tmp_path, head_4(compression=code) + packet_4(body[: min(keep * len(body) // 21, len(body) - 1)]))


def test_offsets_that_lead_nowhere_are_refused(tmp_path):
    """Every byte of a small header and packet changed in turn: an error, or other events; never anything else."""
    content = head_4(info=INFO.replace("\n", "")) + packet_4(events_4(ROWS))
    random = np.random.RandomState(0)
    refused = 0
    for place in (*range(14, 60), *range(len(content) - 100, len(content))):
        broken = bytearray(content)
        broken[place] ^= int(random.randint(1, 256))
        try:
            read(tmp_path, bytes(broken), suffix=".aedat4", disorder="sort", size=(2**15, 2**15))
        except ValueError:
            refused += 1
    assert refused > 20

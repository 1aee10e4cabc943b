"""Prophesee's files, written word by word, give back their events; EVT 3.0 equals a loop over its words."""

import struct

import numpy as np
import pytest

from spikeformers.data import event_prophesee
from spikeformers.data.event_files import read_events

ROWS = [(10, 3, 7, 1), (10, 300, 0, 0), (70_000, 0, 33, 1), (70_001, 5, 7, 1)]
HEAD_DAT = "% Data file containing Event2D events.\n% Version 2\n% Date 2020-01-01 00:00:00\n"


def rows_of(events):
    columns = (events.t, events.x, events.y, events.p.astype(int))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def read(tmp_path, content, suffix=".raw", **arguments):
    path = tmp_path / f"1{suffix}"
    path.write_bytes(content)
    return read_events(path, **arguments)


def dat(rows, *, head=HEAD_DAT, kind=0x0C, size=8):
    body = b"".join(struct.pack("<II", t, x | y << 14 | p << 28) for t, x, y, p in rows)
    return head.encode() + bytes([kind, size]) + body


def evt_2(*words, head="% evt 2.0\n% geometry 640x480\n% end\n"):
    return head.encode() + struct.pack(f"<{len(words)}I", *words)


def change_2(low, x, y, p):
    return p << 28 | low << 22 | x << 11 | y


def evt_3(*words, head="% evt 3.0\n% format EVT3;height=720;width=1280\n% end\n"):
    return head.encode() + struct.pack(f"<{len(words)}H", *words)


@pytest.mark.parametrize("kind", [0x00, 0x0C])
@pytest.mark.parametrize(("sizes", "size"), [("% Height 240\n% Width 304\n", (240, 304)), ("", (34, 301))])
def test_dat_files_have_eight_bytes_an_event(tmp_path, kind, sizes, size):
    events = read(tmp_path, dat(ROWS, head=HEAD_DAT + sizes, kind=kind), suffix=".dat")
    assert rows_of(events) == ROWS
    assert events.size == size


def test_dat_files_of_version_1_have_other_bits(tmp_path):
    body = b"".join(struct.pack("<II", t, x | y << 9 | p << 17) for t, x, y, p in ROWS)
    assert rows_of(read(tmp_path, b"% Version 1\n\x00\x08" + body, suffix=".dat")) == ROWS
    assert rows_of(read(tmp_path, body, suffix=".dat")) == ROWS  # the first files have no header at all


def test_evt_2_joins_the_two_parts_of_the_time(tmp_path):
    trigger, other, high = 0xA << 28, 0xE << 28, 0x8 << 28
    content = evt_2(
        *(change_2(1, 9, 9, 1), high | 3, change_2(5, 3, 7, 1), trigger, change_2(5, 639, 479, 0)),
        *(other, high | 4, high | 5, change_2(0, 0, 0, 1)),
    )
    events = read(tmp_path, content)
    assert rows_of(events) == [(3 * 64 + 5, 3, 7, 1), (3 * 64 + 5, 639, 479, 0), (5 * 64, 0, 0, 1)]
    assert events.size == (480, 640)


def test_the_clock_of_evt_2_starts_again_after_34_bits(tmp_path):
    high = 0x8 << 28
    content = evt_2(high | 2**28 - 1, change_2(63, 1, 2, 1), high, change_2(0, 1, 2, 1), high | 1, change_2(0, 1, 2, 1))
    assert read(tmp_path, content).t.tolist() == [2**34 - 1, 2**34, 2**34 + 64]


def row(y):
    return 0x0000 | y


def single(x, p):
    return 0x2000 | p << 11 | x


def base(x, p):
    return 0x3000 | p << 11 | x


def low(value):
    return 0x6000 | value


def high(value):
    return 0x8000 | value


def vector_12(*bits):
    return 0x4000 | sum(1 << bit for bit in bits)


def vector_8(*bits):
    return 0x5000 | sum(1 << bit for bit in bits)


def test_evt_3_keeps_what_does_not_change(tmp_path):
    content = evt_3(
        *(high(1), low(5), row(7), single(3, 1), single(4, 0), low(9), single(4, 0), row(8)),
        *(base(100, 1), vector_12(0, 11), vector_12(1), vector_8(7), vector_12(2), base(1, 0), vector_8(0), 0xA001),
    )
    events = read(tmp_path, content)
    t = 4096
    assert rows_of(events) == [
        *[(t + 5, 3, 7, 1), (t + 5, 4, 7, 0), (t + 9, 4, 7, 0)],
        *[(t + 9, 100, 8, 1), (t + 9, 111, 8, 1), (t + 9, 113, 8, 1), (t + 9, 131, 8, 1), (t + 9, 134, 8, 1)],
        (t + 9, 1, 8, 0),
    ]
    assert events.size == (720, 1280)


def test_the_clock_of_evt_3_starts_again_after_24_bits(tmp_path):
    content = evt_3(
        *(high(4095), low(4095), row(1), single(2, 1), high(0), single(2, 1), low(3), single(2, 1)),
        *(high(0), single(2, 1), high(4000), high(0), single(2, 1)),
    )
    times = [2**24 - 1, 2**24, 2**24 + 3, 2**24 + 3, 2 * 2**24]
    assert read(tmp_path, content).t.tolist() == times


def test_words_before_the_first_time_or_row_or_base_are_left_out(tmp_path):
    content = evt_3(
        *(row(1), single(2, 1), vector_8(0), low(3), high(1), vector_8(0), single(5, 1), base(9, 1), vector_8(0)),
    )
    assert rows_of(read(tmp_path, content)) == [(4096, 5, 1, 1), (4096, 9, 1, 1)]
    assert rows_of(read(tmp_path, evt_3(high(1), single(2, 1), row(3), single(4, 0)))) == [(4096, 4, 3, 0)]
    other_kind = 0x1000
    assert rows_of(read(tmp_path, evt_3(high(1), row(1), single(2, 1), other_kind, single(3, 1)))) == [(4096, 2, 1, 1)]


def loop_over(words):
    """EVT 3.0, one word after the other, as Prophesee describes it."""
    rows, time_high, time_low, y, x, on, loops = [], None, 0, None, None, 0, 0
    for word in words:
        kind, value = word >> 12, word & 0xFFF
        if kind == 0x0:
            y = value & 0x7FF
        elif kind == 0x1:
            y = None
        elif kind == 0x3:
            x, on = value & 0x7FF, value >> 11
        elif kind == 0x6:
            time_low = value
        elif kind == 0x8:
            if time_high is not None and time_high - value >= 2048:
                loops += 1
            if value != time_high:
                time_low = 0
            time_high = value
        elif kind in (0x2, 0x4, 0x5):
            known = time_high is not None and y is not None
            t = (loops << 24) + ((time_high or 0) << 12) + time_low
            if kind == 0x2:
                rows += [(t, value & 0x7FF, y, value >> 11)] if known else []
            elif x is not None:
                width = 12 if kind == 0x4 else 8
                rows += [(t, x + bit, y, on) for bit in range(width) if known and value >> bit & 1]
                x += width
    return rows


@pytest.mark.parametrize("chunk", [1, 7, 1000, 2**20])
def test_evt_3_equals_a_loop_over_its_words_in_chunks_of_any_size(tmp_path, monkeypatch, chunk):
    """Bases stay below 500 and come often, so that vectors end inside the sensor."""
    monkeypatch.setattr(event_prophesee, "WORDS", chunk)
    random = np.random.RandomState(0)
    kinds = random.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 14, 15], size=3000)
    values = random.randint(4096, size=3000)
    values[kinds == 0] %= 720
    values[kinds == 2] = values[kinds == 2] & 0x800 | values[kinds == 2] % 1280
    values[kinds == 3] = values[kinds == 3] & 0x800 | values[kinds == 3] % 500
    times = kinds == 8
    values[times] = np.cumsum(random.randint(3, size=times.sum())) * 40 % 4096  # time goes on, and starts again
    words = (kinds << 12 | values).tolist()
    expected = sorted(loop_over(words), key=lambda event: event[0])
    assert rows_of(read(tmp_path, evt_3(*words), disorder="sort")) == expected
    assert len(expected) > 1000


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".dat", dat(ROWS)[:-3], "event 3 at offset .* has 5 of 8 bytes: the file was cut"),
        (".dat", HEAD_DAT.encode(), "it ends at offset .*, after its header"),
        (".dat", dat(ROWS, kind=0x0E), "its events are of type 0xe with 8 bytes"),
        (".dat", dat(ROWS, size=16), "its events are of type 0xc with 16 bytes"),
        (".dat", dat(ROWS[::-1]), "time goes backwards at event 1: 70000 us after 70001 us"),
        (".dat", dat(ROWS, head=HEAD_DAT + "% Height 240\n% Width 240\n"), "x of event 1 is 300"),
        (".raw", b"nothing", "its header does not tell the format"),
        (".raw", b"% evt 2.1\n% end\n", r"its format is EVT 2\.1; read are EVT 2\.0 and 3\.0"),
        (".raw", evt_2(0x80000001, change_2(0, 1, 2, 1))[:-1], "event 1 at offset .* has 3 of 4 bytes"),
        (".raw", evt_3(high(1), row(1))[:-1], "event 1 at offset .* has 1 of 2 bytes"),
        (".raw", evt_3(high(1), row(800), single(3, 1)), "y of event 0 is 800, and must be inside the height 720"),
        (".raw", evt_2(0x80000003, change_2(0, 1, 2, 1), 0x80000002, change_2(0, 1, 2, 1)), "time goes backwards"),
        (".raw", evt_3(head="% evt 3.0\n% end\n"), "it holds no events and tells no sensor"),
    ],
)
def test_broken_files_are_refused_with_the_place(tmp_path, suffix, content, message):
    with pytest.raises(ValueError, match=rf"1\{suffix}: {message}"):
        read(tmp_path, content, suffix=suffix)


@pytest.mark.parametrize("header", ["% format EVT2;height=480;width=640\n% end\n", "% evt 2.0\n% geometry 640x480\n"])
def test_headers_of_different_ages_tell_format_and_sensor(tmp_path, header):
    events = read(tmp_path, evt_2(0x80000001, change_2(0, 1, 2, 1), head=header))
    assert rows_of(events) == [(64, 1, 2, 1)]
    assert events.size == (480, 640)

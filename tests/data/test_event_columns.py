"""Columns are found by their usual names and checked; headers end where data begins; limits grow with a file."""

import numpy as np
import pytest

from spikeformers.data.event_columns import (
    LARGEST_RATIO,
    SMALL_UNPACKED,
    Columns,
    header_of,
    joined,
    named,
    polarity,
    records,
    unpacked_limit,
    whole,
)

FOUND = {"X": np.array([1, 2]), "y": np.array([[3], [4]]), "Polarity": np.array([-1, 1]), "ts": np.array([5, 6])}


def test_columns_are_found_by_any_of_their_names_and_flattened():
    columns = named(FOUND)
    assert columns is not None
    assert [column.tolist() for column in columns[:4]] == [[1, 2], [3, 4], [False, True], [5, 6]]
    assert columns.size is None
    assert named({name: values for name, values in FOUND.items() if name != "ts"}) is None


@pytest.mark.parametrize(
    ("times", "seconds", "expected"),
    [
        ([5.0, 6.0], False, [5, 6]),
        ([5.0, 6.0], True, [5_000_000, 6_000_000]),
        ([5.0, 6.0000014], False, [5_000_000, 6_000_001]),
        ([5, 6], True, [5_000_000, 6_000_000]),
        ([5, 6], False, [5, 6]),
    ],
)
def test_times_are_seconds_where_told_or_where_they_have_fractions(times, seconds, expected):
    columns = named(FOUND | {"ts": np.array(times)}, seconds=seconds)
    assert columns is not None
    assert columns.t.tolist() == expected


@pytest.mark.parametrize("times", [[1000.5, 11_001.0], [20_000.5, 20_001.0], [-1e5, 0.5]])
def test_times_with_a_point_that_may_be_microseconds_are_refused(times):
    with pytest.raises(ValueError, match=rf"t goes from {min(times)} to {max(times)} .*: store whole microseconds"):
        named(FOUND | {"ts": np.array(times)})


def test_numbers_that_are_no_polarities_or_not_whole_are_named():
    assert polarity(np.array([0.0, 1.0])).tolist() == [False, True]
    assert polarity(np.array([], np.int64)).tolist() == []
    with pytest.raises(ValueError, match="p of event 1 is 0, and must be 1, or -1 as in other events"):
        polarity(np.array([-1, 0, 1]))
    with pytest.raises(ValueError, match=r"x of event 1 is 2\.5"):
        whole(np.array([2.0, 2.5]), "x")
    with pytest.raises(ValueError, match="x holds <U1, and must hold numbers"):
        whole(np.array(["a"]), "x")


def test_parts_are_joined_and_none_of_them_is_an_empty_recording():
    part = Columns(*(np.array([1, 2]) for _ in range(4)))
    assert joined([part, part], size=(3, 4)).t.tolist() == [1, 2, 1, 2]
    assert joined([part], size=(3, 4)).size == (3, 4)
    assert len(joined([], size=(3, 4)).t) == 0


def test_a_header_ends_before_the_first_line_that_is_none():
    assert header_of(b"# a\r\n# b\n\x00data", mark=b"#", end=b"#end") == (["# a", "# b"], 9)
    assert header_of(b"# a\n#\x00data\n", mark=b"#", end=b"#end") == (["# a"], 4)
    assert header_of(b"# a\n#end here\n# data\n", mark=b"#", end=b"#end") == (["# a", "#end here"], 14)
    assert header_of(b"# cut", mark=b"#", end=b"#end") == ([], 0)


def test_records_are_whole():
    kind = np.dtype([("a", ">u2")])
    assert records(b"--\x00\x01\x00\x02", kind, start=2)["a"].tolist() == [1, 2]
    assert records(b"--\x00\x01\x00\x02", kind, start=2, end=4)["a"].tolist() == [1]
    with pytest.raises(ValueError, match="event 1 at offset 4 has 1 of 2 bytes: the file was cut, fetch it again"):
        records(b"--\x00\x01\x00", kind, start=2)


def test_a_file_may_grow_in_proportion_and_a_small_one_to_a_fixed_size():
    assert unpacked_limit(100) == SMALL_UNPACKED
    assert unpacked_limit(SMALL_UNPACKED) == LARGEST_RATIO * SMALL_UNPACKED

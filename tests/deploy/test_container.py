"""The bytes of an artifact: what goes in comes out, and nothing is believed that cannot be."""

import json
import struct

import pytest
import torch

from spikeformers.deploy import container

TENSORS = {
    "scale": torch.tensor([0.5, 3e-8]),
    "thresholds": torch.arange(-4, 4, dtype=torch.int32).view(2, 4),
    "nothing": torch.empty(0, 3),
    "sum": torch.tensor(2.5, dtype=torch.float64),
}


@pytest.fixture
def written(tmp_path):
    """Call with header and payload to seal them in a file with right checksums, or with neither for a good one."""

    def write(header: object = None, payload: bytes = b""):
        path = tmp_path / "model.spk"
        if header is None:
            path.write_bytes(container.encode({"labels": ["één"]}, TENSORS))
        else:
            text = header if isinstance(header, bytes) else json.dumps(header).encode()
            path.write_bytes(container.seal(text + b" " * (-len(text) % container.ALIGNMENT), payload))
        return path

    return write


def test_header_and_tensors_come_back(written):
    content = container.read(written())
    assert content.header == {"labels": ["één"]}
    for name, tensor in TENSORS.items():
        again = content.tensor(name)
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)
    assert all(stored.offset % container.ALIGNMENT == 0 for stored in content.table.values())


@pytest.mark.parametrize("bits", range(2, 9))
def test_whole_numbers_take_the_fewest_bits_that_hold_them(tmp_path, bits):
    most = 2 ** (bits - 1)
    weight = torch.randint(-most, most, (16, 3, 3, 3), dtype=torch.int8)
    weight.view(-1)[:2] = torch.tensor([-most, most - 1])
    path = tmp_path / "model.spk"
    path.write_bytes(container.encode({}, {"weight": weight}))
    content = container.read(path)
    assert content.table["weight"].kind == f"int{bits}"
    assert content.table["weight"].size == weight.numel() * bits // 8
    assert torch.equal(content.tensor("weight"), weight)


def test_layouts_come_back(tmp_path):
    tensors = {
        "last": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "first": torch.randn(4, 3, 3, 3),
        "pointwise": torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
        "integers": torch.ones(4, 3, 2, 2, dtype=torch.int8).to(memory_format=torch.channels_last),
    }
    path = tmp_path / "model.spk"
    path.write_bytes(container.encode({}, tensors))
    content = container.read(path)
    for name, tensor in tensors.items():
        assert torch.equal(content.tensor(name), tensor)
        assert content.tensor(name).stride() == tensor.stride(), name


def test_what_a_file_cannot_hold_is_refused():
    for tensor in (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match=f"w is of type {tensor.dtype}"):
            container.encode({}, {"w": tensor})
    with pytest.raises(ValueError, match="w holds numbers that are not finite"):
        container.encode({}, {"w": torch.tensor([1.0, torch.nan])})
    with pytest.raises(ValueError, match="plain JSON with finite numbers"):
        container.encode({"accuracy": float("nan")}, {})
    with pytest.raises(ValueError, match="may take 4,194,304 bytes"):
        container.encode({"labels": "x" * 2**22}, {})


def test_a_file_that_is_none_is_told_from_a_damaged_one(written, tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*gone\.spk"):
        container.read(tmp_path / "gone.spk")
    path = tmp_path / "other"
    for content in (b"", b"PK\x03\x04" + bytes(500)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="other is not a spikeformers artifact"):
            container.read(path)
    good = written().read_bytes()
    damages = {
        "its first 128 bytes changed": good[:20] + b"\x01" + good[21:],
        "header changed": good[:130] + b"?" + good[131:],
        "tensors changed": good[:-1] + b"?",
        "it ends after 90 bytes": good[:90],
        f"it has {len(good) - 1} bytes, not the {len(good)}": good[:-1],
        f"it has {len(good) + 1} bytes, not the {len(good)}": good + b"\0",
    }
    for said, content in damages.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"other is damaged: .*{said}"):
            container.read(path)


def preamble(**changes) -> bytes:
    """A preamble of nothing with right checksums, but for what `changes`."""
    values = {"magic": container.MAGIC, "version": 1, "zero": 0, "header": 0, "payload": 0} | changes
    empty = container._digest(b"")
    packed = struct.pack("<8sIIQQ32s32s", *values.values(), empty, empty)
    return packed + container._digest(packed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "written by a newer version .format 2, this one reads 1"),
        ({"version": 0}, "what no version writes"),
        ({"zero": 1}, "what no version writes"),
        ({"header": 7}, "what no version writes"),
        ({"header": 2**40}, "claims a header of 1,099,511,627,776 bytes"),
        ({"payload": 2**63}, "claims a header of 0 bytes and tensors of 9,223,372,036,854,775,808"),
        ({"payload": 2**31}, "it has 128 bytes, not the 2,147,483,776"),
        ({}, "is damaged: "),
    ],
)
def test_sizes_are_checked_before_anything_is_read(tmp_path, changes, said):
    path = tmp_path / "model.spk"
    path.write_bytes(preamble(**changes))
    with pytest.raises(ValueError, match=said):
        container.read(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"tensors":{},"a":1,"a":1}', "a key twice"),
        (b'{"tensors":{},"a":NaN}', "not finite"),
        (b'{"tensors":{},"a":1e999}', "not finite"),
        (b'{"tensors":{},"a":9223372036854775808}', "beyond 64 bits"),
        (b'{"tensors":{},"a":-' + b"9" * 5000 + b"}", "beyond 64 bits"),
        ({}, "no table of tensors"),
        ({"tensors": []}, "no table of tensors"),
    ],
)
def test_headers_that_no_one_writes_are_refused(written, header, said):
    with pytest.raises(ValueError, match=f"is damaged: .*{said}"):
        container.read(written(header))


GOOD = {"kind": "float32", "shape": [2, 2], "channels_last": False, "offset": 0, "size": 16}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "object"}, "unknown kind, 'object'"),
        ({"kind": ["float32"]}, "unknown kind"),
        ({"kind": "int4"}, "takes 2 bytes, not 16"),
        ({"shape": [4, 4]}, "takes 64 bytes, not 16"),
        ({"shape": [-2, -2]}, "has the shape"),
        ({"shape": [2.0, 2]}, "has the shape"),
        ({"shape": [True, 4]}, "has the shape"),
        ({"shape": [1] * 9}, "has the shape"),
        ({"shape": "22"}, "has the shape"),
        ({"shape": [2**62, 2**62]}, "bytes, not 16"),
        ({"shape": [4], "channels_last": True}, "has 1 dimensions"),
        ({"channels_last": 0}, "not described"),
        ({"offset": -64}, "not described"),
        ({"offset": 64}, "does not begin where"),
        ({"offset": 8}, "does not begin where"),
        ({"size": None}, "not described"),
        ({"size": 32}, "takes 16 bytes, not 32"),
        ({"pickle": "x"}, "not described"),
        ({"shape": [8], "size": 32}, "its tensors take 32 bytes, and 16 are there"),
    ],
)
def test_tensors_that_do_not_fill_the_payload_one_by_one_are_refused(written, changes, said):
    with pytest.raises(ValueError, match=f"is damaged: .*{said}"):
        container.read(written({"tensors": {"w": GOOD | changes}}, bytes(16)))


def test_tensors_cannot_overlap(written):
    with pytest.raises(ValueError, match="'b' does not begin where the one before it ends"):
        container.read(written({"tensors": {"a": GOOD, "b": GOOD}}, bytes(16)))


def test_numbers_that_are_not_finite_are_not_handed_out(written):
    content = container.read(written({"tensors": {"w": GOOD}}, torch.tensor([1, torch.inf, 1, 1]).numpy().tobytes()))
    with pytest.raises(ValueError, match="tensor w holds numbers that are not finite"):
        content.tensor("w")

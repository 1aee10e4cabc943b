"""What models weigh: the paper's numbers, hand-worked ones, and bytes on disk."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spikeformers as sf
from spikeformers.quantize import convert, fold, prepare, size

PAPER = {  # parameters, millions as the paper counts, those in its Table 9, and float parameters in its Table 1
    "qsd_transformer_t": (15_116_720, 1.877, 1.8, 15.1),
    "qsd_transformer_m": (31_340_392, 3.899, 3.8, 31.3),
    "qsd_transformer_l": (55_358_952, 6.895, 6.8, 55.4),
}


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_the_papers(name):
    parameters, counted, published, published_float = PAPER[name]
    with torch.device("meta"):
        found = size(sf.create_model(name))
        unquantised = size(sf.create_model(name, bits=0))
    assert found.parameters == unquantised.parameters == parameters
    assert round(found.paper_m, 3) == counted
    assert math.floor(10 * found.paper_m) / 10 == published  # truncated
    assert round(parameters / 1e6, 1) == published_float
    assert unquantised.paper_m == 8 * found.paper_m  # weights alone
    assert found.fp32_mb == unquantised.packed_mb == 4 * parameters / 1e6
    assert found.paper_m * 4 < found.packed_mb < found.paper_m * 4 * 1.1


def test_sizes_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 3, bias=False))
    plain_size = size(model)
    assert plain_size.parameters == 135 + 5 + 10 + 21
    assert plain_size.paper_m == (135 + 21) / 1e6
    assert plain_size.packed_mb == plain_size.fp32_mb == 4 * 171 / 1e6
    prepare(model, bits={"first": 3, "last": 2}, offset=True)
    found = size(model)
    assert found.parameters == 171
    assert found.fp32_mb == 4 * 171 / 1e6
    assert found.paper_m == pytest.approx((135 * 3 / 32 + 21 * 2 / 32) / 1e6, rel=1e-15)
    # 135 * 3 bits are 51 bytes, 21 * 2 bits 6; floats are the bias, scale and shift, step sizes and offsets of 5 + 3
    assert found.packed_mb == (51 + 6 + 4 * (5 + 10 + 2 * 8)) / 1e6
    assert size(convert(model)) == found
    mixed = prepare(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 3)), bits={"first": 3})
    assert size(mixed).paper_m == pytest.approx((135 * 3 / 32 + 21) / 1e6, rel=1e-15)
    assert size(mixed).packed_mb == (51 + 4 * (5 + 5 + 21 + 3)) / 1e6


def test_a_shared_parameter_weighs_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert size(model).parameters == 16 + 8


def data_bytes(folder: Path) -> int:
    """Bytes of a saved model's weight file without its header."""
    content = (folder / "model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("qsd_transformer_t", {"dims": (8, 16, 24, 36), "heads": 4, "qkv": "rep_conv_mprf"}),
        ("meta_spikeformer_15m", {"dims": (8, 16, 24, 36), "heads": 4}),
        ("spikformer_8_384", {"dim": 24, "depth": 2}),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"bits": {"attention": None, "*": 3, "first": 8}}, {"bits": 2, "offset": True}]
)
def test_packed_megabytes_are_what_lies_on_disk(name, sizes, options, tmp_path):
    model = prepare(sf.create_model(name, **sizes), **options)
    told = size(model)
    for change in (convert, fold):
        found = size(change(model))
        if change is convert:
            assert found == told
        # without the header; an exact count, in floats
        assert found.packed_mb * 1e6 == pytest.approx(data_bytes(model.save_pretrained(tmp_path)), rel=1e-12)
    assert found.packed_mb < told.packed_mb


def test_the_whole_qsd_transformer_t_fits_into_8_2_megabytes(tmp_path):
    model = sf.create_model("qsd_transformer_t").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        logits = model(x)
        folder = convert(model).save_pretrained(tmp_path / "model")
        loaded = sf.from_pretrained(folder)
        assert torch.equal(loaded(x), logits)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8.2e6
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.uint8, torch.float32}
    assert size(model).packed_mb * 1e6 == pytest.approx(data_bytes(folder), rel=1e-12)
    assert round(size(model).packed_mb, 1) == 8.1

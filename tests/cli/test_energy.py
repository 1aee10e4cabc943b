"""`energy`: the table, the numbers, the chart, and what is said of random weights."""

import json
import re

import pytest
from PIL import Image


def test_energy_prints_layers_and_writes_numbers_and_a_chart(said_by, trained, tmp_path):
    written = ("--json", tmp_path / "e.json", "--plot", tmp_path / "e.png")
    code, out, err = said_by("energy", trained[0], "--images", "5", *written)
    assert code == 0, err
    assert out.startswith(f"{trained[0]}: trained weights, 5 images of its test split\n")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["images"] == 5
    assert all(layer["name"] in out for layer in found["layers"])
    assert all(f"\n{stage} " in out for stage in found["stages"])
    assert Image.open(tmp_path / "e.png").width > 100


@pytest.mark.slow
def test_energy_of_a_name_says_that_nothing_is_real(said_by):
    out = said_by("energy", "meta_spikeformer_15m", "--images", "1")[1]
    assert "RANDOM weights, 1 RANDOM images" in out
    assert float(re.search(r"Firing rate ([\d.]+) %", out)[1]) > 1  # batch norm settled: the network is not silent


def test_energy_of_a_name_is_counted_at_the_size_its_paper_has(said_by):
    code, out, err = said_by("energy", "spikformer_cifar_2_384", "--images", 1)
    assert code == 0, err
    assert "1 RANDOM images of 32x32" in out

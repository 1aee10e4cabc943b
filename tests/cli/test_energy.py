"""`energy`: the table, the numbers, the chart, and what is said of random weights."""

import json
import re

import pytest
import torch
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


def test_energy_writes_tables_and_other_plots(said_by, trained, tmp_path):
    files = [tmp_path / name for name in ("e.csv", "e.tex", "rates.png", "layers.png")]
    words = ("--csv", files[0], "--latex", files[1], "--strict")
    for kind, file in (("rates", files[2]), ("layers", files[3])):
        code, out, err = said_by("energy", trained[0], "--images", 2, *words, "--plot", file, "--kind", kind)
        assert code == 0, err
    assert all(f"written: {file}\n" in out for file in files if file.stem != "rates")
    assert "rate_step1" in files[0].read_text().splitlines()[0]
    assert "\\begin{tabular}" in files[1].read_text()
    assert [Image.open(file).width > 100 for file in files[2:]] == [True, True]


def test_several_runs_are_rows_and_bubbles(said_by, trained, tmp_path):
    summary = json.loads((trained[0] / "summary.json").read_text())
    written = [word for kind in ("json", "csv", "latex", "plot") for word in (f"--{kind}", tmp_path / f"e.{kind}")]
    written[-1] = tmp_path / "e.png"
    code, out, err = said_by("energy", trained[0], trained[0] / "model", "--images", 3, *written)
    assert code == 0, err
    head, *rows = (tmp_path / "e.csv").read_text().splitlines()
    assert head == "model,Test accuracy %,mJ,sd,ANN mJ,firing rate %,T,images,parameters"
    assert len(rows) == 2
    for row, source in zip(rows, (trained[0], trained[0] / "model"), strict=True):
        name, score, *_, images, parameters = row.split(",")
        assert (name, float(score), int(images)) == (str(source), 100 * summary["accuracy"], 3)
        assert int(parameters) == summary["parameters"]
    found = json.loads((tmp_path / "e.json").read_text())
    assert found[str(trained[0])]["total_mj"] == float(rows[0].split(",")[2])
    assert Image.open(tmp_path / "e.png").width > 100
    assert "Convention meta_spikeformer" in out


def test_bubbles_need_scores_and_a_kind_needs_one_model(refused, trained, tmp_path):
    path = tmp_path / "e.png"
    assert "finished runs" in refused("energy", trained[0], "spikformer_cifar_2_384", "--images", 1, "--plot", path)
    assert "--kind layers draws one model, got 2" in refused("energy", trained[0], trained[0], "--kind", "layers")
    assert not path.exists()


def test_scores_of_several_kinds_have_a_column_each_and_no_chart(said_by, trained, tmp_path, monkeypatch):
    from spikeformers.cli import energy as command

    other, path = trained[0] / "model", tmp_path / "e.png"
    told = {str(trained[0]): ("Test accuracy", 0.125, 7), str(other): ("mIoU", 0.5, 7)}
    monkeypatch.setattr(command, "score_of", told.__getitem__)
    code, out, err = said_by("energy", trained[0], other, "--images", 1, "--plot", path)
    assert (code, out) == (2, "")
    assert "--plot of several needs finished runs that have one score" in err
    code, out, err = said_by("energy", trained[0], other, "--images", 1)
    assert code == 0
    head, first, second = (re.split(r"  +", line) for line in out.splitlines()[2:5])
    assert head[:3] == ["model", "Test accuracy %", "mIoU %"]
    assert (first[1:3], second[1:3]) == (["12.5", "-"], ["-", "50"])


def test_strict_fails_on_what_is_not_counted_and_writes_nothing(refused, trained, tmp_path, monkeypatch):
    from spikeformers import energy
    from spikeformers.cli import energy as command

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.memory = torch.nn.Linear(8, 8), torch.nn.LSTM(8, 8)

        def forward(self, x):
            return self.memory(self.first(x))[0]

    monkeypatch.setattr(command, "energy_subject", lambda *_: (Net(), torch.randn(2, 8), "a network"))
    assert energy.measure(Net(), torch.randn(2, 8)).uncounted
    said = refused("energy", "net", "--strict", "--json", tmp_path / "e.json")
    assert "net has parts that are not counted: memory (LSTM): " in said
    assert not (tmp_path / "e.json").exists()

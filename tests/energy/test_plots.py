"""Pictures of reports and of runs, and tables that other programs read."""

import csv
import io

import pytest
import torch
from PIL import Image
from torch import nn

from spikeformers.energy import Run, compare_runs, measure
from spikeformers.energy.plots import KINDS
from spikeformers.energy.report import EnergyReport
from spikeformers.neurons import LIF, TimeMean


@pytest.fixture(scope="module")
def report() -> EnergyReport:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), LIF(steps=3), nn.Conv2d(4, 4, 1), TimeMean(steps=3), nn.Conv2d(4, 2, 1))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.bias, 1.5)
    return measure(model, torch.randn(3 * 2, 3, 4, 4))


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_plot_is_an_image(report, kind, tmp_path):
    assert Image.open(report.plot(tmp_path / "energy.png", kind=kind)).width > 100


def test_the_heat_map_shows_the_rates_of_layers_and_steps(report):
    (image,) = KINDS["rates"](report).axes[0].images
    assert image.get_array().tolist() == [list(report.rates["2"])]
    assert len(report.rates["2"]) == 3


def test_bars_of_layers_are_their_energies_and_deviations(report):
    axes = KINDS["layers"](report).axes[0]
    bars = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in axes.patches}
    assert [bars[i] for i in range(3)] == [layer.mj for layer in report.layers]


def test_a_plot_that_cannot_be_drawn_says_why(report, tmp_path):
    with pytest.raises(ValueError, match="kind must be one of stages, layers, rates, got 'pie'"):
        report.plot(tmp_path / "energy.png", kind="pie")
    with pytest.raises(ValueError, match="spikes feed no layer"):
        measure(nn.Linear(3, 2), torch.rand(1, 3)).plot(tmp_path / "energy.png", kind="rates")
    assert not list(tmp_path.iterdir())


def test_runs_are_compared_in_one_picture(tmp_path):
    runs = [Run("small", 0.8, 0.1, 90_000), Run("large", 0.9, 2.0, 1_500_000)]
    assert Image.open(compare_runs(runs, tmp_path / "bubbles.png")).width > 100
    with pytest.raises(ValueError, match="no runs"):
        compare_runs([], tmp_path / "none.png")
    with pytest.raises(ValueError, match="idle spends 0 mJ"):
        compare_runs([Run("idle", 0.5, 0.0, 10)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_csv_has_every_digit_and_a_column_for_each_step(report):
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["name"] for row in rows] == [layer.name for layer in report.layers]
    assert [float(row["mj"]) for row in rows] == [layer.mj for layer in report.layers]
    assert [float(rows[1][f"rate_step{step}"]) for step in (1, 2, 3)] == list(report.rates["2"])
    assert [float(rows[1][f"sd_rate_step{step}"]) for step in (1, 2, 3)] == list(report.layers[1].sd_rates)
    assert (rows[0]["rate"], rows[0]["rate_step1"]) == ("", "")


def test_latex_escapes_names_and_carries_the_convention(report):
    text = report.to_latex()
    assert text.count(r"\\") == 2 + len(report.layers)
    assert all(f"% {line}" in text for line in report.describe().splitlines())
    assert f"{report.total_mj:.4g}" in text.splitlines()[-3]
    model = nn.Sequential()
    model.add_module("a_b", nn.Linear(3, 2))
    assert r"a\_b & linear" in measure(model, torch.rand(1, 3)).to_latex()

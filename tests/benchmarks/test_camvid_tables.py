"""The script of Spike2Former's small tables: rows differ in what they are about, can be built, and run to a JSON."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from spikeformers import create_model, recipes
from spikeformers.neurons import Neuron
from spikeformers.train.loop import train
from spikeformers.train.recipe import Recipe, differences

LAST = "head.embedding.mask_spikes.neuron"
SHALLOW = {"encoder_layers": 1, "decoder_layers": 1, "queries": 8}


def outcome(recipe: Recipe) -> SimpleNamespace:
    """A run whose mIoU tells its seed and, of the baseline, 10 points more."""
    miou = 0.3 - 0.1 * (recipe.model.options.get("mask_shortcut") == "none") + recipe.seed / 100
    layers = {} if recipe.model.neuron == "gelu" else {LAST: 0.25}
    return SimpleNamespace(miou=miou, energy_mj=2.0, firing_rate=0.5, layers=layers, accuracy=0.5)


@pytest.fixture
def tables(noting):
    """The script, which instead of training notes what it would train."""
    return noting("camvid_tables", outcome)


def ground_of(tables, **changes: object):
    return dataclasses.replace(tables.Ground(), **changes)


def test_rows_of_table_3_differ_from_the_baseline_in_the_network_alone_and_all_can_be_built(tables, tmp_path):
    rows = tables.table_3(tmp_path, 0, ground=ground_of(tables, rows=tuple(tables.TABLE_3)))
    assert [row["row"] for row in rows] == list(tables.TABLE_3)
    assert len(tables.asked) == 3 * len(rows)
    baseline = tables.asked["baseline_seed-0"]
    assert (baseline.data.size, baseline.data.test_size, baseline.epochs) == ((90, 120), (90, 120), 40)
    seen = set()
    for name, recipe in tables.asked.items():
        about = differences(baseline, recipe)
        assert all(each.startswith(("model.", "init.balance", "seed")) for each in about), name
        seen.add(tuple(each for each in about if not each.startswith("seed")))
        if recipe.seed == 0:
            with torch.device("meta"):
                create_model(recipe.model.name, **recipe.model.overrides())
    assert len(seen) == len(rows)


def test_both_sides_of_a_row_are_compared_with_the_baseline(tables, tmp_path):
    base, row = tables.table_3(tmp_path, 0, ground=ground_of(tables, rows=("no shortcut",)))
    assert base["ours"]["miou"] == pytest.approx(31)  # 30, 31 and 32 by seeds
    assert base["mious"] == pytest.approx([30, 31, 32])
    assert base["ours"]["sd"] == pytest.approx(1)
    assert base["ours"]["difference"] == base["paper"]["difference"] == 0
    assert row["ours"]["difference"] == pytest.approx(-10)
    assert row["paper"] == pytest.approx({"miou": 41.8, "mj": 67.9, "difference": -4.5})
    assert row["ours"]["last_firing"] == 25


def test_only_a_membrane_makes_several_steps_differ_from_one_and_the_twin_has_no_neuron(tables, tmp_path):
    rows = tables.steps(tmp_path, 0, ground=ground_of(tables, seeds=(0,)))
    assert [row["network"] for row in rows] == ["1 x 2", "2 x 2", "1 x 4", "4 x 4", "ANN twin"]
    assert rows[-1]["ours"]["last_firing"] is None
    assert "paper" not in rows[-1]
    for name, recipe in tables.asked.items():
        assert recipe.model.options.get("temporal", False) == (recipe.model.steps > 1), name
    recipe = tables.asked["ann_seed-0"]
    assert not recipe.init.balance
    with torch.device("meta"):
        ann = create_model(recipe.model.name, **recipe.model.overrides())
    assert not [name for name, module in ann.named_modules() if isinstance(module, Neuron)]


def test_tables_share_the_baseline(tables, tmp_path):
    for table in tables.TABLES.values():
        table(tmp_path / "images-0", 0, ground=ground_of(tables, seeds=(0,)))
    assert sum(name == "baseline_seed-0" for name in tables.asked) == 1
    assert {"fpn_seed-0", "fpn-from-cifar10_seed-0", "baseline-from-cifar10_seed-0"} < set(tables.asked)


def test_segmenters_start_from_classifiers_of_their_very_backbone(tables, tmp_path):
    tables.backbone(tmp_path / "images-0", 0, ground=ground_of(tables, seeds=(0,)))
    for name in ("fpn-from-cifar10_seed-0", "baseline-from-cifar10_seed-0"):
        recipe = tables.asked[name]
        scratch = tables.asked[name.replace("-from-cifar10", "")]
        assert differences(scratch, dataclasses.replace(recipe, init=scratch.init)) == []
        source = tables.asked[recipe.init.backbone.rsplit("/", 1)[1]]
        with torch.device("meta"):
            segmenter, classifier = (
                create_model(each.model.name, **each.model.overrides()) for each in (recipe, source)
            )
        stages = {key: value.shape for key, value in segmenter.backbone.state_dict().items()}
        trained = {key: value.shape for key, value in classifier.state_dict().items()}
        assert stages == {key: shape for key, shape in trained.items() if not key.startswith("head.")}
        neurons = [
            next(module for module in each.modules() if isinstance(module, Neuron))
            for each in (segmenter.backbone, classifier)
        ]
        assert type(neurons[0]) is type(neurons[1])


def test_a_table_runs_to_its_json_and_a_second_time_only_reads(tables, painted, tmp_path, monkeypatch, capsys):
    tiny = recipes.get("camvid_smoke")
    tiny = dataclasses.replace(
        tiny,
        data=dataclasses.replace(tiny.data, source="maskfolder", root=str(painted), test_limit=0),
        model=dataclasses.replace(tiny.model, blocks=(1, 0, 0, 1, 0), options=tiny.model.options | SHALLOW),
        batch_size=2,
    )
    monkeypatch.setattr(tables.recipes, "get", lambda name: {"camvid_spike2former_small": tiny}[name])
    monkeypatch.setattr(tables, "done", lambda recipe, folder: train(recipe, run=folder, resume=folder.exists()))
    found = tmp_path / "tables.json"
    small = ["--epochs", "1", "--size", "32x32", "--seeds", "0"]
    command = ["table3", *small, "--rows", "baseline,no shortcut", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["camvid_tables.py", *command, "--json", str(found)])
    tables.main()
    first = json.loads(found.read_text())
    assert first["command"].startswith("python benchmarks/camvid_tables.py table3 --images 0 --epochs 1 --size 32x32")
    assert (first["epochs"], first["size"], first["seeds"]) == (1, [32, 32], [0])
    base, row = first["tables"]["table3"]["rows"]
    assert set(base["ours"]) == set(row["ours"]) == {"miou", "sd", "mj", "firing", "last_firing", "difference"}
    assert 0 <= row["ours"]["miou"] <= 100
    assert row["ours"]["mj"] > 0
    assert row["ours"]["last_firing"] >= 0
    folder = tmp_path / "runs" / "images-0" / "32x32_epochs-1" / "no-shortcut_seed-0"
    written = (folder / "summary.json").stat().st_mtime_ns
    tables.main()
    assert (folder / "summary.json").stat().st_mtime_ns == written
    with Image.open(folder.parent / "shortcut.png") as drawn:
        assert drawn.size[0] > 500
    assert json.loads(found.read_text())["tables"] == first["tables"]
    printed = capsys.readouterr().out
    assert "no shortcut" in printed
    assert "41.8" in printed


def test_rows_and_sizes_that_cannot_be_are_named(tables, monkeypatch, capsys):
    wrong = (("--rows", "i_lif", "no such rows: i_lif; there are large"), ("--size", "90", "height x width, such as"))
    for option, value, message in wrong:
        monkeypatch.setattr(sys, "argv", ["camvid_tables.py", "table3", option, value])
        with pytest.raises(SystemExit):
            tables.main()
        assert message in capsys.readouterr().err

"""The script of Spikformer's small tables: every row has its recipe and its place, and tables share what they can."""

import json
from types import SimpleNamespace

import pytest
import torch

from spikeformers import create_model
from spikeformers.train.recipe import Recipe


@pytest.fixture
def tables(noting, monkeypatch):
    """The script, which instead of training notes what it would train."""
    result = {"accuracy": 0.5, "loss": 0.5, "seconds": 2.0, "parameters": 10, "firing_rate": 0.1}
    module = noting("spikformer_tables", lambda recipe: SimpleNamespace(**result))
    monkeypatch.setattr(module, "attention_cost", lambda folder: (1.0, 0.9))
    return module


def test_all_tables_together_ask_for_each_training_once_and_all_can_be_built(tables, tmp_path, capsys):
    rows = {name: make(tmp_path, 100) for name, make in tables.TABLES.items()}
    assert [len(rows[name]) for name in ("labels", "1", "6", "fig4", "fig7", "7")] == [2, 5, 11, 8, 4, 6]
    for name, recipe in tables.asked.items():
        with torch.device("meta"):
            create_model(recipe.model.name, **recipe.model.overrides())
        if recipe.init.backbone and recipe.init.backbone != str(tmp_path / "mae"):
            assert (tmp_path / recipe.init.backbone).name in tables.asked, name
    from tables import show

    for found in rows.values():
        show(json.loads(json.dumps(found)))
    assert "79.64" in capsys.readouterr().out


def test_both_arms_choose_their_rate_alike_and_train_the_same_epochs(tables, tmp_path, monkeypatch):
    def by_rate(recipe: Recipe, folder):
        tables.asked[folder.name] = recipe
        return SimpleNamespace(
            accuracy={5e-4: 0.2, 1.5e-3: 0.4, 4e-3: 0.3}.get(recipe.optim.lr, 0.0) + recipe.seed / 100
        )

    monkeypatch.setattr(tables, "done", by_rate)
    scratch, pretrained = tables.labels(tmp_path, 100)
    assert scratch["rate"] == pretrained["rate"] == 1.5e-3
    assert scratch["accuracies"] == pretrained["accuracies"] == pytest.approx([40, 41, 42])
    assert scratch["sd"] == pytest.approx(1)
    tuned = [recipe for name, recipe in tables.asked.items() if name != "mae"]
    assert len({(recipe.epochs, recipe.batch_size, recipe.data.train_limit) for recipe in tuned}) == 1
    assert {recipe.init.backbone for recipe in tuned} == {"", str(tmp_path / "mae")}

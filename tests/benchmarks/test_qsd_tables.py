"""The script of QSD-Transformer's tables: rows differ in what they are about and in nothing else."""

from types import SimpleNamespace

import pytest
import torch

from spikeformers import create_model
from spikeformers.train.recipe import differences


@pytest.fixture
def tables(noting):
    """The script, which instead of training notes what it would train; the larger rate always wins."""
    return noting("qsd_tables", lambda recipe: SimpleNamespace(accuracy=recipe.optim.lr * 100 + recipe.seed / 100))


def test_rows_share_images_epochs_and_rates_and_every_network_can_be_built(tables, tmp_path):
    rows = [*tables.table_5(tmp_path, 100), *tables.table_6(tmp_path, 100)]
    assert [row["paper"]["accuracy"] for row in rows[:5]] == [70.0, 75.8, 77.5, None, 75.0]
    assert [len(row["accuracies"]) for row in rows] == [3, 3, 3, *[1] * 8]
    assert all(row["ours"]["rate"] == 3e-3 for row in rows)
    assert [set(row["trials"]) for row in rows] == [{1e-3, 3e-3}] * 3 + [{3e-3}] * 8
    assert rows[0]["ours"]["accuracy"] == pytest.approx(31)  # 30, 31 and 32 by the note above
    ground = tables.asked["ie_lif_T-1_D-4_lr-0.003_seed-0"]
    for name, recipe in tables.asked.items():
        with torch.device("meta"):
            create_model(recipe.model.name, **recipe.model.overrides())
        if name == "teacher":
            continue
        about = ("model.", "fgd.teacher", "optim.lr", "seed")
        assert all(each.startswith(about) for each in differences(ground, recipe)), name
        assert recipe.model.dims == ground.model.dims


def test_only_a_membrane_makes_several_steps_of_integer_neurons_differ_from_one(tables, tmp_path):
    tables.table_6(tmp_path, 100)
    for name, recipe in tables.asked.items():
        assert recipe.model.neuron == ("ie_lif" if "T-1_" in name else "ie_lif_leaky"), name

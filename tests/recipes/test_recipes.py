import json

import pytest
import torch

from spikeformers import create_model
from spikeformers.recipes import RECIPES, get
from spikeformers.train.optimise import peak_rate
from spikeformers.train.recipe import from_json, to_json


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_name_survives_json_and_names_a_model_that_exists(name):
    recipe = get(name)
    assert recipe.name == name
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    sizes = {"num_classes": 10, "in_channels": recipe.data.in_channels, "distillation": bool(recipe.distill.teacher)}
    with torch.device("meta"):
        create_model(recipe.model.name, **(recipe.model.overrides() | sizes))


def test_an_unknown_recipe_lists_the_closest():
    with pytest.raises(ValueError, match=r"unknown recipe 'digit'; closest: digits"):
        get("digit")


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "rate", "warmup"),
    [("meta_spikeformer_55m_imagenet", 200, 1568, 6e-4, 10), ("meta_spikeformer_55m_imagenet_t4", 20, 336, 2e-5, 2)],
)
def test_imagenet_recipes_hold_the_numbers_of_table_8(name, epochs, batch, rate, warmup):
    recipe = get(name)
    assert recipe.epochs == epochs
    assert recipe.batch_size * 8 == batch
    assert peak_rate(recipe, processes=8) == pytest.approx(rate * batch / 256)
    assert recipe.optim.warmup_epochs == warmup
    assert (recipe.optim.weight_decay, recipe.label_smoothing, recipe.optim.name) == (0.05, 0.1, "lambc")
    assert recipe.data.augment.policy.startswith("rand-m9-mstd0.5")
    assert recipe.data.augment.mixup == recipe.data.augment.cutmix == 0


def test_the_quick_recipes_use_integer_neurons_at_one_step():
    for name in ("digits", "cifar10_small"):
        model = get(name).model
        assert (model.neuron, model.levels, model.steps) == ("i_lif", 4, 1)

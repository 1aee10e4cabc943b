import dataclasses
import json

import pytest

from spikeformers.train.recipe import Recipe, differences, from_json, override, to_json


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("epochs", "3", 3),
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1", 1.0),
        ("channels_last", "false", False),
        ("data.root", "some/folder", "some/folder"),
        ("data.augment.flip", "0.5", 0.5),
        ("model.dims", "8,16,24,32", (8, 16, 24, 32)),
        ("model.dims", "(8, 16, 24, 32)", (8, 16, 24, 32)),
        ("precision", "bfloat16", "bfloat16"),
        ("optim.per_epoch", "true", True),
        ("optim.layer_decay", "0.75", 0.75),
        ("data.augment.erase_fill", "zero", "zero"),
    ],
)
def test_override_sets_any_leaf_and_nothing_else(tiny, path, text, value):
    before = tiny()
    after = override(before, path, text)
    found = after
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)
    assert [each.split(":")[0] for each in differences(before, after)] == [path]


def test_override_reads_names_with_and_without_blanks(tiny):
    recipe = override(tiny(), "data.augment.policy", "rand-m9-n1-mstd0.4-inc1")
    for text in ("Rotate,ShearX", "(Rotate, ShearX)", "'Rotate', 'ShearX'"):
        assert override(recipe, "data.augment.policy_ops", text).data.augment.policy_ops == ("Rotate", "ShearX")


def test_override_reaches_builder_options(tiny):
    recipe = override(override(tiny(), "model.options.qkv", "linear"), "model.options.mlp_ratio", "2")
    assert recipe.model.options == {"heads": 2, "qkv": "linear", "mlp_ratio": 2}


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("optim.lrr", "1", "optim.lrr.*closest.*optim.lr"),
        ("lr", "1", "unknown recipe field 'lr'; closest: optim.lr$"),
        ("epoch", "1", "closest.*epochs"),
        ("optim.learning_rate", "1", "unknown recipe field 'optim.learning_rate'; closest: optim.lr$"),
        ("model.num_classes", "3", "unknown recipe field 'model.num_classes'; classes come with the data"),
        ("optim", "1", "group of fields.*optim.lr"),
        ("epochs.x", "1", "no parts"),
        ("epochs", "many", "epochs must be of type int, got 'many'"),
        ("epochs", "1.5", "epochs must be of type int, got 1.5"),
        ("epochs", "true", "epochs must be of type int, got True"),
        ("optim.lr", "nan", "optim.lr must be of type float, got 'nan'"),
        ("channels_last", "1", "channels_last must be of type bool"),
        ("model.dims", "8,x", "model.dims must be of type int, got 'x'"),
        ("precision", "float8", "precision must be one of float32, bfloat16, float64, got 'float8'"),
        ("epochs", "0", "epochs must be at least 1, got 0"),
        ("ema_decay", "1.5", "ema_decay must be at least 0 and below 1"),
        ("optim.layer_decay", "0", "optim.layer_decay must be above 0 and at most 1.*, got 0.0"),
        ("optim.layer_decay", "1.1", "optim.layer_decay must be above 0 and at most 1.*, got 1.1"),
        ("optim.cooldown_epochs", "2", "optim.cooldown_epochs must be below epochs, got 2.0 of 2: lower it"),
        ("optim.warmup_lr", "-1", "optim.warmup_lr must be at least 0, got -1"),
        ("data.augment.erase_fill", "grey", "data.augment.erase_fill must be one of noise, zero, got 'grey'"),
    ],
)
def test_a_wrong_override_names_field_value_and_cure(tiny, path, text, message):
    with pytest.raises(ValueError, match=message):
        override(tiny(), path, text)


def test_a_recipe_survives_json(tiny):
    recipe = tiny(ema_decay=0.5)
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe


def test_data_of_every_kind_survives_json_and_can_be_set(segmenting):
    recipe = segmenting()
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    changed = override(recipe, "data.augment.scale", "0.5,2")
    assert changed.data.augment.scale == (0.5, 2.0)
    with pytest.raises(ValueError, match=r"data\.size takes 2 numbers, such as data\.size=48,64, got \[48\]"):
        override(recipe, "data.size", "48")
    changed = override(override(changed, "optim.rates.backbone", "0.1"), "segmentation.test", "slide")
    assert changed.optim.rates == {"head": 2.0, "backbone": 0.1}
    assert from_json(json.loads(json.dumps(to_json(changed)))) == changed
    with pytest.raises(ValueError, match=r"optim\.rates\.backbone must be a factor above 0, such as 0\.1, got 'slow'"):
        override(recipe, "optim.rates.backbone", "slow")


def test_data_of_two_kinds_differ_in_every_field_that_one_lacks(tiny, segmenting):
    found = differences(tiny(), segmenting())
    assert "data.source: digits -> maskfolder" in found
    assert any(each.startswith("data.short_side: absent -> ") for each in found)


def test_data_of_an_unknown_kind_is_refused(tiny):
    stored = to_json(tiny())
    with pytest.raises(ValueError, match=r"unknown data\.source 'camvids'; closest: camvid"):
        from_json(stored | {"data": stored["data"] | {"source": "camvids"}})
    with pytest.raises(ValueError, match=r"unknown recipe field data\.eval_crop"):
        from_json(stored | {"data": stored["data"] | {"source": "camvid"}})


def test_stored_recipes_that_do_not_fit_are_refused(tiny):
    stored = to_json(tiny())
    with pytest.raises(ValueError, match=r"unknown recipe field optim.momentun"):
        from_json(stored | {"optim": stored["optim"] | {"momentun": 0.9}})
    with pytest.raises(ValueError, match="epochs must be of type int, got '2'"):
        from_json(stored | {"epochs": "2"})
    with pytest.raises(ValueError, match="not complete"):
        from_json({"epochs": 2})


def test_recipes_are_frozen(tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().epochs = 3
    assert isinstance(tiny(), Recipe)

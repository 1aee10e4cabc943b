import dataclasses
import json

import pytest
import torch

from spikeformers import create_model
from spikeformers.data.event_augment import EventAugment
from spikeformers.neurons import Neuron
from spikeformers.quantize import LSQLayer, prepare
from spikeformers.recipes import RECIPES, get, spike2former
from spikeformers.train.loop import build_model
from spikeformers.train.optimise import peak_rate
from spikeformers.train.recipe import from_json, override, to_json


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_its_name_survives_json_and_names_a_model_that_exists(name):
    recipe = get(name)
    assert recipe.name == name
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    sizes = {"num_classes": 10, "in_channels": recipe.data.in_channels}
    sizes |= {"distillation": True} if recipe.distill.teacher else {}
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


def test_spikformer_recipes_hold_the_papers_numbers():
    v1, v2, t4 = (get(f"spikformer_{name}") for name in ("8_512_imagenet", "v2_8_512_imagenet", "v2_8_512_imagenet_t4"))
    assert (v1.epochs - v1.optim.cooldown_epochs, v1.batch_size * 8, v1.optim.lr, v1.model.steps) == (300, 192, 5e-4, 4)
    assert (v1.optim.warmup_lr, v1.optim.min_lr, v1.optim.per_epoch) == (1e-6, 1e-5, True)
    assert (v1.data.augment.mixup, v1.data.augment.cutmix, v1.data.augment.erase_fill) == (0.8, 1.0, "zero")
    assert (v2.epochs, v2.batch_size * 8, v2.optim.lr, v2.optim.warmup_epochs, v2.model.steps) == (
        300,
        512,
        5e-4,
        10,
        1,
    )
    assert v2.data.augment.mixup == v2.data.augment.cutmix == 0
    assert (t4.epochs, t4.optim.lr, t4.model.steps, t4.init.backbone) == (
        20,
        1e-5,
        4,
        "runs/spikformer_v2_8_512_imagenet",
    )


def test_cifar_recipes_draw_one_of_five_operations_and_mix_for_200_epochs():
    recipe = get("spikformer_4_384_cifar100")
    assert (recipe.model.name, recipe.data.source, recipe.batch_size) == ("spikformer_cifar_4_384", "cifar100", 128)
    augment = recipe.data.augment
    assert augment.policy_ops == ("Equalize", "Rotate", "ShearX", "TranslateXRel", "TranslateYRel")
    assert (augment.mixup, augment.mixing_epochs, recipe.epochs, recipe.optim.weight_decay) == (0.5, 200, 310, 0.06)


def test_pre_training_hides_three_quarters_and_finetuning_decays_by_layer():
    mae, tuned, t4 = (get(f"spikformer_v2_16_768_imagenet_mae{part}") for part in ("", "_finetune", "_finetune_t4"))
    assert (mae.pretrain.mask_ratio, mae.epochs, mae.batch_size * 8, mae.optim.lr) == (0.75, 200, 1024, 1e-3)
    assert (tuned.pretrain.mask_ratio, tuned.epochs, tuned.optim.lr, tuned.optim.layer_decay) == (0, 150, 1e-3, 0.7)
    assert tuned.init.backbone == f"runs/{mae.name}"
    assert (t4.model.steps, t4.epochs, t4.optim.lr, t4.init.backbone) == (4, 20, 1e-5, f"runs/{tuned.name}")


def test_the_ann_twin_of_cifar_is_the_same_network_without_spikes():
    twin, spiking = get("spikformer_4_384_cifar10_ann"), get("spikformer_4_384_cifar10")
    assert (twin.data, twin.optim, twin.epochs, twin.model.steps) == (spiking.data, spiking.optim, spiking.epochs, 1)
    with torch.device("meta"):
        models = [create_model(recipe.model.name, **recipe.model.overrides()) for recipe in (twin, spiking)]
    assert [sum(each.numel() for each in model.parameters()) for model in models] == [9_324_730] * 2
    assert not neurons(models[0])
    assert neurons(models[1])


def neurons(model):
    return [module for module in model.modules() if isinstance(module, Neuron)]


def test_the_qsd_recipes_are_table_8s():
    recipe = get("qsd_transformer_t_imagenet")
    optim, augment = recipe.optim, recipe.data.augment
    assert (recipe.epochs, 8 * recipe.batch_size, recipe.data.size, recipe.label_smoothing) == (300, 1568, 224, 0.1)
    assert (optim.name, optim.lr, optim.lr_batch, optim.weight_decay) == ("lambc", 6e-4, 256, 0.05)
    assert (optim.warmup_epochs, augment.policy, augment.mixup) == (10.0, "rand-m9-mstd0.5-inc1", 0.0)
    assert (recipe.model.steps, recipe.model.levels, recipe.fgd.weight, recipe.fgd.rule) == (1, 4, 2.0, "same")
    tuned = get("qsd_transformer_t_cifar100")
    assert (tuned.epochs, tuned.batch_size, tuned.data.size, tuned.label_smoothing) == (100, 256, 128, 0.0)
    assert (tuned.data.augment.mixup, tuned.data.augment.cutmix, tuned.optim.warmup_epochs) == (0.8, 1.0, 0.0)
    assert (tuned.optim.lr, tuned.fgd.teacher, tuned.init.backbone) == (6e-4, "", "runs/qsd_transformer_t_imagenet")


def test_a_twin_has_the_layers_of_its_student_in_float():
    for name in ("qsd_transformer_t_imagenet", "spikformer_8_384_w4_imagenet"):
        student, teacher = get(name), get(f"{name}_ann")
        assert student.fgd.teacher == f"runs/{teacher.name}"
        with torch.device("meta"):
            spiking, ann = (create_model(each.model.name, **each.model.overrides()) for each in (student, teacher))
            if bits := student.quantize.chosen():
                prepare(spiking, bits=bits)
        assert [type(each).__name__ for each in ann.modules() if isinstance(each, Neuron | LSQLayer)] == []
        own = {key: value.shape for key, value in spiking.state_dict().items() if not key.endswith(".alpha")}
        assert own == {key: value.shape for key, value in ann.state_dict().items()}


def steps_of(recipe, *, pictures: int, processes: int) -> int:
    """Optimiser steps of a whole run over so many training pictures."""
    return recipe.epochs * (pictures // (recipe.batch_size * recipe.accumulate * processes))


@pytest.mark.parametrize(
    ("name", "pictures", "batch", "rate", "iterations", "size"),
    [
        ("ade20k", 20_210, 48, 2e-4, 160_000, (512, 512)),
        ("cityscapes", 2_975, 64, 2e-3, 90_000, (512, 1024)),
        ("voc", 1_464, 64, 2e-3, 80_000, (512, 512)),
        ("voc_aug", 10_582, 64, 2e-3, 80_000, (512, 512)),
    ],
)
def test_spike2former_recipes_hold_the_numbers_of_table_2(name, pictures, batch, rate, iterations, size):
    recipe = get(f"spike2former_{name}")
    optim = recipe.optim
    assert (8 * recipe.batch_size, optim.lr, optim.lr_batch, recipe.data.size) == (batch, rate, 0, size)
    steps = steps_of(recipe, pictures=pictures, processes=8)
    assert steps == pytest.approx(iterations, rel=0.005)  # whole epochs
    assert optim.warmup_epochs * (pictures // batch) == pytest.approx(1500)
    assert (optim.schedule, optim.min_lr, optim.warmup_lr, optim.clip_grad) == ("poly", 0.0, 1e-6, 0.01)
    assert (optim.weight_decay, optim.decay_1d, optim.rates) == (0.005, True, {"backbone": 0.1})
    assert optim.undecayed == ("query_features", "query_positions", "level_embeddings")
    assert (recipe.model.neuron, recipe.model.levels, recipe.model.steps) == ("ni_lif", 4, 1)
    one_card = dataclasses.replace(recipe, accumulate=8)  # what the file's header says
    assert steps_of(one_card, pictures=pictures, processes=1) == steps


def test_spike2former_draws_short_sides_on_ade20k_and_cityscapes_and_scales_on_voc():
    ade20k, cityscapes, voc, aug = (
        get(f"spike2former_{name}").data for name in ("ade20k", "cityscapes", "voc", "voc_aug")
    )
    sides = ade20k.augment.short_sides
    assert (sides[0], sides[1], sides[-1], len(sides), ade20k.augment.max_side) == (320, 384, 1280, 16, 2560)
    assert (ade20k.short_side, ade20k.max_side) == (512, 2048)
    sides = cityscapes.augment.short_sides
    assert (sides[0], sides[1], sides[-1], len(sides), cityscapes.augment.max_side) == (512, 614, 2048, 16, 4096)
    assert (cityscapes.short_side, cityscapes.max_side) == (1024, 2048)
    assert (voc.augment.scale, voc.augment.short_sides, voc.short_side) == ((0.5, 2.0), (), 512)
    for data in (ade20k, cityscapes, voc):
        assert (data.augment.flip, data.augment.distort, data.augment.cat_max_ratio) == (0.5, 0.5, 0.75)
    assert (voc.train_split, aug.train_split) == ("", "trainaug")
    assert dataclasses.replace(aug, train_split="") == voc


def test_spike2former_starts_from_the_classifier_that_its_header_trains():
    recipe = get("spike2former_ade20k")
    command = next(line for line in spike2former.__doc__.splitlines() if line.endswith(f"--out {recipe.init.backbone}"))
    backbone = get("meta_spikeformer_15m_imagenet")
    for change in command.split(" --set ")[1].split(" --out ")[0].split():
        backbone = override(backbone, *change.split("=", 1))
    with torch.device("meta"):
        models = [create_model(each.model.name, **each.model.overrides()) for each in (recipe, backbone)]
    assert models[0].backbone.config.attention == models[1].config.attention == "sdsa3_width"
    assert recipe.model.neuron == backbone.model.neuron


@pytest.mark.parametrize(
    ("name", "pictures", "iterations", "decay", "rates"),
    [
        ("meta_spikeformer_15m_fpn_ade20k", 20_210, 160_000, 0.005, {"head": 2.0}),
        ("meta_spikeformer_55m_fpn_ade20k", 20_210, 160_000, 0.05, {"head": 2.0}),
        ("meta_spikeformer_15m_fpn_voc", 1_464, 80_000, 0.005, {"head": 2.0}),
        ("meta_spikeformer_55m_fpn_voc_aug", 10_582, 80_000, 0.05, {"head": 2.0}),
        ("qsd_transformer_t_fpn_ade20k", 20_210, 160_000, 0.005, {"head.classifier": 2.0}),
    ],
)
def test_semantic_fpn_recipes_hold_the_papers_numbers(name, pictures, iterations, decay, rates):
    recipe = get(name)
    optim = recipe.optim
    assert (4 * recipe.batch_size, recipe.data.size, recipe.data.augment.scale) == (20, (512, 512), (0.5, 2.0))
    assert steps_of(recipe, pictures=pictures, processes=4) == pytest.approx(iterations, rel=0.005)
    assert optim.warmup_epochs * (pictures // 20) == pytest.approx(1500)
    assert (optim.lr, optim.lr_batch, optim.schedule, optim.decay_1d) == (1e-3, 0, "poly", True)
    assert (optim.weight_decay, optim.rates) == (decay, rates)
    with torch.device("meta"):
        model = create_model(recipe.model.name, **recipe.model.overrides())
    assert all(model.get_submodule(part) is not None for part in optim.rates)


def test_semantic_fpn_at_four_steps_starts_from_one_step():
    first, fourth = get("meta_spikeformer_55m_fpn_voc_aug"), get("meta_spikeformer_55m_fpn_voc_aug_t4")
    assert fourth.init.backbone == f"runs/{first.name}"
    assert (first.model.steps, fourth.model.steps, fourth.optim.lr) == (1, 4, 1e-4)
    assert fourth.data == first.data


def test_event_recipes_hold_the_papers_numbers():
    objects, gestures, actions, three = (
        get(name)
        for name in (
            "spikformer_dvs_2_256_cifar10_dvs",
            "spikformer_dvs_2_256_dvs128_gesture",
            "meta_spikeformer_15m_har_dvs",
            "qsd_transformer_t_cifar10_dvs",
        )
    )
    assert (objects.epochs, objects.batch_size, objects.data.steps, objects.optim.lr) == (106, 16, 16, 1e-3)
    mixing = objects.data.augment
    assert (mixing.mixup, mixing.mixing_share, mixing.mixing_epochs) == (0.5, 0.5, 75)
    assert (gestures.epochs, gestures.model.options["heads"], gestures.data.augment) == (200, 8, EventAugment())
    assert (actions.data.steps, actions.data.in_channels) == (8, 2)
    assert (three.data.in_channels, three.data.split, three.epochs, three.optim.weight_decay) == (3, "count", 100, 0.01)


@pytest.mark.parametrize("name", ["spikformer_dvs_2_256_cifar10_dvs", "meta_spikeformer_15m_har_dvs"])
def test_networks_of_event_recipes_take_their_clips(name):
    recipe = get(name)
    small = dataclasses.replace(
        recipe,
        model=dataclasses.replace(
            recipe.model,
            **({"dims": (8, 8, 16, 16)} if "meta" in name else {"options": {"dim": 16, "depth": 1, "heads": 4}}),
        ),
    )
    model = build_model(small, num_classes=10, in_channels=recipe.data.in_channels).eval()
    with torch.no_grad():
        assert model(torch.rand(recipe.data.steps, 2, 2, 32, 32)).shape == (2, 10)

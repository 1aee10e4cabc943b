import json

import pytest
import torch

from spikeformers import create_model
from spikeformers.neurons import Neuron
from spikeformers.quantize import LSQLayer, prepare
from spikeformers.recipes import RECIPES, get
from spikeformers.train.optimise import peak_rate
from spikeformers.train.recipe import from_json, to_json


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

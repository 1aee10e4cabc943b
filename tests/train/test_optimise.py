import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from spikeformers.data.images import ImageData
from spikeformers.train.optimise import build_optimizer, gradient_norm, learning_rate, peak_rate, set_rate
from spikeformers.train.recipe import Optim, Recipe
from spikeformers.zoo import create_model


def test_the_rate_rises_linearly_from_zero_then_falls_by_half_a_cosine():
    optim = Optim(warmup_epochs=2, min_lr=0.1)
    rates = [learning_rate(step, steps_per_epoch=10, epochs=10, peak=1.0, optim=optim) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[10] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(1.0)
    assert rates[40] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[100] == pytest.approx(0.1)


def test_the_warm_up_starts_at_its_own_rate_and_the_cool_down_stays_at_the_least():
    optim = Optim(warmup_epochs=2, warmup_lr=0.2, min_lr=0.1, cooldown_epochs=2)
    rates = [learning_rate(step, steps_per_epoch=10, epochs=10, peak=1.0, optim=optim) for step in range(100)]
    assert rates[0] == 0.2
    assert rates[10] == pytest.approx(0.6)
    assert rates[20] == pytest.approx(1.0)
    assert rates[50] == pytest.approx(0.55)  # half way from epoch 2 to epoch 8
    assert rates[79] > 0.1
    assert set(rates[80:]) == {0.1}


def test_per_epoch_the_rate_is_constant_within_an_epoch_and_the_warm_up_does_not_shift_the_cosine():
    optim = Optim(warmup_epochs=3, warmup_lr=0.01, min_lr=0.1, cooldown_epochs=2, per_epoch=True)
    rates = [learning_rate(step, steps_per_epoch=5, epochs=10, peak=1.0, optim=optim) for step in range(50)]
    cosine = [0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * epoch / 8)) for epoch in range(8)]
    assert rates[::5] == pytest.approx([0.01, 0.01 + 0.99 / 3, 0.01 + 0.99 * 2 / 3, *cosine[3:], 0.1, 0.1])
    assert all(rate == rates[step - step % 5] for step, rate in enumerate(rates))


@pytest.mark.parametrize(("cooldown", "warmup"), [(0, 0), (0, 20), (10, 20)])
def test_per_epoch_equals_timms_scheduler(cooldown, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-4)
    # timm does not count the cool-down among the epochs of the cosine, a recipe does.
    scheduler = CosineLRScheduler(optimizer, t_initial=100, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-5)
    optim = Optim(min_lr=1e-5, warmup_lr=1e-5, warmup_epochs=warmup, cooldown_epochs=cooldown, per_epoch=True)
    for epoch in range(100 + cooldown):
        rate = learning_rate(7 * epoch + 3, steps_per_epoch=7, epochs=100 + cooldown, peak=5e-4, optim=optim)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1)


def test_the_rate_scales_with_the_images_of_a_step(tiny):
    recipe = tiny(optim=Optim(lr=6e-4, lr_batch=256), batch_size=128, accumulate=3)
    assert peak_rate(recipe, processes=4) == pytest.approx(6e-4 * 6)
    assert peak_rate(tiny(optim=Optim(lr=6e-4)), processes=4) == 6e-4


@pytest.mark.parametrize("name", ["adamw", "lamb", "lambc"])
def test_parameters_with_one_axis_are_not_decayed(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decays = {}
    for group in build_optimizer(model, Optim(name=name, weight_decay=0.05)).param_groups:
        decays |= dict.fromkeys(group["params"], group["weight_decay"])
    assert {decays[parameter] for parameter in model.parameters() if parameter.ndim == 1} == {0.0}
    assert decays[model[0].weight] == 0.05


def test_with_layer_decay_each_layer_learns_at_a_fraction_of_the_rate_of_the_one_above():
    model = create_model("meta_spikeformer_15m", dims=(8, 8, 8, 8), blocks=(1, 1, 1, 2, 0), num_classes=3, heads=2)
    optimizer = build_optimizer(model, Optim(layer_decay=0.5, weight_decay=0.05))
    set_rate(optimizer, 0.1)
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters()])
    layers = ["stage1a", "stage1b", "stage2", "stage3.block0", "stage3.block1", "stage4", "head"]
    found = {name: groups[id(parameter)]["lr"] for name, parameter in model.named_parameters()}
    for name, rate in found.items():
        layer = name.replace("stage3.down", "stage3.block0")
        (depth,) = (index for index, prefix in enumerate(layers) if layer.startswith(prefix))
        assert rate == 0.1 * 0.5 ** (6 - depth), name
    assert {groups[id(each)]["weight_decay"] for each in model.parameters() if each.ndim > 1} == {0.05}
    assert {groups[id(each)]["weight_decay"] for each in model.parameters() if each.ndim == 1} == {0.0}


def test_without_layer_decay_every_group_uses_the_rate_itself():
    optimizer = build_optimizer(nn.Linear(2, 2), Optim())
    set_rate(optimizer, 0.3)
    assert all(group["lr"] == 0.3 and "lr_scale" not in group for group in optimizer.param_groups)


def test_layer_decay_wants_a_network_that_lists_its_layers():
    with pytest.raises(ValueError, match=r"optim\.layer_decay=0\.5 .*Linear has no group_matcher.*layer_decay=1"):
        build_optimizer(nn.Linear(1, 1), Optim(layer_decay=0.5))


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match=r"optim\.name 'adamww'"):
        build_optimizer(nn.Linear(1, 1), Optim(name="adamww"))


def test_clipping_scales_gradients_and_reports_the_norm_before():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(gradient_norm(layer, clip=0.0)) == pytest.approx(5.0)
    assert float(gradient_norm(layer, clip=1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_the_poly_schedule_falls_in_a_straight_line_behind_the_warm_up():
    optim = Optim(schedule="poly", warmup_epochs=1, min_lr=0.0)
    rates = [learning_rate(step, steps_per_epoch=4, epochs=5, peak=1.0, optim=optim) for step in range(21)]
    assert rates[:4] == [0, 0.25, 0.5, 0.75]
    assert rates[4:] == pytest.approx([1 - step / 16 for step in range(17)])


def test_a_power_bends_the_poly_schedule_and_needs_one():
    optim = Optim(schedule="poly", power=0.9, min_lr=0.0)
    rates = [learning_rate(step, steps_per_epoch=10, epochs=1, peak=2.0, optim=optim) for step in (0, 5)]
    assert rates == pytest.approx([2.0, 2.0 * 0.5**0.9])
    with pytest.raises(ValueError, match=r"optim\.power must be above 0, and is of optim\.schedule=poly, got 0\.9"):
        Recipe(name="bent", data=ImageData(), optim=Optim(power=0.9))


def test_the_poly_schedule_ends_at_the_least_rate():
    optim = Optim(schedule="poly", min_lr=0.2)
    rates = [learning_rate(step, steps_per_epoch=1, epochs=4, peak=1.0, optim=optim) for step in range(5)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def parts() -> nn.ModuleDict:
    """A backbone and a head with a layer, a norm and queries."""
    head = nn.ModuleDict({"layer": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2), "query_feat": nn.Embedding(3, 2)})
    return nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": head})


def found(model: nn.Module, optim: Optim) -> dict[str, tuple[float, float]]:
    """Rate at a rate of 1, and decay, of each parameter."""
    optimizer = build_optimizer(model, optim)
    set_rate(optimizer, 1.0)
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups) == len([*model.parameters()])
    return {name: (groups[id(each)]["lr"], groups[id(each)]["weight_decay"]) for name, each in model.named_parameters()}


def test_each_part_of_the_network_learns_at_its_own_rate():
    rates = {"backbone": 0.1, "head": 2.0, "head.query_feat": 3.0}
    values = found(parts(), Optim(rates=rates, weight_decay=0.05))
    assert values["backbone.weight"] == (0.1, 0.05)
    assert values["backbone.bias"] == (0.1, 0.0)
    assert values["head.layer.weight"] == (2.0, 0.05)
    assert values["head.norm.weight"] == (2.0, 0.0)
    assert values["head.query_feat.weight"] == (3.0, 0.05)  # the longest name that fits


def test_parameters_are_decayed_by_name():
    values = found(parts(), Optim(undecayed=("query_feat",), decay_1d=True, weight_decay=0.05))
    assert values.pop("head.query_feat.weight") == (1.0, 0.0)
    assert set(values.values()) == {(1.0, 0.05)}


def test_names_that_no_parameter_has_are_refused():
    with pytest.raises(ValueError, match=r"optim\.rates\.backbones names no part of the network; closest: backbone"):
        build_optimizer(parts(), Optim(rates={"backbones": 0.1}))
    with pytest.raises(ValueError, match=r"optim\.rates\.back names no part"):  # whole names only
        build_optimizer(parts(), Optim(rates={"back": 0.1}))
    with pytest.raises(ValueError, match=r"optim\.undecayed: no parameter has 'query_embed' in its name"):
        build_optimizer(parts(), Optim(undecayed=("query_embed",)))
    with pytest.raises(ValueError, match=r"optim\.layer_decay=0\.5 makes its own groups"):
        build_optimizer(parts(), Optim(layer_decay=0.5, decay_1d=True))

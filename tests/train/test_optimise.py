import math

import pytest
import torch
from torch import nn

from spikeformers.train.optimise import build_optimizer, gradient_norm, learning_rate, peak_rate
from spikeformers.train.recipe import Optim


def test_the_rate_rises_linearly_from_zero_then_falls_by_half_a_cosine():
    optim = Optim(warmup_epochs=2, min_lr=0.1)
    rates = [learning_rate(step, steps_per_epoch=10, epochs=10, peak=1.0, optim=optim) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[10] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(1.0)
    assert rates[40] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[60] == pytest.approx(0.55)  # half way down
    assert rates[100] == pytest.approx(0.1)


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


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match=r"optim\.name 'adamww'"):
        build_optimizer(nn.Linear(1, 1), Optim(name="adamww"))


def test_clipping_scales_gradients_and_reports_the_norm_before():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert float(gradient_norm(layer, clip=0.0)) == pytest.approx(5.0)
    assert float(gradient_norm(layer, clip=1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]))

"""What only a GPU can show of the switches of a training step: CUDA graphs, kernels in compiled graphs, peaks."""

import copy

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers.train.optimise import build_optimizer
from spikeformers.train.recipe import Optim, Speed
from spikeformers.train.speed import apply_speed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SMALL = {"dims": (16, 32, 48, 64), "num_classes": 5, "neuron": "lif", "steps": 2}


def built() -> tuple[nn.Module, torch.Tensor]:
    """A network whose attention fires, and images."""
    model = sf.create_model("meta_spikeformer_15m", **SMALL).to("cuda", torch.float64)
    for name, module in model.named_modules():
        if name.endswith("conv.bn3"):
            nn.init.ones_(module.bias)
    return model, torch.randn(4, 3, 64, 64, dtype=torch.float64, device="cuda")


def trained(model: nn.Module, speed: Speed, images: torch.Tensor, *, accumulate: int) -> list[torch.Tensor]:
    """Gradients, parameters and running statistics after two optimiser steps of `accumulate` backward passes."""
    apply_speed(model, speed, images, accumulate=accumulate)
    optimizer = build_optimizer(model, Optim(name="sgd", lr=1e-6), fused=speed.fused_optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(accumulate):
            model(images).square().mean().backward()
        optimizer.step()
    return [*(each.grad for each in model.parameters()), *(each.detach() for each in model.state_dict().values())]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("switch", ["fused_qkv", "fused_norms", "fused_optimizer", "recompute", "compile"])
def test_a_switch_trains_to_the_same_numbers(switch, accumulate, unchecked):
    model, images = built()
    twin = copy.deepcopy(model)
    wanted = trained(model, Speed(), images, accumulate=accumulate)
    found = trained(twin, Speed(**{switch: True}), images, accumulate=accumulate)
    assert any(gradient.any() for gradient in wanted)
    for a, b in zip(found, wanted, strict=True):
        # Sums in another order, which norms of maps that hardly vary magnify.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, b.abs().max().item()))


def test_recomputation_lowers_the_peak_of_a_step():
    images = torch.randn(8, 3, 128, 128, device="cuda")
    peaks = []
    for speed in (Speed(), Speed(recompute=True)):
        model = sf.create_model("meta_spikeformer_15m", **SMALL).to("cuda")
        apply_speed(model, speed, images)
        model(images).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(images).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 2

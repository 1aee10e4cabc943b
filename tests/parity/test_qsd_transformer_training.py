"""QSD-Transformer in training against a second writing of the authors' network: loss, gradients, statistics, float64.

The reference has no gradients of the whole network. The oracle below is functions of the authors' tensors, by their
names, written from a description of their code (bollossom/QSD-Transformer, classification/models.py and quan_w.py).
It shares nothing with the package, and in evaluation it gives the logits that their code gave.
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from spikeformers.weights import load_official
from spikeformers.weights.qsd_transformer import own_key, own_tensor
from spikeformers.zoo import create_model

REFERENCE = load_file(Path(__file__).parent / "qsd_transformer.safetensors")
SIZES = {"dims": (8, 16, 32, 40), "num_classes": 10}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
LOW, HIGH = -8, 7  # 4 bits
# Step sizes as stored, or never set; layer scales as stored, or where they start.
CASES = [(flag, scale) for flag in ("set", "unset") for scale in (None, 1e-6)]
every_case = pytest.mark.parametrize(("flag", "layer_scale"), CASES)
# A norm follows and takes any constant away again: the gradient is zero, both have rounding noise.
CANCELLED = re.compile(r".+\.(down\.conv\.conv|mlp\.conv[12]\.conv|bn2)\.bias")


def spikes(x: Tensor, *, unit: int = 4) -> Tensor:
    """IE-LIF: counts 0..4 of 4x, halves up, over `unit`; the gradient passes strictly between the ends."""
    counts = (4 * x).clamp(0, 4).add(0.5).floor()
    ramp = 4 * x * ((4 * x > 0) & (4 * x < 4))
    return (counts.detach() + (ramp - ramp.detach())) / unit


class Oracle:
    """The authors' network; a pass changes `parameters` (step sizes never set) and `statistics` as theirs does."""

    def __init__(self, state: dict[str, Tensor], *, training: bool) -> None:
        kept = {key: tensor.clone() for key, tensor in state.items() if ".act." not in key}
        self.flags = {key: kept.pop(key) for key in list(kept) if key.endswith(".init_state")}
        self.statistics = {key: kept.pop(key) for key in list(kept) if key.endswith(STATISTICS)}
        self.parameters = {key: tensor.requires_grad_() for key, tensor in kept.items()}
        self.training = training

    def quantized(self, layer: str) -> Tensor:
        weight, alpha = self.parameters[f"{layer}.weight"], self.parameters[f"{layer}.alpha"]
        if self.training and not self.flags[f"{layer}.init_state"].any():
            with torch.no_grad():
                alpha.fill_(2 * weight.abs().mean() / math.sqrt(HIGH))
        part = alpha / math.sqrt(weight.numel() * HIGH)  # the value is alpha's, the gradient that of this part
        step = (alpha.detach() + (part - part.detach())).view(-1, *[1] * (weight.ndim - 1))
        scaled = weight / step
        clipped = torch.where((scaled >= LOW) & (scaled <= HIGH), scaled, scaled.detach().clamp(LOW, HIGH))
        return (clipped.detach().round() + (clipped - clipped.detach())) * step

    def conv(self, layer: str, x: Tensor, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        weight = self.quantized(layer)
        weight = weight.unsqueeze(-1) if weight.ndim == 3 else weight  # 1-D on tokens
        return F.conv2d(x, weight, self.parameters.get(f"{layer}.bias"), stride, padding, 1, groups)

    def norm(self, layer: str, x: Tensor) -> Tensor:
        mean, var, batches = (self.statistics[f"{layer}.{name}"] for name in STATISTICS)
        batches += self.training
        weight, bias = self.parameters[f"{layer}.weight"], self.parameters[f"{layer}.bias"]
        return F.batch_norm(x, mean, var, weight, bias, self.training, 0.1, 1e-5)

    def rep_conv(self, layer: str, x: Tensor) -> Tensor:
        body = f"{layer}.0.body"
        x = self.norm(f"{body}.1.bn", self.conv(f"{body}.0", x))
        mean, var, _ = (self.statistics[f"{body}.1.bn.{name}"] for name in STATISTICS)
        weight, bias = (self.parameters[f"{body}.1.bn.{name}"].detach() for name in ("weight", "bias"))
        border = bias - mean * weight / torch.sqrt(var + 1e-5)  # what zeros become, by the statistics just updated
        batch, channels, height, width = x.shape
        padded = border.view(1, -1, 1, 1).repeat(batch, 1, height + 2, width + 2)
        padded[:, :, 1:-1, 1:-1] = x
        x = self.conv(f"{body}.2.1", self.conv(f"{body}.2.0", padded, groups=channels))
        return self.norm(f"{layer}.1", self.norm(f"{body}.2.2", x))

    def down(self, layer: str, x: Tensor, *, stride: int = 2, padding: int = 1) -> Tensor:
        x = self.conv(f"{layer}.encode_conv", x, stride=stride, padding=padding)
        return self.norm(f"{layer}.encode_bn", x)

    def conv_block(self, block: str, x: Tensor) -> Tensor:
        y = spikes(self.norm(f"{block}.Conv.bn1", self.conv(f"{block}.Conv.pwconv1", spikes(x))))
        y = self.conv(f"{block}.Conv.dwconv", y, padding=3, groups=y.shape[1])
        x = x + self.norm(f"{block}.Conv.bn2", self.conv(f"{block}.Conv.pwconv2", y))
        y = spikes(self.norm(f"{block}.bn1", self.conv(f"{block}.conv1", spikes(x), padding=1)))
        return x + self.norm(f"{block}.bn2", self.conv(f"{block}.conv2", y, padding=1))

    def transformer_block(self, block: str, x: Tensor) -> Tensor:
        first, second = (self.parameters[f"{block}.layer_scale{i}"].view(1, -1, 1, 1) for i in (1, 2))
        shared = spikes(x)
        q, k, v = (
            spikes(self.rep_conv(f"{block}.attn.{name}_conv", shared)).flatten(2).unflatten(1, (8, -1)).mT
            for name in "qkv"
        )  # [B, M, N, K]
        mixed = (q @ (k.mT @ v) * 0.25).mT.reshape(x.shape)
        x = x + first * self.rep_conv(f"{block}.attn.proj_conv", spikes(mixed, unit=2))
        y = self.norm(f"{block}.mlp.fc1_bn", self.conv(f"{block}.mlp.fc1_conv", spikes(x)))
        return x + second * self.norm(f"{block}.mlp.fc2_bn", self.conv(f"{block}.mlp.fc2_conv", spikes(y)))

    def logits(self, images: Tensor) -> Tensor:
        x = self.conv_block("ConvBlock1_1.0", self.down("downsample1_1", images, padding=3))
        x = self.conv_block("ConvBlock1_2.0", self.down("downsample1_2", spikes(x)))
        x = self.conv_block("ConvBlock2_1.0", self.down("downsample2", spikes(x)))
        x = self.down("downsample3", spikes(self.conv_block("ConvBlock2_2.0", x)))
        for i in range(6):
            x = self.transformer_block(f"block3.{i}", x)
        x = self.down("downsample4", spikes(x), stride=1)
        for i in range(2):
            x = self.transformer_block(f"block4.{i}", x)
        return F.linear(spikes(x.mean((2, 3))), self.quantized("head"), self.parameters["head.bias"])


def stored(flag: str, layer_scale: float | None) -> dict[str, Tensor]:
    """The authors' tensors in float64; with flag "unset" step sizes are the bare memory that nothing may read."""
    state = {key.removeprefix("state/"): tensor for key, tensor in REFERENCE.items() if key.startswith("state/")}
    for key, tensor in state.items():
        state[key] = tensor.double() if tensor.is_floating_point() else tensor
        if layer_scale is not None and "layer_scale" in key:
            state[key] = torch.full_like(state[key], layer_scale)
        elif flag == "unset" and ".act." not in key and key.endswith((".alpha", ".init_state")):
            state[key] = torch.full_like(state[key], math.nan if key.endswith("alpha") else 0)
    return state


class Step(NamedTuple):
    """What one forward and backward pass in train mode left; the last three by our names."""

    logits: Tensor
    loss: Tensor
    parameters: dict[str, Tensor]
    statistics: dict[str, Tensor]
    gradients: dict[str, Tensor]


def trained_on(logits: Tensor, parameters: dict[str, Tensor], statistics: dict[str, Tensor]) -> Step:
    loss = F.cross_entropy(logits, torch.tensor([1, 2, 3, 4]))
    loss.backward()
    return Step(logits, loss, parameters, statistics, {name: each.grad for name, each in parameters.items()})


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {own_key(key): own_tensor(key, tensor) for key, tensor in tensors.items()}


@cache
def trained_once(flag: str, layer_scale: float | None) -> tuple[Step, Step]:
    """The oracle's step and ours."""
    state, noise = stored(flag, layer_scale), torch.Generator().manual_seed(1)
    images = torch.cat([REFERENCE["input"].double(), torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=noise)])
    oracle = Oracle(state, training=True)
    theirs = trained_on(oracle.logits(images), oracle.parameters, oracle.statistics)
    model = create_model("qsd_transformer_t", **SIZES).double().train()
    load_official(model, state)
    ours = trained_on(model(images), dict(model.named_parameters()), dict(model.named_buffers()))
    return Step(theirs.logits, theirs.loss, *map(renamed, theirs[2:])), ours


def test_the_oracle_gives_the_logits_of_the_authors_code():
    with torch.no_grad():
        logits = Oracle(stored("set", None), training=False).logits(REFERENCE["input"].double())
    # They were equal to the last bit; another order of a sum of 40 stays far below.
    assert torch.allclose(logits, REFERENCE["logits_fp64"], atol=1e-12, rtol=0)


@every_case
def test_logits_and_loss_in_training_equal_the_oracle(flag, layer_scale):
    theirs, ours = trained_once(flag, layer_scale)
    # They were equal to the last bit; the classifier's sum of 40 may round otherwise elsewhere.
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-12, rtol=0)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-12)


@every_case
def test_every_gradient_equals_the_oracle(flag, layer_scale):
    theirs, ours = (step.gradients for step in trained_once(flag, layer_scale))
    assert ours.keys() == theirs.keys()
    cancelled = {name for name in theirs if CANCELLED.fullmatch(name)}
    assert (len(theirs), len(cancelled)) == (580, 5 + 8 * 2 + 8 * 4)
    noise = 1e-14 * max(gradient.abs().max() for gradient in theirs.values())  # 1e-17 was seen
    for name, gradient in theirs.items():
        if name in cancelled:
            assert max(gradient.abs().max(), ours[name].abs().max()) < noise, name
        else:
            # Of the largest element 5e-15 was seen, and 4e-11 at scales of a norm in front of a norm: that takes scales
            # away again, and their gradient is the small rest that its epsilon leaves.
            share = 1e-9 if name.endswith("bn2.weight") else 1e-12
            assert torch.allclose(ours[name], gradient, atol=share * gradient.abs().max().item(), rtol=0), name


@every_case
def test_step_sizes_and_every_statistic_after_a_step_equal_the_oracle(flag, layer_scale):
    theirs, ours = (step.parameters | step.statistics for step in trained_once(flag, layer_scale))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Values up to 4, and 2e-16 was seen: means, in whatever order. Batches are counted in whole numbers.
        assert torch.allclose(ours[name], tensor, atol=1e-14, rtol=1e-12), name

"""Layers side by side: the outputs, gradients and running statistics of the layers one after the other."""

import copy

import pytest
import torch
from torch import nn

from spikeformers.attention import QSDSA, SDSA1, SDSA2, SDSA3, SSA, Rectified
from spikeformers.layers import ConvBN, RepConv
from spikeformers.layers.side_by_side import side_by_side
from spikeformers.neurons import neuron_builder
from spikeformers.quantize import prepare

BUILDERS = {
    "conv_bn": lambda: ConvBN(6, 4, 1),
    "conv_bn with bias, 3x3, stride 2": lambda: ConvBN(6, 4, 3, stride=2, bias=True),
    "conv_bn, dilated": lambda: dilated(ConvBN(6, 4, 3)),
    "rep_conv": lambda: RepConv(6, 4),
}


def dilated(layer: ConvBN) -> ConvBN:
    layer.conv.dilation = (2, 2)
    return layer


def three(build) -> nn.ModuleList:
    """Three layers whose norms differ in everything that a norm holds."""
    layers = nn.ModuleList(build() for _ in range(3)).double()
    for module in layers.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return layers


def calls(monkeypatch, layers) -> list[nn.Module]:
    """The convolutions of `layers` that are called as modules, which those put together are not."""
    called = []
    plain = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: called.append(self) or plain(self, x))
    return called


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_gradients_and_statistics_are_those_of_the_layers_alone(monkeypatch, name, bits):
    layers = three(BUILDERS[name])
    if bits:
        prepare(layers, bits=bits)
    alone = copy.deepcopy(layers)
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    wanted = [layer(inputs[1]) for layer in alone]
    called = calls(monkeypatch, layers)
    found = side_by_side(list(layers), inputs[0])
    assert not called
    weights = torch.randn(3, *wanted[0].shape, dtype=torch.float64)
    for outputs in (found, wanted):
        sum((w * y).sum() for w, y in zip(weights, outputs, strict=True)).backward()
    # Sums over channels in another order: float64's rounding, through five layers.
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-11)
    for a, b in zip(layers.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11)
    for (key, a), b in zip(layers.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=key)


def rectified() -> nn.ModuleList:
    return nn.ModuleList(Rectified(6, 4, projection=RepConv) for _ in range(3))


def frozen() -> nn.ModuleList:
    layers = nn.ModuleList(ConvBN(6, 4, 1) for _ in range(3))
    layers[1].bn.eval()
    return layers


def heard() -> nn.ModuleList:
    layers = nn.ModuleList(ConvBN(6, 4, 1) for _ in range(3))
    layers[2].conv.register_forward_hook(lambda *_: None)
    return layers


def unlike() -> nn.ModuleList:
    return nn.ModuleList([ConvBN(6, 4, 1), ConvBN(6, 4, 3), ConvBN(6, 4, 1)])


def grouped() -> nn.ModuleList:
    return nn.ModuleList(ConvBN(6, 6, 3, groups=6) for _ in range(3))


def reflecting() -> nn.ModuleList:
    layers = nn.ModuleList(ConvBN(6, 4, 3) for _ in range(3))
    for layer in layers:
        layer.conv.padding_mode = "reflect"
        layer.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return layers


def of_other_norms() -> nn.ModuleList:
    layers = nn.ModuleList(RepConv(6, 4) for _ in range(3))
    layers[1].bn1.eps, layers[2].bn3.momentum = 0.1, 0.5
    return layers


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def of_own_kind() -> nn.ModuleList:
    layers = nn.ModuleList(ConvBN(6, 4, 1) for _ in range(3))
    for layer in layers:
        layer.conv = Doubled(6, 4, 1, bias=False)
    return layers


UNFIT = (rectified, frozen, heard, unlike, grouped, reflecting, of_other_norms, of_own_kind)


@pytest.mark.parametrize("build", UNFIT)
def test_layers_that_cannot_be_put_together_are_called_one_by_one(monkeypatch, build):
    layers = build().double()
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    wanted = [layer(x) for layer in copy.deepcopy(layers)]
    called = calls(monkeypatch, layers)
    found = side_by_side(list(layers), x)
    assert len(called) >= 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", [SDSA1, SDSA2, SDSA3, SSA, QSDSA])
def test_a_fused_attention_trains_as_before_and_is_read_layer_by_layer_in_eval_mode(monkeypatch, kind):
    neuron = neuron_builder("ie_lif" if kind is QSDSA else "lif")
    attention = kind(8, neuron=neuron, heads=2).double()
    for name in attention.operands:
        for module in getattr(attention, f"{name}_conv").modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 2.0)
    twin = copy.deepcopy(attention)
    attention.fused = True
    spikes = (torch.rand(4, 8, 3, 3, dtype=torch.float64) > 0.5).double()
    wanted = twin(spikes)
    assert wanted.any()
    torch.testing.assert_close(attention(spikes), wanted, rtol=0, atol=1e-12)
    called = calls(monkeypatch, attention)
    attention.eval()(spikes)
    assert len(set(called)) == sum(isinstance(module, nn.Conv2d) for module in attention.modules())

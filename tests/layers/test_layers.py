"""Layers equal their merged forms in float64, count the parameters of the paper, and keep its shortcut identities."""

import pytest
import torch
from torch import nn

from spikeformers.layers import (
    SHORTCUTS,
    ChannelConv,
    ChannelMLP,
    ConvBN,
    MembraneShortcut,
    RepConv,
    SepConv,
    SpikeElementWiseShortcut,
    VanillaShortcut,
)
from spikeformers.neurons import neuron_builder

I_LIF = neuron_builder("i_lif", levels=4)


def trained(module: nn.Module) -> nn.Module:
    """Batch norms as after training: nothing at its neutral value; float64, eval."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
            layer.running_var.uniform_(0.5, 2)
    return module.double().eval()


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 2, 1), (7, 2, 1), (7, 1, 6)])
def test_merged_conv_bn_is_the_same_function(kernel, stride, groups):
    layer = trained(ConvBN(6, 12, kernel, stride=stride, groups=groups, bias=groups == 1))
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    assert torch.allclose(layer.merge()(x), layer(x), atol=1e-12, rtol=0)


def test_merged_rep_conv_is_one_dense_3x3_with_zero_padding():
    layer = trained(RepConv(5, 7))
    merged = layer.merge()
    x = torch.randn(3, 5, 6, 4, dtype=torch.float64)
    assert merged.weight.shape == (7, 5, 3, 3)
    # The border is where a naive zero padding inside would differ; all pixels are compared.
    assert torch.allclose(merged(x), layer(x), atol=1e-12, rtol=0)


def test_merged_sep_conv_is_one_dense_7x7():
    layer = trained(SepConv(4, neuron=I_LIF))
    spikes = torch.randint(0, 5, (2, 8, 9, 9), dtype=torch.float64)
    assert torch.allclose(layer.merge_spatial()(spikes), layer.pw2(layer.dw(spikes)), atol=1e-12, rtol=0)


def test_border_of_rep_conv_takes_running_statistics_updated_by_the_same_forward():
    layer = RepConv(1, 1).train()
    for conv in (layer.pw1, layer.pw2):
        nn.init.ones_(conv.weight)
    nn.init.ones_(layer.dw.weight)
    nn.init.ones_(layer.bn1.bias)
    seen = []
    layer.dw.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    x = torch.full((1, 1, 2, 2), 3.0)
    x[0, 0, 0, 0] = 7.0  # mean 4, unbiased variance 4: running mean 0.4, running variance 0.9 + 0.4
    layer(x)
    border = 1.0 - 0.4 / (1.3 + 1e-5) ** 0.5
    assert seen[0].shape == (1, 1, 4, 4)
    assert seen[0][0, 0, 0, 0].item() == pytest.approx(border, abs=1e-6)
    assert seen[0][0, 0, 1, 1].item() == pytest.approx(1 + 3 / (3 + 1e-5) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("c", [4, 12])
def test_parameter_formulas_of_the_paper_hold(c):
    assert size(SepConv(c, neuron=I_LIF)) == 4 * c**2 + 104 * c
    assert size(ChannelConv(c, neuron=I_LIF)) == 72 * c**2 + 10 * c
    assert size(RepConv(c, c)) == 2 * c**2 + 15 * c
    assert size(ChannelMLP(c, neuron=I_LIF)) == 8 * c**2 + 15 * c


def zero(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def test_ms_and_sew_are_identities_for_a_zero_branch_and_vs_is_not():
    membrane = torch.randn(2, 3, 4, 4) * 3
    assert torch.equal(MembraneShortcut(neuron=neuron_builder("lif"))(membrane, zero), membrane)
    spikes = torch.randint(0, 2, (2, 3, 4, 4)).float()
    assert torch.equal(SpikeElementWiseShortcut(neuron=neuron_builder("lif"))(spikes, zero), spikes)
    # A spike of 1 is below what a LIF needs at one step (2): the vanilla shortcut loses it.
    assert not torch.equal(VanillaShortcut(neuron=neuron_builder("lif"))(spikes, zero), spikes)


def test_sew_emits_integers_beyond_one_and_vs_binary_spikes():
    spikes = torch.randint(0, 2, (2, 3, 4, 4)).float()
    sew = SpikeElementWiseShortcut(neuron=neuron_builder("lif"))(spikes, lambda s: 5 * s)
    assert set(sew.unique().tolist()) == {0.0, 2.0}
    vs = VanillaShortcut(neuron=neuron_builder("lif"))(spikes, lambda s: 5 * s)
    assert set(vs.unique().tolist()) == {0.0, 1.0}


def test_ms_feeds_its_branch_spikes():
    seen = []
    MembraneShortcut(neuron=I_LIF)(torch.randn(2, 3, 4, 4) * 3, lambda s: seen.append(s) or zero(s))
    assert set(seen[0].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_shortcut_names_are_the_papers():
    assert set(SHORTCUTS) == {"ms", "sew", "vs"}

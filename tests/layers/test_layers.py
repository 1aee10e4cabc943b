"""Layers equal their merged forms in float64, count the parameters of the paper, and keep its shortcut identities."""

from functools import partial

import pytest
import torch
from torch import nn

from spikeformers.layers import (
    SHORTCUTS,
    ChannelConv,
    ChannelMLP,
    ConvBN,
    IAndShortcut,
    MembraneShortcut,
    RepConv,
    ResidualShortcut,
    SepConv,
    SpikeElementWiseShortcut,
    VanillaShortcut,
)
from spikeformers.neurons import IELIF, neuron_builder
from spikeformers.quantize import prepare

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


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (2, 2, 1), (3, 2, 1), (7, 2, 1), (7, 1, 6)])
def test_merged_conv_bn_is_the_same_function(kernel, stride, groups):
    layer = trained(ConvBN(6, 12, kernel, stride=stride, groups=groups, bias=groups == 1))
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    assert torch.allclose(layer.merge()(x), layer(x), atol=1e-12, rtol=0)


def test_a_2x2_kernel_with_stride_2_halves_exactly_and_its_patches_never_overlap():
    layer = ConvBN(1, 1, 2, stride=2).eval()
    nn.init.ones_(layer.conv.weight)
    layer.bn.eps = 0
    x = torch.arange(8.0).view(1, 1, 2, 4)
    assert layer(x).tolist() == [[[[0 + 1 + 4 + 5, 2 + 3 + 6 + 7]]]]
    assert layer(torch.zeros(1, 1, 14, 6)).shape == (1, 1, 7, 3)


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


def test_iand_is_not_the_branch_and_the_shortcut():
    # S of the shortcut and current of the branch; a LIF fires from 2 at one step.
    table = {(0, 0): 0, (0, 2): 0, (1, 0): 1, (1, 2): 0}
    s, current = torch.tensor(list(table), dtype=torch.float32).T.view(2, 1, 4, 1, 1)
    out = IAndShortcut(neuron=neuron_builder("lif"))(s, lambda _: current)
    assert out.flatten().tolist() == list(table.values())


def test_iand_is_the_identity_for_a_zero_branch_and_its_branch_reads_the_shortcut():
    spikes = torch.randint(0, 2, (4, 3, 4, 4)).float()
    shortcut = IAndShortcut(neuron=neuron_builder("lif", steps=2))
    assert torch.equal(shortcut(spikes, zero), spikes)
    assert not shortcut(spikes, lambda s: 2 * s).any()  # a branch that fires where the shortcut does erases all of it


@pytest.mark.parametrize(("neuron", "levels"), [("lif", 4), ("i_lif", 1), ("ni_lif", 1), ("ie_lif", 1)])
def test_iand_takes_every_neuron_that_emits_0_and_1(neuron, levels):
    shortcut = IAndShortcut(neuron=neuron_builder(neuron, levels=levels))
    assert set(shortcut(torch.ones(2, 3, 4, 4), lambda s: 5 * torch.randn(s.shape)).unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("neuron", "levels"), [("i_lif", 4), ("ni_lif", 4), ("ie_lif", 2), ("gelu", 1)])
def test_iand_refuses_every_other_neuron(neuron, levels):
    with pytest.raises(ValueError, match="IAND needs binary spikes"):
        IAndShortcut(neuron=neuron_builder(neuron, levels=levels))
    with pytest.raises(ValueError, match="IAND needs binary spikes"):
        IAndShortcut(neuron=partial(IELIF, levels=1, unit=0.5))  # one level, but a spike is not worth 1


def test_iand_passes_gradients_to_the_shortcut_where_the_branch_is_silent_and_to_the_branch_where_it_has_spikes():
    spikes, current = torch.tensor([1.0, 1, 0]).view(1, 3, 1, 1), torch.tensor([1.0, 2, 1]).view(1, 3, 1, 1)
    spikes.requires_grad_()
    current.requires_grad_()
    IAndShortcut(neuron=neuron_builder("lif"))(spikes, lambda _: current).sum().backward()
    assert spikes.grad.flatten().tolist() == [1, 0, 1]
    # -S times half the slope of the surrogate, which is 1 at the threshold: it is the membrane that is halved.
    assert current.grad.flatten()[1:].tolist() == [-0.5, 0]
    assert -0.5 < current.grad.flatten()[0] < 0


def test_the_residual_shortcut_adds_and_has_nothing_of_its_own():
    x = torch.randn(2, 3, 4, 4)
    shortcut = ResidualShortcut(neuron=neuron_builder("lif"))
    assert torch.equal(shortcut(x, zero), x)
    assert torch.equal(shortcut(x, lambda y: 2 * y), 3 * x)
    assert not list(shortcut.children())


def test_shortcut_names_are_the_papers():
    assert set(SHORTCUTS) == {"ms", "sew", "vs", "iand", "residual"}


@pytest.mark.parametrize("build", [partial(ConvBN, 5, 7, 3), partial(RepConv, 5, 7)], ids=["conv_bn", "rep_conv"])
def test_layers_with_low_bit_weights_merge_what_they_multiply_by(build):
    layer = prepare(trained(build()), bits=3)
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    assert torch.allclose(layer.merge()(x), layer(x), atol=1e-12, rtol=0)  # sums in another order

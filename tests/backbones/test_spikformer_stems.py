"""The two stems of Spikformer: SPS with its position embedding, SCS with its branches."""

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers.backbones.spikformer import SCS, SPS, STEM_BRANCHES, SCSBlock, SPSBlock
from spikeformers.layers import SHORTCUTS
from spikeformers.neurons import Neuron, neuron_builder

TINY = {"dim": 16, "depth": 1, "heads": 2, "num_classes": 5, "patch_size": 4, "steps": 2}
NAMES = {"sps": "spikformer_cifar_4_384", "scs": "spikformer_v2_8_384"}
SEW = SHORTCUTS["sew"]
LIF2 = neuron_builder("lif", steps=2)


def tiny(stem: str, **overrides) -> nn.Module:
    return sf.create_model(NAMES[stem], **(TINY | overrides))


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("stem", "patch_size", "channels", "strides"),
    [
        ("sps", 2, (2, 4, 8, 16), (1, 1, 1, 2)),
        ("sps", 4, (2, 4, 8, 16), (1, 1, 2, 4)),
        ("sps", 8, (2, 4, 8, 16), (1, 2, 4, 8)),
        ("sps", 16, (2, 4, 8, 16), (2, 4, 8, 16)),
        ("scs", 2, (16,), (2,)),
        ("scs", 4, (8, 16), (2, 4)),
        ("scs", 16, (2, 4, 8, 16), (2, 4, 8, 16)),
        ("scs", 32, (1, 2, 4, 8, 16), (2, 4, 8, 16, 32)),
    ],
)
def test_feature_maps_of_every_patch_size_are_as_feature_info_says(stem, patch_size, channels, strides):
    model = tiny(stem, patch_size=patch_size)
    info = model.feature_info
    assert (info.channels, info.strides) == (channels, strides)
    maps = model.forward_features(torch.randn(3, 3, 64, 32))
    for tensor, width, stride in zip(maps, channels, strides, strict=True):
        assert tensor.shape == (6, width, 64 // stride, 32 // stride)
    named = dict(model.named_modules())
    assert all(name in named for name in info.names)


@pytest.mark.parametrize("halvings", [1, 2, 3, 4])
def test_the_last_blocks_of_sps_pool_one_for_each_halving(halvings):
    stem = SPS(3, 16, patch_size=2**halvings, neuron=LIF2, shortcut=SEW)
    assert [isinstance(block.pool, nn.MaxPool2d) for block in stem.blocks] == [n >= 4 - halvings for n in range(4)]


@pytest.mark.parametrize("stem", ["sps", "scs"])
def test_32_pixels_with_patches_of_4_are_8x8_tokens(stem):
    assert tiny(stem).forward_features(torch.randn(1, 3, 32, 32))[-1].shape == (2, 16, 8, 8)


def test_sps_fires_before_it_pools():
    block = SPSBlock(1, 1, pool=True, neuron=LIF2).eval()
    nn.init.dirac_(block.conv.conv.weight)
    block.conv.bn.eps = 0  # the convolution hands its input on, exactly
    x = torch.zeros(2, 1, 2, 2)
    x[0, 0, 0, 0] = x[1, 0, 1, 1] = 1.5  # T=2: one pixel gets 1.5 first, another afterwards
    # Membranes (0.75, 0.375) and (0, 0.75) never reach 1. The pooled current (1.5, 1.5) would: 0.75, then 1.125.
    assert block.neuron(block.pool(block.conv(x))).flatten().tolist() == [0, 1]
    assert block(x).flatten().tolist() == [0, 0]


def test_rpe_is_a_3x3_convolution_whose_spikes_are_added_to_the_last_map():
    stem = SPS(3, 16, patch_size=4, neuron=LIF2, shortcut=SEW).train()
    assert size(stem.rpe) == 9 * 16**2 + 2 * 16
    heard = []
    stem.blocks[-1].register_forward_hook(lambda _, __, out: heard.append(out))
    nn.init.zeros_(stem.rpe.bn.weight)
    images = torch.randn(4, 3, 16, 16)
    for bias, spike in ((0, 0), (10, 1)):
        nn.init.constant_(stem.rpe.bn.bias, bias)
        out = stem(images)[-1]
        assert torch.equal(out, heard[-1] + spike)
    assert set(heard[-1].unique().tolist()) == {0.0, 1.0}


def test_scs_has_no_rpe_and_its_parameters_are_the_papers():
    # Sum over blocks of Conv 2x2, the pair of 3x3 with four times the width, and their batch norms.
    blocks = [(3, 4), (4, 8), (8, 16)]
    expected = sum(4 * before * c + 72 * c**2 + 12 * c for before, c in blocks)
    stem = SCS(3, 16, patch_size=8, neuron=LIF2, shortcut=SEW, branch=STEM_BRANCHES["conv2"])
    assert size(stem) == expected


@pytest.mark.parametrize("branch", STEM_BRANCHES)
def test_every_branch_of_figure_4_keeps_the_shape_and_has_its_layers(branch):
    block = SCSBlock(3, 8, branch=STEM_BRANCHES[branch], neuron=LIF2, shortcut=SEW)
    assert block(torch.randn(4, 3, 12, 8)).shape == (4, 8, 6, 4)
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    kernel = 3 if branch.startswith("conv") else 1
    assert [conv.kernel_size[0] for conv in convolutions] == [2] + [kernel] * int(branch[-1])
    assert sum(isinstance(module, Neuron) for module in block.modules()) == 1 + int(branch[-1])
    tiny("scs", stem_branch=branch)(torch.randn(2, 3, 16, 16)).sum().backward()


@pytest.mark.parametrize(
    ("branch", "weights"), [("conv1", 9), ("conv2", 72), ("conv3", 72), ("linear1", 1), ("linear2", 8), ("linear3", 8)]
)
def test_three_layers_of_a_stem_branch_have_the_weights_of_two(branch, weights):
    layers = STEM_BRANCHES[branch](8, neuron=LIF2)
    found = sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Conv2d))
    assert found == weights * 8**2

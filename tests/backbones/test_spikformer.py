"""Spikformer: sizes to the digit, both stems, what the residual stream carries, and what a network must not break."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import spikeformers as sf
from spikeformers.attention import SSA
from spikeformers.backbones import ANN_TWIN
from spikeformers.backbones.spikformer import SCS, SPS, SCSBlock, SPSBlock, stem_layers
from spikeformers.deploy import fuse, integer
from spikeformers.deploy.counts import quantize_weight
from spikeformers.energy.firing import record
from spikeformers.layers import SHORTCUTS, ConvBN, SpikeElementWiseShortcut, TransformerBlock
from spikeformers.neurons import LIF, Neuron, set_steps, streaming

TINY = {"dim": 16, "depth": 2, "heads": 2, "num_classes": 5, "patch_size": 4, "steps": 2}
NAMES = {"sps": "spikformer_cifar_4_384", "scs": "spikformer_v2_8_384"}
# Both stems, both layouts of q, k, v, both shortcuts.
NETWORKS = [{"stem": "sps"}, {"stem": "scs"}, {"stem": "sps", "shortcut": "iand"}, {"stem": "scs", "shortcut": "iand"}]


def tiny(stem: str = "sps", **overrides) -> nn.Module:
    torch.manual_seed(3)
    return sf.create_model(NAMES[stem], **(TINY | overrides))


def awake(model: nn.Module) -> nn.Module:
    """Batch norms that have seen data, shifted so that neurons fire, as in a trained network; float64, eval."""
    generator = torch.Generator().manual_seed(5)
    for name, module in model.double().named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.uniform_(-0.5, 1.5, generator=generator)
            module.momentum = 0.5
            if name.endswith(("q_conv.bn", "k_conv.bn", "v_conv.bn")):
                module.bias.data += 0.5  # products of three rare spikes would stay below the threshold
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for _ in range(12):  # 2^-12 of the initial statistics is left
            model.train()(images)
    return model.eval()


def always_firing(model: nn.Module) -> nn.Module:
    """Every convolution gives a current of 10 everywhere."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, 10)
    return model.eval()


def pictures(batch: int = 2, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def meta(name: str, **overrides) -> nn.Module:
    with torch.device("meta"):
        return sf.create_model(name, **overrides)


PARAMETERS = {
    "spikformer_8_384": 16_816_024,
    "spikformer_6_512": 23_373_352,
    "spikformer_8_512": 29_689_384,
    "spikformer_10_512": 36_005_416,
    "spikformer_8_768": 66_338_632,
    "spikformer_cifar_4_256": 4_155_178,
    "spikformer_cifar_2_384": 5_765_050,
    "spikformer_cifar_4_384": 9_324_730,
    "spikformer_dvs_2_256": 2_566_666,
    "spikformer_v2_8_384": 29_111_272,
    "spikformer_v2_8_512": 51_545_064,
    "spikformer_v2_12_512": 64_177_128,
    "spikformer_v2_12_768": 143_893_480,
    "spikformer_v2_16_768": 172_278_760,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameter_counts_equal_the_authors_to_the_digit(name, parameters):
    assert size(meta(name)) == parameters


@pytest.mark.parametrize(("name", "tensors"), [("4_256", 4_182_404), ("2_384", 5_802_772), ("4_384", 9_365_524)])
def test_parameter_counts_for_100_classes_equal_the_authors_without_their_unused_norms(name, tensors):
    model = meta(f"spikformer_cifar_{name}", num_classes=100)
    unused = 4 * model.config.dim * model.config.depth  # two layer norms a block, which no forward pass of theirs reads
    assert size(model) == tensors - unused


def test_the_catalogue_has_the_papers_sizes_and_time_steps():
    steps = {name: meta(name).steps for name in sf.list_models("spikformer*")}
    assert steps.keys() == PARAMETERS.keys()
    assert all(steps[name] == {"v2": 1, "dvs": 16}.get(name.split("_")[1], 4) for name in steps)


def test_stems_branches_attentions_and_shortcuts_of_ones_own_are_passed_in():
    class Patches(nn.Module):
        """A stem in one layer."""

        def __init__(self, in_channels, dim, *, patch_size, neuron, shortcut) -> None:
            super().__init__()
            self.channels, self.strides = (dim,), (patch_size,)
            self.conv, self.neuron = ConvBN(in_channels, dim, patch_size, stride=patch_size), neuron()

        def forward(self, x):
            return [self.neuron(self.conv(x))]

    class Doubling(SpikeElementWiseShortcut):
        """A shortcut that no paper has."""

    images = torch.randn(2, 3, 16, 16)
    model = tiny(stem_branch=partial(stem_layers, layers=2, kernel=5), stem="scs")
    assert model.stem.blocks[0].branch.conv1.conv.kernel_size == (5, 5)
    model(images).sum().backward()
    for tokens in ("linear", "conv"):  # a mixer without biases has none to initialise
        model = sf.create_model(
            NAMES["sps"],
            **(TINY | {"patch_size": 5, "tokens": tokens}),
            stem=Patches,
            attention=lambda dim, *, neuron: ConvBN(dim, dim, 1),
            shortcut=Doubling,
        )
        assert isinstance(model.stem, Patches)
        assert model.feature_info.names == ("blocks",)
        assert isinstance(model.blocks[0].attn, ConvBN)
        assert isinstance(model.blocks[1].mlp_shortcut, Doubling)
        model(images).sum().backward()


# What the stream carries

BETWEEN_LAYERS = (SPSBlock, SCSBlock, SPS, SCS, TransformerBlock, *SHORTCUTS.values())


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """What every neuron, and every module that another layer reads, gave in the last forward pass."""
    heard = {}

    def keep(name: str):
        return lambda _, __, out: heard.__setitem__(name, out[-1] if isinstance(out, list) else out)

    kinds = (Neuron, *BETWEEN_LAYERS)
    hooks = [module.register_forward_hook(keep(n)) for n, module in model.named_modules() if isinstance(module, kinds)]
    yield heard
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("stem", ["sps", "scs"])
@pytest.mark.parametrize("training", [True, False])
def test_iand_keeps_every_tensor_between_layers_binary_and_sew_does_not(stem, training):
    values = {}
    for shortcut in ("iand", "sew"):
        model = awake(tiny(stem, shortcut=shortcut, steps=4)).train(training)
        with listening(model) as heard:
            model(pictures(8))
        neurons = [name for name, module in model.named_modules() if isinstance(module, Neuron)]
        assert all(set(heard[name].unique().tolist()) <= {0.0, 1.0} for name in neurons)
        assert sum(heard[name].any().item() for name in neurons) > len(neurons) / 2
        values[shortcut] = {name: set(tensor.unique().tolist()) for name, tensor in heard.items()}
    assert all(found <= {0.0, 1.0} for found in values["iand"].values())
    assert values["iand"]["blocks.1"] == {0.0, 1.0}
    assert {0.0, 1.0, 2.0} <= values["sew"]["blocks.1"]
    assert {0.0, 1.0, 2.0} <= values["sew"]["stem"]


def test_iand_needs_binary_neurons():
    for neuron, levels in (("i_lif", 4), ("ni_lif", 2), ("ie_lif", 4)):
        with pytest.raises(ValueError, match=f"binary spikes .*levels={levels}"):
            tiny(shortcut="iand", neuron=neuron, levels=levels)
    with pytest.raises(ValueError, match="binary spikes"):
        tiny(shortcut="iand", neuron="gelu")
    tiny(shortcut="iand", neuron="i_lif", levels=1)(torch.randn(2, 3, 16, 16)).sum().backward()


@pytest.mark.parametrize("stem", ["sps", "scs"])
def test_block_l_of_sew_gets_at_most_2_plus_2l_spikes_and_reaches_it(stem):
    model = tiny(stem, depth=3)
    images = torch.randn(4, 3, 16, 16)
    for network, reached in ((awake(copy.deepcopy(model)).float(), False), (always_firing(model), True)):
        with listening(network) as heard:
            network(images)
        # The last MLP of L blocks reads at most 2L + 1.
        streams = ["stem", *(name for i in range(3) for name in (f"blocks.{i}.attn_shortcut", f"blocks.{i}"))]
        for most, name in enumerate(streams, start=2):
            assert heard[name].max() <= most
            assert not reached or (heard[name] == most).all(), name


# What a network must not break


@pytest.mark.parametrize("overrides", [*NETWORKS, {"neuron": "i_lif"}, {"attention": "relu"}], ids=str)
def test_spikes_and_logits_do_not_depend_on_who_shares_the_batch(overrides):
    model, images = awake(tiny(**overrides)), pictures(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad(), record(model) as spikes:
        together, together_spikes = model(images), dict(spikes)
        shuffled, shuffled_spikes = model(images[order]), dict(spikes)
        alone, alone_spikes = [], []
        for image in images:
            alone.append(model(image[None]))
            alone_spikes.append(dict(spikes))
    assert together.std(0).min() > 1e-4  # the network tells the images apart, so equality below says something
    for name, counts in together_spikes.items():
        by_image = counts.unflatten(0, (2, 5))  # time-major: [T, B, ...]
        assert torch.equal(by_image[:, order], shuffled_spikes[name].unflatten(0, (2, 5))), name
        assert torch.equal(by_image, torch.stack([spikes[name] for spikes in alone_spikes], 1)), name
    # Spikes are equal in float64; the rest is the rounding of the last linear layer.
    assert torch.allclose(together[order], shuffled, atol=1e-12, rtol=0)
    assert torch.allclose(together, torch.cat(alone), atol=1e-12, rtol=0)


@pytest.mark.parametrize("overrides", [*NETWORKS, {"attention": "softmax"}], ids=str)
def test_streaming_the_frames_equals_the_whole_clip(overrides):
    model, clip = awake(tiny(**overrides, steps=4)), torch.stack([pictures() for _ in range(4)])
    with torch.no_grad():
        whole, reversed_clip = model(clip), model(clip.flip(0))
        with streaming(model):
            for frame in clip:
                logits = model(frame)
    assert torch.allclose(logits, whole, atol=1e-12, rtol=0)  # spikes equal; the head sums in another order
    assert not torch.allclose(reversed_clip, whole, atol=1e-6)


def test_changing_steps_changes_the_network_as_building_it_so():
    model, longer, images = awake(tiny(steps=1)), tiny(steps=3).double().eval(), pictures()
    longer.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(set_steps(model, 3)(images), longer(images))
    assert model.steps == 3


@pytest.mark.parametrize("overrides", NETWORKS[::3], ids=str)
def test_compiles_to_one_graph_with_equal_logits_and_gradients(overrides, unchecked):
    eager, images = awake(tiny(**overrides, depth=1)).train(), pictures()
    twin = copy.deepcopy(eager)
    logits = eager(images)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")(images)
    assert torch.allclose(compiled, logits, atol=1e-12, rtol=0)
    logits.square().sum().backward()
    compiled.square().sum().backward()
    for (name, ours), theirs in zip(eager.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-10), name  # sums of float64 in another order


def test_a_pass_leaves_no_trace_and_copies_are_equal():
    model, images = awake(tiny()), pictures()
    with torch.no_grad():
        first = model(images)
        model(images + 1)
        assert torch.equal(model(images), first)
        assert torch.equal(copy.deepcopy(model)(images), first)


@pytest.mark.parametrize("stem", ["sps", "scs"])
def test_a_saved_model_comes_back_with_equal_logits_and_options(stem, tmp_path):
    model = awake(tiny(stem, attention="ssa_learnable", shortcut="iand")).float()
    nn.init.constant_(model.blocks[1].attn.scale, 0.5)
    set_steps(model, 3)
    model.save_pretrained(tmp_path)
    loaded, images = sf.from_pretrained(tmp_path), torch.randn(2, 3, 16, 16)
    assert (loaded.steps, loaded.config.shortcut) == (3, "iand")
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    "overrides",
    [
        *({"neuron": neuron} for neuron in ("lif", "i_lif", "ie_lif", "ni_lif")),
        *({"attention": name} for name in ("ssa_learnable", "vsa", "vsa_float_v", "identity", "relu", "leaky_relu")),
        *NETWORKS[1:],
        ANN_TWIN,
        ANN_TWIN | {"stem": "scs"},
    ],
    ids=str,
)
def test_every_neuron_attention_and_shortcut_trains(overrides):
    model = tiny(**overrides).train()
    model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.head.weight.grad.any()
    assert next(model.stem.parameters()).grad.any()


# Options


def test_the_ann_twin_has_the_same_parameters_and_no_neuron():
    spiking, twin = (meta(NAMES["sps"], **overrides) for overrides in ({}, ANN_TWIN))
    assert size(spiking) == size(twin) == 9_324_730
    assert spiking.state_dict().keys() == twin.state_dict().keys()
    assert not any(isinstance(module, Neuron) for module in twin.modules())
    assert any(isinstance(module, Neuron) for module in spiking.modules())


def test_a_learnable_scale_is_one_parameter_a_layer_and_starts_as_ssa():
    fixed, learnable = awake(tiny(scale=0.25)), awake(tiny(scale=0.25, attention="ssa_learnable"))
    missing = learnable.load_state_dict(fixed.state_dict(), strict=False).missing_keys
    assert missing == ["blocks.0.attn.scale", "blocks.1.attn.scale"]
    assert size(learnable) == size(fixed) + 2
    images = pictures()
    logits = learnable(images)
    assert torch.equal(logits, fixed(images))
    logits.square().sum().backward()
    assert all(block.attn.scale.grad.item() != 0 for block in learnable.blocks)


def test_the_linear_layout_has_biases_of_q_k_v_and_small_weights_and_the_other_neither():
    linear, conv = tiny(tokens="linear", dim=32), tiny(tokens="conv", dim=32)
    for operand in ("q", "k", "v"):
        assert not linear.blocks[0].attn.get_submodule(f"{operand}_conv").conv.bias.any()
        assert conv.blocks[0].attn.get_submodule(f"{operand}_conv").conv.bias is None
    # Deviations, found from 1024 weights each: normal, 0.02; torch's own, uniform up to 1 / sqrt(32), has 1 / sqrt(96).
    assert linear.blocks[0].attn.q_conv.conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert conv.blocks[0].attn.q_conv.conv.weight.std().item() == pytest.approx(96**-0.5, rel=0.1)


def test_scale_and_heads_reach_the_attention_and_a_neuron_of_ones_own_every_place():
    model = tiny(scale=0.25, heads=2, neuron=lambda *, steps, threshold=1.0: LIF(steps=steps, tau=1.5))
    attention = model.blocks[1].attn
    assert isinstance(attention, SSA)
    assert (attention.scale, attention.heads) == (0.25, 2)
    assert {module.tau for module in model.modules() if isinstance(module, Neuron)} == {1.5}


def test_layers_are_the_stem_the_blocks_and_the_head_as_masked_pretraining_numbers_them():
    for stem in ("sps", "scs"):
        model = tiny(stem, depth=3)
        ids = {"stem": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "head": 4}
        wanted = {name: next(i for start, i in ids.items() if name.startswith(start)) for name in model.state_dict()}
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        assert layers == {name: wanted[name] for name, _ in model.named_parameters()}
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7):
            for parameter in group["params"]:
                assert group["lr_scale"] == 0.7 ** (4 - wanted[names[parameter]])
                assert group["weight_decay"] == (0.05 if parameter.ndim > 1 else 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"patch_size": 5}, "power of two from 2 to 16, got 5"),
        ({"patch_size": 1}, "power of two from 2 to 16, got 1"),
        ({"patch_size": 32}, "power of two from 2 to 16, got 32"),
        ({"patch_size": 5, "stem": "scs"}, "power of two from 2 to 256, got 5"),
        ({"patch_size": 0}, "power of two from 2 to 16, got 0"),
        ({"patch_size": -4}, "power of two from 2 to 16, got -4"),
        ({"dim": 12}, "multiple of 8, got 12"),
        ({"dim": 12, "patch_size": 16, "stem": "scs"}, "multiple of 8, got 12"),
        ({"heads": 3}, "multiple of heads, got dim=16, heads=3"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"depth": -1}, "depth must not be negative, got -1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"scale": 0.0}, "scale must be positive, got 0"),
        ({"neuron": "liff"}, "'liff'; closest: lif"),
        ({"stem": "spss"}, "stem: unknown choice 'spss'; closest: sps"),
        ({"stem_branch": "conv4", "stem": "scs"}, "stem_branch: unknown choice 'conv4'; closest: conv"),
        ({"attention": "sssa"}, "attention: unknown choice 'sssa'; closest: ssa"),
        ({"shortcut": "iandd"}, "shortcut: unknown choice 'iandd'; closest: iand"),
        ({"tokens": "linears"}, "tokens: unknown choice 'linears'; closest: linear"),
    ],
)
def test_impossible_networks_are_refused_with_value_and_cure(overrides, message):
    with pytest.raises(ValueError, match=message):
        sf.create_model(NAMES["sps"], **(TINY | overrides))


def test_wrong_channels_of_an_image_name_the_cure():
    with pytest.raises(ValueError, match="in_channels=2"):
        tiny()(torch.zeros(1, 2, 16, 16))


# Deployment


@pytest.mark.parametrize(
    "overrides", [*NETWORKS, {"attention": "relu"}, {"stem": "scs", "stem_branch": "conv3"}], ids=str
)
def test_a_fused_network_equals_the_original_in_every_spike_and_logit(overrides):
    model, images = awake(tiny(**overrides)), pictures()
    fused = fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad(), record(model) as wanted, record(fused) as got:
        # Rounding of float64 only: merging changes the order of sums.
        assert torch.allclose(fused(images), model(images), atol=1e-12, rtol=0)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert all(counts.any() for counts in wanted.values())


@pytest.mark.parametrize("overrides", [*NETWORKS, {"attention": "ssa_learnable"}, {"attention": "relu"}], ids=str)
def test_apart_from_weight_rounding_the_integer_engine_is_the_float_network(overrides):
    model, images = awake(tiny(**overrides, dim=32)), pictures(16)
    spike_fed = integer(model.float(), images.float()).spike_fed
    rounded = fuse(model.double())
    for name, module in rounded.named_modules():
        if name in spike_fed:
            units, step = quantize_weight(module.weight.detach())
            module.weight.data.copy_(units * step.view(-1, 1, 1, 1))
    found = integer(rounded, images).compare(rounded, images)
    assert found.same == found.total == 16
    # float32 membranes against float64: a spike may flip where a current lies within 1e-6 of a threshold.
    assert max(found.flip_rates.values()) <= 0.001
    # These read one neuron, not a sum or a pool of several.
    assert {"blocks.0.attn.proj", "blocks.0.mlp.conv2"} <= set(spike_fed)

"""Meta-SpikeFormer: sizes to the digit, Table 5 as switches, and the invariances a network must not break."""

import copy

import pytest
import torch
from timm.models import group_parameters
from torch import nn

from spikeformers.attention import SDSA3
from spikeformers.layers import ConvBN, VanillaShortcut
from spikeformers.neurons import LIF, set_steps, streaming
from spikeformers.zoo import create_model

TINY = {"dims": (8, 16, 16, 24), "num_classes": 5, "blocks": (1, 1, 1, 1, 1), "heads": 4}


def tiny(**overrides) -> nn.Module:
    torch.manual_seed(3)
    return create_model("meta_spikeformer_15m", **(TINY | overrides))


def awake(model: nn.Module) -> nn.Module:
    """Batch norms shifted so that neurons fire, as in a trained network; float64, eval."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.uniform_(-0.5, 1.5, generator=generator)
            module.running_var.uniform_(0.1, 0.5, generator=generator)
    return model.double().eval()


def size(**overrides) -> int:
    with torch.device("meta"):
        model = create_model("meta_spikeformer_31m", **overrides)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "with_kd"),
    [
        ("meta_spikeformer_15m", 15_112_208, 15_473_208),
        ("meta_spikeformer_31m", 31_333_864, 31_814_864),
        ("meta_spikeformer_55m", 55_350_248, 55_991_248),
    ],
)
def test_parameter_counts_equal_the_authors_to_the_digit(name, parameters, with_kd):
    with torch.device("meta"):
        plain, distilled = create_model(name), create_model(name, distillation=True)
    assert sum(p.numel() for p in plain.parameters()) == parameters
    assert sum(p.numel() for p in distilled.parameters()) == with_kd


@pytest.mark.parametrize(
    ("overrides", "millions"),
    [
        ({"conv_token_mixer": "none"}, 30.938),
        ({"conv_channel_mixer": "mlp"}, 25.881),
        ({"single_scale_stem": True}, 31.830),
        ({"qkv": "linear"}, 27.170),
        ({"proj": "linear"}, 29.946),
        ({"attention": "sdsa1"}, 31.334),
        ({"attention": "sdsa2"}, 28.594),
        ({"attention": "sdsa4"}, 31.334),
        ({"pyramid": False}, 26.909),
        ({"kinds": ("transformer",) * 5}, 26.198),
        ({"attention": "sep_conv"}, 26.095),
        ({"shortcut": "sew"}, 31.334),
        ({"shortcut": "vs"}, 31.334),
    ],
)
def test_ablations_of_table_5_have_their_parameters(overrides, millions):
    assert size(**overrides) / 1e6 == pytest.approx(millions, abs=5e-4)


ABLATIONS = [
    {"conv_token_mixer": "none"},
    {"conv_token_mixer": "identity"},
    {"conv_token_mixer": "pooling", "attention": "pooling"},
    {"conv_channel_mixer": "mlp"},
    {"single_scale_stem": True},
    {"qkv": "linear", "proj": "linear"},
    {"attention": "sdsa1"},
    {"attention": "sdsa2"},
    {"attention": "sdsa4"},
    {"attention": "sep_conv"},
    {"pyramid": False},
    {"kinds": ("transformer",) * 5},
    {"shortcut": "sew"},
    {"shortcut": "vs"},
    {"head_spikes": False},
    {"blocks": (0, 0, 0, 1, 1)},
    {"blocks": (1, 1, 0, 1, 1)},
]


@pytest.mark.parametrize("overrides", ABLATIONS, ids=str)
def test_every_ablation_trains(overrides):
    model = tiny(neuron="i_lif", **overrides)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("neuron", ["lif", "i_lif", "ie_lif", "ni_lif"])
def test_every_neuron_fits_the_network(neuron):
    model = tiny(neuron=neuron, levels=4, steps=2)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_a_neuron_builder_of_ones_own_fits():
    model = tiny(neuron=lambda *, steps, threshold=1.0: LIF(steps=steps, tau=1.5, threshold=threshold), steps=2)
    assert model.head_neuron.tau == 1.5


def test_feature_maps_are_as_feature_info_says():
    model = tiny(steps=2)
    maps = model.forward_features(torch.randn(3, 3, 64, 32))
    info = model.feature_info
    assert info.channels == (4, 8, 16, 16, 24)
    assert info.strides == (2, 4, 8, 16, 16)
    for tensor, channels, stride in zip(maps, info.channels, info.strides, strict=True):
        assert tensor.shape == (6, channels, 64 // stride, 32 // stride)
    assert tiny(single_scale_stem=True).feature_info.strides == (4, 8, 16, 16)
    assert tiny(pyramid=False).feature_info.channels == (4, 8, 16, 16, 16)


@pytest.mark.parametrize("neuron", ["lif", "i_lif"])
def test_logits_do_not_depend_on_who_shares_the_batch(neuron):
    model, images = awake(tiny(neuron=neuron, steps=2)), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        shuffled = model(images.flip(0)).flip(0)
    assert together.std(0).min() > 1e-3  # the network tells the images apart, so equality below says something
    # Spikes are equal in float64; the rest is the rounding of the last linear layer.
    assert torch.allclose(together, alone, atol=1e-12, rtol=0)
    assert torch.allclose(together, shuffled, atol=1e-12, rtol=0)


def test_a_clip_is_time_major_and_its_order_matters():
    model, clip = awake(tiny(steps=3)), torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        whole, reversed_clip = model(clip), model(clip.flip(0))
        second_alone = model(clip[:, 1:])
        repeated = model(clip[0])
        as_clip = model(clip[:1].expand(3, -1, -1, -1, -1))
    assert torch.allclose(whole[1:], second_alone, atol=1e-12, rtol=0)
    assert not torch.allclose(whole, reversed_clip, atol=1e-6)
    assert torch.equal(repeated, as_clip)


@pytest.mark.parametrize("overrides", [{}, {"neuron": "ni_lif"}, {"distillation": True}, {"shortcut": "sew"}], ids=str)
def test_streaming_the_frames_equals_the_whole_clip(overrides):
    model, clip = awake(tiny(steps=4, **overrides)), torch.randn(4, 2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = model(clip)
        with streaming(model):
            for frame in clip:
                logits = model(frame)
    assert torch.allclose(logits, whole, atol=1e-12, rtol=0)


def test_changing_steps_changes_the_network_as_building_it_so():
    model = awake(tiny(steps=1))
    longer = awake(tiny(steps=3))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(set_steps(model, 3)(images), longer(images))
    assert model.steps == 3


def test_a_pass_leaves_no_trace_and_copies_are_equal():
    model, images = awake(tiny(steps=2)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        first = model(images)
        model(images + 1)
        assert torch.equal(model(images), first)
        assert torch.equal(copy.deepcopy(model)(images), first)


COMPILABLE = {"blocks": (0, 1, 0, 1, 0), "dims": (4, 8, 8, 8), "heads": 2}


@pytest.mark.parametrize("neuron", ["lif", "ie_lif"])
def test_compiles_to_one_graph_and_exports_with_equal_logits(neuron, unchecked):
    model = awake(tiny(neuron=neuron, steps=2, **COMPILABLE))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        exported = torch.export.export(model, (images,)).module()(images)
    assert torch.allclose(compiled, logits, atol=1e-12, rtol=0)
    assert torch.allclose(exported, logits, atol=1e-12, rtol=0)


def test_a_compiled_training_step_has_equal_gradients_and_statistics(unchecked):
    eager = awake(tiny(neuron="i_lif", **COMPILABLE)).train()
    twin = copy.deepcopy(eager)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    eager(images).sum().backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(images).sum().backward()
    for (name, ours), theirs in zip(eager.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-10), name
    for ours, theirs in zip(eager.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_bfloat16_autocast_trains_with_spikes_near_those_of_float32():
    model, images = tiny(neuron="i_lif").train(), torch.randn(4, 3, 32, 32)
    rates = []
    for enabled in (False, True):
        spikes = []
        hook = model.stage2.block0.channel_conv.neuron.register_forward_hook(lambda _, __, out, s=spikes: s.append(out))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(images).sum().backward()
        hook.remove()
        rates.append(spikes[0].float().mean().item())
    assert rates[1] == pytest.approx(rates[0], rel=0.1)


def test_distillation_gives_a_pair_in_training_and_the_mean_in_evaluation():
    model = tiny(distillation=True)
    images = torch.randn(2, 3, 32, 32)
    logits, logits_kd = model(images)
    assert logits.shape == logits_kd.shape == (2, 5)
    model.eval()
    features = model.head_neuron(model.forward_features(images)[-1].mean((2, 3)))
    assert torch.allclose(model(images), (model.head(features) + model.head_kd(features)) / 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dims": (7, 16, 16, 24)}, "dims"),
        ({"heads": 3}, "multiple of heads"),
        ({"attention": "sdsa5"}, "closest: sdsa"),
        ({"shortcut": "mss"}, "closest: ms"),
        ({"neuron": "liff"}, "closest: lif"),
        ({"blocks": (1, 1)}, "blocks"),
        ({"steps": 0}, "steps"),
    ],
)
def test_impossible_networks_are_refused_with_value_and_cure(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


def test_wrong_channels_of_an_image_name_the_cure():
    with pytest.raises(ValueError, match="in_channels=1"):
        tiny()(torch.zeros(1, 1, 32, 32))


def test_the_old_official_head_reads_means_and_the_distilled_one_spikes():
    model = awake(tiny(distillation=True, head_spikes=False, neuron="i_lif"))
    seen = {}
    model.head.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("head", inputs[0]))
    model.head_kd.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("head_kd", inputs[0]))
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert torch.equal(seen["head_kd"], seen["head_kd"].round())
    assert not torch.equal(seen["head"], seen["head"].round())


def test_mixers_and_shortcuts_of_ones_own_are_passed_in():
    class Doubling(VanillaShortcut):
        """A shortcut that no paper has."""

    model = tiny(
        neuron="i_lif",
        conv_token_mixer="sdsa3",
        conv_channel_mixer="identity",
        attention=lambda dim, *, neuron: ConvBN(dim, dim, 3),
        channel_mixer=lambda dim, *, neuron: ConvBN(dim, dim, 1),
        shortcut=Doubling,
    )
    assert isinstance(model.stage1a.block0.sep_conv, SDSA3)
    assert isinstance(model.stage3.block0.mlp, ConvBN)
    assert isinstance(model.stage3.block0.attn_shortcut, Doubling)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_the_membrane_stream_is_float32_under_bfloat16_autocast():
    model = tiny(neuron="i_lif").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model.forward_features(torch.randn(2, 3, 32, 32))
    assert {tensor.dtype for tensor in maps} == {torch.float32}


@pytest.mark.parametrize("stem", [False, True])
def test_layers_are_blocks_with_the_down_sampling_before_them_and_levels_if_coarse(stem):
    model = tiny(blocks=(0, 2, 1, 2, 1), single_scale_stem=stem, distillation=True)
    layers = group_parameters(model, model.group_matcher(coarse=False))
    found = [sorted({".".join(name.split(".")[:2]) for name in names}) for names in layers.values()]
    first = [["stage1.block0", "stage1.down"], ["stage1.block1"]]
    if not stem:
        first = [["stage1a.down"], ["stage1b.block0", "stage1b.down"], ["stage1b.block1"]]
    rest = [["stage2.block0", "stage2.down"], ["stage3.block0", "stage3.down"], ["stage3.block1"]]
    heads = ["head.bias", "head.weight", "head_kd.bias", "head_kd.weight"]
    assert found == [*first, *rest, ["stage4.block0", "stage4.down"], heads]
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert [{name.split(".")[0] for name in names} for names in coarse.values()] == [
        *({name} for name in model.level_names),
        {"head", "head_kd"},
    ]

"""The integer engine end to end: against the float network, against its own readable path, in every batch size."""

import copy
import pickle

import pytest
import torch
from torch import nn

from spikeformers.attention import SCALE, SDSA3
from spikeformers.deploy import fuse, integer, runtime
from spikeformers.deploy.counts import CountNeuron, quantize_weight
from spikeformers.deploy.form import integer_form
from spikeformers.deploy.joint import JointAttention
from spikeformers.energy.firing import record
from spikeformers.neurons import set_steps, streaming

VARIANTS = [
    {"neuron": "lif", "steps": 4},
    {"neuron": "i_lif"},
    {"neuron": "ie_lif"},
    {"neuron": "ni_lif"},
    {"neuron": "ni_lif", "levels": 3},
    {"neuron": "i_lif", "steps": 2},
    {"attention": "sdsa1"},
    {"attention": "sdsa2"},
    {"attention": "sdsa4", "neuron": "ni_lif"},
    {"shortcut": "sew"},
    {"shortcut": "vs"},
    {"qkv": "linear", "proj": "linear", "conv_channel_mixer": "mlp"},
    {"conv_token_mixer": "pooling"},
    {"distillation": True},
    {"head_spikes": False},
]


def with_integer_weights(model: nn.Module, engine: nn.Module) -> nn.Module:
    """The network in its integer form, whose spike-fed weights lie on the engine's 8-bit grid already."""
    exact = integer_form(model)
    for name, module in exact.named_modules():
        if name in engine.spike_fed:
            units, step = quantize_weight(module.weight.detach())
            module.weight.data.copy_(units * step.view(-1, *[1] * (units.ndim - 1)))
    return exact


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_apart_from_weight_rounding_the_engine_is_the_float_network(small, images, variant):
    model = small(**variant)
    engine = integer(model, images)
    exact = with_integer_weights(model, engine)
    twin = integer(exact, images)
    for name, weight in engine.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], weight)
    with torch.no_grad():
        wanted = exact(images.double())
    # float32 epilogues and membranes against float64: a spike may flip where a current lies within 1e-6 of a threshold.
    found = twin.compare(exact, images.double())
    assert max(found.flip_rates.values()) <= 0.01
    assert (engine(images) - wanted).abs().max() <= 2e-2 * wanted.std()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_fast_path_equals_the_readable_path_and_no_result_depends_on_the_batch(small, images, variant):
    model = small(**variant)
    fast, readable = integer(model, images), integer(model, images, fast=False)
    logits = fast(images)
    assert torch.equal(logits, readable(images))
    assert torch.equal(logits[2:3], fast(images[2:3]))
    assert torch.equal(logits[:3], fast(images[:3]))
    assert torch.equal(logits[3:], readable(images[3:]))


def test_layers_take_the_path_that_their_input_allows(small, images):
    engine = integer(small("i_lif"), images)
    layers = {layer.name: layer for layer in engine.report().layers}
    expected = {
        "stage1a.down.conv": ("float", 32, False),
        "stage1a.block0.sep_conv.pw1": ("fused", 8, True),
        "stage1a.block0.sep_conv.dw": ("int8", 8, True),
        "stage1a.block0.sep_conv.pw2": ("float", 32, False),
        "stage2.block0.channel_conv.conv1": ("fused", 8, True),
        "stage2.block0.channel_conv.conv2": ("int8", 8, True),
        "stage3.block0.attn.qkv_conv.pw1": ("int8", 8, True),
        "stage3.block0.attn.qkv_conv.dw": ("float", 32, False),
        "stage3.block0.attn.qkv_conv.pw2": ("float", 32, False),
        "stage3.block0.attn.proj.pw1": ("int8", 8, True),
        "stage3.block0.mlp.conv1": ("fused", 8, True),
        "head": ("int8", 8, True),
    }
    for name, wanted in expected.items():
        assert (layers[name].path, layers[name].bits, layers[name].spike_fed) == wanted, name
    assert sum(layer.path == "float" for layer in layers.values()) == 12  # stem, 3 x pw2, 4 x (dw, pw2)
    report = engine.report()
    assert report.weight_bytes == sum(tensor.numel() * tensor.element_size() for tensor in engine.state_dict().values())
    assert "stage3.block0.attn.qkv_conv.pw1" in report.table()
    assert report.to_json()["weight_bytes"] == report.weight_bytes


def test_layers_that_could_saturate_are_named_in_one_line_of_the_log(small, images, caplog):
    integer(small("i_lif", levels=130), images)
    assert [record.message.split(";")[0].split(",")[0] for record in caplog.records] == [
        "25 of 25 integer layers take the readable path"
    ]
    caplog.clear()
    integer(small("i_lif", levels=129), images)
    assert not caplog.records


def test_a_neuron_with_a_membrane_is_never_fused(small, images):
    assert not any(layer.path == "fused" for layer in integer(small("lif", 4), images).report().layers)


def test_attention_multiplies_whole_counts(small, images):
    model = small("ni_lif", levels=3)  # thirds are no float32 numbers
    engine = integer(model, images)
    joint = [module for module in engine.modules() if isinstance(module, JointAttention)]
    assert len(joint) == 2
    assert all(attention.scale == pytest.approx(SCALE / 27) and attention.qkv.unit == 1.0 for attention in joint)
    assert all(module.scale == 0.125 for module in model.modules() if isinstance(module, SDSA3))


def test_attention_with_one_projection_is_attention_with_three(small, images, monkeypatch):
    models = [
        small(neuron, steps, qkv=qkv) for neuron, steps in (("ie_lif", 1), ("lif", 2)) for qkv in ("rep_conv", "linear")
    ]
    joint = [integer(model, images)(images) for model in models]
    monkeypatch.setattr(runtime, "joined", lambda attention: None)
    for model, logits in zip(models, joint, strict=True):
        engine = integer(model, images)
        assert not any(isinstance(module, JointAttention) for module in engine.modules())
        torch.testing.assert_close(engine(images), logits, rtol=0, atol=1e-6)  # grouped convolutions may add otherwise


def test_attention_sums_beyond_float32_are_taken_in_float64(small, images):
    engine = integer(small("i_lif", levels=128), images)
    joint = [module for module in engine.modules() if isinstance(module, JointAttention)]
    assert [attention.qkv.dtype for attention in joint] == [torch.float64] * 2


def test_a_fused_model_gives_an_engine_whose_rep_convs_are_dense_and_read_spikes(small, images):
    layers = {layer.name: layer for layer in integer(fuse(small("ie_lif")), images).report().layers}
    assert layers["stage3.block0.attn.qkv_conv"].path == "fused"
    assert sum(layer.path == "float" for layer in layers.values()) == 4  # stem, 3 x pw2


def test_a_compiled_model_gives_the_engine_of_the_model_inside(small, images):
    model = small()
    compiled = torch.compile(model, backend="eager")
    engine = integer(compiled, images)
    assert torch.equal(engine(images), integer(model, images)(images))
    assert engine.compare(compiled, images).flip_rates == engine.compare(model, images).flip_rates


def test_building_an_engine_leaves_the_model_alone(small, images):
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    integer(model, images)
    assert model.training
    assert not any(isinstance(module, CountNeuron) for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_engines_copy_pickle_and_build_under_inference_mode(small, images):
    engine = integer(small(), images)
    logits = engine(images)
    assert torch.equal(copy.deepcopy(engine)(images), logits)
    assert torch.equal(pickle.loads(pickle.dumps(engine))(images), logits)
    with torch.inference_mode():
        again = integer(small(), images)
        again(images)
    assert not any(tensor.is_inference() for tensor in again.state_dict().values())


def test_an_engine_takes_clips_follows_set_steps_and_streams(small):
    model, clip = small("lif", 3), torch.randn(3, 2, 3, 32, 32)
    engine = integer(model, clip)
    logits = engine(clip)
    with streaming(engine):
        for frame in clip:
            streamed = engine(frame)
    assert torch.equal(streamed, logits)
    set_steps(engine, 2)
    assert engine(clip[:2]).shape == (2, 5)


def test_compare_counts_what_changed(small, images):
    model = small("i_lif")
    engine = integer(model, images)
    whole = engine.compare(model, images)
    labels = torch.zeros(5)
    loader = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    pieces = engine.compare(model, loader)
    assert (whole.same, whole.total, whole.different) == (pieces.same, pieces.total, pieces.different)
    assert whole.same + len(whole.different) == whole.total == 5
    with record(model) as spikes:
        model(images)
    assert whole.flip_rates.keys() == spikes.keys()
    assert set(whole.to_json()) >= {"same", "total", "different"}
    turned = copy.deepcopy(model)
    turned.head.weight.data.neg_()
    turned.head.bias.data.neg_()
    with torch.no_grad():
        differs = turned(images).argmax(1) != engine(images).argmax(1)
    assert list(engine.compare(turned, loader).different) == differs.nonzero().flatten().tolist()


def test_compare_refuses_train_mode_and_nothing_to_compare(small, images):
    model = small()
    engine = integer(model, images)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        engine.compare(model.train(), images)
    with pytest.raises(ValueError, match="no image"):
        engine.compare(model.eval(), [])


def test_networks_that_cannot_be_converted_are_refused(small, images):
    with pytest.raises(ValueError, match="reads spikes"):
        integer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images)
    with pytest.raises(ValueError, match="at most 255, got 300"):
        integer(small("i_lif", levels=300), images)

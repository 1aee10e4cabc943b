"""The integer form equals the network it came from; the engine then fires by its thresholds, exactly."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import spikeformers as sf
from spikeformers.data.images import ImageData, load_split
from spikeformers.deploy import integer
from spikeformers.deploy.form import Factors, integer_form
from spikeformers.energy.firing import record
from spikeformers.layers import LayerScaleBlock
from spikeformers.quantize import PackedLayer

SIZES = {"dims": (8, 16, 24, 32), "num_classes": 5, "blocks": (1, 1, 1, 1, 1)}


def low_bit(**overrides) -> nn.Module:
    """A small QSD-Transformer whose norms have seen some noise."""
    model = sf.create_model("qsd_transformer_t", **SIZES | {"layer_scale": 1.0} | overrides)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, -1.5, 1.5)  # scales of either sign
            nn.init.normal_(module.bias, 0.3, 0.5)
        if name.endswith(("attn_scale", "mlp_scale")):
            nn.init.normal_(module.weight)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


def forms(model: nn.Module) -> dict[str, nn.Module]:
    packed = sf.quantize.convert(copy.deepcopy(model))
    return {"trained": model, "converted": packed, "folded": sf.quantize.fold(copy.deepcopy(packed))}


@pytest.mark.parametrize(
    "overrides", [{}, {"bits": 0}, {"qkv": "rep_conv_mprf"}, {"neuron": "i_lif", "attention": "sdsa4"}]
)
def test_the_integer_form_gives_every_spike_of_the_network_in_float64(overrides, images):
    model = low_bit(**overrides).double()
    form, images = integer_form(model), images.double()
    assert not any(isinstance(each, nn.BatchNorm2d | LayerScaleBlock) for each in form.modules())
    assert isinstance(form.stage3.block0.attn.q_conv, Factors)
    with record(model) as wanted, torch.no_grad():
        logits = model(images)
    with record(form) as found, torch.no_grad():
        torch.testing.assert_close(form(images), logits, rtol=0, atol=1e-10)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert sum(bool(counts.any()) for counts in wanted.values()) > 0.8 * len(wanted)


@pytest.mark.parametrize("form", ["trained", "converted", "folded"])
def test_layers_of_a_low_bit_network_fire_exactly_from_equal_counts(form, images):
    model = low_bit()
    engine = integer(forms(model)[form], images)
    assert {layer.bits for layer in engine.report().layers} == {4}
    exact = forms(copy.deepcopy(model).double())[form]
    wrong = engine.compare_layers(exact, images.double())
    assert len(wrong) == 8  # pw1 and conv1 of three convolutional blocks, fc1 of two transformer blocks
    assert not any(wrong.values())


def test_weights_are_rounded_as_they_were_in_training(images):
    model = low_bit()
    conv = model.stage2.block0.channel_conv.conv1.conv
    with torch.no_grad():  # in float32 W / alpha is 3.5, which is rounded to 4; in float64 it is less
        conv.alpha.fill_(0.1)
        conv.weight.fill_(0.35)
    form = integer_form(model)
    layer = form.stage2.block0.channel_conv.conv1
    assert isinstance(layer, PackedLayer)
    assert layer.integers().unique().tolist() == conv.integers().unique().tolist() == [4]
    assert copy.deepcopy(conv).double().integers().unique().tolist() == [3]


def test_an_engine_without_flips_gives_the_logits_of_the_float64_network(images):
    model = low_bit()
    engine = integer(model, images)
    found = engine.compare(copy.deepcopy(model).double(), images.double())
    exact = [index for index in range(5) if index not in found.flipped]
    assert exact, "every image has a flip: the test network is no good"
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(images.double())
    torch.testing.assert_close(engine(images)[exact].double(), wanted[exact], rtol=0, atol=1e-5)


def test_layers_fire_exactly_on_real_pictures(shared_data):
    spec = ImageData(source="parquet", root=str(shared_data / "cifar10"), size=32, test_limit=1000)
    loader = DataLoader(load_split(spec, "test"), batch_size=100)
    model = low_bit()
    engine = integer(model, next(iter(loader))[0])
    assert not any(engine.compare_layers(model.double(), loader).values())


def test_offsets_of_lsq_plus_are_no_multiples_of_a_step_so_weights_are_rounded_again(images):
    model = low_bit(bits=0)
    sf.quantize.prepare(model, bits=4, offset=True)
    assert {layer.bits for layer in integer(model, images).report().layers} == {8, 32}

"""Few bits in networks that segment: which layers, equal predictions packed and folded, saved and loaded."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import spikeformers as sf
from spikeformers.quantize import LSQLayer, PackedLayer, convert, fold, prepare
from spikeformers.quantize.prepare import quantizable

KINDS = ("fpn_lif", "fpn", "qsd_fpn", "spike2former", "released")


def outputs(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return tree_leaves(model(images))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_predict_the_same_bit_by_bit_and_folded_ones_up_to_rounding(segmenter, kind):
    model, images = prepare(segmenter(kind), bits=4).eval(), torch.randn(2, 3, 32, 32)
    wanted = outputs(model, images)
    packed = convert(copy.deepcopy(model))
    assert all(torch.equal(one, other) for one, other in zip(outputs(packed, images), wanted, strict=True))
    model, images = model.double(), images.double()
    wanted = outputs(model, images)
    for one, other in zip(outputs(fold(convert(copy.deepcopy(model))), images), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_saved_and_loaded_it_predicts_the_same(segmenter, kind, packed, tmp_path):
    model, images = prepare(segmenter(kind), bits={"last": 8, "*": 4, "first": 8}).eval(), torch.randn(2, 3, 32, 32)
    model = convert(model) if packed else model
    again = sf.from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert again.config == model.config
    assert {type(each) for each in again.modules()} == {type(each) for each in model.modules()}
    pairs = zip(outputs(again, images), outputs(model, images), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_qsd_fpn_is_born_with_four_bits_everywhere(segmenter):
    model = segmenter("qsd_fpn")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert all(isinstance(layer, LSQLayer) and layer.bits == 4 for layer in layers)


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("fpn", {"head.classifier.classify"}),
        ("spike2former", {"head.embedding.classifier", "head.pixel_decoder.embedding"}),
    ],
)
def test_last_layers_are_those_that_give_classes_and_pixels(segmenter, kind, last):
    model = prepare(segmenter(kind), bits={"last": 8, "first": None, "*": 2})
    bits = {name: getattr(layer, "bits", None) for name, layer, _ in quantizable(model)}
    assert {name for name, width in bits.items() if width == 8} == last
    assert [name for name, width in bits.items() if width is None] == ["backbone.stage1a.down.conv.conv"]


def test_kinds_of_layers_of_spike2former(segmenter):
    kinds = {name.removeprefix("head."): kind for name, _, kind in quantizable(segmenter("spike2former"))}
    expected = {
        "pixel_decoder.encoders.0.layer0.esc.dw.conv": "conv",
        "pixel_decoder.encoders.0.layer0.attn.offset_conv.conv": "attention",
        "pixel_decoder.encoders.0.layer0.mlp.mlp.conv1.conv": "linear",
        "pixel_decoder.top_down.0.output.conv": "conv",
        "decoder.layers.0.cross_attn.k.conv.conv": "attention",
        "decoder.layers.1.self_attn.proj.conv": "attention",
        "decoder.layers.0.ffn.conv2.conv": "linear",
        "embedding.classifier": "linear",
        "embedding.mask_mlp.conv3": "linear",
    }
    assert {name: kinds[name] for name in expected} == expected


def test_offsets_that_start_at_zero_learn_with_few_bits():
    sizes = {"dims": (8, 8, 8, 16), "blocks": (1, 0, 0, 1, 0), "num_classes": 4, "dim": 8, "queries": 3, "groups": 2}
    sizes |= {"encoder_layers": 1, "encoder_hidden": 16, "decoder_layers": 1, "decoder_heads": 2, "decoder_hidden": 16}
    model = prepare(sf.create_model("spike2former_voc", **sizes), bits=4)
    layer = model.head.pixel_decoder.encoders[0].layer0.attn.attn_conv.conv
    assert not layer.weight.any()
    with torch.no_grad():
        layer.weight.add_(0.3)  # less than half a step of 1
    assert layer.quantized_weight().any()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fpn", r"head\.neck\.output\.0\.neuron cannot be exact in float32: it depends on interpolate in head\.neck"),
        ("qsd_fpn", r"cannot keep backbone\.stage3\.block0\.attn_scale of LayerScaleBlock a power of two"),
        ("spike2former", r"cannot keep head\.pixel_decoder\.encoders\.0\.layer0\.esc_scale of SDTELayer a power"),
    ],
)
def test_exact_networks_that_segment_are_refused_by_name_and_stay_as_they_are(segmenter, kind, reason):
    model = segmenter(kind)
    before = [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match=reason):
        prepare(model, bits=4, exact=True)
    assert [type(each) for each in model.modules()] == before
    assert not any(isinstance(each, PackedLayer) for each in model.modules())

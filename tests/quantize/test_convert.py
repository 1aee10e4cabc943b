"""Packed integers: the same predictions bit for bit, safe to copy and to save; norms folded."""

import copy
import json
import math
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import spikeformers as sf
from spikeformers.layers import ConvBN
from spikeformers.quantize import (
    ChannelAffine,
    LSQLayer,
    PackedLayer,
    convert,
    fold,
    pack,
    plain,
    prepare,
    unpack,
)
from spikeformers.quantize.lsq import integer_range

META = {"dims": (8, 16, 24, 32), "num_classes": 5, "blocks": (1, 1, 1, 1, 1)}
SPIKFORMER = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 5}
NETWORKS = {
    "meta_lif": ("meta_spikeformer_15m", META | {"neuron": "lif", "steps": 2}),
    "meta_ie_lif": ("meta_spikeformer_15m", META | {"neuron": "ie_lif"}),
    "spikformer": ("spikformer_cifar_2_384", SPIKFORMER | {"steps": 2}),
    "spikformer_v2": ("spikformer_v2_8_384", SPIKFORMER | {"neuron": "ie_lif", "patch_size": 8}),
    "qsd": ("qsd_transformer_t", META | {"layer_scale": 1.0}),
    "qsd_mprf": ("qsd_transformer_t", META | {"layer_scale": 1.0, "qkv": "rep_conv_mprf", "proj": "linear"}),
}


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def trained(name: str, **options) -> nn.Module:
    """A prepared network whose norms, step sizes and biases look trained, in eval mode."""
    catalogued, overrides = NETWORKS[name]
    model = prepare(sf.create_model(catalogued, **overrides), **options).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(1, 3)
                module.bias.normal_(0.5, 1)
            elif isinstance(module, LSQLayer):
                module.alpha.mul_(torch.rand_like(module.alpha) + 0.5)
                if module.offset is not None:
                    module.offset.normal_(0, 0.02)
        for _ in range(3):
            model(images())
    return model.eval()


def small(**options) -> nn.Sequential:
    """A prepared network of plain torch modules, in eval mode."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(16, 5))
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return prepare(model, **options).eval()


def small_images() -> Tensor:
    return torch.randn(2, 3, 4, 4)


def layers_of(model: nn.Module) -> dict[str, LSQLayer | PackedLayer]:
    return {name: each for name, each in model.named_modules() if isinstance(each, LSQLayer | PackedLayer)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_integers_are_packed_one_behind_the_other_lowest_bit_first():
    # 0, 1, 2, 3 from the lowest: 00 10 01 11 in order of bits
    assert pack(torch.tensor([-2, -1, 0, 1], dtype=torch.int8), bits=2).tolist() == [0b11100100]
    # 0, 7, 4: 000 111 001, the ninth bit in a byte of its own
    assert pack(torch.tensor([[-4, 3, 0]], dtype=torch.int8), bits=3).tolist() == [0b00111000, 1]
    assert pack(torch.tensor([-128, 127, 0], dtype=torch.int8), bits=8).tolist() == [0, 255, 128]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 3, 3), (1, 1, 1, 1), (4, 8)])
def test_packing_is_undone_and_takes_no_more_than_its_bits(bits, shape):
    low, high = integer_range(bits)
    integers = torch.randint(low, high + 1, shape, dtype=torch.int8)
    integers.view(-1)[0], integers.view(-1)[-1] = high, low
    packed = pack(integers, bits=bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(integers.numel() * bits / 8)
    assert torch.equal(unpack(packed, bits=bits, shape=shape), integers)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in NETWORKS),
        ("meta_ie_lif", {"bits": 2, "per_channel": False}),
        ("spikformer", {"bits": 3, "offset": True}),
        ("spikformer_v2", {"bits": 8, "per_channel": False, "offset": True}),
        ("qsd_mprf", {"bits": {"attention": 2, "first": None, "*": 5}, "offset": True}),
    ],
)
def test_a_converted_network_predicts_the_same_bit_for_bit(name, options):
    model, x = trained(name, **options), images()
    with torch.no_grad():
        logits, maps = model(x), model.forward_features(x)
        assert logits.std(0).max() > 0  # the network is alive
        integers = {layer: each.integers() for layer, each in layers_of(model).items()}
        assert convert(model.train()) is model
        assert not model.training
        assert torch.equal(model(x), logits)
        if name.startswith("spikformer"):  # in the others the border of a RepConv rounds otherwise
            assert all(torch.equal(a, b) for a, b in zip(model.forward_features(x), maps, strict=True))
        found = {layer: each.integers() for layer, each in layers_of(model).items()}
        assert found.keys() == integers.keys()
        assert all(found[layer].dtype == torch.int8 for layer in found)
        assert all(torch.equal(found[layer], integers[layer]) for layer in found)
        assert torch.equal(model.train()(x), logits)  # nothing is left that could behave otherwise
        assert not any(
            isinstance(each, nn.BatchNorm2d) and not isinstance(each, ChannelAffine) for each in model.modules()
        )
        assert torch.equal(plain(model).eval()(x), logits)
        assert not layers_of(model)
        assert {type(each) for each in model.modules() if isinstance(each, nn.BatchNorm2d)} == {nn.BatchNorm2d}


def test_what_is_stored_is_packed_integers_step_sizes_biases_scales_and_shifts():
    model = convert(small(bits={"first": 3, "last": 8}, offset=True))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in model.state_dict().items()} == {
        "0.packed": (torch.uint8, (math.ceil(108 * 3 / 8),)),
        "0.alpha": (torch.float32, (4,)),
        "0.offset": (torch.float32, (4,)),
        "0.bias": (torch.float32, (4,)),
        "1.weight": (torch.float32, (4,)),
        "1.bias": (torch.float32, (4,)),
        "4.packed": (torch.uint8, (80,)),
        "4.alpha": (torch.float32, (5,)),
        "4.offset": (torch.float32, (5,)),
        "4.bias": (torch.float32, (5,)),
    }
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "4x3x3x3, bits=3" in repr(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(6), (3, 6, 5, 4)),
        (nn.BatchNorm2d(6, eps=1e-2, affine=False), (3, 6, 5, 4)),
        (nn.BatchNorm1d(6, momentum=None), (3, 6, 7)),
        (nn.BatchNorm1d(6, eps=1e-3), (5, 6)),
    ],
)
def test_a_norm_as_one_scale_and_one_shift_and_back_is_the_same_bit_for_bit(norm, shape, dtype):
    model = nn.Sequential(prepare(nn.Linear(2, 2)), copy.deepcopy(norm).to(dtype)).eval()
    nn.init.normal_(model[1].running_mean, 0, 3)
    nn.init.uniform_(model[1].running_var, 1e-3, 3)
    if norm.affine:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    x = torch.randn(shape, dtype=dtype)
    y = model[1](x)
    convert(model)
    assert isinstance(model[1], ChannelAffine)
    assert torch.equal(model[1](x), y)
    assert torch.equal(model[1].train()(x), y)
    plain(model).eval()
    assert type(model[1]) is type(norm)
    assert model[1].eps == norm.eps
    assert torch.equal(model[1](x), y)
    model[1].train()(x)  # it trains again
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, track_running_stats=False), BatchNormAct2d(4)])
def test_a_norm_that_uses_each_batch_or_does_more_is_left_alone(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    x = small_images()
    y = prepare(model)(x)
    assert torch.equal(convert(model)(x), y)
    assert type(model[1]) is type(norm)


@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), lambda: plain(small())])
def test_a_model_without_low_bit_weights_is_refused_and_stays(build):
    model = build()
    types, keys = [type(each) for each in model.modules()], model.state_dict().keys()
    with pytest.raises(ValueError, match=r"no layer of this model has quantised weights: call quantize\.prepare first"):
        convert(model.train())
    assert [type(each) for each in model.modules()] == types
    assert model.state_dict().keys() == keys
    assert model.training


def test_a_converted_model_is_refused():
    with pytest.raises(ValueError, match="this model was converted already"):
        convert(convert(small()))


@pytest.mark.parametrize(("tensor", "value"), [("alpha", 0.0), ("alpha", math.nan), ("alpha", math.inf)])
@pytest.mark.parametrize("options", [{}, {"offset": True}])
def test_a_step_size_without_integers_is_refused_by_name_and_nothing_changes(tensor, value, options):
    model = small(**options).train()
    with torch.no_grad():
        getattr(model[4], tensor)[2] = value
    before, types = state(model), [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match=r"^4 has a step size of zero or weights that are not finite"):
        convert(model)
    assert [type(each) for each in model.modules()] == types
    assert model.quantization["converted"] is False
    assert model.training
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tensor", ["weight", "offset"])
def test_weights_that_are_not_finite_are_refused(tensor):
    layer = prepare(nn.Linear(2, 2), offset=True)
    with torch.no_grad():
        getattr(layer, tensor).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="LSQLinear has a step size of zero or weights that are not finite"):
        convert(layer)


def test_a_negative_step_size_has_integers():
    model, x = small(), small_images()
    with torch.no_grad():
        model[4].alpha[1] *= -1
    y = model(x)
    assert torch.equal(convert(model)(x), y)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_are_equal_and_small(copies):
    model, x = convert(small(offset=True)), small_images()
    y = model(x)
    assert model[0].unpacked is not None
    twin = copies(model)
    assert twin[0].unpacked is None
    assert torch.equal(twin(x), y)
    assert torch.equal(copies(plain(twin))(x), y)


@pytest.mark.parametrize("options", [{}, {"assign": True}])
def test_a_loaded_state_replaces_unpacked_weights(options, tmp_path):
    first, second, x = convert(small(bits=3)), convert(small(bits=3)), small_images()
    y = first(x)
    assert not torch.equal(second(x), y)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), **options)
    assert torch.equal(second(x), y)


def test_a_state_of_other_bits_or_of_float_weights_does_not_load():
    model = convert(small(bits=3))
    for other in (convert(small(bits=4)), small(bits=3), plain(small())):
        with pytest.raises(RuntimeError, match="Error"):
            model.load_state_dict(other.state_dict())


def test_another_precision_unpacks_anew():
    model, x = convert(small(offset=True)), small_images()
    y = model(x)
    wide = model.double()(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), y, rtol=0, atol=1e-5)  # float32
    assert torch.equal(model.float()(x), y)


def test_a_first_call_in_inference_mode_leaves_gradients_possible():
    model, x = convert(small()), small_images().requires_grad_()
    with torch.inference_mode():
        y = model(x)
    again = model(x)
    again.sum().backward()
    assert torch.equal(again, y)
    assert x.grad.abs().sum() > 0


def test_a_converted_network_compiles_to_one_graph(unchecked):
    model, x = convert(small(bits=2)), small_images()
    y = model(x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    assert torch.equal(compiled(x), y)


def test_a_part_of_a_network_converts_with_it_and_says_so(tmp_path):
    inner = trained("qsd")
    x = images()
    model = nn.Sequential(inner, nn.Linear(5, 2))
    y = model(x)
    assert torch.equal(convert(model)(x), y)
    assert type(model[1]) is nn.Linear
    assert inner.quantization["converted"] is True
    assert torch.equal(sf.from_pretrained(inner.save_pretrained(tmp_path))(x), inner(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_equals_the_converted_one_in_every_spike_and_logit(name):
    model, x = convert(trained(name).double()), images().double()
    folded = copy.deepcopy(model)
    packed = {layer: each.packed.clone() for layer, each in layers_of(model).items()}
    assert fold(folded) is folded
    with sf.record(model) as wanted, torch.no_grad():
        logits = model(x)
    with sf.record(folded) as got, torch.no_grad():
        # Rounding of float64 only: the scale comes before the sum instead of behind it.
        assert (folded(x) - logits).abs().max() <= 1e-12
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[layer], got[layer]) for layer in wanted)
    assert logits.std(0).max() > 0
    assert {layer: each.packed.tolist() for layer, each in layers_of(folded).items()} == {
        layer: each.tolist() for layer, each in packed.items()
    }
    left = [layer for layer, each in folded.named_modules() if isinstance(each, nn.BatchNorm2d)]
    assert all(layer.endswith("bn1") for layer in left)  # the border of RepConv needs it
    assert len(left) == sum(layer.endswith(".pw1") and ".attn" in layer for layer in packed)
    assert folded.quantization["folded"] is True
    assert model.quantization["folded"] is False
    twice = copy.deepcopy(folded)
    assert torch.equal(fold(twice)(x), folded(x))


def test_folding_by_hand():
    # App. D, Eqs. 25-26: alpha' = gamma / sqrt(var + eps) alpha, b' = gamma (b - mu) / sqrt(var + eps) + beta
    layer = prepare(ConvBN(2, 2, 1, bias=True).double(), bits=4, offset=True).eval()
    values = {
        "conv.weight": [[1.5, -1.0], [1.75, 0.25]],
        "conv.alpha": [0.5, 0.25],
        "conv.offset": [0.0, 0.125],
        "conv.bias": [1.0, -2.0],
        "bn.weight": [2.0, 0.5],
        "bn.bias": [0.25, 0.75],
        "bn.running_mean": [0.5, -1.0],
        "bn.running_var": [3.0, 15.0],  # with eps 1 the roots are 2 and 4
    }
    with torch.no_grad():
        for key, value in values.items():
            layer.state_dict()[key].copy_(torch.tensor(value).view_as(layer.state_dict()[key]))
    layer.bn.eps = 1.0
    integers = layer.conv.integers()
    assert integers.flatten(1).tolist() == [[3, -2], [6, 0]]  # (1.75 - 0.125) / 0.25 = 6.5 and 0.5 go to even
    fold(convert(layer))
    assert layer.conv.alpha.tolist() == [0.5 * 2 / 2, 0.25 * 0.5 / 4]
    assert layer.conv.offset.tolist() == [0, 0.125 * 0.5 / 4]
    assert layer.conv.bias.tolist() == [2 * (1 - 0.5) / 2 + 0.25, 0.5 * (-2 + 1) / 4 + 0.75]
    assert torch.equal(layer.conv.integers(), integers)
    assert type(layer.bn) is nn.Identity
    x = torch.tensor([1.0, 2.0], dtype=torch.float64).view(1, 2, 1, 1)
    # 0.5 (3 - 4) + 0.75; 0.03125 * 6 + 0.015625 * 3 + 0.625
    assert layer(x).flatten().tolist() == [0.25, 0.859375]


def test_folding_takes_no_more_than_norms_behind_packed_layers():
    model = trained("meta_ie_lif", bits={"attention": 4}).double()
    x = images().double()
    y = model(x)
    fold(convert(model))
    assert (model(x) - y).abs().max() <= 1e-12  # float64
    assert isinstance(model.stage1a.down.conv.bn, ChannelAffine)
    assert type(model.stage3.block0.attn.q_conv.bn3) is nn.Identity


def test_folding_wants_a_converted_model():
    for model in (small(), plain(small())):
        with pytest.raises(ValueError, match=r"nothing to fold into: call quantize\.convert first"):
            fold(model)


@pytest.mark.parametrize("name", ["meta_ie_lif", "spikformer_v2", "qsd_mprf"])
def test_prepared_converted_and_folded_networks_fuse_for_deployment(name):
    model, x = trained(name).double(), images().double()
    with torch.no_grad():
        logits = model(x)
        forms = [model, convert(copy.deepcopy(model)), fold(convert(copy.deepcopy(model)))]
        forms += [plain(copy.deepcopy(form)) for form in forms]
        for form in forms:
            # float64: merging changes the order of sums
            assert (sf.deploy.fuse(form)(x) - logits).abs().max() <= 1e-12
            assert (form(x) - logits).abs().max() <= 1e-12


@pytest.mark.parametrize("options", [{"bits": {"attention": None, "*": 3, "first": 8}}, {"bits": 2, "offset": True}])
@pytest.mark.parametrize("name", ["meta_lif", "spikformer", "qsd_mprf"])
def test_saved_models_come_back_equal_prepared_converted_and_folded(name, options, tmp_path):
    model, x = trained(name, **options), images(2)
    with torch.no_grad():
        for change in (lambda model: model, convert, fold):
            change(model)
            loaded = sf.from_pretrained(model.save_pretrained(tmp_path))
            assert torch.equal(loaded(x), model(x))
            assert loaded.quantization == model.quantization
            assert [type(each) for each in loaded.modules()] == [type(each) for each in model.modules()]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: setattr(model, "head", nn.Linear(40, 10)), "head"),
        (lambda model: plain(model.stage4), "stage4.down.conv.conv"),
        (lambda model: prepare(model.stage3, bits=2), "stage3.down.conv.conv"),
    ],
    ids=["replaced", "plain", "prepared"],
)
def test_a_part_that_is_no_longer_as_prepared_is_not_saved_as_if_it_were(change, name, tmp_path):
    model = sf.create_model("qsd_transformer_t", num_classes=10, dims=(8, 16, 32, 40))
    change(model)
    with pytest.raises(ValueError, match=rf"not those that quantize.prepare made \(first: {name}\)"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    prepare(model, bits={name: 8, "*": 4}).save_pretrained(tmp_path / "model")
    assert sf.from_pretrained(tmp_path / "model").quantization["layers"] == model.quantization["layers"]


def test_a_plain_model_comes_back_from_disk_and_one_without_its_norms_refuses_to_be_saved(tmp_path):
    model, x = convert(trained("qsd")), images(2)
    packed = copy.deepcopy(model)
    with torch.no_grad():
        y = model(x)
        loaded = sf.from_pretrained(plain(model).save_pretrained(tmp_path / "plain"))
        assert torch.equal(loaded(x), y)
    with pytest.raises(ValueError, match="create_model"):
        plain(fold(packed)).save_pretrained(tmp_path / "folded")


@pytest.mark.parametrize(
    "entry",
    [
        4,
        "4",
        [],
        {},
        {"bits": 4},
        {"bits": 9},
        {"bits": "4"},
        {"bits": 4.0},
        {"bits": {"nowhere": 4}},
        {"bits": {"*": "4"}},
        {"bits": {"*": 1}},
        {"folded": True},
    ],
)
def test_a_config_with_a_broken_quantisation_is_refused_as_damaged(entry, tmp_path, unchecked):
    model = trained("qsd")
    path = model.save_pretrained(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    complete = isinstance(entry, dict) and entry not in ({}, {"bits": 4})
    config["quantize"] = config["quantize"] | entry if complete else entry
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json is damaged: its quantisation cannot be repeated"):
        sf.from_pretrained(tmp_path)


def test_a_config_that_hides_the_quantisation_does_not_load(tmp_path):
    path = convert(trained("qsd")).save_pretrained(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    for entry in (None, config["quantize"] | {"converted": False}, config["quantize"] | {"bits": 2}):
        path.write_text(json.dumps(config | {"quantize": entry}))
        with pytest.raises(ValueError, match="weights do not fit"):
            sf.from_pretrained(tmp_path)

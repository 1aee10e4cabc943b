"""Exact networks: equal spikes and logits however float32 sums, the pieces by hand, and what is refused and why."""

import copy
import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spikeformers as sf
from spikeformers.backbones.qsd_transformer import ANN_TWIN
from spikeformers.neurons import LIF, Door
from spikeformers.quantize import (
    FixedPointNorm,
    LSQLayer,
    convert,
    exact_bits,
    fixed_point,
    fold,
    plain,
    power_of_two,
    prepare,
)
from spikeformers.quantize.exact import BIAS_GRID, GRID, LIMIT, ExactDepthwise, FixedPointDoor, reading_format
from spikeformers.train.parallel import sync_bn
from spikeformers.train.quantization import prepared
from spikeformers.train.recipe import Quantize

META = {"dims": (8, 16, 24, 32), "num_classes": 5, "blocks": (1, 0, 0, 1, 0), "heads": 2}
SPIKFORMER = {"dim": 32, "depth": 1, "heads": 2, "num_classes": 5, "patch_size": 8}
NETWORKS = {
    "qsd": ("qsd_transformer_t", META | {"layer_scale": 0.0}),
    "qsd_mprf": ("qsd_transformer_t", META | {"layer_scale": 0.0, "qkv": "rep_conv_mprf", "proj": "linear"}),
    "meta_sdsa1_vs": ("meta_spikeformer_15m", META | {"neuron": "i_lif", "attention": "sdsa1", "shortcut": "vs"}),
    "meta_sdsa2_lif": ("meta_spikeformer_15m", META | {"attention": "sdsa2", "steps": 2}),
    "meta_sdsa3_leaky": ("meta_spikeformer_15m", META | {"neuron": "ie_lif_leaky", "steps": 2}),
    "spikformer_v2": ("spikformer_v2_8_384", SPIKFORMER | {"neuron": "ni_lif"}),
    "spikformer_iand": ("spikformer_cifar_2_384", SPIKFORMER | {"shortcut": "iand", "steps": 2}),
}


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def trained(name: str = "qsd", *, exact: bool = True) -> nn.Module:
    """A prepared network whose norms, step sizes and biases look trained, in eval mode."""
    return copy.deepcopy(_trained(name, exact=exact))


@functools.cache
def _trained(name: str, *, exact: bool) -> nn.Module:
    catalogued, overrides = NETWORKS[name]
    model = prepare(sf.create_model(catalogued, **overrides), exact=exact).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(1, 3).mul_(torch.randn_like(module.weight).sign())
                module.bias.normal_(0.5, 1)
            elif isinstance(module, LSQLayer):
                module.alpha.mul_(torch.rand_like(module.alpha) + 0.5)
        for _ in range(3):
            model(images())
    return model.eval()


@torch.no_grad()
def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Counts of every neuron, images first ([B, T, ...]), and the logits in float64."""
    with sf.record(model) as counts:
        logits = model(x).double()
    steps = model.steps
    return {"logits": logits} | {name: each.unflatten(0, (steps, -1)).transpose(0, 1) for name, each in counts.items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_spikes_and_logits_are_equal_for_any_batch_order_layout_threads_and_precision(name):
    model, x = trained(name), images()
    wanted = outcome(model, x)
    assert len(wanted["logits"].unique()) > 10
    assert sum(bool(each.any()) for each in wanted.values()) > len(wanted) / 2  # most neurons fire
    for part in (slice(1), slice(1, 2), slice(3)):
        assert_equal(outcome(model, x[part]), {key: each[part] for key, each in wanted.items()})
    order = torch.randperm(len(x))
    assert_equal(outcome(model, x[order]), {key: each[order] for key, each in wanted.items()})
    assert_equal(outcome(model, x.to(memory_format=torch.channels_last)), wanted)
    double = copy.deepcopy(model).double()
    assert_equal(outcome(double, x.double()), wanted)
    torch.set_num_threads(2)
    assert_equal(outcome(model, x), wanted)
    assert_equal(outcome(convert(model).double(), x.double()), wanted)


def test_without_the_option_float32_and_float64_differ():
    model, x = trained(exact=False), images()
    with torch.no_grad():
        assert not torch.equal(model(x).double(), model.double()(x.double()))


def test_a_layer_may_sum_in_another_order():
    # What another library would do.
    order = torch.arange(23, -1, -1)
    for exact in (True, False):
        model, heard = trained(exact=exact), []
        layer = model.stage3.block0.attn.q_conv.pw2
        layer.register_forward_pre_hook(lambda _, inputs, heard=heard: heard.append(inputs[0]))
        with torch.no_grad():
            model(images())
            weight = layer.quantized_weight()
            equal = torch.equal(F.conv2d(heard[0], weight), F.conv2d(heard[0][:, order], weight[:, order]))
        assert equal is exact


def test_powers_of_two_are_the_nearest_by_ratio_with_their_sign():
    x = torch.tensor([1.0, 0.75, 0.7, 0.71, 1.4, 1.42, -3.0, -2.8, 0.0, 2.0**-130, 5e30])
    wanted = [1.0, 1.0, 0.5, 1.0, 1.0, 2.0, -4.0, -2.0, 0.0, 2.0**-130, 2.0**102]
    assert power_of_two(x).tolist() == wanted
    assert power_of_two(x.double()).tolist() == wanted


def test_float32_and_float64_round_the_same_number_to_the_same_power():
    middle = torch.tensor(math.sqrt(0.5))
    x = torch.stack([middle.nextafter(torch.tensor(0.0)), middle, middle.nextafter(torch.tensor(1.0))])
    x = torch.cat([x, torch.tensor([181 / 256]).nextafter(torch.tensor(0.0)), torch.tensor([181 / 256])])
    assert torch.equal(power_of_two(x).double(), power_of_two(x.double()))
    assert power_of_two(x)[-2:].tolist() == [0.5, 1.0]


def test_fixed_point_by_hand_and_its_gradient_inside_the_limits():
    x = torch.tensor([-2.0, -1.2, -1.0, 0.124, 0.125, 0.375, 0.4, 1.0, 1.2], requires_grad=True)
    y = fixed_point(x, grid=0.25, limit=1.0)
    assert y.tolist() == [-1, -1, -1, 0, 0, 0.5, 0.5, 1, 1]  # ties go to the even multiple
    y.backward(torch.arange(9.0))
    assert x.grad.tolist() == [0, 0, 2, 3, 4, 5, 6, 7, 0]
    power = torch.tensor([0.3], requires_grad=True)
    power_of_two(power).backward(torch.tensor([5.0]))
    assert power.grad.tolist() == [5.0]


def norm_2d(channels: int = 4) -> nn.BatchNorm2d:
    """A norm of an exact network, with statistics and weights of its own."""
    model = prepare(sf.create_model("qsd_transformer_t", **NETWORKS["qsd"][1]), exact=True)
    norm = model.stage1a.down.conv.bn
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.5, -1.0, 0.0, 3.0]))
        norm.running_var.copy_(torch.tensor([0.25, 1.0, 4.0, 1.0]))
        norm.weight.copy_(torch.tensor([1.1, -0.6, 0.0, 40.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.0]))
    return norm.eval()


def test_a_norm_by_hand():
    norm = norm_2d()
    # gamma / sigma is 2.2, -0.6, 0 and 40; shifts beta - mean scale are 0.1 - 1, 0.2 - 0.5, 0.3 and -96
    assert norm.scale().tolist() == [2.0, -0.5, 0.0, 32.0]
    assert norm.shift().tolist() == [round(each / GRID) * GRID for each in (-0.9, -0.3, 0.3, -96.0)]
    x = torch.tensor([1 / 3, -7.0, 100.0, 3.0]).view(1, 4, 1, 1)
    wanted = [round(2 / 3 / GRID) * GRID + norm.shift()[0], 3.5 + norm.shift()[1], norm.shift()[2], 0.0]
    assert norm(x).flatten().tolist() == wanted
    assert norm(-100 * x).flatten().tolist() == [-LIMIT, -LIMIT, norm.shift()[2], -LIMIT]
    assert norm.of_zero().tolist() == norm(torch.zeros(1, 4, 1, 1)).flatten().tolist()


def test_a_norm_is_monotone_in_every_channel_and_takes_float64():
    norm, x = norm_2d(), torch.linspace(-9, 9, 999, dtype=torch.float64)
    y = norm(x.expand(4, 1, -1).transpose(0, 1)[..., None])[0, :, :, 0]
    signs = norm.scale().sign()[:, None]
    assert (y.diff(dim=1) * signs >= 0).all()
    assert torch.equal(y, (y / GRID).round() * GRID)


def test_a_norm_trains_as_a_batch_norm_whose_gamma_makes_the_running_scale_a_power_of_two():
    norm = norm_2d().double().train()
    own = nn.BatchNorm2d(4).double()
    own.load_state_dict(norm.state_dict())
    gamma = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        own.weight *= torch.where(gamma == 0, 1, norm.scale() / gamma)
    x = torch.randn(8, 4, 5, 5, dtype=torch.float64)
    (xs, ys) = (x.clone().requires_grad_() for _ in range(2))
    y, wanted = norm(xs), own(ys)
    whole = (wanted / GRID).round() * GRID
    assert torch.equal(y, whole.clamp(-LIMIT, LIMIT))
    assert (whole.abs() > LIMIT).any()
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(norm.state_dict()[key], own.state_dict()[key])
    upstream = torch.randn_like(y)
    y.backward(upstream)
    wanted.backward(upstream * (whole.abs() <= LIMIT))
    assert torch.allclose(xs.grad, ys.grad, rtol=0, atol=1e-12)  # the same sums in float64
    assert torch.allclose(norm.bias.grad, own.bias.grad, rtol=0, atol=1e-12)


def test_what_a_norm_trains_with_is_what_it_evaluates_with():
    norm, x = norm_2d().double(), torch.randn(64, 4, 9, 9, dtype=torch.float64)
    norm.momentum = 1.0
    norm.train()(x)
    y = norm.train()(x)
    # Variances of batch and running statistics differ by 1 / 5184 (half of that in y); two roundings by a grid step.
    assert (y - norm.eval()(x)).abs().max() <= LIMIT / 5184 + GRID


@pytest.mark.parametrize("name", ["qsd", "spikformer_v2"])
def test_weights_are_integers_times_powers_of_two_and_biases_lie_on_their_grid(name):
    model = trained(name)
    for layer in (each for each in model.modules() if isinstance(each, LSQLayer)):
        step = layer.step()
        assert torch.equal(step, power_of_two(step))
        assert not torch.equal(step, layer.alpha)
        shape = (-1, *[1] * (layer.weight.ndim - 1))
        assert torch.equal(layer.quantized_weight(), layer.integers() * step.view(shape))
        if layer.bias is not None:
            units = layer.quantized_bias() / step / BIAS_GRID
            assert torch.equal(units, units.round())
            assert (layer.quantized_bias() - layer.bias).abs().max() <= BIAS_GRID * step.max() / 2


def test_images_are_rounded_at_the_door_and_by_depthwise_convolutions_what_they_give():
    model = trained()
    door, depthwise = model.door, model.stage3.block0.attn.q_conv.dw
    assert isinstance(door, FixedPointDoor)
    assert door(torch.full((1, 3, 2, 2), 100.0)).unique().tolist() == [8.0]
    assert isinstance(depthwise, ExactDepthwise)
    assert (depthwise.grid, depthwise.limit) == reading_format(24, bits=4)
    y = depthwise(torch.randn(1, 24, 7, 7) * 9)
    assert torch.equal(y, (y / depthwise.grid).round() * depthwise.grid)
    assert y.abs().max() <= depthwise.limit


@pytest.mark.parametrize("inputs", [16, 360, 640, 4608])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_layer_that_reads_a_depthwise_convolution_has_room_for_any_weights(inputs, bits):
    grid, limit = reading_format(inputs, bits=bits)
    assert inputs * 2 ** (bits - 1) * limit / grid <= 2**24
    assert GRID <= grid <= 1
    assert limit >= 8
    # and none to spare, unless both are as good as wanted
    assert (grid, limit) == (GRID, LIMIT) or inputs * 2 ** (bits - 1) * 2 * limit / grid > 2**24


@pytest.mark.parametrize("name", ["qsd", "spikformer_v2"])
def test_gradients_reach_every_parameter(name):
    model = trained(name).train()
    F.cross_entropy(model(images()), torch.arange(8) % 5).backward()
    silent = [key for key, each in model.named_parameters() if each.grad is None or not each.grad.isfinite().all()]
    assert silent == []
    moved = [key for key, each in model.named_parameters() if each.grad.any()]
    assert len(moved) > 0.8 * len(list(model.parameters()))
    assert {key.rsplit(".", 1)[-1] for key in moved} == {"weight", "bias", "alpha"}


def test_a_saved_exact_network_comes_back_prepared_or_converted(tmp_path):
    model, x = trained(), images()
    wanted = outcome(model, x)
    assert model.quantization["exact"] is True
    for form in (model, convert(copy.deepcopy(model))):
        loaded = sf.from_pretrained(form.save_pretrained(tmp_path / "saved"))
        assert loaded.quantization == form.quantization
        assert [type(each) for each in loaded.modules()] == [type(each) for each in form.modules()]
        assert_equal(outcome(loaded, x), wanted)


def test_preparing_again_without_the_option_gives_the_ordinary_low_bit_network():
    model = prepare(sf.create_model("qsd_transformer_t", **NETWORKS["qsd"][1]), exact=True)
    prepare(model, bits=4)
    wanted = sf.create_model("qsd_transformer_t", **NETWORKS["qsd"][1])
    assert [type(each) for each in model.modules()] == [type(each) for each in wanted.modules()]
    assert model.quantization == wanted.quantization
    wanted.load_state_dict(model.state_dict())
    x = images()
    assert torch.equal(model.eval()(x), wanted.eval()(x))
    assert not any(hasattr(each, "grid") for each in model.modules())


BARE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
REFUSED = {
    "layer scale": ({"layer_scale": 1.0}, {}, r"attn_scale of LayerScaleBlock .* it is learned.*layer_scale"),
    "threshold": ({"attention": "sdsa4"}, {}, r"attn\.attn\.threshold of IELIF"),
    "offset": ({}, {"offset": True}, "no room for an offset"),
    "float layer": ({}, {"bits": {"*": 4, "last": None}}, "head stays in float: give it 2 to 8"),
    "levels": ({"levels": 3}, {}, r"its (unit|gain) is .*no power of two; levels must be"),
    "leak": (
        {"neuron": functools.partial(LIF, tau=3.0), "attention": "sdsa3"},
        {},
        "its leak is 0.333333, which is no power",
    ),
    "steps": ({"neuron": "lif", "attention": "sdsa3", "steps": 16}, {}, r"may take .* bits of 24; use fewer steps"),
    "pooling": ({"attention": "pooling"}, {}, "it depends on avg_pool2d in"),
    "twin": (ANN_TWIN, {}, r"depends on gelu in stage1a\.block0"),
    "product": ({"levels": 128}, {}, r"attn is not exact in float32.* bits of 24; use smaller images or fewer levels"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_exact_is_refused_with_its_cure_and_nothing_changes(why):
    overrides, options, message = REFUSED[why]
    model = sf.create_model("qsd_transformer_t", **NETWORKS["qsd"][1] | {"bits": 0} | overrides)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    types = [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match=message):
        prepare(model, **{"bits": 4, "exact": True} | options)
    assert [type(each) for each in model.modules()] == types
    assert model.quantization is None
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("spikformer_v2_8_384", {"attention": "ssa_learnable"}, r"blocks\.0\.attn\.scale of LearnableScaleSSA"),
        ("spikformer_v2_8_384", {"attention": "identity"}, r"blocks\.0\.attn is not exact in float32"),
        ("spikformer_v2_8_384", {"attention": "vsa"}, "depends on scaled_dot_product_attention in blocks.0.attn"),
    ],
)
def test_attention_of_real_numbers_is_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        prepare(sf.create_model(name, **SPIKFORMER | overrides), exact=True)


def test_a_network_without_a_door_or_with_norms_without_statistics_is_refused():
    with pytest.raises(ValueError, match=r"round images at a Door .*, and Sequential has none"):
        prepare(copy.deepcopy(BARE), exact=True)
    model = sf.create_model("qsd_transformer_t", **NETWORKS["qsd"][1])
    model.stage1a.down.conv.bn = nn.BatchNorm2d(4, momentum=None)
    with pytest.raises(ValueError, match="needs batch norms with weight, bias, momentum"):
        prepare(model, exact=True)


def test_exact_bits_are_worked_by_hand_and_a_layer_that_outgrows_them_is_named():
    model = trained()
    found = exact_bits(model, images())
    # The head reads counts 0..4 worth 1/4; its biases, in steps of 1/16 of alpha, make the grid finer.
    bias = (model.head.quantized_bias() / model.head.step()).abs()
    largest = (model.head.integers().double().abs().sum(1) + bias).max().item()
    assert found["head"] == pytest.approx(math.log2(largest / BIAS_GRID))
    # Behind bn1 stand multiples of 1/256 up to 16, at the border up to twice that.
    depthwise = model.stage3.block0.attn.q_conv.dw
    reach = 16 + model.stage3.block0.attn.q_conv.bn1.of_zero().abs().max().item()
    sums = depthwise.integers().double().abs().flatten(1).sum(1).max().item()
    assert found["stage3.block0.attn.q_conv.dw"] == pytest.approx(math.log2(sums * reach * 256))
    assert max(found.values()) <= 24
    with torch.no_grad():
        model.head.bias.fill_(2.0**24)
    with pytest.raises(ValueError, match=r"head is not exact in float32: its sums may take .*fewer bits than 4"):
        convert(model)
    assert isinstance(model.head, LSQLayer)


def test_bits_do_not_depend_on_what_the_image_shows_but_attention_minds_its_size():
    model = trained()
    small, large = exact_bits(model, images()), exact_bits(model, torch.zeros(1, 3, 64, 64))
    assert exact_bits(model) == large
    assert large["stage3.block0.attn"] == small["stage3.block0.attn"] + 2
    assert large["stage3.block0.attn.q_conv.pw1"] == small["stage3.block0.attn.q_conv.pw1"]


def test_a_mean_over_another_number_than_a_power_of_two_is_for_neurons_only():
    model = trained()
    exact_bits(model, torch.zeros(1, 3, 48, 48))  # nine tokens: the neuron in front of the head reads the mean
    spikformer = trained("spikformer_v2")
    with pytest.raises(ValueError, match="head cannot be exact in float32: it reads a mean over 36 numbers"):
        exact_bits(spikformer, torch.zeros(1, 3, 48, 48))


def test_networks_of_ordinary_low_bits_are_not_exact():
    with pytest.raises(ValueError, match="depends on images that were not rounded"):
        exact_bits(trained(exact=False))
    model = trained()
    packed = convert(copy.deepcopy(model))
    packed.head.alpha.mul_(1.5)
    with pytest.raises(ValueError, match="head has step sizes that are no powers of two"):
        exact_bits(packed)


def test_the_sizes_of_the_paper_fit_whatever_their_weights_become():
    # With weights of 8 bits at their largest, which `prepare` asks about.
    model = sf.create_model("qsd_transformer_t", layer_scale=0.0, blocks=(1, 1, 1, 1, 1))
    assert prepare(model, bits=8, exact=True).quantization["exact"]


@pytest.mark.parametrize("write", [lambda y: y.__setitem__((slice(None), 0), 0.3), lambda y: y.view(-1).div_(3)])
def test_numbers_written_into_a_tensor_are_not_proven(write):
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.door, self.conv = Door(in_channels=3), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.door(x).clone()
            write(y)
            return self.conv(y)

    with pytest.raises(ValueError, match="changed in place"):
        sf.quantize.prepare(Written(), bits=4, exact=True)


def test_merging_folding_plain_layers_and_other_norms_are_refused():
    model = trained()
    with pytest.raises(ValueError, match="predicts by rounding that torch's own layers do not have"):
        plain(model)
    with pytest.raises(ValueError, match="its norms round, so it cannot merge"):
        sf.deploy.fuse(model)
    with pytest.raises(ValueError, match="a FixedPointNorm2d rounds what it gives"):
        model.stage1a.down.conv.merge()
    with pytest.raises(ValueError, match=r"cannot synchronise .*FixedPointNorm2d"):
        sync_bn(model)
    with pytest.raises(ValueError, match="leave fold out"):
        fold(convert(model))
    assert not any(isinstance(each, nn.Identity) for name, each in model.named_modules() if name.endswith("bn"))
    assert isinstance(model.stage1a.down.conv.bn, FixedPointNorm)


def test_a_recipe_asks_for_exactness():
    group = Quantize(bits=4, exact_integer=True)
    model = prepared(sf.create_model("qsd_transformer_t", **NETWORKS["qsd"][1]), group)
    assert model.quantization["exact"]
    assert "exact" not in prepared(model, Quantize(bits=4)).quantization
    with pytest.raises(ValueError, match=r"set quantize\.bits to 2 to 8"):
        Quantize(exact_integer=True).chosen()

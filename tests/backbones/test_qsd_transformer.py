"""QSD-Transformer: sizes to the digit, what each switch changes, and what a network of IE-LIF must keep."""

import copy

import pytest
import torch
from timm.models import group_parameters
from torch import nn

from spikeformers.attention import MPRF, QSDSA, SoftmaxAttention
from spikeformers.backbones.qsd_transformer import ANN_TWIN
from spikeformers.deploy import integer
from spikeformers.energy import measure
from spikeformers.layers import LayerScaleBlock, TransformerBlock
from spikeformers.neurons import Neuron, set_steps, streaming
from spikeformers.quantize import LSQLayer, quantizable, size
from spikeformers.zoo import create_model
from tests.backbones.test_meta_spikeformer import TINY, awake

LAYERS = 3 * (1 + 3 + 2) + 2 * (1 + 12 + 2) + 1  # down, SepConv, 3x3s; down, four RepConvs of three, MLP; classifier


def tiny(**overrides) -> nn.Module:
    torch.manual_seed(3)
    return create_model("qsd_transformer_t", **(TINY | overrides))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


def all_of(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("name", "parameters", "paper_m"),
    [
        ("qsd_transformer_t", 15_116_720, 1.877),
        ("qsd_transformer_m", 31_340_392, 3.899),
        ("qsd_transformer_l", 55_358_952, 6.895),
    ],
)
def test_parameter_counts_equal_the_authors_to_the_digit(name, parameters, paper_m):
    with torch.device("meta"):
        model, twin = create_model(name), create_model(name, bits=0)
    assert size(model).parameters == sum(p.numel() for p in twin.parameters()) == parameters
    assert size(model).paper_m == pytest.approx(paper_m, abs=5e-4)
    # Beside what a Meta-SpikeFormer of that size has: two scales a channel in six blocks of stage 3 and two of stage 4.
    with torch.device("meta"):
        float_net = create_model(name, bits=0, layer_scale=0.0)
    _, _, c3, c4 = model.config.dims
    assert parameters - sum(p.numel() for p in float_net.parameters()) == 2 * (6 * c3 + 2 * c4)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (3, -4, 3), (4, -8, 7)])
def test_every_layer_has_weights_of_the_bits_asked_for(bits, low, high):
    model = tiny(bits=bits)
    layers = all_of(model, LSQLayer)
    assert len(layers) == len(list(quantizable(model))) == LAYERS
    assert {layer.bits for layer in layers} == {bits}
    for layer in layers:
        layer.weight.data.mul_(10)  # fresh weights do not fill the range of their step sizes
        integers = layer.integers()
        assert (integers.min(), integers.max()) == (low, high)


def test_without_bits_weights_are_float():
    model = tiny(bits=0)
    assert not all_of(model, LSQLayer)
    assert model.quantization is None


def test_without_layer_scale_blocks_are_those_of_a_meta_spikeformer():
    assert {type(block) for block in all_of(tiny(layer_scale=0.0), TransformerBlock)} == {TransformerBlock}
    scaled = all_of(tiny(layer_scale=0.25), LayerScaleBlock)
    assert len(scaled) == 2
    assert all((scale == 0.25).all() for block in scaled for scale in (block.attn_scale, block.mlp_scale))


@pytest.mark.parametrize("qkv", ["rep_conv_mprf", "linear_mprf"])
def test_an_mprf_stands_behind_q_k_and_v_only_and_it_trains(qkv):
    model = tiny(qkv=qkv)
    names = {name for name, module in model.named_modules() if isinstance(module, MPRF)}
    blocks = ("stage3.block0", "stage4.block0")
    assert names == {f"{block}.attn.{operand}_conv.mprf" for block in blocks for operand in "qkv"}
    model(torch.randn(4, 3, 32, 32)).pow(2).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.stage3.block0.attn.v_conv.mprf.weight.grad.abs().sum() > 0


def test_the_ann_twin_has_the_layers_and_no_neuron():
    model, twin = tiny(), tiny(**ANN_TWIN)
    assert not all_of(twin, Neuron)
    assert not all_of(twin, LSQLayer)
    assert len(all_of(twin, SoftmaxAttention)) == len(all_of(model, QSDSA)) == 2
    own = {key: tensor.shape for key, tensor in twin.state_dict().items()}
    assert own == {key: each.shape for key, each in model.state_dict().items() if not key.endswith(".alpha")}
    twin(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())


def test_a_training_step_reaches_weights_step_sizes_and_scales():
    model = tiny(layer_scale=1.0)
    model(torch.randn(4, 3, 32, 32)).pow(2).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for ending in ("weight", "alpha", "attn_scale", "mlp_scale"):
        found = [gradient.abs().sum() for name, gradient in gradients.items() if name.endswith(ending)]
        assert found
        assert min(found) > 0, ending


def test_maps_and_logits_do_not_depend_on_who_shares_the_batch():
    model, batch = awake(tiny(layer_scale=1.0)), images(5)
    with torch.no_grad():
        maps, logits = model.forward_features(batch)[-1], model(batch)
        alone = torch.cat([model.forward_features(image[None])[-1] for image in batch])
        logits_alone = torch.cat([model(image[None]) for image in batch])
    assert maps.std(0).mean() > 0.01  # the network tells the images apart, so equality below says something
    # Spikes are equal in float64; the rest is the rounding of sums in another order.
    assert torch.allclose(maps, alone, atol=1e-12, rtol=0)
    assert torch.allclose(logits, logits_alone, atol=1e-12, rtol=0)


def test_without_a_membrane_steps_change_nothing_and_with_one_they_do():
    batch = images()
    for neuron, same in (("ie_lif", True), ("ie_lif_leaky", False)):
        model = awake(tiny(neuron=neuron, layer_scale=1.0))
        with torch.no_grad():
            once = model(batch)
            # Equal spikes at every step; a mean of four equal numbers, and the last layer's rounding.
            assert torch.allclose(set_steps(model, 4)(batch), once, atol=1e-12, rtol=0) == same


@pytest.mark.parametrize("neuron", ["ie_lif", "ie_lif_leaky"])
def test_streaming_the_frames_equals_the_whole_clip(neuron):
    model, clip = awake(tiny(neuron=neuron, steps=3, layer_scale=1.0)), images(6).view(3, 2, 3, 32, 32)
    with torch.no_grad():
        whole = model(clip)
        with streaming(model):
            for frame in clip:
                logits = model(frame)
    assert torch.allclose(logits, whole, atol=1e-12, rtol=0)


def test_a_block_starts_as_nearly_the_identity():
    block = awake(tiny()).stage3.block0
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        change = (block(x) - x).abs().max()
        branch = block.attn(block.attn_shortcut.neuron(x)).abs().max()
    # Two branches of order 1 to 10 times 1e-6.
    assert 1e-7 < change < 3e-5
    assert branch > 0.1


def test_a_block_scaled_by_one_is_the_block_without_scales():
    scaled, plain = (awake(tiny(layer_scale=scale)).stage3.block0 for scale in (1.0, 0.0))
    plain.load_state_dict({key: each for key, each in scaled.state_dict().items() if not key.endswith("_scale")})
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(scaled(x), plain(x))
        scaled.mlp_scale.mul_(2)
        after_attention = plain.attn_shortcut(x, plain.attn)
        assert torch.allclose(scaled(x) - after_attention, 2 * (plain(x) - after_attention), atol=1e-12, rtol=0)


def test_other_neurons_need_another_attention():
    with pytest.raises(ValueError, match='take attention="sdsa3"'):
        tiny(neuron="i_lif")
    assert tiny(neuron="i_lif", attention="sdsa3")(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_step_sizes_and_scales_belong_to_the_layer_of_their_block():
    model = tiny()
    layers = {tuple(sorted(names)) for names in group_parameters(model, model.group_matcher(coarse=False)).values()}
    stage3 = next(names for names in layers if "stage3.block0.attn.q_conv.pw1.weight" in names)
    assert {"stage3.block0.attn.q_conv.pw1.alpha", "stage3.block0.attn_scale", "stage3.block0.mlp_scale"} <= set(stage3)
    assert "stage3.down.conv.conv.alpha" in stage3
    assert ("head.alpha", "head.bias", "head.weight") in layers


def test_energy_is_measured_of_every_quantised_layer():
    model = awake(tiny(layer_scale=1.0)).float()
    report = measure(model, torch.randn(2, 3, 32, 32), convention="as_executed")
    names = {name for name, _, _ in quantizable(model)}
    assert names <= {layer.name for layer in report.layers}
    assert 0 < report.total_mj < report.ann_mj
    assert 0 < report.firing_rate < 1


def test_the_integer_engine_predicts_much_the_same_and_leaves_the_model_alone():
    model, batch = awake(tiny(layer_scale=1.0)).float(), torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    engine = integer(model, batch)
    found = engine.compare(model, batch)
    assert {"head", "stage3.block0.attn.q_conv", "stage3.block0.mlp.conv1.conv"} & engine.spike_fed
    # The engine rounds 4-bit weights to its own 8 bits (another step size), so some counts flip, one in ten at most.
    assert sum(found.flip_rates.values()) / len(found.flip_rates) < 0.1
    with torch.no_grad():
        assert found.largest_error < 0.5 * model(batch).std()
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())

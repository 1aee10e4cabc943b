import pytest
import torch
from torch import nn

from spikeformers.attention import SDDA, balance
from spikeformers.attention.balance import drive
from spikeformers.neurons import build_neuron
from spikeformers.zoo import create_model

SMALL = {
    "dims": (16, 16, 32, 32),
    "blocks": (0, 1, 0, 1, 1),
    "dim": 32,
    "groups": 4,
    "queries": 8,
    "encoder_layers": 1,
    "encoder_hidden": 32,
    "decoder_layers": 2,
    "decoder_heads": 4,
    "decoder_hidden": 32,
    "num_classes": 3,
}


def network(levels: int, *, learnable: bool = True, **overrides) -> nn.Module:
    scales = {"attention": "sdsa3_learned", "attention_scale": "learnable"} if learnable else {}
    return create_model("spike2former_voc", levels=levels, **(SMALL | scales | overrides)).train()


def drives(model: nn.Module, images: torch.Tensor) -> dict[str, float]:
    """Mean membrane of every attention neuron that stands behind a product with a scale."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "scale") and hasattr(module, "attn"):

            def hook(_, arguments, name=name):
                found[name] = float(arguments[0].mean())

            handles.append(module.attn.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("levels", [1, 4, 8])
def test_every_attention_is_driven_by_one_spike_whatever_the_levels(levels):
    model, images = network(levels), torch.randn(2, 3, 64, 64)
    before = drives(model, images)
    assert balance(model, images) == len(before) == 6
    after = drives(model, images)
    assert max(abs(drive - 1) for drive in before.values()) > 0.5
    # Not exactly: borders of RepConv follow running statistics, which the first pass moved, and a flip spreads.
    assert all(drive == pytest.approx(1, abs=0.3) for drive in after.values())


def test_the_first_gradient_is_finite_where_fixed_scales_give_infinity():
    norms, images = {}, torch.randn(2, 3, 64, 64)
    labels = torch.randint(0, 3, (2, 4, 4)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    sizes = {"dims": (16, 32, 64, 64), "blocks": (1, 1, 2, 6, 2)}
    for learnable in (False, True):
        torch.manual_seed(0)
        model = network(8, learnable=learnable, **sizes)
        if learnable:
            balance(model, images)
        model.loss(model(images), labels).backward()
        norms[learnable] = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.isinf(norms[False])
    assert norms[True] < 1e4


def test_statistics_and_all_else_stay():
    model, images = network(4), torch.randn(2, 3, 64, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    balance(model, images)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rsplit(".", 1)[-1] for name in changed} == {"scale", "bias"}
    assert {name for name in changed if name.endswith("bias")} == {
        "head.pixel_decoder.encoders.0.layer0.attn.attn_conv.bn.bias"
    }


def test_an_untrained_sdda_attends_to_all_points_and_a_trained_one_is_left_alone():
    model, images = network(4), torch.randn(2, 3, 64, 64)
    sdda = next(module for module in model.modules() if isinstance(module, SDDA))
    balance(model, images)
    assert sdda.attn_conv.bn.bias.eq(1).all()
    with torch.no_grad():
        sdda.attn_conv.conv.weight.normal_()
        sdda.attn_conv.bn.bias.fill_(0.25)
    balance(model, images)
    assert sdda.attn_conv.bn.bias.eq(0.25).all()


def test_what_is_skipped_keeps_its_scale():
    model, images = network(4), torch.randn(2, 3, 64, 64)
    trained = {name for name, _ in model.named_parameters() if name.startswith("backbone.") and name.endswith(".scale")}
    before = {name: model.get_parameter(name).item() for name in trained}
    assert balance(model, images, skip=trained) == 4
    assert {name: model.get_parameter(name).item() for name in trained} == before


@pytest.mark.parametrize(
    ("neuron", "expected"),  # a LIF halves its input, an IE-LIF multiplies it by D, others take it as it is
    [("lif", 0.3), ("ie_lif", 2.4), ("ni_lif", 0.6), ("i_lif", 0.6), ("gelu", 0.6)],
)
def test_the_drive_is_counted_as_the_neuron_charges(neuron, expected):
    current = torch.tensor([[0.2, 1.0]])
    assert float(drive(build_neuron(neuron, levels=4), current)) == pytest.approx(expected)


def test_fixed_scales_are_not_touched():
    model = network(4, learnable=False)
    assert balance(model, torch.randn(1, 3, 64, 64)) == 0

"""What is heard of a network is what its attentions multiply: spikes of a student, real numbers of its twin, CAFormer's
queries, keys and values; and nothing of it stays."""

import copy

import pytest
import timm
import torch
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from torch import nn
from torch.nn import functional as F

from spikeformers.backbones import meta_spikeformer, qsd_transformer
from spikeformers.distill import Caformer, Twin, listen, teacher_of
from spikeformers.energy import record
from spikeformers.neurons import Neuron, set_steps
from spikeformers.zoo import create_model

SIZES = {"num_classes": 10, "dims": (8, 16, 32, 40), "blocks": (1, 1, 1, 2, 1)}
ATTENTIONS = ["stage3.block0.attn", "stage3.block1.attn", "stage4.block0.attn"]


def student(**overrides) -> nn.Module:
    return create_model("meta_spikeformer_15m", **(SIZES | {"neuron": "ie_lif"} | overrides))


def twin() -> nn.Module:
    return student(**meta_spikeformer.ANN_TWIN)


def small_caformer(*, depths: tuple[int, ...] = (1, 1, 3, 2)) -> nn.Module:
    """Four stages as in caformer_s18, four heads in stage 3 and three in stage 4."""
    return MetaFormer(
        depths=depths,
        dims=(8, 16, 128, 96),
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        num_classes=10,
    )


def heard(network: nn.Module, images: torch.Tensor) -> list:
    with listen(network) as layers:
        network(images)
    return layers


def test_every_attention_is_heard_in_the_order_of_depth_with_its_grid():
    layers = heard(student(), torch.randn(2, 3, 64, 32))
    assert [layer.name for layer in layers] == ATTENTIONS
    assert [layer.stage for layer in layers] == ["stage3", "stage3", "stage4"]
    assert {layer.grid for layer in layers} == {(4, 2)}
    assert [tuple(each.shape for each in layer.qkv) for layer in layers] == [
        ((2, 8, width, 8),) * 3 for width in (4, 4, 5)
    ]


def test_blocks_of_a_spikformer_are_one_stage():
    network = create_model("spikformer_v2_8_384", dim=16, depth=2, heads=4, patch_size=4, num_classes=10)
    layers = heard(network, torch.randn(1, 3, 16, 16))
    assert [(layer.name, layer.stage) for layer in layers] == [("blocks.0.attn", "blocks"), ("blocks.1.attn", "blocks")]


def test_the_student_is_heard_behind_its_neurons_and_over_time_on_average():
    network = student(neuron="lif", steps=4)
    images = torch.randn(2, 3, 32, 32)
    with listen(network) as layers, record(network) as counts:
        network(images)
    for layer in layers:
        for operand, found in zip("qkv", layer.qkv, strict=True):
            steps = counts[f"{layer.name}.{operand}"].float().unflatten(0, (4, 2))  # time-major
            assert steps[:, 0].std(0).any()  # else a mean of steps could not be told from one of them
            expected = steps.mean(0).flatten(2).unflatten(1, (8, -1))
            assert torch.equal(found, expected)  # quarters are exact


def test_steps_are_those_of_the_forward_pass_and_averaged_in_float32_under_autocast():
    network = set_steps(student(neuron="lif", steps=1), 3)
    with torch.autocast("cpu", torch.bfloat16):
        q = heard(network, torch.randn(2, 3, 32, 32))[0].qkv[0]
    assert (q.dtype, q.shape[0]) == (torch.float32, 2)
    thirds = (3 * q).round() / 3
    assert thirds.unique().numel() > 2
    torch.testing.assert_close(q, thirds, rtol=0, atol=1e-6)  # in bfloat16 a third would be off by 1e-3


def test_a_network_inside_a_wrapper_is_heard_under_its_plain_names_and_gradients_arrive():
    class Wrapper(nn.Module):  # as DistributedDataParallel
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    network = student().train()
    layers = heard(Wrapper(network), torch.randn(2, 3, 32, 32))
    assert [layer.name for layer in layers] == ATTENTIONS
    sum(each.square().sum() for layer in layers for each in layer.qkv).backward()
    assert all(
        network.get_submodule(f"{name}.{operand}_conv.bn3").weight.grad.any()
        for name in ATTENTIONS
        for operand in "qkv"
    )


def test_a_compiled_network_is_heard(unchecked):
    network = student().eval()
    compiled = torch.compile(network, backend="eager")
    images = torch.randn(2, 3, 32, 32)
    compiled(images)  # a graph that already exists must not be used
    for found, expected in zip(heard(compiled, images), heard(network, images), strict=True):
        assert found.name == expected.name
        assert all(torch.equal(x, y) for x, y in zip(found.qkv, expected.qkv, strict=True))


def test_the_last_forward_pass_is_kept_and_no_hook():
    network = student().eval()
    images = torch.randn(3, 3, 32, 32)
    with listen(network) as layers:
        network(torch.randn(1, 3, 32, 32))
        network(images)
    assert torch.equal(layers[0].qkv[0], heard(network, images)[0].qkv[0])
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_go_and_an_error_stays_itself_when_the_forward_pass_fails():
    network = student()
    with pytest.raises(ValueError, match="3 input channels"):
        heard(network, torch.randn(1, 2, 32, 32))
    assert not any(module._forward_hooks for module in network.modules())


def test_raises_if_the_network_did_not_run():
    with pytest.raises(RuntimeError, match=r"stage3.block0.attn.q did not run"), listen(student()):
        pass


def test_an_attention_without_k_is_refused_by_name():
    with pytest.raises(ValueError, match=r"stage3.block0.attn is SDSA2, which multiplies q and v only"):
        Twin(student(attention="sdsa2"))


def test_a_network_without_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no attention"):
        teacher_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no attention to distil from"):
        teacher_of(MetaFormer(depths=(1, 1), dims=(8, 8)))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("meta_spikeformer_15m", meta_spikeformer.ANN_TWIN), ("qsd_transformer_t", qsd_transformer.ANN_TWIN)],
)
def test_the_twin_has_the_layout_of_the_student(name, overrides):
    """Every weight, and a GELU wherever the student has a neuron outside its attention: the shortcut stays."""
    ours, theirs = (create_model(name, **SIZES, **each) for each in ({}, overrides))
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (ours, theirs)]
    assert shapes[1] == {key: shape for key, shape in shapes[0].items() if not key.endswith("alpha")}
    neurons = {key for key, module in ours.named_modules() if isinstance(module, Neuron) and ".attn." not in key}
    assert {key for key, module in theirs.named_modules() if isinstance(module, nn.GELU)} == neurons


def test_the_twin_teaches_what_its_softmax_multiplies():
    network = twin().eval()
    mixed = []
    network.stage4.block0.attn.proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0]))
    *_, last = Twin(network).operands(torch.randn(2, 3, 64, 32))
    q, k, v = (each.mT for each in last.qkv)
    attended = F.scaled_dot_product_attention(q, k, v).mT.flatten(1, 2).unflatten(2, last.grid)
    torch.testing.assert_close(attended, mixed[0])  # the same kernel on copies: float32 rounding at most


def test_a_teacher_is_frozen_in_eval_mode_and_gives_no_gradient():
    for network in (twin().train(), small_caformer().train()):
        before = copy.deepcopy(network.state_dict())
        layers = teacher_of(network).operands(torch.randn(2, 3, 32, 32, requires_grad=True))
        assert not any(each.requires_grad for layer in layers for each in layer.qkv)
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(module.training for module in network.modules())
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert not any(module._forward_hooks for module in network.modules())


def test_a_module_with_operands_of_its_own_is_a_teacher_already():
    teacher = Twin(twin())
    assert teacher_of(teacher) is teacher
    assert isinstance(teacher_of(twin()), Twin)
    assert isinstance(teacher_of(small_caformer()), Caformer)


def test_caformer_teaches_what_its_attention_multiplies_on_the_grid_of_its_stage():
    network = small_caformer().double()
    before_proj, stage_maps = {}, {}
    for stage in (2, 3):
        mixer = network.stages[stage].blocks[0].token_mixer
        mixer.proj.register_forward_pre_hook(lambda _, inputs, stage=stage: before_proj.update({stage: inputs[0]}))
        network.stages[stage].register_forward_hook(lambda _, __, out, stage=stage: stage_maps.update({stage: out}))
    layers = Caformer(network).operands(torch.randn(2, 3, 64, 96, dtype=torch.float64))
    assert [layer.stage for layer in layers] == ["stages.2"] * 3 + ["stages.3"] * 2
    for layer, stage, heads in ((layers[0], 2, 4), (layers[3], 3, 3)):
        assert layer.grid == tuple(stage_maps[stage].shape[-2:]) == {2: (4, 6), 3: (2, 3)}[stage]
        assert layer.qkv[0].shape == (2, heads, 32, layer.grid[0] * layer.grid[1])
        attended = F.scaled_dot_product_attention(*(each.mT for each in layer.qkv))
        # The same products in another memory layout: rounding of float64.
        torch.testing.assert_close(attended.transpose(1, 2).flatten(2), before_proj[stage], rtol=1e-10, atol=1e-12)


def test_caformer_s18_has_nine_and_three_attentions():
    layers = teacher_of(timm.create_model("caformer_s18", pretrained=False)).operands(torch.randn(1, 3, 64, 64))
    found = [(layer.stage, layer.grid, layer.qkv[0].shape[1]) for layer in layers]
    assert found == [("stages.2", (4, 4), 10)] * 9 + [("stages.3", (2, 2), 16)] * 3

"""Spike2Former's head: sizes of the paper, every switch of Table 3, what it gives in training and evaluation."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from spikeformers.heads.mask_decoder import FFN, ReleasedFFN
from spikeformers.heads.masks import MaskClassification
from spikeformers.heads.spike2former import ANN_TWIN, Spike2FormerConfig, mask_products
from spikeformers.layers import FeatureInfo
from spikeformers.neurons import ILIF, NILIF, Neuron, SigmoidL2, neuron_builder, set_steps
from spikeformers.zoo import create_model

ADE20K = FeatureInfo(("1a", "1b", "2", "3", "4"), (32, 64, 128, 256, 360), (2, 4, 8, 16, 16))
SMALL = FeatureInfo(("a", "b", "c", "d"), (4, 6, 8, 10), (2, 4, 8, 16))
NI_LIF = neuron_builder("ni_lif", levels=4)
TINY = Spike2FormerConfig(
    dim=16,
    queries=5,
    encoder_layers=1,
    encoder_hidden=16,
    groups=2,
    decoder_layers=3,
    decoder_heads=2,
    decoder_hidden=16,
)
PRETRAINED_BACKBONE = 14_751_208  # the rest of the published 34,361,112 parameters


def build(*, neuron: str = "ni_lif", steps: int = 1, features: FeatureInfo = SMALL, **changes: object) -> nn.Module:
    config = dataclasses.replace(TINY, **changes)
    return config.build(features, num_classes=3, neuron=neuron_builder(neuron, levels=4, steps=steps), steps=steps)


def pyramid(*, batch: int = 2, features: FeatureInfo = SMALL, side: int = 32) -> list[Tensor]:
    shapes = zip(features.channels, features.strides, strict=True)
    return [2 * torch.randn(batch, width, -(-side // stride), -(-side // stride)) for width, stride in shapes]


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_the_published_model():
    head = Spike2FormerConfig().build(ADE20K, num_classes=150, neuron=neuron_builder("ni_lif"))
    assert size(head) == 34_361_112 - PRETRAINED_BACKBONE
    assert size(head.pixel_decoder) == 9_796_544
    assert size(head.decoder.layers) == 9_515_520
    assert size(head.decoder.layers[0]) == 1_585_920
    assert size(head.decoder) == 9_515_520 + 2 * 25_600 + 768
    assert size(head.embedding.classifier) == 38_807
    assert size(head.embedding.mask_mlp) == 196_864
    assert size(head.embedding.shortcut) == 10_200 + 1


def test_it_reads_the_last_map_of_each_stride_and_predicts_at_the_finest():
    features = FeatureInfo(("a", "b", "c", "d", "e"), (4, 6, 8, 9, 10), (2, 4, 8, 16, 16))
    head = build(features=features).eval()
    maps = pyramid(features=features)
    maps[3].fill_(torch.nan)  # 1/16, but not the last
    output = head(maps)
    assert output.class_logits.shape == (2, 5, 4)
    assert output.mask_logits.shape == (2, 5, 16, 16)
    assert torch.isfinite(output.mask_logits).all()


def test_every_state_predicts_in_training_and_only_the_last_in_evaluation():
    head, maps = build(), pyramid()
    output = head(maps)
    assert len(output.auxiliary) == 3
    assert all(isinstance(each, MaskClassification) and not each.auxiliary for each in output.auxiliary)
    head.eval()
    alone = head(maps)
    assert alone.auxiliary == ()
    head.training = True  # batch norms stay as they are
    assert torch.allclose(head(maps).mask_logits, alone.mask_logits, atol=1e-5)


def test_a_mask_is_the_sum_over_channels_of_spikes_times_pixels():
    spikes, pixels = torch.randint(5, (2, 3, 4, 5)).double(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    assert torch.allclose(mask_products(spikes, pixels), torch.einsum("bclq,bchw->blqhw", spikes, pixels), atol=1e-12)


def test_predictions_are_averaged_over_time():
    head = build(steps=2).double().eval()
    clip = [each.double() for each in pyramid(batch=4)]
    both = head(clip)
    set_steps(head, 1)
    first, second = (head([each[half] for each in clip]) for half in (slice(2), slice(2, 4)))
    for name in ("class_logits", "mask_logits"):
        mean = (getattr(first, name) + getattr(second, name)) / 2
        assert torch.allclose(getattr(both, name), mean, atol=1e-10)


def test_the_loss_is_the_sum_of_the_losses_of_all_layers_and_reaches_every_parameter():
    head = build()
    labels = torch.randint(3, (2, 32, 32))
    output = head(pyramid())
    losses = head.losses(output, labels)
    assert len(losses) == 3 * 4
    loss = head.loss(output, labels)
    assert loss.item() == pytest.approx(sum(each.item() for each in losses.values()), rel=1e-6)
    loss.backward()
    missing = [name for name, parameter in head.named_parameters() if parameter.grad is None]
    assert missing == []


def test_class_weights_change_the_loss_of_classes_only():
    head = build()
    labels = torch.randint(3, (2, 32, 32))
    output = head(pyramid())
    plain = head.losses(output, labels)
    weighted = head.losses(output, labels, class_weights=torch.tensor([1.0, 2.0, 5.0]))
    assert {name for name in plain if plain[name] != weighted[name]} == {name for name in plain if "cls" in name}


def test_scores_have_the_size_asked_for():
    head = build().eval()
    assert head.semantic(head(pyramid()), (33, 47)).shape == (2, 3, 33, 47)


@pytest.mark.parametrize(
    ("features", "side"),
    [
        (FeatureInfo(("a", "b"), (4, 6), (2, 4)), 30),
        (FeatureInfo(("a",), (4,), (4,)), 16),
        (SMALL, 37),
    ],
)
def test_other_pyramids_and_odd_sizes_work(features, side):
    head = build(features=features)
    output = head(pyramid(features=features, side=side))
    assert torch.isfinite(head.loss(output, torch.randint(3, (2, side, side))))


CHANGES = [
    {"layout": "released"},
    {"encoder": "vanilla"},
    {"encoder": "none"},
    {"sdda_projection": "linear"},
    {"sdda_query": "plain"},
    {"sdda_spikes": "query"},
    {"encoder_query": "multi"},
    {"mask_shortcut": "none"},
    {"mask_shortcut": "spikes"},
    {"mask_shortcut": "membrane"},
    {"decoder_attention": "softmax"},
    {"neuron": "i_lif", "alpha": 1.0},
    {"neuron": "i_lif", "cross_attention_neuron": NI_LIF},
    {"neuron": "ni_lif_const8"},
    {"neuron": "sigmoid_l2"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_row_of_table_3_trains_a_step(changes):
    head = build(**changes)
    loss = head.loss(head(pyramid()), torch.randint(3, (2, 32, 32)))
    loss.backward()
    assert torch.isfinite(loss)
    assert head.decoder.query_features.grad.abs().sum() > 0


def test_norm_only_in_cross_attention_changes_those_neurons_and_no_other():
    head = build(neuron="i_lif", cross_attention_neuron=NI_LIF)
    kinds = {name: type(module) for name, module in head.named_modules() if isinstance(module, ILIF | NILIF)}
    assert {name for name, kind in kinds.items() if kind is NILIF} == {name for name in kinds if ".cross_attn." in name}


@pytest.mark.parametrize("choice", ["fixed", "learnable"])
def test_scales_of_every_attention_are_learnt_together_the_vanilla_encoders_too(choice):
    head = build(encoder="vanilla", attention_scale=choice)
    scales = {name: module.scale for name, module in head.named_modules() if hasattr(module, "scale")}
    assert len(scales) == 1 + 2 * TINY.decoder_layers
    assert all(isinstance(each, nn.Parameter) == (choice == "learnable") for each in scales.values())
    (encoder,) = (torch.as_tensor(each) for name, each in scales.items() if name.startswith("pixel_decoder"))
    assert encoder.item() == pytest.approx((TINY.dim // 8) ** -0.5)  # eight heads


def test_the_ann_twin_has_the_same_layers_and_no_neuron():
    names = ("dim", "queries", "encoder_layers", "encoder_hidden", "groups", "decoder_layers", "decoder_hidden")
    sizes = {name: getattr(TINY, name) for name in names} | {"dims": (8, 8, 8, 8)}
    with torch.device("meta"):
        spiking = create_model("spike2former_voc", **sizes)
        ann = create_model("spike2former_voc", **sizes | ANN_TWIN)
    shapes = [{name: each.shape for name, each in model.state_dict().items()} for model in (spiking, ann)]
    assert shapes[0] == shapes[1]
    assert not [name for name, module in ann.named_modules() if isinstance(module, Neuron)]


def test_released_and_fixed_layouts_hold_the_same_parameters():
    fixed, released = build(), build(layout="released")
    assert isinstance(released.decoder.layers[0].ffn, ReleasedFFN)
    assert type(fixed.decoder.layers[0].ffn) is FFN
    released.load_state_dict(fixed.state_dict())
    maps = pyramid()
    assert not torch.allclose(fixed.eval()(maps).class_logits, released.eval()(maps).class_logits)


def test_const_8_divides_four_levels_by_eight():
    neuron = neuron_builder("ni_lif_const8", levels=4)()
    assert neuron(torch.tensor([0.4, 1.2, 9.0])).tolist() == [0, 1 / 8, 4 / 8]
    assert neuron.counts(neuron(torch.tensor([9.0]))).item() == 4


def test_sigmoid_l2_gives_channels_of_length_one():
    out = SigmoidL2(levels=4)(torch.tensor([[[0.0]], [[-9.0]], [[9.0]]]).view(1, 3, 1, 1))
    assert torch.allclose(out.flatten(), torch.tensor([2.0, 0, 4]) / 20**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "fixd"}, "layout: unknown choice 'fixd'; closest: fixed"),
        ({"encoder": "sdt"}, "encoder: unknown choice 'sdt'; closest: sdte"),
        ({"sdda_projection": "ecs"}, "sdda_projection: unknown choice"),
        ({"sdda_query": "dwconv"}, "sdda_query: unknown choice 'dwconv'; closest: dw_conv"),
        ({"sdda_spikes": "value"}, "sdda_spikes: unknown choice"),
        ({"encoder_query": "multiple"}, "encoder_query: unknown choice 'multiple'; closest: multi"),
        ({"mask_shortcut": "cnov"}, "mask_shortcut: unknown choice"),
        ({"cross_attention_neuron": "ni_lif"}, "takes a builder, got cross_attention_neuron='ni_lif'"),
        ({"decoder_attention": "sotfmax"}, "decoder_attention: unknown choice 'sotfmax'; closest: softmax"),
        ({"layout": "released", "sdda_spikes": "query"}, "no released layout"),
        ({"layout": "released", "encoder": "vanilla"}, "layout='released' is of encoder='sdte', got encoder='vanilla'"),
        ({"encoder": "none", "encoder_query": "multi"}, "not with encoder='none'"),
        ({"encoder": "vanilla", "sdda_projection": "linear"}, "sdda_projection='linear' is of encoder='sdte'"),
        ({"encoder": "none", "sdda_query": "plain"}, "sdda_query='plain' is of encoder='sdte'"),
        ({"encoder": "vanilla", "sdda_spikes": "query"}, "sdda_spikes='query' is of encoder='sdte'"),
        ({"alpha": 0.0}, "must be above 0, got 0.0"),
        ({"decoder_heads": 0}, "dim must be a multiple of heads, got dim=16, heads=0"),
        ({"encoder_hidden": 20}, "encoder_hidden must be a multiple of dim=16, got 20"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
    ],
    ids=str,
)
def test_choices_and_sizes_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("neuron", ["ni_lif", "i_lif"])
def test_the_first_gradient_of_a_new_head_is_finite_in_float32(neuron):
    """What the authors' code loses with 8 levels on a new backbone; the head alone keeps it."""
    head = build(neuron=neuron)
    head.loss(head(pyramid()), torch.randint(3, (2, 32, 32))).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in head.parameters()]).norm()
    assert 0 < norm < 1e6


def test_it_learns_to_tell_two_halves_apart():
    head = build(decoder_layers=1)
    maps, labels = pyramid(), torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, :, 16:] = 1
    for each in maps:
        each[..., each.shape[-1] // 2 :] += 3
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        head.loss(head(maps), labels).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    correct = head.semantic(head(maps), (32, 32)).argmax(1) == labels
    assert correct.float().mean() > 0.9

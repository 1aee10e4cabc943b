from dataclasses import dataclass

import pytest
import torch

from spikeformers.backbones.meta_spikeformer import MetaSpikeFormerConfig
from spikeformers.heads import IGNORE, MaskClassification, SegmenterConfig, SemanticFPNConfig
from spikeformers.neurons import ILIF, NILIF, Neuron, set_steps, streaming
from spikeformers.zoo import CATALOGUE, create_model, from_pretrained

SMALL = {"dims": (8, 16, 16, 24), "neck_dim": 8, "fpn_dim": 8, "num_classes": 5, "blocks": (1, 1, 1, 1, 1)}
SMALL["neck"] = "batch_norm"  # plain convolutions with random weights make no LIF fire


def small(**overrides):
    """A small segmenter whose norms have seen images, so that it fires."""
    model = create_model("meta_spikeformer_15m_fpn_voc", **(SMALL | overrides)).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 32, 32).double())
    torch.nn.init.normal_(model.head.classifier.classify.weight)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "count"),
    [  # 16.47 M and 58.9 M are the papers'
        ("meta_spikeformer_15m_fpn_ade20k", 16_470_142),
        ("meta_spikeformer_55m_fpn_ade20k", 58_992_278),
        ("meta_spikeformer_15m_fpn_voc", 16_453_501),
    ],
)
def test_parameter_counts_are_the_papers(name, count):
    assert sum(each.numel() for each in create_model(name).parameters()) == count


def test_an_option_reaches_backbone_and_head():
    model = small(neuron="ni_lif", levels=3, steps=2)
    neurons = [module for module in model.modules() if isinstance(module, Neuron)]
    assert {type(each) for each in neurons} == {NILIF}
    assert {each.levels for each in neurons} == {3}
    assert {each.steps for each in model.backbone.modules() if isinstance(each, Neuron)} == {2}
    assert {each.steps for each in model.head.modules() if isinstance(each, Neuron)} == {1}


def test_an_unknown_option_lists_those_of_all_parts():
    with pytest.raises(ValueError, match="no option 'neck_dims'; closest: neck_dim"):
        small(neck_dims=3)


def test_labels_of_another_type_and_sizes_that_are_none_are_refused(unchecked):
    model, images = small(), torch.rand(1, 3, 32, 32).double()
    output = model(images)
    labels = torch.zeros(1, 40, 48)  # labels keep their size
    assert model.loss(output, labels.long()).isfinite()
    with pytest.raises(ValueError, match=r"labels must be of torch.int64, got torch.uint8: give labels.long\(\)"):
        model.loss(output, labels.byte())
    with pytest.raises(ValueError, match=r"size must be a height and a width, such as \(48, 64\), got 48"):
        model.semantic(output, 48)


def test_logits_do_not_depend_on_who_shares_the_batch():
    model, images = small(steps=2), torch.rand(3, 3, 32, 48).double()
    together = model(images)
    assert together.std() > 0.1
    for index in range(3):
        torch.testing.assert_close(model(images[index : index + 1])[0], together[index], rtol=0, atol=1e-12)


def test_changing_the_steps_leaves_the_head_at_one():
    model, images = small(steps=1), torch.rand(3, 3, 32, 32).double()
    set_steps(model, 4)
    assert model.steps == 4
    assert model(images).shape == (3, 5, 16, 16)
    assert {each.steps for each in model.head.modules() if isinstance(each, Neuron)} == {1}


def test_a_stream_equals_its_clip():
    model, clip = small(steps=3), torch.rand(3, 2, 3, 32, 32).double()
    whole = model(clip)
    with streaming(model):
        for frame in clip:
            last = model(frame)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-12)


def test_temporal_neurons_carry_their_membrane_and_others_are_refused():
    images = torch.rand(1, 3, 32, 32).double()
    torch.manual_seed(0)
    inert = small(neuron="ni_lif", steps=3)
    torch.manual_seed(0)
    carried = small(neuron="ni_lif", steps=3, temporal=True, decay=0.5)
    assert all(each.decay == 0.5 for each in carried.modules() if isinstance(each, NILIF))
    assert not torch.equal(inert(images), carried(images))
    with pytest.raises(ValueError, match=r"temporal is for integer neurons .* got neuron='lif'"):
        small(temporal=True)


def test_decay_without_temporal_is_refused():
    with pytest.raises(ValueError, match=r"decay=0\.25 .* add temporal=True"):
        small(neuron="ni_lif", decay=0.25)


def test_no_option_of_the_catalogue_goes_to_backbone_and_head():
    """The config refuses such names; what the segmenter itself has goes to both on purpose."""
    checked = [entry.config for entry in CATALOGUE.values() if isinstance(entry.config, SegmenterConfig)]
    assert len(checked) == 9
    for config in checked:
        config.__post_init__()

    @dataclass(frozen=True)
    class Head(SemanticFPNConfig):
        layer_scale: float = 1.0

    with pytest.raises(ValueError, match="backbone and head both have an option 'layer_scale'"):
        SegmenterConfig(MetaSpikeFormerConfig(), Head())


# Spike2Former as a whole, of which the head's own tests see maps only.


def three_times(segmenter, **overrides):
    """A small one in float64 whose membranes live on over three steps."""
    return segmenter("spike2former", steps=3, temporal=True, **overrides).double()


def assert_close(found: MaskClassification, expected: MaskClassification, *, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=0, atol=atol)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits, rtol=0, atol=atol)


def test_a_stream_through_a_temporal_spike2former_equals_its_clip(segmenter):
    model, clip = three_times(segmenter), torch.rand(3, 2, 3, 32, 32).double()
    with torch.no_grad():
        whole = model(clip)
        with streaming(model):
            for frame in clip:
                last = model(frame)
    assert_close(last, whole)
    assert whole.mask_logits.std() > 0.1


def test_temporal_spike2former_is_not_the_inert_one_nor_forgets_its_order(segmenter):
    model, clip = three_times(segmenter), torch.rand(3, 2, 3, 32, 32).double()
    inert = segmenter("spike2former", steps=3).double()
    inert.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(inert(clip).mask_logits, model(clip).mask_logits)
        assert not torch.allclose(model(clip.flip(0)).mask_logits, model(clip).mask_logits)
        assert_close(inert(clip.flip(0)), inert(clip), atol=1e-10)


def test_changing_the_steps_of_a_spike2former_reaches_its_head(segmenter):
    model, images = segmenter("spike2former").double(), torch.rand(2, 3, 32, 32).double()
    with torch.no_grad():
        once = model(images)
        set_steps(model, 3)
        assert model.steps == 3
        assert {each.steps for each in model.modules() if isinstance(each, Neuron)} == {3}
        assert_close(model(images), once)  # steps alike, without a membrane between them


def test_a_saved_spike2former_comes_back_with_its_outputs(segmenter, tmp_path):
    options = {"encoder_scale": 0.1, "attention_scale": "learnable", "cross_attention_neuron": "i_lif"}
    model, images = segmenter("spike2former", steps=2, temporal=True, **options), torch.rand(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(again(images), model(images), atol=0)
    assert again.config == model.config


def test_where_branches_of_the_encoder_start_is_an_option_of_the_head_alone():
    sizes = {"dims": (8, 8, 8, 16), "blocks": (0, 0, 0, 1, 0), "dim": 8, "groups": 2, "encoder_layers": 1}
    sizes |= {"encoder_hidden": 16, "decoder_layers": 1, "decoder_heads": 2, "decoder_hidden": 16}
    model = create_model("spike2former_voc", encoder_scale=0.25, **sizes)
    scales = {name: each for name, each in model.named_parameters() if name.endswith(("esc_scale", "attn_scale"))}
    assert len(scales) == 2
    assert all(name.startswith("head.") and (each == 0.25).all() for name, each in scales.items())


def test_the_neuron_of_cross_attention_has_the_levels_steps_and_membrane_of_the_network(segmenter):
    model = three_times(segmenter, neuron="ni_lif", cross_attention_neuron="i_lif", decay=0.25, levels=3)
    crossing = [each for each in model.modules() if isinstance(each, ILIF) and not isinstance(each, NILIF)]
    assert len(crossing) == 7 * 2
    assert {(each.levels, each.steps, each.decay) for each in crossing} == {(3, 3, 0.25)}


@pytest.mark.parametrize("neuron", ["sigmoid_l2", "gelu"])
def test_the_neuron_of_cross_attention_may_differ_from_a_network_without_levels(segmenter, neuron):
    model = segmenter("spike2former", neuron=neuron, cross_attention_neuron="ni_lif")
    kinds = {name for name, each in model.named_modules() if isinstance(each, NILIF)}
    assert kinds
    assert all(".cross_attn." in name for name in kinds)
    assert torch.isfinite(model(torch.rand(1, 3, 32, 32)).mask_logits).all()


def test_an_unknown_neuron_of_cross_attention_lists_the_closest(segmenter):
    with pytest.raises(ValueError, match=r"unknown neuron 'nilif'; closest: .*ni_lif"):
        segmenter("spike2former", cross_attention_neuron="nilif")
    with pytest.raises(ValueError, match=r"temporal is for integer neurons .* got neuron='lif'"):
        three_times(segmenter, cross_attention_neuron="lif")


def test_saving_keeps_options_of_both_parts(tmp_path):
    model, images = small(neuron="ni_lif", steps=1).float(), torch.rand(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(from_pretrained(tmp_path)(images), model(images), rtol=0, atol=0)


def test_a_quantised_segmenter_has_few_bits_in_backbone_and_head():
    sizes = {**SMALL, "heads": 8}
    model = create_model("qsd_transformer_t_fpn_ade20k", **sizes)
    assert model.head.classifier.classify.bits == 4
    assert model.backbone.stage1a.down.conv.conv.bits == 4
    assert type(model.head.classifier.neuron) is NILIF


def test_training_lowers_the_loss():
    model = small(neuron="ni_lif", steps=1, attention="sdsa3").train()
    images = torch.rand(2, 3, 32, 32).double()
    labels = torch.arange(32).div(8, rounding_mode="floor").expand(2, 32, 32).clone()
    images[:, 0] += labels
    labels[:, :4] = IGNORE
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(8):
        loss = model.loss(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]

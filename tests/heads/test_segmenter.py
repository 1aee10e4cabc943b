import pytest
import torch

from spikeformers.heads import IGNORE
from spikeformers.neurons import NILIF, Neuron, set_steps, streaming
from spikeformers.zoo import create_model, from_pretrained

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

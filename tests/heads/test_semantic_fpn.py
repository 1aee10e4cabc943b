import pytest
import torch

from spikeformers.heads import IGNORE, SemanticFPNConfig
from spikeformers.heads.semantic_fpn import FeaturePyramid, plain_conv
from spikeformers.layers import FeatureInfo
from spikeformers.neurons import ILIF, neuron_builder

FEATURES = FeatureInfo(("a", "b", "c", "d", "e"), (4, 4, 8, 8, 12), (2, 4, 8, 16, 16))


def small(**options):
    steps = options.pop("steps", 1)
    neuron = neuron_builder(options.pop("neuron", "ni_lif"), steps=steps)
    config = SemanticFPNConfig(neck_dim=6, fpn_dim=5, **options)
    return config.build(FEATURES, num_classes=3, neuron=neuron, steps=steps).double().eval()


def maps(rows: int, height: int = 16, width: int = 24):
    sizes = [(max(1, height // s), max(1, width // s)) for s in FEATURES.strides]
    return [3 * torch.rand(rows, c, *size).double() for c, size in zip(FEATURES.channels, sizes, strict=True)]


def test_it_reads_the_last_map_of_each_stride():
    given = maps(2)
    logits = small()(given)
    assert logits.shape == (2, 3, 8, 12)
    given[3] = torch.full_like(given[3], torch.nan)  # the first of two at stride 16
    torch.testing.assert_close(small_like(given), logits, rtol=0, atol=0)


def small_like(given):
    torch.manual_seed(0)
    head = small()
    torch.manual_seed(0)
    return head(given)


def test_the_pyramid_by_hand():
    pyramid = FeaturePyramid((1, 1), 1, convolution=plain_conv, neuron=lambda: ILIF(levels=4)).double()
    for layer, weight in zip((*pyramid.lateral, *pyramid.output), (2.0, 3.0, 1.0, 1.0), strict=True):
        torch.nn.init.zeros_(layer.conv.weight)
        layer.conv.weight.data[..., layer.conv.kernel_size[0] // 2, layer.conv.kernel_size[1] // 2] = weight
        torch.nn.init.zeros_(layer.conv.bias)
    fine, coarse = torch.tensor([[[[0.2, 1.4], [0.6, 9.0]]]]).double(), torch.tensor([[[[1.0]]]]).double()
    # Counts 0 1 / 1 4 times 2, plus the coarse count 1 times 3 everywhere: 3 5 / 5 11, of which 4 is the most a neuron
    # counts.
    finer, coarser = pyramid([fine, coarse])
    assert finer.flatten().tolist() == [3, 4, 4, 4]
    assert coarser.flatten().tolist() == [3]


def test_time_is_averaged_before_the_head_so_that_steps_alike_change_nothing():
    torch.manual_seed(1)
    once, given = small(neuron="lif"), maps(2)
    torch.manual_seed(1)
    often = small(neuron="lif", steps=3)
    torch.testing.assert_close(often([each.repeat(3, 1, 1, 1) for each in given]), once(given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(23, 37), (16, 24), (5, 9)])
def test_odd_sizes_keep_the_resolution_of_the_finest_map(size):
    sizes = [tuple(-(-side // s) for side in size) for s in FEATURES.strides]
    given = [torch.rand(1, c, *each).double() for c, each in zip(FEATURES.channels, sizes, strict=True)]
    assert small()(given).shape[2:] == sizes[0]


def test_the_loss_by_hand_leaves_out_what_is_ignored():
    head = small()
    logits = torch.zeros(1, 3, 1, 2).double()
    logits[0, 1, 0, 0] = 5.0
    labels = torch.tensor([[[1, IGNORE]]])
    expected = -torch.log(torch.tensor(5.0).double().exp() / (torch.tensor(5.0).double().exp() + 2))
    torch.testing.assert_close(head.loss(logits, labels), expected)
    assert head.loss(logits, torch.full((1, 1, 2), IGNORE)) == 0
    weights = torch.tensor([1.0, 1.0, 3.0]).double()
    both = head.loss(logits, torch.tensor([[[1, 2]]]), class_weights=weights)
    torch.testing.assert_close(both, (expected + 3 * torch.tensor(3.0).double().log()) / 4)


def test_semantic_gives_logits_at_any_size():
    logits = torch.randn(2, 3, 4, 5).double()
    scores = small().semantic(logits, (9, 7))
    assert scores.shape == (2, 3, 9, 7)
    assert torch.equal(scores, torch.nn.functional.interpolate(logits, size=(9, 7), mode="bilinear"))
    assert scores.min() < 0


def test_under_autocast_sums_scores_and_losses_are_of_float32():
    head, sums = small().float(), {}
    for name in ("neck.output.0.neuron", "classifier.neuron"):
        head.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: sums.update({name: args[0].dtype})
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head([each.float() for each in maps(2)])
    assert logits.dtype == torch.bfloat16
    assert list(sums.values()) == [torch.float32] * 2
    labels = torch.randint(3, (2, 16, 24))
    assert head.semantic(logits, (16, 24)).dtype == head.loss(logits, labels).dtype == torch.float32


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_is_no_class_is_named(label):
    with pytest.raises(ValueError, match=f"label {label} is no class of this head: labels are 0 to 2, or 255"):
        small().loss(torch.zeros(1, 3, 1, 2).double(), torch.tensor([[[1, label]]]))


def test_an_unknown_neck_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"neck: unknown choice 'norm'; closest: .*batch_norm"):
        small(neck="norm")

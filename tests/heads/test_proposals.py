import pytest
import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from spikeformers.heads.proposals import Anchors, Dense, ProposalHead, ProposalNetwork
from spikeformers.neurons import neuron_builder

SIZES = (8, 12, 16, 24, 32)
BOXES = [[[4, 6, 20, 30], [30, 10, 60, 40]], [[10, 10, 40, 44]]]


@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_anchors_lie_around_the_places_of_maps_also_where_strides_do_not_divide_the_image(size):
    strides = (4, 8, 16, 16, 32)
    maps = [torch.zeros(1, 1, *(-(-side // stride) for side in size)) for stride in strides]
    for each, stride, anchors in zip(maps, strides, Anchors(SIZES, strides=strides)(maps), strict=True):
        centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).view(*each.shape[2:], 3, 2)
        assert centres[:, 0, :, 1].eq(torch.arange(each.shape[2])[:, None] * stride).all()
        assert centres[0, :, :, 0].eq(torch.arange(each.shape[3])[:, None] * stride).all()


@pytest.mark.parametrize(("level", "row", "column"), [(0, 3, 7), (2, 1, 2), (3, 2, 1), (4, 1, 1)])
def test_the_anchor_at_a_box_is_taught_that_box_and_with_those_deltas_proposes_it(level, row, column):
    network = ProposalNetwork(
        ProposalHead(4, levels=5, norm=nn.Identity, neuron=neuron_builder("i_lif")),
        anchors=Anchors(SIZES, strides=(4, 8, 16, 16, 32)),
    )
    maps = tuple(torch.zeros(1, 4, 64 // stride, 64 // stride) for stride in network.anchor_generator.strides)
    anchors = network.anchor_generator(maps)
    index = sum(map(len, anchors[:level])) + 3 * (row * maps[level].shape[3] + column) + 1  # the square one
    stride, side = network.anchor_generator.strides[level], SIZES[level]
    centre = torch.tensor([column, row]) * stride
    box = torch.cat((centre - side / 2, centre + side / 2))[None] + torch.tensor([[0.5, -0.25, 0.75, 0.5]])
    labels, matched = network.assign_targets_to_anchors([torch.cat(anchors)], [{"boxes": box}])
    assert labels[0][index] == 1
    deltas = network.box_coder.encode(matched, [torch.cat(anchors)])[0][None]
    objectness = torch.full((1, deltas.shape[1]), -9.0)
    objectness[0, index] = 9
    proposed = network.regions(Dense(objectness, deltas, maps), [(99, 99)])[0][0]
    torch.testing.assert_close(proposed, box[0].clamp(min=0), atol=1e-5, rtol=0)  # float32


def test_with_relus_the_first_stage_is_torchvisions():
    strides = (4, 8, 16, 32, 64)
    head = ProposalHead(4, levels=5, norm=nn.Identity, neuron=neuron_builder("relu")).double()
    anchors = Anchors(SIZES, strides=strides)
    ours = ProposalNetwork(head, anchors=anchors, limit=30)
    other = RPNHead(4, 3).double()
    other.load_state_dict(
        {
            **{f"conv.0.0.{kind}": getattr(head.conv[0], kind) for kind in ("weight", "bias")},
            **{f"cls_logits.{kind}": getattr(head.objectness, kind) for kind in ("weight", "bias")},
            **{f"bbox_pred.{kind}": getattr(head.deltas, kind) for kind in ("weight", "bias")},
        }
    )
    counts = {"training": 60, "testing": 30}, {"training": 30, "testing": 30}
    theirs = RegionProposalNetwork(
        AnchorGenerator(anchors.sizes, anchors.aspect_ratios), other, 0.7, 0.3, 256, 0.5, *counts, 0.7
    )
    maps = [torch.rand(2, 4, 128 // stride, 64 // stride, dtype=torch.float64) for stride in strides]
    targets = [{"boxes": torch.tensor(each).double()} for each in BOXES]
    images = ImageList(torch.zeros(2, 3, 128, 64, dtype=torch.float64), [(128, 64), (100, 60)])
    torch.manual_seed(1)
    regions, parts = theirs(images, dict(enumerate(maps)), targets)
    torch.manual_seed(1)
    dense = ours(maps)
    torch.testing.assert_close(ours.regions(dense, images.image_sizes), regions)
    # They judge objectness in float32.
    found = [each.item() for each in ours.losses(dense, targets).values()]
    assert found == pytest.approx([each.item() for each in parts.values()], rel=1e-6)


def test_a_norm_sees_the_pixels_of_all_levels_as_one_batch():
    head = ProposalHead(2, levels=2, norm=nn.BatchNorm2d, neuron=nn.Identity)
    maps = [torch.randn(2, 2, 6, 6), 3 + torch.randn(2, 2, 3, 3)]
    norm = head.conv[1].train()
    norm.momentum = 1.0
    head(maps)
    pixels = torch.cat([head.conv[0](each).flatten(2) for each in maps], 2)
    torch.testing.assert_close(norm.running_mean, pixels.mean((0, 2)))

import pytest
import torch
from torch import nn

from spikeformers.heads.regions import MaskHead, RegionPool


@pytest.mark.parametrize(
    ("side", "level"), [(8, 0), (111, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3), (1000, 3)]
)
def test_regions_are_read_from_the_level_of_their_size_by_hand(side, level):
    maps = [
        torch.full((1, 1, 1024 // stride, 1024 // stride), float(index)) for index, stride in enumerate((4, 8, 16, 16))
    ]
    pooled = RegionPool((4, 8, 16, 16), size=1)(maps, [torch.tensor([[10.0, 10, 10 + side, 10 + side]])])
    assert pooled.item() == level


@pytest.mark.parametrize("side", [14, 120, 240, 460])
def test_regions_are_read_from_where_they_lie_on_every_level(side):
    strides = (4, 8, 16, 16)
    ramps = [((torch.arange(512 // stride) + 0.5) * stride).expand(1, 1, 512 // stride, -1) for stride in strides]
    pooled = RegionPool(strides, size=7)(ramps, [torch.tensor([[21.0, 21, 21 + side, 21 + side]])])
    centres = 21 + side * (torch.arange(7) + 0.5) / 7
    torch.testing.assert_close(pooled[0, 0], centres.expand(7, 7))


def test_regions_are_pooled_from_the_maps_of_every_step_time_major():
    maps = [torch.rand(6, 2, 64 // stride, 64 // stride, dtype=torch.float64) for stride in (4, 8, 16, 16)]
    regions = [torch.tensor([[1.0, 2, 30, 40]]), torch.zeros(0, 4), torch.tensor([[5.0, 5, 9, 9], [0, 0, 64, 60]])]
    pool = RegionPool((4, 8, 16, 16), size=3)
    steps = [pool([each[3 * t : 3 * t + 3] for each in maps], regions) for t in range(2)]
    assert torch.equal(pool(maps, regions), torch.cat(steps))


def test_doubling_is_a_transposed_convolution():
    head = MaskHead(4, num_classes=3, convolution=nn.Conv2d, neuron=nn.Identity, depth=0).double()
    transposed = nn.ConvTranspose2d(4, 4, 2, stride=2).double()
    head.enlarge.conv.weight.data = transposed.weight.permute(1, 2, 3, 0).reshape(16, 4, 1, 1)
    head.enlarge.conv.bias.data = transposed.bias.repeat_interleave(4)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(head(x), head.classify(transposed(x)))

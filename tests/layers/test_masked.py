"""Sparse computation under a mask: what is hidden does not exist, and what is visible is as in the dense network."""

import pytest
import torch
from torch import nn

from spikeformers.layers import ConvBN
from spikeformers.layers.masked import Visible, masked


def checkerboard(rows: int = 2, side: int = 4) -> torch.Tensor:
    cells = torch.arange(side)
    return ((cells[:, None] + cells) % 2 == 0).expand(rows, side, side)


def test_a_grid_is_repeated_to_the_resolution_of_the_map_and_over_time():
    grid = torch.tensor([[[True, False], [False, True]]])
    mask = Visible(grid).at(torch.zeros(3, 5, 4, 4))
    rows = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert mask.tolist() == [[[bool(cell) for cell in row] for row in rows]] * 3


def test_time_is_major_so_each_step_repeats_the_masks_of_the_batch():
    grid = torch.tensor([[[True]], [[False]]])
    assert Visible(grid).at(torch.zeros(4, 1, 1, 1)).flatten().tolist() == [True, False, True, False]


def test_gather_and_scatter_are_inverse_and_hidden_positions_come_back_zero():
    visible, x = Visible(checkerboard()), torch.randn(2, 3, 8, 8)
    pixels = visible.gather(x)
    assert pixels.shape == (2 * 32, 3, 1, 1)
    assert torch.equal(visible.scatter(pixels, x), visible.cover(x))


@pytest.mark.parametrize("shape", [(2, 1, 6, 6), (3, 1, 4, 4), (2, 1, 4, 8)])
def test_a_map_that_is_no_multiple_of_the_grid_is_refused(shape):
    with pytest.raises(ValueError, match="does not fit a map of shape"):
        Visible(checkerboard()).at(torch.zeros(shape))


def test_a_batch_norm_sees_the_visible_positions_only():
    torch.manual_seed(0)
    norm, visible, x = nn.BatchNorm2d(3).double(), Visible(checkerboard()), torch.randn(2, 3, 8, 8).double()
    with masked(norm, visible):
        out = norm(x)
    seen = x.permute(0, 2, 3, 1)[visible.at(x)]
    expected = (seen - seen.mean(0)) / (seen.var(0, unbiased=False) + norm.eps).sqrt()
    # Another order of sums than ours: rounding of float64.
    assert torch.allclose(visible.gather(out)[:, :, 0, 0], expected, atol=1e-12)
    assert not out[~visible.at(x)[:, None].expand_as(out)].any()
    assert torch.allclose(norm.running_mean, 0.1 * seen.mean(0), atol=1e-12)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * seen.var(0), atol=1e-12)


def test_a_hidden_position_reaches_no_visible_one_through_convolution_norm_or_pool():
    torch.manual_seed(0)
    chain = nn.Sequential(ConvBN(3, 4, 3), nn.MaxPool2d(3, 2, 1), ConvBN(4, 4, 3, bias=True), nn.AvgPool2d(3, 1, 1))
    visible, x = Visible(checkerboard()), torch.randn(2, 3, 8, 8)
    noisy = torch.where(visible.at(x)[:, None], x, torch.randn_like(x) * 100)
    for mode in (True, False):
        chain.train(mode)
        with masked(chain, visible):
            clean, dirty = chain(visible.cover(x)), chain(visible.cover(noisy))
        assert torch.equal(clean, dirty)
        assert not clean[~visible.at(clean)[:, None].expand_as(clean)].any()


def test_the_layers_are_the_dense_ones_again_afterwards():
    chain, x = ConvBN(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)
    keys, before = list(chain.state_dict()), chain(x)
    with masked(chain, Visible(checkerboard())):
        assert list(chain.state_dict()) == keys
        assert not torch.equal(chain(x), before)
    assert torch.equal(chain(x), before)
    with pytest.raises(ZeroDivisionError), masked(chain, Visible(checkerboard())):
        raise ZeroDivisionError
    assert torch.equal(chain(x), before)


def test_what_stands_at_hidden_positions_does_not_matter_not_even_if_it_is_no_number():
    visible, x = Visible(checkerboard()), torch.full((2, 3, 8, 8), torch.nan)
    x = torch.where(visible.at(x)[:, None], torch.ones_like(x), x)
    assert visible.cover(x).sum() == 2 * 3 * 32


def test_the_layout_in_memory_stays():
    visible, x = Visible(checkerboard()), torch.randn(2, 3, 8, 8)
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert visible.scatter(visible.gather(given), given).stride() == given.stride()


def test_norms_over_positions_and_a_second_mask_are_refused():
    visible, chain = Visible(checkerboard()), ConvBN(3, 4, 3)
    with (
        pytest.raises(ValueError, match="1 is a GroupNorm, which cannot be masked"),
        masked(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), visible),
    ):
        pass
    with masked(chain, visible), pytest.raises(ValueError, match="bn is under a mask already"), masked(chain, visible):
        pass

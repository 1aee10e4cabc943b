"""SDDA: sampling against a loop over points and corners, by hand, its layouts, its points, and Table 3's rows."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikeformers.attention import (
    SDDA,
    ReleasedSDDA,
    SoftmaxSDDA,
    SpikeQuery,
    SpikingQuerySDDA,
    deformable_sampling,
)
from spikeformers.attention.sdda import read_channels_last
from spikeformers.deploy import unroll
from spikeformers.energy import record
from spikeformers.energy.products import products_of
from spikeformers.layers import Pointwise
from spikeformers.neurons import neuron_builder

NI_LIF = neuron_builder("ni_lif")


def unchanged(dim: int, *, neuron: object) -> nn.Module:
    """No projection."""
    return nn.Identity()


def operands(size: tuple[int, int], *, groups: int = 2, spread: float = 2.0, dtype=torch.float64) -> list[Tensor]:
    """Values of 4 channels, offsets, and weights of spikes over 4."""
    values = torch.randn(2, 4, *size, dtype=dtype)
    offsets = spread * torch.randn(2, groups, 9, 2, *size, dtype=dtype)
    return [values, offsets, torch.randint(0, 5, (2, groups, 9, *size)).to(dtype) / 4]


def by_loop(values: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Eq. 4 as it stands: over groups, points, and the four pixels around each point."""
    batch, _, height, width = values.shape
    groups = offsets.shape[1]
    image = torch.arange(batch)[:, None, None]
    out = []
    for group, v in enumerate(values.chunk(groups, 1)):
        total = torch.zeros_like(v)
        for k in range(9):
            x = offsets[:, group, k, 0] + torch.arange(width) + k // 3 - 1
            y = offsets[:, group, k, 1] + torch.arange(height)[:, None] + k % 3 - 1
            for column in (x.floor(), x.floor() + 1):
                for row in (y.floor(), y.floor() + 1):
                    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                    share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
                    pixels = v[image, :, row.long().clamp(0, height - 1), column.long().clamp(0, width - 1)]
                    total = total + (weights[:, group, k] * share)[:, None] * pixels.permute(0, 3, 1, 2)
        out.append(total)
    return torch.cat(out, 1)


@pytest.mark.parametrize("size", [(4, 8), (5, 7), (1, 3)])
def test_sampling_and_its_gradients_equal_the_loop_over_points_and_corners(size):
    results = []
    for sample in (deformable_sampling, by_loop):
        torch.manual_seed(1)
        inputs = [x.requires_grad_() for x in operands(size)]
        y = sample(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, torch.randn_like(y))])
    for fast, loop in zip(*results, strict=True):
        assert fast.any()
        assert torch.allclose(fast, loop, atol=1e-12, rtol=0)  # sums of 36 numbers near 1, in another order


def test_without_offsets_equal_weights_average_the_3x3_window():
    values, offsets, weights = operands((5, 6))
    y = deformable_sampling(values, torch.zeros_like(offsets), torch.full_like(weights, 1 / 9))
    assert torch.allclose(y, F.avg_pool2d(values, 3, 1, 1), atol=1e-14, rtol=0)  # zeros around count as pixels


@pytest.mark.parametrize("size", [(4, 8), (5, 7), (13, 33)])
def test_whole_offsets_are_shifts_to_the_last_bit_in_float32(size):
    values, offsets, weights = operands(size, dtype=torch.float32)
    weights = torch.zeros_like(weights)
    weights[:, :, 4] = 1  # the middle of the window
    offsets = torch.tensor([2.0, -1.0]).view(2, 1, 1).expand_as(offsets)
    shifted = F.pad(values, (0, 2, 1, 0))[:, :, : size[0], 2:]
    assert torch.equal(deformable_sampling(values, offsets, weights), shifted)


@pytest.mark.parametrize(("k", "x", "y"), [(0, -1, -1), (1, -1, 0), (2, -1, 1), (3, 0, -1), (7, 1, 0)])
def test_points_run_down_the_columns_of_the_window(k, x, y):
    values, offsets, weights = operands((5, 5))
    weights = torch.zeros_like(weights)
    weights[:, :, k] = 1
    read = deformable_sampling(values, torch.zeros_like(offsets), weights)[:, :, 2, 2]
    assert torch.equal(read, values[:, :, 2 + y, 2 + x])


def test_a_group_reads_its_own_channels_at_its_own_points():
    values, offsets, weights = operands((4, 4))
    y = deformable_sampling(values, offsets, weights)
    offsets[:, 1] += 1
    changed = deformable_sampling(values, offsets, weights)
    assert torch.equal(changed[:, :2], y[:, :2])
    assert not torch.equal(changed[:, 2:], y[:, 2:])


def lively(module: nn.Module) -> nn.Module:
    """`module` in eval mode with norms that know their input and shift it up, so that all its neurons fire."""
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.constant_(norm.bias, 1.0)
    module(3 * torch.randn(8, 8, 6, 6, dtype=norms[0].weight.dtype))
    return module.eval()


def active(kind: type[SDDA] = SDDA, *, dtype: torch.dtype = torch.float64, **options) -> SDDA:
    """SDDA of 8 channels in eval mode, lively, and past its start: offsets of about a pixel, weights that fire."""
    module = kind(8, neuron=NI_LIF, groups=2, **options).to(dtype)
    for conv in (module.offset_conv.conv, module.attn_conv.conv):
        nn.init.normal_(conv.weight)
    lively(module)
    nn.init.zeros_(module.offset_conv.bn.bias)
    return module


def test_at_the_start_points_are_the_window_and_no_weight_fires():
    module = lively(SDDA(8, neuron=NI_LIF, groups=2))
    nn.init.zeros_(module.offset_conv.bn.bias)
    nn.init.zeros_(module.attn_conv.bn.bias)
    u = 3 * torch.randn(2, 8, 3, 5)
    points = module.sampling_points(u)
    assert points.shape == (2, 2, 9, 2, 3, 5)
    assert points[0, 0, 5, :, 2, 3].tolist() == [3, 3]  # pixel (3, 2), one row down
    with record(module) as spikes:
        module(u)
    assert spikes["query.spikes"].any()
    assert not spikes["attn"].any()


def test_at_the_start_weights_have_a_gradient_and_offsets_have_none_until_weights_fire():
    module = lively(SDDA(8, neuron=NI_LIF, groups=2).double())
    nn.init.zeros_(module.attn_conv.bn.bias)
    u = 3 * torch.randn(2, 8, 4, 4, dtype=torch.float64)
    offsets, weights = module.offset_conv.bn.bias, module.attn_conv.bn.bias
    of_offsets, of_weights = torch.autograd.grad(module(u).square().sum(), (offsets, weights))
    assert of_weights.any()
    assert not of_offsets.any()
    nn.init.ones_(weights)
    assert torch.autograd.grad(module(u).square().sum(), offsets)[0].any()


def test_sampling_points_are_where_the_forward_pass_reads():
    module = active()
    u = 3 * torch.randn(2, 8, 4, 5, dtype=torch.float64)
    nn.init.zeros_(module.offset_conv.bn.weight)
    module.offset_conv.bn.bias.data = torch.tensor([100.0, 0.0], dtype=torch.float64).repeat(18)
    assert (module.sampling_points(u)[:, :, :, 0] >= 99).all()
    values = []
    module.output_proj.pw1_neuron.register_forward_pre_hook(lambda _, args: values.append(args[0]))
    module(u)
    assert not values[0].any()  # a hundred pixels to the right there is nothing


def test_weights_are_spikes_and_values_are_not():
    module = active()
    with record(module) as spikes:
        module(3 * torch.randn(2, 8, 4, 5, dtype=torch.float64))
    assert spikes["attn"].shape == (2, 18, 4, 5)
    assert len(spikes["attn"].unique()) > 2
    assert "value" not in spikes


def test_spiking_in_query_makes_the_values_spikes_and_not_the_weights():
    module = active(SpikingQuerySDDA)
    with record(module) as spikes:
        module(3 * torch.randn(2, 8, 4, 5, dtype=torch.float64))
    assert spikes["value"].shape == (2, 8, 4, 5)
    assert spikes["value"].any()
    assert "attn" not in spikes


def test_softmax_weights_start_equal_and_add_up_to_one():
    layer = SoftmaxSDDA(4, neuron=partial(nn.GELU), groups=2, proj=unchanged).double().eval()
    u = torch.ones(1, 4, 4, 4, dtype=torch.float64)
    assert torch.allclose(layer(u)[:, :, 1:-1, 1:-1], u[:, :, 1:-1, 1:-1])
    nn.init.normal_(layer.attn_conv.conv.weight)
    weights = layer.attn(layer.attn_conv(layer.query(torch.randn_like(u)))).unflatten(1, (2, 9))
    assert torch.allclose(weights.sum(2), torch.ones(1, dtype=torch.float64))
    assert weights.std(2).min() > 0


def test_both_layouts_agree_on_one_pixel_and_only_there():
    fixed, released = active(), active(ReleasedSDDA)
    released.load_state_dict(fixed.state_dict())
    pixel, maps = (3 * torch.randn(2, 8, *size, dtype=torch.float64) for size in ((1, 1), (3, 4)))
    assert torch.equal(fixed(pixel), released(pixel))
    assert not torch.allclose(fixed(maps), released(maps), atol=1e-2)


def test_the_released_layout_reads_channels_where_pixels_are():
    x = torch.arange(2 * 3 * 2).view(1, 3, 2, 2).float()  # 3 channels of 2x2
    assert read_channels_last(x)[0, :, 0, 0].tolist() == [0, 1, 2]  # the first three numbers in memory
    assert read_channels_last(x)[0, :, 0, 1].tolist() == [3, 4, 5]


@pytest.mark.parametrize(("kind", "follows"), [(SDDA, True), (ReleasedSDDA, False)])
def test_moving_the_image_moves_the_output_in_the_fixed_layout_only(kind, follows):
    module = active(kind)
    nn.init.normal_(module.offset_conv.conv.weight, std=0.2)
    u = 3 * torch.randn(1, 8, 32, 32, dtype=torch.float64)
    moved = module(u.roll((1, 2), (2, 3)))
    # Both projections, the window and its offsets reach 2 + 2 + 1 + 5 pixels: the middle does not see the border.
    assert module.offsets(module.query(u)).abs().max() < 5
    inner, outer = moved[..., 14:18, 14:18], module(u)[..., 13:17, 12:16]
    assert torch.allclose(inner, outer, atol=1e-9) == follows  # 1e-9: rounding of sums, far below a spike


ROWS = {
    "baseline": (SDDA, {}),
    "released layout": (ReleasedSDDA, {}),
    "w/o ESC": (SDDA, {"proj": Pointwise}),
    "w/o DWConv": (SDDA, {"query": SpikeQuery}),
    "spiking in query": (SpikingQuerySDDA, {}),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_table_3_gives_a_gradient_to_every_parameter(row):
    kind, options = ROWS[row]
    module = active(kind, **options)
    u = (3 * torch.randn(2, 8, 5, 4, dtype=torch.float64)).requires_grad_()
    module(u).square().sum().backward()
    for name, parameter in module.named_parameters():
        # In eval mode the norm takes the convolution's bias for what it is, so that it counts, too.
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert u.grad.any()


def test_the_papers_size_has_the_authors_number_of_parameters():
    with torch.device("meta"):
        module = SDDA(256, neuron=NI_LIF)
    assert sum(parameter.numel() for parameter in module.parameters()) == 785_696


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match=r"multiple of groups, got dim=8, groups=3"):
        SDDA(8, neuron=NI_LIF, groups=3)


def test_binary_spikes_over_virtual_steps_give_the_same_currents():
    module = active()
    u = 3 * torch.randn(2, 8, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        # Sums in another order; values of ten at most.
        assert torch.allclose(unroll(module)(u), module(u), atol=1e-12, rtol=0)


def test_energy_sees_the_taps_as_real_products_and_the_weights_as_additions():
    module = active(dtype=torch.float32)
    with torch.no_grad():
        _, products = products_of(module, 3 * torch.randn(1, 8, 4, 5))
    own = {product.kind: product for product in products if product.module == ""}
    points = 2 * 9 * 4 * 5  # of both groups, for 4 channels each
    assert (own["taps"].operand, own["taps"].products) == ("real", points * 4 * 4)
    assert (own["mask"].operand, own["mask"].products) == ("spikes", points * 4)
    assert own["mask"].most == 4
    assert own["mask"].rate > 0
    assert "unknown" not in own


def test_points_stay_float32_under_autocast():
    module = active(dtype=torch.float32)
    u = 3 * torch.randn(1, 8, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.sampling_points(u).dtype == torch.float32
        assert module(u).isfinite().all()


def test_sampling_compiles_as_one_graph_for_any_size(unchecked):
    compiled = torch.compile(deformable_sampling, fullgraph=True, backend="eager", dynamic=True)
    for size in ((5, 7), (6, 4)):
        inputs = operands(size)
        assert torch.equal(compiled(*inputs), deformable_sampling(*inputs))


def test_it_exports_as_standard_operators(unchecked):
    module = active()
    u = 3 * torch.randn(2, 8, 5, 7, dtype=torch.float64)
    program = torch.export.export(module, (u,))
    assert torch.equal(program.module()(u), module(u))
    sampler = partial(filter, lambda node: "grid_sampl" in str(node.target))
    assert len(list(sampler(program.graph.nodes))) == 1

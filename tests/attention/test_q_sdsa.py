"""Q-SDSA by hand and in integers, ties included; and MPRF, which centres what IE-LIF neurons read."""

from functools import partial
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch import nn

from spikeformers.attention import MPRF, QSDSA, SDSA3, Rectified, integer_attention
from spikeformers.energy import record
from spikeformers.layers import ConvBN, RepConv
from spikeformers.neurons import IELIF, neuron_builder
from spikeformers.zoo import create_model
from tests.attention.test_ssa import Chosen

IE_LIF = neuron_builder("ie_lif")


def attended(kind: type[SDSA3], *, levels: int = 4, heads: int = 1, **counts: torch.Tensor) -> torch.Tensor:
    """Spikes of the attention's neuron for counts q, k, v [TB, C, H, W], in float64."""
    operands = {name: each.double() for name, each in counts.items()}
    builder = neuron_builder("ie_lif", levels=levels)
    module = kind(operands["q"].shape[1], neuron=builder, heads=heads, qkv=Chosen, proj=Chosen)
    for name, each in operands.items():
        getattr(module, f"{name}_conv").value = each / levels
    return module(torch.zeros_like(operands["q"]))


def product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int) -> torch.Tensor:
    """q (k^T v) of counts [TB, C, H, W], head by head, token by token."""
    q, k, v = (each.flatten(2).unflatten(1, (heads, -1)) for each in (q, k, v))
    out = torch.zeros_like(q)
    for n in range(q.shape[-1]):
        for m in range(q.shape[-1]):
            out[..., n] += (q[..., n] * k[..., m]).sum(-1, keepdim=True) * v[..., m]
    return out


def drawn(levels: int) -> dict[str, torch.Tensor]:
    """Counts q, k, v of 4 heads of width 4; few small ones, so that products spread over all results."""
    return {name: torch.randint(0, levels + 1, (32, 16, 2, 3)) * (torch.rand(32, 16, 2, 3) < 0.6) for name in "qkv"}


def test_two_tokens_by_hand():
    def tokens(*each: tuple[int, int]) -> torch.Tensor:
        return torch.tensor(each).mT.reshape(1, 2, 1, 2)

    # k^T v = [[3*2 + 1*4, 3*4 + 1*1], [0*2 + 4*4, 0*4 + 4*1]] = [[10, 13], [16, 4]]
    # q (k^T v) = [[4*10 + 4*16, 4*13 + 4*4], [2*16, 2*4]] = [[104, 68], [32, 8]], in 64ths 1.625, 1.0625, 0.5, 0.125
    spikes = attended(QSDSA, q=tokens((4, 4), (0, 2)), k=tokens((3, 0), (1, 4)), v=tokens((2, 4), (4, 1)))
    assert spikes.flatten(2)[0].mT.tolist() == [[2 * 0.5, 1 * 0.5], [1 * 0.5, 0]]  # a half is rounded up


@pytest.mark.parametrize("levels", [1, 2, 4, 8])
def test_counts_equal_integer_arithmetic(levels):
    counts = drawn(levels)
    exact = product(**counts, heads=4)
    emitted = attended(QSDSA, levels=levels, heads=4, **counts) * (levels / 2)
    assert torch.equal(emitted.flatten(2), integer_attention(exact, levels=levels).flatten(1, 2).double())
    assert len(emitted.unique()) == levels + 1
    if levels == 4:
        assert torch.equal(integer_attention(exact), (exact + 32 >> 6).clamp(0, 4))


@pytest.mark.parametrize("levels", [3, 5, 6, 7])
def test_counts_of_other_levels_equal_integer_arithmetic_except_at_ties(levels):
    # 1/3 is no binary fraction, so a half may arrive as a little less and be rounded down.
    counts = drawn(levels)
    exact = product(**counts, heads=4)
    emitted = attended(QSDSA, levels=levels, heads=4, **counts) * (levels / 2)
    expected = integer_attention(exact, levels=levels).flatten(1, 2)
    tie = ((exact + 2 * levels**2) % (4 * levels**2) == 0).flatten(1, 2)
    assert torch.equal(emitted.round().flatten(2)[~tie].long(), expected[~tie])
    assert tie.float().mean() < 0.1


@pytest.mark.parametrize(
    ("q", "v", "emitted"), [(1, (4, 4, 0, 0), 1), (3, (4, 4, 0, 0), 2), (4, (4, 4, 2, 0), 3), (4, (4, 4, 4, 2), 4)]
)
def test_ties_are_rounded_up(q, v, emitted):
    v = torch.tensor(v).view(1, 1, 2, 2)
    tied = q * 4 * int(v.sum())
    assert (tied + 32) % 64 == 0
    spikes = attended(QSDSA, q=torch.full_like(v, q), k=torch.full_like(v, 4), v=v)
    assert (spikes * 2).flatten().tolist() == [emitted] * 4
    assert integer_attention(torch.tensor([tied - 1, tied])).tolist() == [emitted - 1, emitted]


def test_integers_end_at_zero_and_at_the_most_levels():
    for levels in (2, 3, 4):
        top = 4 * levels**3 + 100
        assert integer_attention(torch.tensor([0, top, 10 * top]), levels=levels).tolist() == [0, levels, levels]


def test_it_fires_as_sdsa_3_does_and_each_count_is_worth_twice_as_much():
    counts = drawn(4)
    assert torch.equal(attended(QSDSA, heads=4, **counts), 2 * attended(SDSA3, heads=4, **counts))
    assert SDSA3(8, neuron=IE_LIF).state_dict().keys() == QSDSA(8, neuron=IE_LIF).state_dict().keys()


@pytest.mark.parametrize("levels", [2, 4, 8])
def test_counts_of_the_attention_are_worth_two_over_d_and_others_one(levels):
    module = QSDSA(8, neuron=neuron_builder("ie_lif", levels=levels))
    assert [neuron.unit * levels for neuron in (module.q, module.k, module.v, module.attn)] == [1, 1, 1, 2]
    assert all(isinstance(neuron, IELIF) for neuron in (module.q, module.attn))


@pytest.mark.parametrize("neuron", ["lif", "i_lif", "ni_lif"])
def test_other_neurons_are_refused_with_the_operator_to_take(neuron):
    with pytest.raises(ValueError, match=r'"ie_lif"; with .* take attention="sdsa3"'):
        QSDSA(8, neuron=neuron_builder(neuron))


def test_gradients_reach_every_projection():
    module = QSDSA(16, neuron=IE_LIF, heads=4, qkv=partial(Rectified, projection=RepConv))
    module(torch.randint(0, 5, (2, 16, 5, 4)) / 4).pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    for name in "qkv":
        assert module.get_submodule(f"{name}_conv").mprf.weight.grad.abs().sum() > 0


def test_an_mprf_starts_by_turning_any_normal_distribution_into_half_plus_minus_a_quarter():
    x = 3 + 5 * torch.randn(64, 2, 32, 32, dtype=torch.float64)
    y = MPRF(2).double()(x)
    # What is left is eps = 1e-5 beside a variance of 25.
    assert torch.allclose(y.mean((0, 2, 3)), torch.full((2,), 0.5).double(), atol=1e-12)
    assert torch.allclose(y.std((0, 2, 3), unbiased=False), torch.full((2,), 0.25).double(), atol=1e-6)


def test_behind_an_mprf_counts_follow_the_normal_distribution_they_stand_for():
    x = 3 + 5 * torch.randn(64, 2, 32, 32)
    counts = IELIF().counts(IELIF()(MPRF(2)(x)))
    shares = counts.long().flatten().bincount(minlength=5) / counts.numel()
    membrane = NormalDist(0.5, 0.25)
    edges = [0, *(membrane.cdf(threshold) for threshold in (0.125, 0.375, 0.625, 0.875)), 1]
    expected = torch.tensor([high - low for low, high in pairwise(edges)])
    # 131,072 samples: four standard deviations of a share are below 0.006.
    assert torch.allclose(shares, expected, atol=0.006)
    ordinary = nn.BatchNorm2d(2)(x)
    assert (IELIF()(ordinary) == 0).float().mean() > 0.5  # what MPRF is there for: the left half, lost


@pytest.mark.parametrize("projection", [RepConv, partial(ConvBN, kernel=1)])
def test_a_rectified_projection_merges_into_one_convolution(projection):
    layer = Rectified(6, 6, projection=projection)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    layer = layer.double().eval()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    merged = layer.merge()
    assert isinstance(merged, nn.Conv2d)
    # Sums in another order, of values of order 10.
    assert torch.allclose(merged(x), layer(x), atol=1e-12, rtol=0)
    assert not torch.allclose(merged(x), layer.projection(x), atol=1e-3)


def test_its_neurons_are_recorded_under_the_usual_names():
    sizes = {"dims": (8, 8, 16, 16), "blocks": (0, 0, 0, 1, 1), "num_classes": 3}
    model = create_model("qsd_transformer_t", **sizes).eval()
    with torch.no_grad(), record(model) as spikes:
        model(torch.randn(1, 3, 32, 32))
    for stage in ("stage3", "stage4"):
        assert {f"{stage}.block0.attn.{name}" for name in ("q", "k", "v", "attn")} <= set(spikes)

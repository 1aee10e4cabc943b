"""The information argument: scores by hand, entropies against their definitions, and both propositions in numbers."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from spikeformers.attention import SSA, SoftmaxAttention
from spikeformers.backbones import ANN_TWIN
from spikeformers.distill.information import (
    attention_scores,
    compare,
    conditional_entropy,
    count_entropy,
    entropy,
    mutual_information,
    plot,
    standard_edges,
    standardise,
)
from spikeformers.energy import record
from spikeformers.neurons import IELIF, ILIF, Door
from spikeformers.zoo import create_model

SIZES = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "num_classes": 3}
META = {"dims": (8, 16, 16, 24), "strides": (1, 2, 2, 2, 1), "blocks": (1, 0, 0, 1, 1), "num_classes": 3}
CLEAR = 0.1  # bits; what another draw of pixels or another start of the weights changes is a tenth of it


def network(**overrides) -> nn.Module:
    """A small Spikformer in float64 whose neurons fire: its batch norms know some images and add one half."""
    torch.manual_seed(0)
    model = create_model("spikformer_v2_8_384", **(SIZES | overrides)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)
            module.momentum = 1.0
    model(images(8))
    return model.eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def attention(
    kind: Callable[..., nn.Module] = SSA, *, dim: int = 16, heads: int = 2, neuron: Callable = ILIF, steps: int = 1
) -> nn.Module:
    """One attention in float64 with plain 1x1 convolutions, the same for every kind and neuron."""
    torch.manual_seed(0)
    layer = kind(dim, neuron=neuron, heads=heads, qkv=lambda i, o: nn.Conv2d(i, o, 1))
    return nn.Sequential(Door(in_channels=dim, steps=steps), layer).double().eval()


def centred(model: nn.Module, *, mean: float, std: float) -> nn.Module:
    """Queries and keys of independent channels N(mean, std^2) for images of standard normal pixels."""
    for conv in (model[1].q_conv, model[1].k_conv):
        nn.init.orthogonal_(conv.weight, gain=std)
        nn.init.constant_(conv.bias, mean)
    return model


def pixels(count: int = 64, dim: int = 16) -> torch.Tensor:
    return torch.randn(count, dim, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_scores_by_hand():
    # Q are the pixels, K = (a, a + b) of their channels a, b.
    # step 1: q (1 0) (2 3), k (1 1) (2 5), products 1 2 5 19 | step 2: q (0 1) (1 1), k (0 1) (1 2), products 1 2 1 3
    model = attention(dim=2, heads=1, neuron=partial(ILIF, levels=9), steps=2)
    for conv, weight in ((model[1].q_conv, [[1, 0], [0, 1]]), (model[1].k_conv, [[1, 0], [1, 1]])):
        conv.weight.data.copy_(torch.tensor(weight).view(2, 2, 1, 1))
        nn.init.zeros_(conv.bias)
    clip = torch.tensor([[[1, 2], [0, 3]], [[0, 1], [1, 1]]], dtype=torch.float64).view(2, 1, 2, 1, 2)
    assert attention_scores(model, clip)["1"].tolist() == [1, 2, 3, 11]


def test_scores_are_products_of_the_recorded_spikes_of_every_image_head_and_pair_averaged_over_steps():
    model, x = network(steps=3, neuron="lif"), images(2)
    with record(model) as spikes:
        model(x)
    scores = attention_scores(model, x)
    assert list(scores) == ["blocks.0.attn", "blocks.1.attn"]
    for name, found in scores.items():
        # [T, B, M, K, N]: channel c = head * K + j
        q, k = (spikes[f"{name}.{operand}"].double().view(3, 2, 2, 8, 16) for operand in "qk")
        # a third of the sums of three steps rounds
        torch.testing.assert_close(found, torch.einsum("tbmkn,tbmkj->bmnj", q, k).flatten() / 3, rtol=1e-15, atol=0)
        assert found.unique().numel() > 3


def test_scores_of_an_ann_are_products_of_its_real_queries_and_keys():
    model, x = attention(SoftmaxAttention), pixels(2)
    q, k = (conv(x).view(2, 2, 8, 16) for conv in (model[1].q_conv, model[1].k_conv))
    # sums of eight products in another order
    torch.testing.assert_close(attention_scores(model, x)["1"], (q.mT @ k).flatten().detach(), rtol=1e-12, atol=1e-12)


def test_drawn_scores_stand_at_the_same_positions_in_every_network():
    small, large = (attention(neuron=partial(IELIF, unit=unit)) for unit in (0.25, 0.5))
    x = pixels(4)
    every, drawn = attention_scores(small, x)["1"], attention_scores(small, x, samples=500)["1"]
    assert (len(every), len(drawn)) == (4 * 2 * 16 * 16, 500)
    assert torch.equal(attention_scores(large, x, samples=500)["1"], 4 * drawn)
    # 500 draws from one distribution of deviation s have a mean within 5 s / sqrt(500) of its own
    assert abs(drawn.mean() - every.mean()) < 5 * every.std() / math.sqrt(500)


def test_the_model_comes_back_as_it_was():
    model = network().train()
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert not attention_scores(model, images(2))["blocks.0.attn"].requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_gives_the_scores_of_the_bare_one(unchecked):
    bare = attention()
    compiled = torch.compile(bare, backend="eager")
    with torch.no_grad():
        compiled(pixels(2))  # a graph that already exists must not be used
    scores = attention_scores(compiled, pixels(2))
    assert list(scores) == ["1"]
    assert torch.equal(scores["1"], attention_scores(bare, pixels(2))["1"])


@pytest.mark.parametrize("kind", ["sdsa1", "sdsa2"])
def test_refuses_attention_that_multiplies_no_queries_with_keys(kind):
    model = create_model("meta_spikeformer_15m", attention=kind, **META)
    with pytest.raises(ValueError, match=rf"stage3\.block0\.attn is {kind.upper()}.*such as sdsa3"):
        attention_scores(model, images(1))


def test_refuses_what_has_no_scores():
    with pytest.raises(ValueError, match="Conv2d has no attention"):
        attention_scores(nn.Conv2d(3, 3, 1), images(1))
    with pytest.raises(ValueError, match="no images to score"):
        attention_scores(network(), images(0))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        attention_scores(network(), images(1), samples=0)
    with pytest.raises(ValueError, match=r"1\.q gives NaN"):
        attention_scores(attention(SoftmaxAttention), pixels(1) * math.nan)


def test_entropy_by_hand_and_values_outside_the_edges_count_in_the_outermost_bins():
    edges = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    # bins 0 1 2 hold 2, 1, 1 of 4: 1/2 log2 2 + 2 * 1/4 log2 4
    assert entropy(torch.tensor([-9.0, 0.5, 1.0, 9.0]), edges=edges) == pytest.approx(1.5, abs=1e-15)
    assert entropy(torch.tensor([0.1, 0.2]), edges=edges) == 0


def test_information_by_hand():
    x = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert mutual_information(x, x, bins=4) == pytest.approx(1, abs=1e-15)
    assert mutual_information(x, torch.tensor([0.0, 1.0, 0.0, 1.0]), bins=4) == pytest.approx(0, abs=1e-15)
    # y says x in half of the cases (y = 2), else nothing: H(X|Y) = 1/2
    x, y = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert conditional_entropy(x, y, bins=4) == pytest.approx(0.5, abs=1e-15)


def correlated(count: int = 5000, *, correlation: float = 0.8) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = torch.randn(2, count, dtype=torch.float64)
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


def test_information_is_the_divergence_of_the_joint_histogram_from_the_product_of_its_margins():
    x, y = correlated()
    edges = standard_edges(8)
    cells = [torch.bucketize(standardise(each), edges[1:-1], right=True) for each in (x, y)]
    joint = torch.zeros(8, 8, dtype=torch.float64)
    joint.index_put_(tuple(cells), torch.tensor(1 / len(x), dtype=torch.float64), accumulate=True)
    product = joint.sum(1, keepdim=True) * joint.sum(0)
    divergence = torch.xlogy(joint, joint / product.clamp(min=1e-300)).sum().item() / math.log(2)
    # float64 sums of 64 terms and of 5000 weights
    assert mutual_information(x, y, bins=8) == pytest.approx(divergence, abs=1e-11)
    assert mutual_information(x, y, bins=8) == pytest.approx(mutual_information(y, x, bins=8), abs=1e-12)
    total = entropy(standardise(x), edges=edges)
    assert mutual_information(x, y, bins=8) == total - conditional_entropy(x, y, bins=8)


def test_information_of_correlated_normals_is_that_of_their_correlation():
    # I = -1/2 log2(1 - r^2); bins lose at most width^2 of it, the bias of 10^5 pairs and 32^2 cells adds below 0.007
    for r in (0.5, 0.8):
        found = mutual_information(*correlated(100_000, correlation=r))
        assert found == pytest.approx(-0.5 * math.log2(1 - r**2), abs=0.02)


def test_independent_variables_show_no_more_information_than_the_bias():
    x, y = torch.randn(2, 20_000, dtype=torch.float64)
    inner = standard_edges(16)[1:-1]
    used = [torch.bucketize(standardise(each), inner).unique().numel() for each in (x, y)]
    bias = (used[0] - 1) * (used[1] - 1) / (2 * len(x) * math.log(2))
    # 2 n ln(2) I is nearly chi-square of (a - 1)(b - 1) > 150 degrees: one deviation is a ninth of it, and twice the
    # bias nine of them away; rare cells fall short of the formula
    assert 0.4 * bias < mutual_information(x, y, bins=16) < 2 * bias
    assert bias < 0.01


def test_scale_and_offset_of_scores_do_not_matter():
    x, y = correlated()
    # standardising rounds in the sixteenth digit, and no value lies that near an edge
    assert mutual_information(3 * x - 7, -y.neg() / 5) == pytest.approx(mutual_information(x, y), abs=1e-12)


def test_a_constant_says_nothing_and_leaves_nothing_to_explain():
    x, constant = torch.randn(100), torch.full((100,), 0.1)
    assert not standardise(constant).any()
    assert mutual_information(x, constant) == pytest.approx(0, abs=1e-12)  # rounding of a sum of 32 terms
    assert conditional_entropy(constant, x) == pytest.approx(0, abs=1e-12)


def test_refuses_single_bins_and_values_that_are_no_pairs():
    with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
        mutual_information(torch.randn(3), torch.randn(3), bins=1)
    with pytest.raises(ValueError, match=r"must be pairs, got shapes \(3,\) and \(4,\)"):
        mutual_information(torch.randn(3), torch.randn(4))


def test_a_network_explains_itself_entirely():
    model = network(neuron="ie_lif")
    for information in compare(model, model, images(4)).values():
        assert information.entropy == information.ann_entropy > 1
        assert information.entropy_given_ann == pytest.approx(0, abs=1e-12)  # rounding of sums of 32 terms
        assert information.mutual_information == pytest.approx(information.entropy, abs=1e-12)
        assert information.counts == information.ann_counts


def test_compare_pairs_the_layers_of_twins_and_averages_them():
    snn, ann, x = network(), network(**ANN_TWIN), images(4)
    found = compare(snn, ann, x, bins=16)
    assert list(found) == ["blocks.0.attn", "blocks.1.attn", "mean"]
    for name in ("blocks.0.attn", "blocks.1.attn"):
        s, a, layer = attention_scores(snn, x)[name], attention_scores(ann, x)[name], found[name]
        assert layer.entropy == entropy(standardise(s), edges=standard_edges(16))
        assert layer.ann_entropy == entropy(standardise(a), edges=standard_edges(16))
        assert layer.entropy_given_ann == conditional_entropy(s, a, bins=16)
        assert layer.mutual_information == mutual_information(s, a, bins=16)
        assert sum(layer.counts) == sum(layer.ann_counts) == len(s) == 4 * 2 * 16 * 16
        occupied = [sum(count > 0 for count in counts) for counts in (layer.counts, layer.ann_counts)]
        assert layer.bias == (occupied[0] - 1) * (occupied[1] - 1) / (2 * len(s) * math.log(2))
        assert len(layer.edges) == 17
    first, second, mean = found.values()
    for field in ("entropy", "ann_entropy", "entropy_given_ann", "mutual_information", "bias"):
        assert getattr(mean, field) == (getattr(first, field) + getattr(second, field)) / 2
    assert mean.counts == tuple(a + b for a, b in zip(first.counts, second.counts, strict=True))
    assert mean.ann_counts == tuple(a + b for a, b in zip(first.ann_counts, second.ann_counts, strict=True))
    assert json.loads(json.dumps(asdict(mean)))["entropy"] == mean.entropy


def test_bins_tell_their_counts_from_the_lowest_score_to_the_highest():
    # scores are 0 (no spike meets another), or 1 for the pair of the one token that fires with itself: 15 of 16 are 0
    model = attention(dim=1, heads=1)
    for conv in (model[1].q_conv, model[1].k_conv):
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    x[0, 0, 0, 0] = 1
    found = compare(model, model, x, bins=4)["1"]
    # of mean 1/16 and deviation sqrt(15)/16: 0 is at -0.26 deviations, 1 at 3.9; bins are 2 wide from -4
    assert found.counts == (0, 15, 0, 1)
    assert found.edges == (-4, -2, 0, 2, 4)


def test_more_levels_say_more_and_let_the_ann_explain_more():
    # The argument for IE-LIF: one pair of projections, its neuron of D = 1, 2, 4 levels, and none in the ANN.
    ann = centred(attention(SoftmaxAttention), mean=0.5, std=0.3)
    found = [
        compare(centred(attention(neuron=partial(IELIF, levels=levels)), mean=0.5, std=0.3), ann, pixels())["mean"]
        for levels in (1, 2, 4)
    ]
    assert found[1].entropy > found[0].entropy + CLEAR
    assert found[2].entropy > found[1].entropy
    assert found[1].mutual_information > found[0].mutual_information + CLEAR
    assert found[2].mutual_information > found[1].mutual_information + CLEAR
    assert found[2].mutual_information < found[2].ann_entropy


def test_a_centred_membrane_says_more_than_one_around_zero():
    # The argument for MPRF, here a bias.
    ann = centred(attention(SoftmaxAttention), mean=0.0, std=0.3)
    neuron = partial(IELIF, levels=4)
    plain, rectified = (
        compare(centred(attention(neuron=neuron), mean=mean, std=0.3), ann, pixels())["mean"] for mean in (0.0, 0.5)
    )
    assert rectified.entropy > plain.entropy + CLEAR


def test_a_silent_network_says_nothing():
    snn = centred(attention(), mean=-9.0, std=0.3)
    found = compare(snn, attention(SoftmaxAttention), pixels(4))["mean"]
    assert (found.entropy, found.mutual_information) == pytest.approx((0, 0), abs=1e-12)
    assert found.bias == 0
    assert found.ann_entropy > 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depth": 1}, "have 2 and 1 attentions"),
        ({"heads": 4}, r"blocks.0.attn are \[1, 2, 16, 16\], those of the ANN's blocks.0.attn \[1, 4, 16, 16\]"),
        ({"patch_size": 8}, r"are \[1, 2, 16, 16\], those .* \[1, 2, 4, 4\]: compare twins"),
    ],
)
def test_refuses_networks_that_are_no_twins(other, message):
    with pytest.raises(ValueError, match=message):
        compare(network(), network(**(ANN_TWIN | other)), images(1))


def test_plot_draws_both_histograms_in_a_panel_for_each_row(tmp_path):
    mean = compare(network(), network(**ANN_TWIN), images(2))["mean"]
    rows = dict.fromkeys(("baseline", "+IE-LIF", "+MPRF", "+FGD", "fifth"), mean)
    drawn = plot(rows, tmp_path / "information.svg").read_text()
    assert all(f"<!-- {name}" in drawn for name in rows)
    assert drawn.count('id="axes_') == 5
    changed = [mean, replace(mean, counts=mean.counts[::-1]), replace(mean, ann_counts=mean.ann_counts[::-1])]
    pictures = {plot({"mean": each}, tmp_path / "information.png").read_bytes() for each in changed}
    assert len(pictures) == 3
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    with pytest.raises(ValueError, match="no row to plot"):
        plot({}, tmp_path / "none.png")


# Proposition 1: a head's width in channels, and the rate of a product of two spikes that each fire in half of the steps
HEAD_WIDTH, RATE = 8, 0.25
STEPS = (1, 4, 16, 64)


def exact_score(steps: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Counts 0..KT, their probability, and their deviation: Binomial(KT, r), as a sum of K T products of rate r is."""
    trials = torch.tensor(float(HEAD_WIDTH * steps), dtype=torch.float64)
    counts = torch.arange(int(trials) + 1, dtype=torch.float64)
    ways = torch.lgamma(trials + 1) - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
    probability = (ways + counts * math.log(RATE) + (trials - counts) * math.log(1 - RATE)).exp()
    return counts, probability, math.sqrt(trials * RATE * (1 - RATE))


def test_entropy_of_scores_averaged_over_more_steps_rises_to_that_of_a_normal():
    edges = standard_edges()
    below = torch.special.ndtr(edges[1:-1])
    cells = torch.diff(below, prepend=below.new_zeros(1), append=below.new_ones(1))
    normal = torch.special.entr(cells).sum().item() / math.log(2)
    found = []
    for steps in STEPS:
        q, k = torch.rand(2, 20_000, steps, HEAD_WIDTH) < 0.5
        found.append(entropy(standardise((q & k).sum(-1).double().mean(-1)), edges=edges))
    assert all(later > earlier + 0.02 for earlier, later in pairwise(found))
    assert normal - found[0] > 1
    # at T = 64 two or three values share a bin 0.25 wide: unequal shares take 0.03 bits, 20 000 samples 0.002
    assert normal - 0.06 < found[-1] < normal


def test_entropy_of_a_score_beyond_its_fineness_differs_from_the_normals_by_a_share_that_falls_with_steps():
    # H of the counts less 1/2 log2(2 pi e s^2), s in counts: the first terms of its expansion are of order 1/T
    gap = []
    for steps in STEPS:
        _, probability, deviation = exact_score(steps)
        bits = torch.special.entr(probability).sum().item() / math.log(2)
        gap.append(abs(bits - 0.5 * math.log2(2 * math.pi * math.e * deviation**2)))
    assert gap[0] > 0.03
    ratios = [later / earlier for earlier, later in pairwise(gap)]
    # a quarter for four times the steps; the second order, 1/T^2, still shows at the first
    assert ratios[0] < 0.25
    assert ratios[1:] == pytest.approx([0.25, 0.25], abs=0.03)


def test_distance_of_a_standardised_score_from_the_normal_falls_with_the_root_of_steps():
    distances = []
    for steps in STEPS:
        counts, probability, deviation = exact_score(steps)
        normal = torch.special.ndtr((counts - HEAD_WIDTH * steps * RATE) / deviation)
        cumulated = probability.cumsum(0)
        # the distribution jumps: its distance is largest before or after a step
        distances.append(torch.maximum(cumulated - normal, normal - (cumulated - probability)).max().item())
        # Berry and Esseen, with the constant of Shevtsova (2011): 0.4748 E|X|^3 / (s^3 sqrt(n))
        bound = 0.4748 * ((1 - RATE) ** 2 + RATE**2) / deviation
        assert bound / 2 < distances[-1] < bound
    # the next order is 1/T: a tenth of the ratio at T = 1
    ratios = [later / earlier for earlier, later in pairwise(distances)]
    assert ratios == pytest.approx([0.5, 0.5, 0.5], abs=0.05)


def test_characteristic_function_of_a_standardised_score_tends_to_the_normals():
    # Eq. 18: a product of K T equal factors; Eq. 19: its limit exp(-u^2 / 2). The rest is of order 1/sqrt(T).
    u = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    errors = []
    for steps in STEPS:
        _, probability, deviation = exact_score(steps)
        factor = (1 - RATE) + RATE * torch.exp(1j * u / deviation)
        product = factor ** (HEAD_WIDTH * steps) * torch.exp(-1j * u * HEAD_WIDTH * steps * RATE / deviation)
        direct = (probability * torch.exp(1j * u[:, None] * torch.arange(len(probability)) / deviation)).sum(1)
        # the same function as a sum over the distribution, but for its offset: float64, lgamma of numbers up to 513
        assert torch.allclose(product.abs(), direct.abs(), rtol=0, atol=1e-11)
        errors.append((product - torch.exp(-(u**2) / 2)).abs())
    for earlier, later in pairwise(errors):
        # the next order, 1/T, is largest in the tail: a tenth of the ratio
        torch.testing.assert_close(later / earlier, torch.full_like(u, 0.5), rtol=0, atol=0.06)


def test_without_independence_over_steps_averaging_changes_nothing():
    # A neuron without memory sees the same image at each step: T scores are one score.
    one, four = network(neuron="ie_lif"), network(neuron="ie_lif", steps=4)
    four.load_state_dict(one.state_dict())
    for first, averaged in zip(*(attention_scores(model, images(2)).values() for model in (one, four)), strict=True):
        assert torch.equal(first, averaged)
        assert first.unique().numel() > 3


def spread(distribution: torch.distributions.Distribution, count: int = 100_000) -> torch.Tensor:
    """Quantiles at equal distances: a sample without chance."""
    return distribution.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def test_entropy_of_a_normal_is_half_the_logarithm_of_its_variance_and_grows_with_it():
    width = 0.05
    edges = torch.arange(-20, 20 + width / 2, width, dtype=torch.float64)
    found = []
    for mean, deviation in ((0.0, 0.5), (1.0, 1.0), (-3.0, 2.0)):
        normal = spread(torch.distributions.Normal(mean, deviation))
        # Proposition 2: differential entropy = that of narrow cells + log2 of their width; cells hold whole numbers
        # of quantiles, which costs about (occupied cells) / (12 n): 0.001
        found.append(entropy(normal, edges=edges) + math.log2(width))
        assert found[-1] == pytest.approx(0.5 * math.log2(2 * math.pi * math.e * deviation**2), abs=2e-3)
    assert found == sorted(found)


def test_no_other_distribution_of_equal_variance_exceeds_the_entropy_of_a_normal():
    edges = standard_edges()
    normal = spread(torch.distributions.Normal(0.0, 1.0))
    others = {
        "uniform": spread(torch.distributions.Uniform(0.0, 1.0)),
        "laplace": spread(torch.distributions.Laplace(0.0, 1.0)),
        "bimodal": torch.cat([0.4 * normal - 1, 0.4 * normal + 1]),
        "spikes": (normal > 0.5).double(),
        "counts": IELIF(levels=4)(0.5 + 0.4 * normal),
        "many counts": IELIF(levels=200)(0.5 + 0.2 * normal),
    }
    most = entropy(standardise(normal), edges=edges)
    found = {name: entropy(standardise(values), edges=edges) for name, values in others.items()}
    assert all(bits < most for bits in found.values())
    assert found["spikes"] < 1 < found["counts"] < math.log2(5)
    assert most - found["many counts"] < 0.1  # counts finer than the bins are as good as a normal


@pytest.mark.parametrize("levels", [1, 3, 4, 9])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.5, 0.3), (0.9, 0.1), (-0.2, 1.0)])
def test_count_entropy_is_that_of_the_neurons_counts(levels, mean, std):
    neuron = IELIF(levels=levels)
    membrane = spread(torch.distributions.Normal(mean, std))
    counts = neuron.counts(neuron(membrane)).double()
    edges = torch.arange(levels + 2, dtype=torch.float64) - 0.5
    # Eq. 11; each cell is off by one quantile of 100 000 at most, and the logarithm of its share is below 17 bits
    assert count_entropy(mean, std, levels=levels) == pytest.approx(entropy(counts, edges=edges), abs=1e-3)


def test_count_entropy_by_hand():
    assert count_entropy(0.5, 7.0, levels=1) == pytest.approx(1, abs=1e-15)
    # D = 1 fires beyond one deviation: 0.1586552539 of all
    share = 0.15865525393145707
    bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    assert count_entropy(0.25, 0.25, levels=1) == pytest.approx(bits, abs=1e-14)
    assert count_entropy(0.5, 0.001, levels=4) == 0  # all within one cell


@pytest.mark.parametrize("levels", [1, 2, 4, 8])
@pytest.mark.parametrize("std", [0.3, 0.5, 1.0, 2.0])
def test_a_membrane_centred_in_the_unit_interval_keeps_more_than_one_centred_at_zero(levels, std):
    rectified, plain = count_entropy(0.5, std, levels=levels), count_entropy(0.0, std, levels=levels)
    assert plain < rectified < math.log2(levels + 1) + 1e-12
    # and the middle is the best place
    assert all(count_entropy(0.5 + offset, std, levels=levels) < rectified for offset in (-0.4, -0.2, 0.2, 0.4))


@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize("std", [0.3, 0.5, 1.0, 2.0])
def test_more_levels_keep_more_of_a_wide_membrane(mean, std):
    found = [count_entropy(mean, std, levels=levels) for levels in (1, 2, 4, 8)]
    assert found == sorted(found)
    assert found[2] > found[0] + 0.4


def test_a_membrane_narrower_than_a_cell_is_worth_less_with_four_levels_than_with_one():
    # What MPRF has to avoid: D = 1 divides a membrane at 1/2, D = 4 has a cell there, 1/4 wide.
    assert count_entropy(0.5, 0.05, levels=4) < 0.2 < count_entropy(0.5, 0.05, levels=1)
    assert count_entropy(0.375, 0.05, levels=4) == pytest.approx(1, abs=1e-4)  # on a threshold it would not be


def test_refuses_membranes_without_width_and_counts_without_levels():
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        count_entropy(0.0, 0.0)
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        count_entropy(0.0, 1.0, levels=0)

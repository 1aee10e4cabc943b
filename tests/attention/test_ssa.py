"""SSA: by hand with scale and threshold, equal to its map formed explicitly, and the learnable scale."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spikeformers.attention import (
    SCALE,
    SSA,
    LearnableScaleSSA,
    LearnableWidthScaledSSA,
    WidthScaledSSA,
    spike_attention,
)
from spikeformers.neurons import neuron_builder

LIF = neuron_builder("lif")


def test_spike_attention_follows_equation_15_by_hand():
    # One head of width 2, three tokens as columns.
    q = torch.tensor([[1.0, 0, 1], [0, 1, 1]])[None, None]
    k = torch.tensor([[1.0, 1, 0], [0, 1, 0]])[None, None]
    v = torch.tensor([[0.0, 1, 1], [1, 1, 0]])[None, None]
    # Scores q_n . k_m: n=0: (1,1,0), n=1: (0,1,0), n=2: (1,2,0); then sums of v columns (0,1), (1,1), (1,0).
    assert spike_attention(q, k, v)[0, 0].tolist() == [[1, 1, 2], [2, 1, 3]]


@pytest.mark.parametrize("tokens", [3, 9, 50])
def test_both_product_orders_are_equal_whichever_is_cheaper(tokens):
    q, k, v = torch.randint(0, 5, (3, 2, 4, 8, tokens)).float().unbind()
    mixed = spike_attention(q, k, v)
    assert torch.equal(mixed, (v @ k.mT) @ q)
    assert torch.equal(mixed, v @ (k.mT @ q))


def test_the_cheaper_order_is_taken():
    for tokens, flops in ((4, 2 * 2 * 4**2 * 16), (64, 2 * 2 * 64 * 16**2)):
        with FlopCounterMode(display=False) as counter:
            spike_attention(*torch.ones(3, 1, 1, 16, tokens).unbind())
        assert counter.get_total_flops() == flops


class Chosen(nn.Module):
    """A projection whose output is chosen by the test; without one it hands its input on."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.value: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.value is None else self.value


def attention(*, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: type[SSA] = SSA, **options) -> nn.Module:
    """The operator whose neurons q, k, v fire where the given [C, N] are 1, and whose projection hands on."""
    module = kind(len(q), neuron=LIF, qkv=Chosen, proj=Chosen, **options)
    for name, spikes in (("q", q), ("k", k), ("v", v)):
        getattr(module, f"{name}_conv").value = 2 * spikes[None, :, None]  # a LIF fires from 2 at one step
    return module


# Width 2, three tokens as columns. Scores q_n . k_m: n=0: (1,1,0), n=1: (0,1,0), n=2: (1,2,0); then sums of the
# columns of v, (0,1), (1,1), (1,0), weighted by them.
Q = torch.tensor([[1.0, 0, 1], [0, 1, 1]])
K = torch.tensor([[1.0, 1, 0], [0, 1, 0]])
V = torch.tensor([[0.0, 1, 1], [1, 1, 0]])
MIXED = [[1.0, 1, 2], [2, 1, 3]]


# At one step the neuron halves its current and fires from 1/2, so from scale * count = 1; equality fires.
@pytest.mark.parametrize(("scale", "least"), [(1.0, 1), (0.5, 2), (0.4, 3), (0.3, 4)])
def test_ssa_follows_equations_12_and_13_by_hand(scale, least):
    module = attention(q=Q, k=K, v=V, heads=1, scale=scale)
    out = module(torch.zeros(1, 2, 1, 3))
    assert out.shape == (1, 2, 1, 3)
    assert out[0, :, 0].tolist() == [[float(count >= least) for count in row] for row in MIXED]


def test_the_scale_multiplies_the_mixture_and_is_one_eighth_whatever_the_width():
    q, k, v = (torch.randint(0, 2, (3, 2, 8, 5)).float() for _ in range(3))
    for heads in (1, 4):
        module = SSA(16, neuron=LIF, heads=heads)
        assert module.scale == SCALE == 1 / 8
        assert torch.equal(module.mix(q, k, v), (v @ k.mT @ q) / 8)


def test_the_neuron_on_the_mixture_has_threshold_one_half_and_the_others_one():
    module = SSA(16, neuron=LIF)
    assert [module.q.threshold, module.k.threshold, module.v.threshold, module.attn.threshold] == [1, 1, 1, 0.5]


def test_heads_do_not_see_each_other():
    # A second head that fires everywhere leaves the first as it was, and gives 3 tokens * 2 channels itself.
    q, k, v = (torch.cat((spikes, torch.ones(2, 3))) for spikes in (Q, K, V))
    heard = []
    module = attention(q=q, k=k, v=v, heads=2, scale=1.0)
    module.attn.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    module(torch.zeros(1, 4, 1, 3))
    assert heard[0][0, :, 0].tolist() == [*MIXED, [6, 6, 6], [6, 6, 6]]


@pytest.mark.parametrize(("height", "width"), [(1, 3), (2, 2), (8, 7)])  # fewer tokens than a head is wide, and more
def test_ssa_is_the_map_formed_explicitly_whichever_product_comes_first(height, width):
    q, k, v = torch.randint(0, 2, (3, 12, height * width)).float().unbind()
    module = attention(q=q, k=k, v=v, heads=3, scale=0.25)
    for name, spikes in (("q", q), ("k", k), ("v", v)):
        getattr(module, f"{name}_conv").value = 2 * spikes.view(1, 12, height, width)
    heard = []
    module.attn.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    out = module(torch.zeros(1, 12, height, width))
    for head in range(3):
        channels = slice(4 * head, 4 * head + 4)
        scores = q[channels].T @ k[channels]  # [N, N], counts
        mixed = (scores @ v[channels].T * 0.25).T
        # Counts times a power of two: exact in either order.
        assert torch.equal(heard[0][0, channels].flatten(1), mixed)
        assert torch.equal(out[0, channels].flatten(1), (mixed >= 1).float())


def test_a_learnable_scale_starts_as_ssa_and_learns():
    fixed = SSA(16, neuron=LIF, heads=4, scale=0.5).train()
    learnable = LearnableScaleSSA(16, neuron=LIF, heads=4, scale=0.5).train()
    assert learnable.load_state_dict(fixed.state_dict(), strict=False).missing_keys == ["scale"]
    for module in (fixed, learnable):
        for operand in (module.q_conv, module.k_conv, module.v_conv):
            nn.init.constant_(operand.bn.bias, 2)  # so that about half of them fire
    spikes = torch.randint(0, 2, (4, 16, 3, 3)).float()
    out = learnable(spikes)
    assert torch.equal(out, fixed(spikes))
    (out * torch.randn_like(out)).sum().backward()  # a plain sum of squares is the same whatever a batch norm gets
    assert learnable.scale.shape == ()
    assert learnable.scale.grad != 0


def test_width_scaled_ssa_has_one_over_root_of_a_heads_width_and_threshold_one():
    q, k, v = (torch.randint(0, 2, (3, 4, 4, 5)).float() for _ in range(3))
    for kind in (WidthScaledSSA, LearnableWidthScaledSSA):
        module = kind(16, neuron=LIF, heads=4)
        assert torch.equal(module.mix(q, k, v), (v @ k.mT @ q) / 2)
        assert module.attn.threshold == 1
        assert isinstance(module.scale, nn.Parameter) == (kind is LearnableWidthScaledSSA)


@pytest.mark.parametrize("heads", [4, 0])
def test_heads_that_do_not_divide_are_refused(heads):
    for kind in (SSA, WidthScaledSSA):
        with pytest.raises(ValueError, match=f"dim=10, heads={heads}"):
            kind(10, neuron=LIF, heads=heads)

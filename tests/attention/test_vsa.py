"""The attentions beside SSA, each against its formula with the N x N map written out, in float64."""

import math

import pytest
import torch

from spikeformers.attention import VSA, IdentityMap, LeakyReLUMap, ReLUMap, SoftmaxAttention, VSAFloatV
from spikeformers.attention.ssa import SpikeAttention
from spikeformers.layers import ConvBN
from spikeformers.neurons import LIF, Neuron, neuron_builder
from tests.attention.test_ssa import Chosen

HEADS, WIDTH, SCALE = 3, 4, 0.25


def softmax_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    weights = (q.T @ k / math.sqrt(WIDTH)).exp()
    return weights / weights.sum(1, keepdim=True)


def leaky(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 0.01 * x)


# What multiplies V, [N, N] from real q and k [K, N] of one head; and whether V is spikes.
FORMULAS = {
    VSA: (softmax_map, True),
    VSAFloatV: (softmax_map, False),
    SoftmaxAttention: (softmax_map, False),
    IdentityMap: (lambda q, k: SCALE * q.T @ k, True),
    ReLUMap: (lambda q, k: SCALE * q.clamp(min=0).T @ k.clamp(min=0), True),
    LeakyReLUMap: (lambda q, k: SCALE * leaky(q).T @ leaky(k), True),
}


def mixture(kind: type[SpikeAttention], **currents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches the neuron on the mixture for currents q, k, v [1, C, H, W], and what the operator gives."""
    options = {"scale": SCALE} if kind in (IdentityMap, ReLUMap, LeakyReLUMap) else {}
    module = kind(HEADS * WIDTH, neuron=neuron_builder("lif"), heads=HEADS, qkv=Chosen, proj=Chosen, **options)
    for name, current in currents.items():
        getattr(module, f"{name}_conv").value = current
    heard = []
    module.attn.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    out = module(torch.zeros_like(currents["q"]))
    return heard[0], out


def currents(height: int = 2, width: int = 3) -> torch.Tensor:
    return 3 * torch.randn(3, 1, HEADS * WIDTH, height, width, dtype=torch.float64)


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 5)])
def test_every_attention_is_its_map_times_v_head_by_head(kind, height, width):
    build_map, spiking_v = FORMULAS[kind]
    q, k, v = currents(height, width)
    mixed, out = mixture(kind, q=q, k=k, v=v)
    values = (v >= 2).double() if spiking_v else v  # a LIF fires from 2 at one step
    for head in range(HEADS):
        channels = slice(WIDTH * head, WIDTH * head + WIDTH)
        found = build_map(q[0, channels].flatten(1), k[0, channels].flatten(1))
        wanted = (found @ values[0, channels].flatten(1).T).T
        # Sums of at most 15 float64 products of size 10, in another order.
        assert torch.allclose(mixed[0, channels].flatten(1), wanted, atol=1e-12, rtol=0)
    if kind is SoftmaxAttention:
        assert torch.equal(out, mixed)
    else:
        assert torch.equal(out, (mixed >= 1).double())  # halved against the threshold 1/2


@pytest.mark.parametrize("kind", [VSA, VSAFloatV, SoftmaxAttention])
def test_softmax_rows_sum_to_one_so_that_v_of_ones_gives_ones(kind):
    q, k, v = currents()
    mixed, _ = mixture(kind, q=q, k=k, v=torch.full_like(v, 2.0))
    ones = torch.full_like(v, 1.0 if kind is VSA else 2.0)
    assert torch.allclose(mixed, ones, atol=1e-12, rtol=0)  # the rounding of a softmax over six tokens


def test_softmax_attends_by_hand():
    # One token of width 4 scores (ln 3) * 2 / sqrt(4) higher than the other: weights 3/4 and 1/4.
    q, k, v = torch.zeros(3, 1, HEADS * WIDTH, 1, 2, dtype=torch.float64)
    q[0, 0] = 2.0
    k[0, 0, 0, 0] = math.log(3)
    v[0, 1, 0] = torch.tensor([2.0, 0.0])  # channel 1 of the first head fires at the first token only
    mixed, _ = mixture(VSA, q=q, k=k, v=v)
    assert mixed[0, 1, 0].tolist() == pytest.approx([0.75, 0.75], abs=1e-12)
    assert not mixed[0, 2:].any()


def test_maps_of_real_numbers_are_negative_but_for_relu():
    q, _, v = currents()
    least = {kind: mixture(kind, q=q, k=-q, v=v)[0].min() for kind in (IdentityMap, ReLUMap, LeakyReLUMap)}
    assert least[IdentityMap] < least[LeakyReLUMap] < 0 == least[ReLUMap]


@pytest.mark.parametrize(
    ("kind", "neurons"),
    [
        (VSA, ["v", "attn"]),
        (VSAFloatV, ["attn"]),
        (SoftmaxAttention, []),
        (IdentityMap, ["v", "attn"]),
        (ReLUMap, ["v", "attn"]),
        (LeakyReLUMap, ["v", "attn"]),
    ],
)
def test_neurons_stand_on_v_and_the_mixture_only_where_the_table_has_spikes(kind, neurons):
    module = kind(16, neuron=neuron_builder("lif"), heads=4)
    found = [name for name, child in module.named_modules() if isinstance(child, Neuron)]
    assert found == neurons
    assert all(isinstance(module.get_submodule(name), LIF) for name in found)
    if found:
        assert module.attn.threshold == 0.5


@pytest.mark.parametrize("kind", FORMULAS)
def test_every_attention_keeps_the_shape_and_trains_every_parameter(kind):
    module = kind(16, neuron=neuron_builder("lif", steps=2), heads=4, qkv=lambda i, o: ConvBN(i, o, 1))
    spikes = torch.randint(0, 3, (4, 16, 3, 5)).float().requires_grad_()
    out = module(spikes)
    assert out.shape == spikes.shape
    (out * torch.randn_like(out)).sum().backward()  # a plain sum of squares is the same whatever a batch norm gets
    assert spikes.grad.any()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())

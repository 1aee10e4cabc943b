"""Norm and neuron in one Triton kernel, in the interpreter, against torch's batch norm in front of the loop."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers import kernels
from spikeformers.kernels import normed
from spikeformers.layers import ConvBN, fuse_norms
from spikeformers.neurons import IELIF, ILIF, LIF, NILIF, Neuron

normed_triton = pytest.importorskip("spikeformers.kernels.normed_triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("interpreter")

NEURONS = {
    "lif": partial(LIF, steps=1),
    "lif_4": partial(LIF, steps=4),
    "lif_soft": partial(LIF, steps=2, v_reset=None, detach_reset=False),
    "i_lif": ILIF,
    "ni_lif_decay": partial(NILIF, steps=4, decay=0.5),
    "ie_lif": IELIF,
}
STATISTICS = {"momentum": 0.1, "eps": 1e-5}


def leaves_of(dtype: torch.dtype, layout: torch.memory_format) -> tuple[list[Tensor], list[Tensor]]:
    """x, weight, bias; and running mean and variance."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(8, 5, 4, 3) * 2 + 1).to(dtype).to(memory_format=layout)
    weight, bias = torch.rand(5, dtype=wide) + 1, torch.rand(5, dtype=wide)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    return leaves, [torch.rand(5, dtype=wide), torch.rand(5, dtype=wide) + 0.5]


def fired(neuron: Neuron, leaves: list[Tensor], running: list[Tensor], *, batch: bool) -> Tensor:
    """By the kernel."""
    handed = normed.unapplied(*leaves, *running, batch=batch, **STATISTICS)
    return normed_triton.spikes(handed, normed.Firing(neuron.form(), neuron.steps, neuron.loop))


def compared(neuron: Neuron, dtype: torch.dtype, layout: torch.memory_format, *, batch: bool) -> list[list[Tensor]]:
    """Spikes, three gradients and running statistics, by the kernel and as they are defined."""
    leaves, running = leaves_of(dtype, layout)
    upstream = torch.randn(8, 5, 4, 3).to(dtype)
    results = []
    for run in (fired, None):
        moved = [each.clone() for each in running]
        if run:
            spikes = run(neuron, leaves, moved, batch=batch)
        else:
            x, weight, bias = leaves
            spikes = neuron.loop(F.batch_norm(x, *moved, weight, bias, batch, *STATISTICS.values()))
        results.append([spikes.detach(), *torch.autograd.grad(spikes, leaves, upstream), *moved])
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", NEURONS.values(), ids=NEURONS)
def test_spikes_gradients_and_statistics_are_those_of_the_norm_in_front(build, batch, layout):
    (spikes, *found), (wanted_spikes, *wanted) = compared(build(), torch.float64, layout, batch=batch)
    assert torch.equal(spikes, wanted_spikes)
    assert spikes.any()
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)  # y differs in its last bit


@pytest.mark.parametrize("build", [NEURONS["lif_4"], NEURONS["i_lif"]])
def test_half_precision_is_rounded_where_a_norm_in_front_rounds_it(build):
    # float16, since the interpreter cuts bfloat16 off instead of rounding it
    (spikes, *found), (wanted_spikes, *wanted) = compared(build(), torch.float16, torch.channels_last, batch=True)
    assert spikes.dtype == found[0].dtype == torch.float16
    assert found[1].dtype == torch.float32
    assert torch.equal(spikes, wanted_spikes)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)  # gradients of y are float16, one rounding apart


@pytest.mark.parametrize(("neuron", "shift", "wanted"), [(LIF(), 0.9999, 1.0), (ILIF(), 0.4999, 2.0)])
def test_half_precision_rounds_a_norm_up_to_the_threshold(neuron, shift, wanted):
    x, numbers = torch.ones(2, 3, 4, 1, dtype=torch.float16), [torch.zeros(3), torch.ones(3)]
    handed = normed.unapplied(x, torch.ones(3), torch.full((3,), shift), *numbers, batch=False, momentum=0.1, eps=0.0)
    firing = normed.Firing(neuron.form(), 1, neuron.loop)
    assert (normed_triton.spikes(handed, firing) == wanted).all()
    assert (neuron.loop(handed.computed()) == wanted).all()


@pytest.mark.parametrize(("build", "extra"), [(NEURONS["lif_4"], 0), (NEURONS["i_lif"], 8 * 5 * 4 * 3)])
def test_backward_keeps_the_input_of_the_norm_a_few_numbers_and_the_window(build, extra):
    leaves, running = leaves_of(torch.float32, torch.contiguous_format)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fired(build(), leaves, running, batch=True)
    large = {each.data_ptr(): each.numel() * each.element_size() for each in kept if each.numel() > 5}
    assert sorted(large.values()) == sorted([leaves[0].numel() * 4, *([extra] if extra else [])])
    assert leaves[0].data_ptr() in large


@pytest.mark.parametrize("build", [NEURONS["lif_4"], NEURONS["i_lif"]])
def test_second_derivatives_run_the_loop(build):
    leaves, running = leaves_of(torch.float64, torch.contiguous_format)
    neuron, found = build(), []
    x, weight, bias = leaves
    for spikes in (
        fired(neuron, leaves, running, batch=True),
        neuron.loop(F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5)),
    ):
        first = torch.autograd.grad(spikes.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("build", [NEURONS["lif_4"], NEURONS["i_lif"]])
def test_a_network_whose_norms_are_not_applied_trains_as_it_did(build, monkeypatch):
    plain = nn.Sequential(ConvBN(3, 6, 3), build(), ConvBN(6, 6, 3), build(), ConvBN(6, 4, 1)).double()
    twin, x = copy.deepcopy(plain), torch.randn(8, 3, 6, 5, dtype=torch.float64)
    monkeypatch.setattr(normed, "batch_norm", normed.unapplied)  # as on CUDA
    ran = []
    launch = normed_triton.spikes
    monkeypatch.setattr(normed_triton, "spikes", lambda *inputs: ran.append(1) or launch(*inputs))
    assert fuse_norms(twin, x) == ["0.bn", "2.bn"]
    for _ in range(2):
        outs = [model(x) for model in (twin, plain)]
        torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
        for out in outs:
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert len(ran) == 6
    for one, other in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    for one, other in zip(twin.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with kernels.readable():
        torch.testing.assert_close(twin(x), plain(x), rtol=1e-12, atol=1e-12)

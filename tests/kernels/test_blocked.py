"""The form of LIF for CPUs against the loop that defines it."""

import pytest
import torch

from spikeformers import kernels
from spikeformers.kernels import blocked
from spikeformers.neurons import LIF, ATan, Rectangle

VARIANTS = {
    "default": {},
    "soft": {"v_reset": None},
    "whole_input": {"decay_input": False},
    "rest": {"v_reset": 0.25, "threshold": 0.7, "tau": 3.0},
    "rest_whole_input": {"v_reset": -0.25, "decay_input": False, "tau": 1.7},
    "soft_whole_input": {"v_reset": None, "decay_input": False, "tau": 1.0, "threshold": 0.9},
    "atan": {"surrogate": ATan(3.0)},
    "rectangle": {"surrogate": Rectangle(1.5)},
}


def both(neuron: LIF, x: torch.Tensor, upstream: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Spikes and gradient of the fast form and of the loop."""
    results = []
    for run in (neuron, neuron.loop):
        leaf = x.detach().requires_grad_()
        spikes = run(leaf)
        spikes.backward(upstream)
        results.append((spikes.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_spikes_are_those_of_the_loop_bit_for_bit_and_gradients_to_rounding(options, steps, detach_reset, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 17)  # several blocks and a remainder
    neuron = LIF(steps=steps, detach_reset=detach_reset, **options)
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(steps * 3, 5, 7, dtype=dtype) * 2 + 0.5
        (spikes, grad), (wanted, wanted_grad) = both(neuron, x, torch.randn_like(x))
        assert torch.equal(spikes, wanted)
        assert 0 < spikes.mean() < 1
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(grad, wanted_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_float32_membranes(dtype):
    neuron, x = LIF(steps=4), (torch.randn(8, 33) * 2).to(dtype)
    (spikes, grad), (wanted, wanted_grad) = both(neuron, x, torch.randn_like(x))
    assert spikes.dtype == grad.dtype == dtype
    assert torch.equal(spikes, wanted)
    assert torch.equal(spikes.float(), neuron(x.float()))
    torch.testing.assert_close(grad, wanted_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)  # one rounding apart


def test_any_layout_gives_the_same_numbers_and_dense_ones_keep_theirs():
    neuron, plain = LIF(steps=2), torch.randn(6, 4, 5, 3, dtype=torch.float64) * 2
    upstream = torch.randn_like(plain)
    wanted, wanted_grad = both(neuron, plain, upstream)[1]
    channels_last = plain.to(memory_format=torch.channels_last)
    holes = torch.stack([plain, plain], -1)[..., 0]
    batch_last = plain.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for x in (channels_last, holes, batch_last, plain.expand(6, 4, 5, 3)):
        spikes, grad = both(neuron, x, upstream)[0]
        assert torch.equal(spikes, wanted)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12)
    assert neuron(channels_last).is_contiguous(memory_format=torch.channels_last)
    repeated = torch.randn(1, 4, 5, 3).expand(6, 4, 5, 3) * 2
    assert torch.equal(neuron(repeated), neuron.loop(repeated))


def test_a_gradient_that_is_one_number_repeated_is_read_as_such():
    neuron, x = LIF(steps=2), torch.randn(4, 9, dtype=torch.float64)
    (_, grad), (_, wanted) = both(neuron, x, torch.ones(()).double().expand(4, 9))
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 2)])
def test_an_empty_batch_gives_empty_spikes_and_gradients(shape):
    x = torch.zeros(shape, requires_grad=True)
    LIF(steps=2)(x).sum().backward()
    assert x.grad.shape == shape


def test_backward_keeps_the_currents_and_nothing_else():
    kept = []
    x = torch.randn(8, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LIF(steps=4)(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_currents_and_gradients_are_left_as_they_were():
    x, upstream = torch.randn(8, 32, requires_grad=True), torch.randn(8, 32)
    before = x.detach().clone(), upstream.clone()
    LIF(steps=4)(x).backward(upstream)
    assert torch.equal(x, before[0])
    assert torch.equal(upstream, before[1])


def test_second_derivatives_over_steps_are_those_of_the_loop():
    neuron, x = LIF(steps=3, detach_reset=False), (torch.randn(6, 4).double() * 3).requires_grad_()
    found = []
    for run in (neuron, neuron.loop):
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert found[1].any()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_functional_transforms_give_what_a_loop_over_rows_gives(dim):
    neuron, x = LIF(steps=2), torch.randn(3, 4, 5, dtype=torch.float64) * 2
    stacked = x.movedim(0, dim)
    loss = lambda row: (neuron(row) * torch.arange(5)).sum()  # noqa: E731
    slow = lambda row: (neuron.loop(row) * torch.arange(5)).sum()  # noqa: E731
    assert torch.equal(torch.vmap(neuron, in_dims=dim)(stacked), torch.stack([neuron.loop(row) for row in x]))
    found = torch.vmap(torch.func.grad(loss), in_dims=dim)(stacked)
    torch.testing.assert_close(found, torch.stack([torch.func.grad(slow)(row) for row in x]), rtol=1e-12, atol=1e-12)


def test_a_neuron_whose_equations_are_overridden_runs_the_loop():
    class Shy(LIF):
        def spike(self, h):
            return super().spike(h) * 0

    x = torch.full((4, 2), 9.0)
    assert LIF(steps=2)(x).all()
    assert not Shy(steps=2)(x).any()
    assert Shy(steps=2).form() is None
    assert LIF(threshold=torch.nn.Parameter(torch.ones(()))).form() is None
    assert LIF(surrogate=lambda distance: (distance >= 0).float()).form() is None


def test_readable_runs_the_loop_and_ends_with_its_context(monkeypatch):
    monkeypatch.setattr(blocked, "lif", lambda *_, **__: pytest.fail("the fast form ran"))
    with kernels.readable():
        LIF(steps=2)(torch.randn(4, 2))
    with pytest.raises(pytest.fail.Exception, match="fast form ran"):
        LIF(steps=2)(torch.randn(4, 2))


def test_without_triton_the_log_says_once_that_the_loop_runs(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "TRITON", False)
    monkeypatch.setattr(kernels, "_told", False)
    on_device = torch.empty(4, 2, device="meta")
    assert [kernels._on_cuda(on_device, LIF().form(), steps=2) for _ in range(2)] == [None, None]
    assert [record.message for record in caplog.records if "Triton" in record.message] == [
        "Triton is not installed: neurons on CUDA run their readable loop, which is equal and slower"
    ]

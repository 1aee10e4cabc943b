"""Triton kernels of the integer family in the interpreter against the loop; levels are powers of two, units exact."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from spikeformers.neurons import IELIF, ILIF, NILIF, Neuron

integer = pytest.importorskip("spikeformers.kernels.integer", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("interpreter")

VARIANTS = {
    "i_lif": (ILIF, {}),
    "i_lif_threshold": (ILIF, {"threshold": 0.5, "levels": 255}),
    "ni_lif": (NILIF, {"levels": 8}),
    "ni_lif_const8": (NILIF, {"norm": 8}),
    "ie_lif": (IELIF, {}),
    "ie_lif_unit": (IELIF, {"unit": 0.5, "gain": 3.0, "threshold": 2.0}),
}


def launched(neuron: Neuron, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    how = {"form": neuron.form(), "steps": neuron.steps}
    spikes, windows = integer.launch_forward(x, None, None, None, **how)
    assert windows.dtype == torch.uint8  # what backward keeps
    return spikes, integer.launch_backward(upstream, windows, dtype=x.dtype, **how)


def looped(neuron: Neuron, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    spikes = neuron.loop(leaf)
    spikes.backward(upstream)
    return spikes.detach(), leaf.grad


@pytest.mark.parametrize("decay", [None, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", VARIANTS)
def test_kernels_give_the_spikes_and_gradients_of_the_loop(kind, steps, decay):
    neuron_class, options = VARIANTS[kind]
    neuron = neuron_class(steps=steps, decay=decay, **options)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(steps * 3, 3, 61, dtype=dtype) * 3
        upstream = torch.randn_like(x)
        (spikes, grad), (wanted, wanted_grad) = launched(neuron, x, upstream), looped(neuron, x, upstream)
        assert torch.equal(spikes, wanted)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(grad, wanted_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("neuron_class", [ILIF, NILIF, IELIF])
def test_ties_ends_and_what_lies_just_beside_them_round_as_in_the_loop(neuron_class):
    neuron = neuron_class(levels=4)
    halves = torch.arange(-2, 12, dtype=torch.float32) / 2 / getattr(neuron, "gain", 1.0)
    beside = [torch.nextafter(halves, torch.full_like(halves, end)) for end in (-9.0, 9.0)]
    x = torch.cat([halves, *beside, torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])])
    (spikes, grad), (wanted, wanted_grad) = (run(neuron, x, torch.ones_like(x)) for run in (launched, looped))
    torch.testing.assert_close(spikes, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_other_layouts(dtype):
    neuron = IELIF(steps=2, decay=0.5)
    x = (torch.randn(4, 3, 5, 2) * 3).to(dtype).to(memory_format=torch.channels_last)
    upstream = torch.randn(4, 3, 5, 2).to(dtype)
    (spikes, grad), (wanted, wanted_grad) = launched(neuron, x, upstream), looped(neuron, x, upstream)
    assert spikes.dtype == grad.dtype == dtype
    assert torch.equal(spikes, wanted)
    assert spikes.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(grad, wanted_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)  # one rounding apart


def test_empty_currents_launch_nothing():
    empty = torch.zeros(4, 0, 2)
    assert [found.shape for found in launched(ILIF(steps=2), empty, empty)] == [empty.shape] * 2


def test_norm_and_residual_inside_equal_those_in_front():
    neuron, current, added = NILIF(levels=4), torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    scale, shift = torch.rand(5) + 0.5, torch.randn(5)
    wanted = neuron.loop(current * scale.view(-1, 1) + shift.view(-1, 1) + added)
    assert torch.equal(integer.launch_forward(current, scale, shift, added, form=neuron.form(), steps=1)[0], wanted)


@pytest.mark.parametrize("normed", [False, True])
def test_the_op_keeps_one_byte_an_element_and_what_a_norm_keeps_anyway(normed):
    kept = []
    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.empty(4, 3, 5, dtype=torch.bfloat16, requires_grad=True)
        norm = {key: torch.ones(3, requires_grad=True) for key in ("scale", "shift")} if normed else {}
        spikes = integer.integer(x, form=NILIF(steps=2, decay=0.5).form(), steps=2, **norm)
        bytes_kept = [t.numel() * t.element_size() for t in kept if t is not x]
        assert bytes_kept == [x.numel(), *([12] if normed else [])]
        grads = torch.autograd.grad(spikes.sum(), [x, *norm.values()])
        assert [grad.dtype for grad in grads] == [x.dtype, *(each.dtype for each in norm.values())]


def test_a_neuron_whose_equations_are_overridden_or_learnt_has_no_form():
    class Other(ILIF):
        def charge(self, current, membrane):
            return super().charge(current, membrane) + 1

    assert Other().form() is None
    assert ILIF(threshold=torch.nn.Parameter(torch.ones(()))).form() is None


def test_constants_of_the_form_are_those_of_the_op_in_its_order():
    names = [argument.name for argument in torch.ops.spikeformers.integer.default._schema.arguments]
    assert names[5:] == [field.name for field in dataclasses.fields(ILIF().form())]

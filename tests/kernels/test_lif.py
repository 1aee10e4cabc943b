"""LIF's Triton kernels in the interpreter against the loop; constants are such that reciprocals are exact."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from spikeformers import kernels
from spikeformers.neurons import LIF, ATan, Rectangle, Sigmoid

lif = pytest.importorskip("spikeformers.kernels.lif", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("interpreter")

VARIANTS = {
    "default": {},
    "soft": {"v_reset": None},
    "whole_input": {"decay_input": False},
    "rest": {"v_reset": 0.25, "threshold": 0.75, "tau": 4.0, "surrogate": Rectangle(1.5)},
    "soft_whole_input": {"v_reset": None, "decay_input": False, "tau": 1.0, "surrogate": ATan(3.0)},
}


def launched(neuron: LIF, x: torch.Tensor, upstream: torch.Tensor, *parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes and gradient of the kernels' input by the plain launchers."""
    parts = parts or (None, None, None)
    how = {"form": neuron.form(), "steps": neuron.steps}
    return lif.launch_forward(x, *parts, **how), lif.launch_backward(upstream, x, *parts, **how)


def looped(neuron: LIF, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    spikes = neuron.loop(leaf)
    spikes.backward(upstream)
    return spikes.detach(), leaf.grad


@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_kernels_give_the_spikes_and_gradients_of_the_loop(options, steps, detach_reset):
    neuron = LIF(steps=steps, detach_reset=detach_reset, **options)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(steps * 3, 3, 61, dtype=dtype) * 2 + 0.5
        upstream = torch.randn_like(x)
        (spikes, grad), (wanted, wanted_grad) = launched(neuron, x, upstream), looped(neuron, x, upstream)
        assert torch.equal(spikes, wanted)
        assert 0 < spikes.mean() < 1
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(grad, wanted_grad, rtol=tolerance, atol=tolerance)


def test_more_elements_than_one_program_takes():
    neuron, x = LIF(steps=2), torch.randn(2, 2311) * 2
    upstream = torch.randn_like(x)
    (spikes, grad), (wanted, wanted_grad) = launched(neuron, x, upstream), looped(neuron, x, upstream)
    assert torch.equal(spikes, wanted)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_and_written_with_float32_membranes(dtype):
    neuron, x = LIF(steps=4), (torch.randn(8, 33) * 2).to(dtype)
    upstream = torch.randn_like(x)
    (spikes, grad), (wanted, wanted_grad) = launched(neuron, x, upstream), looped(neuron, x, upstream)
    assert spikes.dtype == grad.dtype == dtype
    assert torch.equal(spikes, wanted)
    torch.testing.assert_close(grad, wanted_grad, rtol=torch.finfo(dtype).eps, atol=1e-6)  # one rounding apart


def test_any_layout_gives_the_same_numbers():
    neuron, plain = LIF(steps=2), torch.randn(6, 4, 5, 3) * 2
    upstream = torch.randn_like(plain)
    wanted, wanted_grad = looped(neuron, plain, upstream)
    channels_last = plain.to(memory_format=torch.channels_last)
    for x in (
        channels_last,
        torch.stack([plain, plain], -1)[..., 0],
        plain.transpose(0, 3).contiguous().transpose(0, 3),
    ):
        spikes, grad = launched(neuron, x, upstream)
        assert torch.equal(spikes, wanted)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-5, atol=1e-5)
    assert launched(neuron, channels_last, upstream)[0].is_contiguous(memory_format=torch.channels_last)


def test_empty_currents_launch_nothing():
    empty = torch.zeros(4, 0, 2)
    assert [found.shape for found in launched(LIF(steps=2), empty, empty)] == [empty.shape] * 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_and_residual_inside_equal_those_in_front(layout, residual):
    neuron, shape = LIF(steps=2, surrogate=Sigmoid(3.0)), (6, 5, 4, 3)
    mean, variance, weight, bias = torch.randn(5), torch.rand(5) + 0.5, torch.rand(5) + 0.5, torch.randn(5)
    scale = (weight / (variance + 1e-5).sqrt()).requires_grad_()
    shift = (bias - mean * scale.detach()).requires_grad_()
    current = (torch.randn(shape) * 2).to(memory_format=layout).requires_grad_()
    added = torch.randn(shape).requires_grad_() if residual else None
    upstream = torch.randn(shape)
    x = current * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    x = x if added is None else x + added
    # float32 of F.batch_norm rounds its parts in another order, so that spikes are compared with the same products.
    torch.testing.assert_close(
        x if added is None else x - added, F.batch_norm(current, mean, variance, weight, bias), rtol=1e-5, atol=1e-5
    )
    wanted = neuron.loop(x)
    leaves = [leaf for leaf in (current, scale, shift, added) if leaf is not None]
    wanted_grads = torch.autograd.grad(wanted, leaves, upstream)
    with torch.no_grad():
        spikes, grad = launched(neuron, current, upstream, scale, shift, added)
        dtypes = (current.dtype, None if added is None else added.dtype)
        grads = [each for each in lif.input_gradients(grad, current, scale, dtypes=dtypes) if each is not None]
    assert torch.equal(spikes, wanted)
    for found, expected in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums over 72 elements in another order


def test_parts_that_do_not_fit_are_refused():
    x, four = torch.randn(4, 3, 2), torch.ones(4)
    form, three = LIF().form(), torch.ones(3)
    with pytest.raises(ValueError, match="both scale and shift"):
        lif.launch_forward(x, three, None, None, form=form, steps=1)
    with pytest.raises(ValueError, match=r"must be \[3\], got \(4,\)"):
        lif.launch_forward(x, four, four, None, form=form, steps=1)
    with pytest.raises(ValueError, match="residual must be"):
        lif.launch_forward(x, None, None, x[:2], form=form, steps=1)


def test_the_op_is_one_node_of_a_graph_and_knows_shapes_strides_and_gradients():
    neuron, three = LIF(steps=2), torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=True):  # nothing is computed, so that no device is needed
        x = torch.empty(4, 3, 5, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
        norm = {name: three.clone().requires_grad_() for name in ("scale", "shift")}
        for parts in ({}, norm, {"residual": x}):
            spikes = lif.lif(x, form=neuron.form(), steps=2, **parts)
            assert (spikes.shape, spikes.dtype, spikes.stride()) == (x.shape, x.dtype, x.stride())
            assert "lif" in type(spikes.grad_fn).__name__
            for leaf, grad in zip(
                leaves := [x, *parts.values()], torch.autograd.grad(spikes.sum(), leaves), strict=True
            ):
                assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


def test_a_compiler_sees_one_graph_with_one_op_in_it(unchecked):
    neuron, seen = LIF(steps=2), []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *inputs: [inputs[0]]  # the op itself needs a device

    on_device = lambda x: kernels._on_cuda(x, neuron.form(), steps=2)  # noqa: E731
    torch.compile(on_device, fullgraph=True, backend=backend)(torch.ones(4, 3))
    assert seen == ["spikeformers.lif"]


def test_second_derivatives_of_the_op_name_the_cure():
    with FakeTensorMode():
        x = torch.empty(4, 3, requires_grad=True)
        (grad,) = torch.autograd.grad(lif.lif(x, form=LIF().form(), steps=2).sum(), x, create_graph=True)
        with pytest.raises(ValueError, match=r"kernels\.readable"):
            grad.sum().backward()


def test_constants_of_the_form_are_those_of_the_op_in_its_order():
    names = [argument.name for argument in torch.ops.spikeformers.lif.default._schema.arguments]
    assert names[5:] == [field.name for field in dataclasses.fields(LIF().form())]

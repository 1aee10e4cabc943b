"""A batch norm that is handed on: what it is to a neuron, and to everybody else."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spikeformers import kernels
from spikeformers.kernels import normed
from spikeformers.neurons import ILIF, LIF

MAKERS = {"computed": normed.batch_norm, "unapplied": normed.unapplied}  # on a CPU, and for kernels
SHAPE = (8, 5, 4, 3)


class Numbers:
    """Input, parameters and running statistics of one norm."""

    def __init__(self, dtype: torch.dtype = torch.float64, layout: torch.memory_format = torch.contiguous_format):
        self.x = (torch.randn(SHAPE) * 3 + 5).to(dtype).to(memory_format=layout).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight, self.bias = (torch.rand(5, dtype=wide) + 0.5).requires_grad_(), torch.randn(5, dtype=wide)
        self.bias.requires_grad_()
        self.mean, self.variance = torch.randn(5, dtype=wide), torch.rand(5, dtype=wide) + 0.5

    def handed(self, make, *, batch: bool = True) -> kernels.Normed:
        parts = (self.x, self.weight, self.bias, self.mean.clone(), self.variance.clone())
        return make(*parts, batch=batch, momentum=0.1, eps=1e-5)

    def plain(self, *, batch: bool = True) -> Tensor:
        parts = (self.x, self.mean.clone(), self.variance.clone(), self.weight, self.bias)
        return F.batch_norm(*parts, batch, 0.1, 1e-5)

    def gradients(self, y: Tensor) -> list[Tensor]:
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        return list(torch.autograd.grad(y, [self.x, self.weight, self.bias], upstream))


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y * 3

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_output_is_recomputed_from_its_input_bit_for_bit(dtype, batch, layout):
    numbers = Numbers(dtype, layout)
    handed = numbers.handed(normed.batch_norm, batch=batch)
    wanted = numbers.plain(batch=batch)
    assert torch.equal(handed.computed(), wanted)
    with torch.no_grad():
        again = handed.norm.again()
    assert torch.equal(again, wanted)
    assert again.stride() == wanted.stride()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("batch", [True, False])
def test_whoever_is_no_neuron_gets_the_output_and_its_gradient(make, batch):
    numbers = Numbers()
    for use in (lambda y: y * 2, lambda y: torch.cat([y, y]), lambda y: y.mean((2, 3)), Tripled.apply):
        found, wanted = use(numbers.handed(make, batch=batch)), use(numbers.plain(batch=batch))
        assert type(found) is Tensor
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # two ways to a deviation
        for one, other in zip(numbers.gradients(found), numbers.gradients(wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_autograd_function_that_puts_nothing_in_place_of_its_argument_still_finds_the_gradient(make):
    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y: Tensor, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor):
            return grad, None

    numbers = Numbers()
    found, wanted = (Slope.apply(y, numbers.x.detach()) for y in (numbers.handed(make), numbers.plain()))
    for one, other in zip(numbers.gradients(found), numbers.gradients(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_running_statistics_move_as_those_of_torch(make):
    numbers = Numbers()
    found, wanted = ([numbers.mean.clone(), numbers.variance.clone()] for _ in range(2))
    make(numbers.x, numbers.weight, numbers.bias, *found, batch=True, momentum=0.3, eps=1e-5)
    F.batch_norm(numbers.x, *wanted, numbers.weight, numbers.bias, True, 0.3, 1e-5)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_asking_for_shape_and_dtype_computes_nothing(make):
    handed = Numbers().handed(make)
    assert (handed.shape, handed.dtype, handed.device.type, handed.ndim) == (SHAPE, torch.float64, "cpu", 4)
    assert (handed.size(1), handed.dim(), handed.numel()) == (5, 4, 480)
    assert not handed.seen
    handed + 1
    assert handed.seen


def test_an_operation_below_torchs_functions_names_the_cure():
    handed = Numbers().handed(normed.unapplied)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(ValueError, match=r"call separate_norms\(model\)"):
        handed + 1


def test_a_norm_right_behind_a_norm_reads_its_output():
    numbers = Numbers()
    parts = (numbers.weight, numbers.bias, numbers.mean, numbers.variance)
    how = {"batch": True, "momentum": 0.1, "eps": 1e-5}
    first = kernels.batch_norm(numbers.x, *parts, **how)
    second = kernels.batch_norm(first, *parts, **how)
    assert first.seen
    assert not second.seen
    assert torch.equal(second.norm.x, first.computed())


def test_what_torch_refuses_and_what_has_no_gradient_is_left_to_torch():
    numbers = Numbers()
    how = {"batch": True, "momentum": 0.1, "eps": 1e-5}
    parts = (numbers.weight, numbers.bias, numbers.mean, numbers.variance)
    assert type(kernels.batch_norm(numbers.x, *parts, **how)) is kernels.Normed
    for x in (numbers.x[:, :3], numbers.x[:1, :, :1, :1], numbers.x[:0], numbers.x[0], numbers.x.detach().long()):
        assert kernels.batch_norm(x, *parts, **how) is None
    with torch.no_grad():
        assert kernels.batch_norm(numbers.x, *parts, **how) is None
    seen = []
    torch.vmap(lambda x: seen.append(kernels.batch_norm(x, *parts, **how)) or x)(numbers.x[None])
    assert seen == [None]


@pytest.mark.parametrize("neuron", [LIF(steps=4), ILIF(levels=4)])
def test_a_neuron_that_runs_its_loop_reads_the_output(neuron):
    numbers = Numbers()
    for make in MAKERS.values():
        handed = numbers.handed(make)
        with kernels.readable():
            found = neuron(handed)
        wanted = neuron.loop(numbers.plain())
        assert torch.equal(found, wanted)
        for one, other in zip(numbers.gradients(found), numbers.gradients(wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

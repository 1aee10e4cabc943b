"""Batch norm and neuron in one Triton kernel: the norm's output is in registers only, forward and backward.

Statistics and the gradient of the norm are torch's own operations. The kernels form scale * x + shift, where torch on
CUDA forms (x - mean) * rstd * weight + bias, so that y rounds differently in its last bit.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from spikeformers.kernels import integer, lif
from spikeformers.kernels.forms import LIFForm
from spikeformers.kernels.normed import Firing, Norm, Normed, twice_differentiable


def spikes(current: Normed, firing: Firing) -> Tensor:
    """Spikes [T*B, C, H, W] of a norm's output, in the dtype of its input."""
    norm = current.norm
    return _Launched.apply(current, *norm.tensors, norm.batch, norm.eps, firing)[0]


class _Launched(Function):
    """Keeps what the norm keeps, and of the integer family the window of its gradient, a byte an element."""

    @staticmethod
    def forward(
        y: Normed, x: Tensor, weight, bias, centre, spread, batch: bool, eps: float, firing: Firing
    ) -> tuple[Tensor, Tensor | None]:
        scale, shift = Norm(x, weight, bias, centre, spread, batch=batch, eps=eps).affine()
        how = {"form": firing.form, "steps": firing.steps}
        if isinstance(firing.form, LIFForm):
            return lif.launch_forward(x, scale, shift, None, **how), None
        return integer.launch_forward(x, scale, shift, None, **how)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, *tensors, ctx.batch, ctx.eps, ctx.firing = inputs
        windows = output[1]
        if windows is not None:
            ctx.mark_non_differentiable(windows)
        ctx.save_for_backward(*tensors, windows)

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        *tensors, windows = ctx.saved_tensors
        norm, firing = Norm(*tensors, batch=ctx.batch, eps=ctx.eps), ctx.firing
        how = {"form": firing.form, "steps": firing.steps, "dtype": norm.x.dtype}
        if torch.is_grad_enabled():  # this gradient is to be differentiated again
            found = twice_differentiable(grad, norm, firing)
        elif windows is None:
            found = lif.launch_backward(grad, norm.x, *norm.affine(), None, **how)
        else:
            found = integer.launch_backward(grad, windows, **how)
        return found, *[None] * 8

"""LIF in Triton: currents are read once and spikes written once for all T steps; backward recomputes the membrane.

Backward keeps its inputs and nothing else: behind a norm whose scale and shift are passed in, that is the tensor which
the norm keeps anyway. Membranes and constants are float32 (float64 for float64), and no multiplication is contracted
with an addition, so that spikes equal those of the loop.
"""

import dataclasses
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeformers.kernels.forms import LIFForm
from spikeformers.kernels.layout import dense
from spikeformers.kernels.tiles import (
    Tiles,
    arranged,
    gradient_dtype,
    input_gradients,
    inverse,
    of_channel,
    refuse_second_derivative,
    step_input,
)

HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def _charge(x, v, T: tl.constexpr, LEAK: tl.constexpr, REST: tl.constexpr, DECAY_INPUT: tl.constexpr):
    if T == 0:
        h = x * LEAK if DECAY_INPUT else x
        h = h + REST if REST != 0.0 else h
    else:
        leak = v - REST if REST != 0.0 else v
        h = v + (x - leak) * LEAK if DECAY_INPUT else v - leak * LEAK + x
    return h


@triton.jit
def _discharge(h, s, THRESHOLD: tl.constexpr, REST: tl.constexpr, HARD: tl.constexpr):
    v = h * (1.0 - s) if HARD else h - THRESHOLD * s
    return v + REST * s if REST != 0.0 else v


@triton.jit
def _slope(distance, SURROGATE: tl.constexpr, SLOPE: tl.constexpr):
    """The surrogate's derivative, as in `neurons.surrogate`."""
    if SURROGATE == "sigmoid":
        p = 1.0 / (1.0 + tl.exp(-SLOPE * distance))
        found = SLOPE * p * (1.0 - p)
    elif SURROGATE == "atan":
        wide = HALF_PI * SLOPE * distance
        found = (SLOPE / 2) / (1.0 + wide * wide)
    else:
        found = (tl.abs(distance) < SLOPE / 2).to(distance.dtype) * (1.0 / SLOPE)  # where() would round to float32
    return found


@triton.jit
def _forward(
    current, scale, shift, residual, spikes, size, inner, channels,
    STEPS: tl.constexpr, LEAK: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr, HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr, AFFINE: tl.constexpr, ADDED: tl.constexpr, FLOAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    weight = of_channel(scale, at, inside, inner, channels, AFFINE, FLOAT)
    bias = of_channel(shift, at, inside, inner, channels, AFFINE, FLOAT)
    v = tl.zeros([BLOCK], dtype=FLOAT)
    for t in tl.static_range(STEPS):
        x = step_input(current, residual, at, inside, weight, bias, AFFINE, ADDED, FLOAT)
        h = _charge(x, v, t, LEAK, REST, DECAY_INPUT)
        s = (h >= THRESHOLD).to(FLOAT)
        tl.store(spikes + at, s.to(spikes.dtype.element_ty), mask=inside)
        v = _discharge(h, s, THRESHOLD, REST, HARD)
        current += size  # pointers move on, since an offset of all steps may not fit 32 bits
        residual += size
        spikes += size


@triton.jit
def _backward(
    grad, current, scale, shift, residual, found, size, inner, channels,
    STEPS: tl.constexpr, LEAK: tl.constexpr, THRESHOLD: tl.constexpr, REST: tl.constexpr, HARD: tl.constexpr,
    DECAY_INPUT: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, SLOPE: tl.constexpr,
    AFFINE: tl.constexpr, ADDED: tl.constexpr, FLOAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    weight = of_channel(scale, at, inside, inner, channels, AFFINE, FLOAT)
    bias = of_channel(shift, at, inside, inner, channels, AFFINE, FLOAT)
    v = tl.zeros([BLOCK], dtype=FLOAT)
    charged = ()
    for t in tl.static_range(STEPS):
        x = step_input(current, residual, at, inside, weight, bias, AFFINE, ADDED, FLOAT)
        h = _charge(x, v, t, LEAK, REST, DECAY_INPUT)
        v = _discharge(h, (h >= THRESHOLD).to(FLOAT), THRESHOLD, REST, HARD)
        charged = charged + (h,)  # noqa: RUF005 - Triton knows no starred expressions
        current += size
        residual += size
        grad += size
        found += size
    later = tl.zeros([BLOCK], dtype=FLOAT)  # dL/dv[t]
    for back in tl.static_range(STEPS):
        grad -= size
        found -= size
        h = charged[STEPS - 1 - back]
        s = (h >= THRESHOLD).to(FLOAT)
        fired = tl.load(grad + at, mask=inside, other=0.0).to(FLOAT)  # dL/ds[t]
        if not DETACH:
            fired += later * (REST - h) if HARD else later * -THRESHOLD
        h_grad = fired * _slope(h - THRESHOLD, SURROGATE, SLOPE) + (later * (1.0 - s) if HARD else later)
        x_grad = h_grad * LEAK if DECAY_INPUT else h_grad
        tl.store(found + at, x_grad.to(found.dtype.element_ty), mask=inside)
        later = h_grad - h_grad * LEAK


def _constants(form: LIFForm, current: Tensor, *, steps: int) -> dict:
    """What both kernels are compiled for."""
    return {
        "STEPS": steps,
        "LEAK": inverse(form.tau, current),
        "THRESHOLD": form.threshold,
        "REST": form.v_reset or 0.0,
        "HARD": form.v_reset is not None,
        "DECAY_INPUT": form.decay_input,
        "enable_fp_fusion": False,
    }


def launch_forward(
    current: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, *, form: LIFForm, steps: int
) -> Tensor:
    """Spikes of x = scale * current + shift + residual, [T*B, C, ...]."""
    x, weight, bias, added, inner, channels = arranged(current, scale, shift, residual)
    spikes = torch.empty_like(x)
    if x.numel():
        tiles = Tiles(x, steps=steps)
        _forward[tiles.grid](
            *(x, weight, bias, added, spikes, tiles.size, inner, channels),
            **_constants(form, x, steps=steps),
            **tiles.constants(norm=scale, residual=residual),
        )
    return spikes


def launch_backward(
    grad: Tensor,
    current: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    *,
    form: LIFForm,
    steps: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of x = scale * current + shift + residual, from that of the spikes and the inputs of forward.

    In `dtype`; None: that of current if it is x itself, else that of membranes.
    """
    x, weight, bias, added, inner, channels = arranged(current, scale, shift, residual)
    found = torch.empty_like(x, dtype=dtype or gradient_dtype(current, scale, residual))
    if x.numel():
        tiles = Tiles(x, steps=steps)
        _backward[tiles.grid](
            *(dense(grad, like=x), x, weight, bias, added, found, tiles.size, inner, channels),
            **_constants(form, x, steps=steps),
            **{"DETACH": form.detach_reset, "SURROGATE": form.surrogate, "SLOPE": form.slope},
            **tiles.constants(norm=scale, residual=residual),
        )
    return found


@torch.library.custom_op("spikeformers::lif", mutates_args=(), device_types="cuda")
def _lif(
    current: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    steps: int,
    tau: float,
    threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    slope: float,
) -> Tensor:
    form = LIFForm(tau, threshold, v_reset, decay_input, detach_reset, surrogate, slope)
    return launch_forward(current, scale, shift, residual, form=form, steps=steps)


@torch.library.custom_op("spikeformers::lif_backward", mutates_args=(), device_types="cuda")
def _lif_backward(
    grad: Tensor,
    current: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    steps: int,
    tau: float,
    threshold: float,
    v_reset: float | None,
    decay_input: bool,
    detach_reset: bool,
    surrogate: str,
    slope: float,
) -> Tensor:
    form = LIFForm(tau, threshold, v_reset, decay_input, detach_reset, surrogate, slope)
    return launch_backward(grad, current, scale, shift, residual, form=form, steps=steps)


@_lif.register_fake
def _(current, scale, shift, residual, *constants):
    return torch.empty_like(dense(current))


@_lif_backward.register_fake
def _(grad, current, scale, shift, residual, *constants):
    return torch.empty_like(dense(current), dtype=gradient_dtype(current, scale, residual))


def _keep(ctx, inputs, output) -> None:
    current, scale, shift, residual, *ctx.constants = inputs
    ctx.save_for_backward(current, scale, shift, residual)


def _differentiate(ctx, grad: Tensor):
    current, scale, shift, residual = ctx.saved_tensors
    found = torch.ops.spikeformers.lif_backward(grad, current, scale, shift, residual, *ctx.constants)
    dtypes = (current.dtype, None if residual is None else residual.dtype)
    return (*input_gradients(found, current, scale, dtypes=dtypes), *[None] * len(ctx.constants))


_lif.register_autograd(_differentiate, setup_context=_keep)
refuse_second_derivative(_lif_backward)


def lif(
    current: Tensor,
    *,
    form: LIFForm,
    steps: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Spikes of scale * current + shift + residual in the dtype of current, [T*B, C, ...], as one registered op.

    Scale and shift [C] are those of a batch norm, the residual has the shape of current; all get gradients.
    Raises ValueError for a scale without a shift, or parts of another shape.
    """
    return torch.ops.spikeformers.lif(current, scale, shift, residual, steps, *dataclasses.astuple(form))

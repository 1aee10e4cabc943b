"""The integer family in Triton: counts, what they are worth, and one byte an element and step for backward.

Without a membrane between steps (`decay` None) one program sees one element; with it, all T of them. Constants as in
`kernels.lif`.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeformers.kernels.forms import IntegerForm
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


@triton.jit
def _count(u, LEVELS: tl.constexpr, HALF_UP: tl.constexpr):
    """Counts of u and the window where they have a gradient."""
    clipped = tl.where(u < 0.0, 0.0, tl.where(u > LEVELS, LEVELS, u))
    if HALF_UP:
        n = tl.floor(clipped + 0.5)
        window = (u > 0.0) & (u < LEVELS)
    else:
        low = tl.floor(clipped)
        rest = clipped - low  # exact, where adding a half could round up
        odd = low - 2.0 * tl.floor(low * 0.5)
        n = low + ((rest > 0.5) | ((rest == 0.5) & (odd == 1.0))).to(u.dtype)
        window = (u >= 0.0) & (u <= LEVELS)
    return n, window


@triton.jit
def _forward(
    current, scale, shift, residual, spikes, windows, size, inner, channels,
    STEPS: tl.constexpr, LEVELS: tl.constexpr, UNIT: tl.constexpr, PER_UNIT: tl.constexpr, GAIN: tl.constexpr,
    PER_THRESHOLD: tl.constexpr, HALF_UP: tl.constexpr, DECAY: tl.constexpr,
    AFFINE: tl.constexpr, ADDED: tl.constexpr, FLOAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    weight = of_channel(scale, at, inside, inner, channels, AFFINE, FLOAT)
    bias = of_channel(shift, at, inside, inner, channels, AFFINE, FLOAT)
    left = tl.zeros([BLOCK], dtype=FLOAT)
    for t in tl.static_range(STEPS):
        x = step_input(current, residual, at, inside, weight, bias, AFFINE, ADDED, FLOAT)
        u = x * GAIN * PER_THRESHOLD
        u = u + left if t > 0 else u
        n, window = _count(u, LEVELS, HALF_UP)
        fired = n * UNIT
        tl.store(spikes + at, fired.to(spikes.dtype.element_ty), mask=inside)
        tl.store(windows + at, window.to(tl.uint8), mask=inside)
        left = DECAY * (u - fired * PER_UNIT)
        current += size
        residual += size
        spikes += size
        windows += size


@triton.jit
def _backward(
    grad, windows, found, size,
    STEPS: tl.constexpr, UNIT: tl.constexpr, FACTOR: tl.constexpr, DECAY: tl.constexpr, FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    for _ in tl.static_range(STEPS - 1):
        grad += size
        windows += size
        found += size
    later = tl.zeros([BLOCK], dtype=FLOAT)  # dL/du of what is left for the next step
    for _ in tl.static_range(STEPS):
        window = tl.load(windows + at, mask=inside, other=0).to(FLOAT)
        u_grad = tl.load(grad + at, mask=inside, other=0.0).to(FLOAT) * UNIT * window + later * (1.0 - window)
        tl.store(found + at, (u_grad * FACTOR).to(found.dtype.element_ty), mask=inside)
        later = DECAY * u_grad
        grad -= size
        windows -= size
        found -= size


def _lives(form: IntegerForm, steps: int) -> int:
    """Steps that one program must see."""
    return 1 if form.decay is None else steps


def launch_forward(
    current: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    *,
    form: IntegerForm,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Spikes of x = scale * current + shift + residual, [T*B, C, ...], and the window of their gradient (uint8)."""
    x, weight, bias, added, inner, channels = arranged(current, scale, shift, residual)
    spikes, windows = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    if x.numel():
        tiles = Tiles(x, steps=_lives(form, steps))
        _forward[tiles.grid](
            *(x, weight, bias, added, spikes, windows, tiles.size, inner, channels),
            STEPS=_lives(form, steps),
            LEVELS=float(form.levels),
            UNIT=form.unit,
            PER_UNIT=inverse(form.unit, x),
            GAIN=form.gain,
            PER_THRESHOLD=inverse(form.threshold, x),
            HALF_UP=form.half_up,
            DECAY=form.decay or 0.0,
            enable_fp_fusion=False,
            **tiles.constants(norm=scale, residual=residual),
        )
    return spikes, windows


def launch_backward(grad: Tensor, windows: Tensor, *, form: IntegerForm, steps: int, dtype: torch.dtype) -> Tensor:
    """Gradient of x in `dtype`, from that of the spikes and the windows of forward."""
    found = torch.empty_like(windows, dtype=dtype)
    if windows.numel():
        tiles = Tiles(found, steps=_lives(form, steps))
        _backward[tiles.grid](
            *(dense(grad, like=windows), windows, found, tiles.size),
            STEPS=_lives(form, steps),
            UNIT=form.unit,
            FACTOR=form.gain * inverse(form.threshold, found),
            DECAY=form.decay or 0.0,
            FLOAT=tiles.float,
            BLOCK=tiles.block,
            enable_fp_fusion=False,
        )
    return found


@torch.library.custom_op("spikeformers::integer", mutates_args=(), device_types="cuda")
def _integer(
    current: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    steps: int,
    levels: int,
    unit: float,
    threshold: float,
    gain: float,
    half_up: bool,
    decay: float | None,
) -> tuple[Tensor, Tensor]:
    form = IntegerForm(levels, unit, threshold, gain, half_up, decay)
    return launch_forward(current, scale, shift, residual, form=form, steps=steps)


@torch.library.custom_op("spikeformers::integer_backward", mutates_args=(), device_types="cuda")
def _integer_backward(
    grad: Tensor,
    windows: Tensor,
    dtype: torch.dtype,
    steps: int,
    levels: int,
    unit: float,
    threshold: float,
    gain: float,
    half_up: bool,
    decay: float | None,
) -> Tensor:
    form = IntegerForm(levels, unit, threshold, gain, half_up, decay)
    return launch_backward(grad, windows, form=form, steps=steps, dtype=dtype)


@_integer.register_fake
def _(current, *others):
    spikes = torch.empty_like(dense(current))
    return spikes, torch.empty_like(spikes, dtype=torch.uint8)


@_integer_backward.register_fake
def _(grad, windows, dtype, *constants):
    return torch.empty_like(windows, dtype=dtype)


def _keep(ctx, inputs, output) -> None:
    current, scale, _, residual, *ctx.constants = inputs
    _, windows = output
    ctx.mark_non_differentiable(windows)
    ctx.dtype = gradient_dtype(current, scale, residual)
    ctx.plain = (current.dtype, None if residual is None else residual.dtype)
    ctx.save_for_backward(windows, *((current, scale) if scale is not None else ()))


def _differentiate(ctx, grad: Tensor, _):
    windows, *norm = ctx.saved_tensors
    found = torch.ops.spikeformers.integer_backward(grad, windows, ctx.dtype, *ctx.constants)
    nothing = [None] * len(ctx.constants)
    return (*input_gradients(found, *norm, dtypes=ctx.plain), *nothing)


_integer.register_autograd(_differentiate, setup_context=_keep)
refuse_second_derivative(_integer_backward)


def integer(
    current: Tensor,
    *,
    form: IntegerForm,
    steps: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Spikes of scale * current + shift + residual in the dtype of current, as one registered op; see `kernels.lif`."""
    constants = dataclasses.astuple(form)
    return torch.ops.spikeformers.integer(current, scale, shift, residual, steps, *constants)[0]

"""What the Triton kernels share: input of a step with its norm and residual, sizes of tiles, gradients of the norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spikeformers.kernels.layout import dense, membrane_dtype


@triton.jit
def step_input(
    current, residual, at, inside, scale, shift, AFFINE: tl.constexpr, ADDED: tl.constexpr, FLOAT: tl.constexpr
):
    """x = scale * current + shift + residual at the offsets `at`, the norm rounded as one in front would hand it on."""
    x = tl.load(current + at, mask=inside, other=0.0).to(FLOAT)
    if AFFINE:
        x = (x * scale + shift).to(current.dtype.element_ty).to(FLOAT)
    if ADDED:
        x = x + tl.load(residual + at, mask=inside, other=0.0).to(FLOAT)
    return x


@triton.jit
def of_channel(values, at, inside, inner, channels, AFFINE: tl.constexpr, FLOAT: tl.constexpr):
    """values[c] for the channel c of each offset, 0 without a norm."""
    if AFFINE:
        return tl.load(values + (at // inner) % channels, mask=inside, other=0.0).to(FLOAT)
    else:
        return 0.0


class Tiles:
    """How one launch covers [T*B, C, ...]: a program takes the same `block` elements of every step."""

    def __init__(self, current: Tensor, *, steps: int) -> None:
        self.size = current.numel() // steps
        self.block = 1024 if steps <= 4 else 512 if steps <= 10 else 256  # backward keeps T membranes in registers
        self.grid = (triton.cdiv(self.size, self.block),)
        self.float = tl.float64 if current.dtype == torch.float64 else tl.float32

    def constants(self, *, norm: Tensor | None, residual: Tensor | None) -> dict:
        """The constants of a kernel that say what it reads."""
        return {
            "AFFINE": norm is not None,
            "ADDED": residual is not None,
            "FLOAT": self.float,
            "BLOCK": self.block,
        }


def gradient_dtype(current: Tensor, scale: Tensor | None, residual: Tensor | None) -> torch.dtype:
    """What the gradient of a kernel's input is handed on in: rounded only where nothing is computed from it."""
    return current.dtype if scale is None and residual is None else membrane_dtype(current)


def refuse_second_derivative(backward) -> None:
    """Make the op `backward` say what to do instead of being differentiated. Raises ValueError then."""

    def refuse(ctx, *grads):
        raise ValueError(
            "the Triton kernels have no second derivative: run the forward pass inside spikeformers.kernels.readable()"
        )

    backward.register_autograd(refuse)


def inverse(value: float, like: Tensor) -> float:
    """1 / value as torch on CUDA multiplies by it, rounded to the precision of membranes."""
    return torch.tensor(value, dtype=membrane_dtype(like)).reciprocal().item()


def arranged(current: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> tuple:
    """Dense current and residual, and the run and number of channels; for parts that are absent the current stands in.

    Raises ValueError for a scale without a shift, or parts of another shape.
    """
    if (scale is None) != (shift is None):
        raise ValueError("a norm needs both scale and shift, got one of them")
    if scale is not None and not scale.shape == shift.shape == current.shape[1:2]:
        wanted = f"[{', '.join(map(str, current.shape[1:2]))}]"
        raise ValueError(f"scale and shift must be {wanted}, got {tuple(scale.shape)} and {tuple(shift.shape)}")
    if residual is not None and residual.shape != current.shape:
        raise ValueError(f"residual must be {tuple(current.shape)}, got {tuple(residual.shape)}")
    current = dense(current)
    residual = current if residual is None else dense(residual, like=current)
    if scale is None:
        return current, current, current, residual, 1, 1
    return current, scale.contiguous(), shift.contiguous(), residual, current.stride(1), current.shape[1]


def input_gradients(
    grad: Tensor,
    current: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of current, scale, shift and residual from that of x = scale * current + shift + residual.

    `dtypes`: those of current and residual (None: no residual); current is needed beside a scale only.
    """
    added = None if dtypes[1] is None else grad.to(dtypes[1])
    if scale is None:
        return grad.to(dtypes[0]), None, None, added
    others = [axis for axis in range(grad.ndim) if axis != 1]
    wide = scale.to(grad.dtype).view(-1, *[1] * (grad.ndim - 2))
    scaled = (grad * current).sum(others).to(scale.dtype)
    return (grad * wide).to(dtypes[0]), scaled, grad.sum(others).to(scale.dtype), added

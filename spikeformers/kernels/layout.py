"""Where the elements of a step lie in memory: kernels run along memory, whatever the order of axes."""

import torch
from torch import Tensor


def dense(x: Tensor, *, like: Tensor | None = None) -> Tensor:
    """`x` without holes and with its first axis outermost, so that every step is one run of memory.

    `like`: in the strides of that tensor.  Copies only what is laid out otherwise.
    """
    if like is None:
        like = torch.empty_like(x)
        if x.shape[0] > 1 and like.stride(0) * x.shape[0] != x.numel():
            like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def runs(x: Tensor, steps: int) -> Tensor:
    """Dense [T*B, ...] -> view [T, B*...], the elements of a step in the order of memory."""
    size = x.numel() // steps
    return x.as_strided((steps, size), (size, 1))


def membrane_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

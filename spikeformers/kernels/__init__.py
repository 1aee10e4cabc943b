"""Fast forms of neurons, equal to their readable loop: Triton on CUDA, blocks that stay in cache on a CPU.

The loop in `neurons` is the definition. A fast form is taken where it exists for the device, and nothing but time and
memory changes: no option, no other result. `readable` switches them off.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spikeformers.kernels import blocked, normed
from spikeformers.kernels.forms import IntegerForm, LIFForm, SurrogateName
from spikeformers.kernels.normed import Firing, Normed

TRITON = importlib.util.find_spec("triton") is not None  # comes with CUDA builds of torch only
if TRITON:
    from spikeformers.kernels import integer, lif, normed_triton

log = logging.getLogger(__name__)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_off = False
_told = False


@contextmanager
def readable() -> Iterator[None]:
    """Inside this context every neuron runs its readable loop."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def run(current: Tensor, form: LIFForm | IntegerForm, *, steps: int, loop: Callable[[Tensor], Tensor]) -> Tensor | None:
    """currents [T*B, ...] -> spikes of the same shape and dtype, or None where only `loop` will do.

    A compiled or exported graph on a CPU holds the loop: the compiler fuses it, exporters know its operations.
    """
    if isinstance(current, Normed):
        return _behind_norm(current, Firing(form, steps, loop))
    if _off or type(current) not in (Tensor, nn.Parameter) or current.dtype not in DTYPES:
        return None
    if current.device.type == "cuda":
        return _on_cuda(current, form, steps=steps)
    if current.device.type != "cpu" or torch.compiler.is_compiling() or not isinstance(form, LIFForm):
        return None
    return blocked.lif(current, form=form, steps=steps, loop=loop)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    batch: bool,
    momentum: float,
    eps: float,
) -> Normed | None:
    """Batch norm of maps x [T*B, C, H, W], from which a neuron keeps x for backward; None where torch's has to do.

    By the numbers of this `batch`, which move the running ones, or by the running ones. Only where gradients are
    wanted, not in compiled graphs (a compiler recomputes a norm by itself), not under the transforms of torch.func.
    """
    if _off or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    x = x.asked_for() if isinstance(x, Normed) else x  # a norm right behind a norm
    plain = type(x) is Tensor and x.dtype in DTYPES and weight.dtype in (torch.float32, torch.float64)
    if not plain or x.ndim != 4 or x.shape[1:2] != weight.shape or x.numel() <= x.shape[1]:
        return None  # what does not fit is for torch to refuse
    if x.device.type != "cpu" and not (TRITON and x.device.type == "cuda"):
        return None
    norm = normed.batch_norm if x.device.type == "cpu" else normed.unapplied
    return norm(x, weight, bias, running_mean, running_var, batch=batch, momentum=momentum, eps=eps)


def _behind_norm(current: Normed, firing: Firing) -> Tensor:
    current.taken = True
    if not (_off or current.seen):  # what has been seen may have been written to
        if current.device.type == "cuda" or current.y is None:
            return normed_triton.spikes(current, firing)
        if isinstance(firing.form, LIFForm):
            return normed.blocked_lif(current, firing)
    y = current.computed()
    spikes = run(y, firing.form, steps=firing.steps, loop=firing.loop)
    return firing.loop(y) if spikes is None else spikes


def _on_cuda(current: Tensor, form: LIFForm | IntegerForm, *, steps: int) -> Tensor | None:
    if TRITON:
        return (lif.lif if isinstance(form, LIFForm) else integer.integer)(current, form=form, steps=steps)
    global _told
    if not _told:
        log.warning("Triton is not installed: neurons on CUDA run their readable loop, which is equal and slower")
        _told = True
    return None


__all__ = ["TRITON", "IntegerForm", "LIFForm", "Normed", "SurrogateName", "batch_norm", "readable", "run"]

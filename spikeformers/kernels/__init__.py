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

from spikeformers.kernels import blocked
from spikeformers.kernels.forms import IntegerForm, LIFForm, SurrogateName

TRITON = importlib.util.find_spec("triton") is not None  # comes with CUDA builds of torch only
if TRITON:
    from spikeformers.kernels import integer, lif

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
    if _off or type(current) not in (Tensor, nn.Parameter) or current.dtype not in DTYPES:
        return None
    if current.device.type == "cuda":
        return _on_cuda(current, form, steps=steps)
    if current.device.type != "cpu" or torch.compiler.is_compiling() or not isinstance(form, LIFForm):
        return None
    return blocked.lif(current, form=form, steps=steps, loop=loop)


def _on_cuda(current: Tensor, form: LIFForm | IntegerForm, *, steps: int) -> Tensor | None:
    if TRITON:
        return (lif.lif if isinstance(form, LIFForm) else integer.integer)(current, form=form, steps=steps)
    global _told
    if not _told:
        log.warning("Triton is not installed: neurons on CUDA run their readable loop, which is equal and slower")
        _told = True
    return None


__all__ = ["TRITON", "IntegerForm", "LIFForm", "SurrogateName", "readable", "run"]

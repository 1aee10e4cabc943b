"""Which tensors hold spikes: a mark follows counts of one unit through whatever moves, adds, multiplies or pools them.

A tensor is spikes if a neuron wrote it, or it is made of such tensors by moving, adding, multiplying or max-pooling
them, or by taking them from a number that they cannot exceed (IAND). Anything else, an average for example, is real
numbers.
"""

import math
from typing import ClassVar, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary


class Mark(NamedTuple):
    """What is known of a tensor of spikes: each is worth `unit`, and an element holds 0 to `most` of them."""

    unit: float
    most: int


class SpikeMarks(TorchFunctionMode):
    """Knows, while active, which tensors hold spikes: counts from 0 up of one unit."""

    MOVES: ClassVar[tuple[str, ...]] = (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "roll", "flip"),
        *("contiguous", "clone", "detach", "to", "float", "double", "repeat", "expand", "dropout"),
        *("__get__", "__getitem__", "chunk", "split", "unbind", "max_pool1d", "max_pool2d"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()

    def put(self, tensor: Tensor, mark: Mark) -> None:
        self.known[tensor] = (mark, tensor._version)

    def of(self, tensor: object) -> Mark | None:
        """The mark of `tensor`, None if it does not hold spikes (or was written to since)."""
        mark, version = self.known.get(tensor, (None, 0)) if isinstance(tensor, Tensor) else (None, 0)
        return mark if mark is not None and tensor._version == version else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        mark = self.after(getattr(function, "__name__", ""), args, kwargs or {})
        if mark is not None:
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.put(tensor, mark)
        return result

    def after(self, name: str, args: tuple, kwargs: dict) -> Mark | None:
        """The mark of what the function `name` makes of `args`."""
        if not args:
            return None
        if name in ("cat", "concat", "stack"):
            marks = [self.of(tensor) for tensor in args[0]]
            alike = None not in marks and len({mark.unit for mark in marks}) == 1
            return Mark(marks[0].unit, max(mark.most for mark in marks)) if alike else None
        mark = self.of(args[0])
        if mark is None or name in self.MOVES:
            return mark
        if len(args) != 2 or kwargs:
            return None
        if name in ("rsub", "__rsub__"):  # number - spikes
            return _taken_from(args[1], mark)
        other = self.of(args[1])
        if other is not None and name in ("mul", "__mul__"):
            return Mark(mark.unit * other.unit, mark.most * other.most)
        if other is not None and name in ("add", "__add__") and mark.unit == other.unit:
            return Mark(mark.unit, mark.most + other.most)
        return None


def _taken_from(number: object, mark: Mark) -> Mark | None:
    """The mark of `number` - spikes: counts again, if the number is one and no spikes exceed it (1 - binary spikes)."""
    counts = number / mark.unit if isinstance(number, int | float) else math.nan
    return Mark(mark.unit, int(counts)) if counts % 1 == 0 and counts >= mark.most else None

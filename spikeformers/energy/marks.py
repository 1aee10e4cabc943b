"""Which tensors hold spikes: a mark follows counts of one unit through whatever moves, adds, multiplies or pools them.

A tensor is spikes if a neuron wrote it, or it is made of such tensors by moving, adding, multiplying or max-pooling
them, by a border of zeros, by a positive number as a factor, or by taking them from a number that they cannot exceed
(IAND). Anything else, an average for example, is real numbers.
"""

import math
from typing import ClassVar, NamedTuple

import torch
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
        *("contiguous", "clone", "detach", "to", "float", "double", "repeat", "expand"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d"),
        *("__get__", "__getitem__", "chunk", "split", "unbind", "max_pool1d", "max_pool2d"),
        *("swapaxes", "swapdims", "movedim", "moveaxis", "narrow", "select", "index_select", "tile"),
        *("pixel_shuffle", "pixel_unshuffle", "adaptive_max_pool2d"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.aside = False  # True: what runs is no part of the pass
        self.known = WeakTensorKeyDictionary()
        self.means = WeakTensorKeyDictionary()  # mean count of each row, of the neurons' outputs

    def put(self, tensor: Tensor, mark: Mark) -> None:
        self.known[tensor] = (mark, tensor._version)

    def fired(self, spikes: Tensor, mark: Mark) -> Tensor:
        """Mark what a neuron emitted; returns the mean count of each row [T*B]."""
        self.put(spikes, mark)
        self.means[spikes] = means = row_means(spikes, mark.unit)
        return means

    def of(self, tensor: object) -> Mark | None:
        """The mark of `tensor`, None if it does not hold spikes (or was written to since)."""
        mark, version = self.known.get(tensor, (None, 0)) if isinstance(tensor, Tensor) else (None, 0)
        return mark if mark is not None and tensor._version == version else None

    def rates(self, x: Tensor) -> Tensor | None:
        """Mean count of each row of `x`, None if it does not hold spikes."""
        mark = self.of(x)
        known = None if mark is None else self.means.get(x)
        return row_means(x, mark.unit) if known is None and mark is not None else known

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.aside:
            self.follow(getattr(function, "__name__", ""), args, kwargs or {}, result)
        return result

    def follow(self, name: str, args: tuple, kwargs: dict, result: object) -> None:
        """Mark what the function `name` made of `args`."""
        mark = self.after(name, args, kwargs)
        if mark is not None:
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.put(tensor, mark)

    def after(self, name: str, args: tuple, kwargs: dict) -> Mark | None:
        """The mark of what the function `name` makes of `args`."""
        if not args:
            return None
        if name in ("cat", "concat", "stack"):
            marks = [self.of(tensor) for tensor in args[0]]
            alike = None not in marks and len({mark.unit for mark in marks}) == 1
            return Mark(marks[0].unit, max(mark.most for mark in marks)) if alike else None
        mark = self.of(args[0])
        moves = name in self.MOVES or (name == "pad" and _adds_zeros(*args[2:], **kwargs))
        if mark is None or moves or (name == "interpolate" and _repeats(*args[1:], **kwargs)):
            return mark
        if len(args) != 2 or kwargs:
            return None
        if isinstance(args[1], int | float) and args[1] > 0 and name in ("mul", "__mul__", "__rmul__"):
            return Mark(mark.unit * args[1], mark.most)
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


def _adds_zeros(mode: str = "constant", value: float | None = None, pad: object = None) -> bool:
    """True for what F.pad does with these arguments, those after the input, if it adds zeros and nothing else."""
    return mode == "constant" and not value


def _repeats(size: object = None, scale_factor: object = None, mode: str = "nearest", *_, **__) -> bool:
    """True for what F.interpolate does with these arguments, those after the input, if it repeats elements."""
    return mode in ("nearest", "nearest-exact")


def row_means(spikes: Tensor, unit: float) -> Tensor:
    """Mean count of each row of spikes [T*B, ...], [T*B] in float64 on the CPU."""
    half = spikes.dtype in (torch.float16, torch.bfloat16)
    total = spikes.flatten(1).sum(1, dtype=torch.float32 if half else None)
    total = (total if total.is_meta else total.cpu()).double()  # off the device: Apple's has no float64
    return (total / unit).round() / max(1, spikes[:1].numel())  # a sum of counts is whole whatever the unit


def sparser(*rates: Tensor | None) -> Tensor | None:
    """Rate of a product: its sparser side says what is added; None, so multiplied, if neither side is spikes."""
    known = [rate for rate in rates if rate is not None]
    return torch.stack(known).amin(0) if known else None

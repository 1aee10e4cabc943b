"""Every product of a forward pass, whoever makes it: where, how many, and whether one operand is spikes.

Paper: Meta-SpikeFormer, Sec. 3 and App. B.1: a product with a spike is an addition where it fires and nothing where it
does not; an element-wise product with binary spikes is a mask; a scale merges into the threshold behind it.
ops.py counts layers by what they are, this file by the functions of torch that run, whoever calls them. What runs
outside them (NumPy, functions scripted by torch.jit) goes unseen.
What a constant does to all elements, or to the channels that a layer has just made, merges into thresholds and weights.
Neurons' own arithmetic (leak, threshold) is left out, as is what does not depend on the image.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from spikeformers.energy.firing import neurons_of, plain_name
from spikeformers.energy.foreign import Spiking
from spikeformers.energy.marks import Mark, SpikeMarks, sparser
from spikeformers.energy.operators import Operators
from spikeformers.energy.ops import FLOAT_BITS, Trace, bits_of, trace
from spikeformers.neurons import TimeMean

LAYERS = {f"conv{n}d": "conv" for n in (1, 2, 3)} | {f"conv_transpose{n}d": "conv" for n in (1, 2, 3)}
LAYERS |= {"linear": "linear"}
MATRIX = (
    *("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "einsum", "tensordot", "kron"),
    *("multi_dot", "addmm", "baddbmm", "addmv"),
)
KINDS = {
    **LAYERS,
    **dict.fromkeys(MATRIX, "matmul"),
    **dict.fromkeys(("mul", "div", "pow", "square", "reciprocal", "addcmul", "addcdiv", "lerp", "prod"), "product"),
    **dict.fromkeys(("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"), "norm"),
    **dict.fromkeys(("interpolate", "upsample", "grid_sample", "grid_sampler", "roi_align"), "taps"),
    **dict.fromkeys(("mean", *(f"{a}avg_pool{n}d" for a in ("", "adaptive_") for n in (1, 2, 3))), "average"),
    **dict.fromkeys(("softmax", "softmin"), "softmax"),
}
SAME = {"multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "subtract": "sub"}
SAME |= {prefix + name: name for prefix in "ir" for name in ("mul", "div", "add", "sub", "matmul")}
SAME |= {"itruediv": "div", "rtruediv": "div"}
NEW = ("new_ones", "new_zeros", "new_full", "new_empty", "zeros_like", "ones_like", "full_like", "empty_like")
MOVES = tuple(name for name in SpikeMarks.MOVES if "max_pool" not in name)
SUMS = ("sum", "add", "sub", "cat", "stack")


@dataclass(frozen=True)
class Product:
    """One call of one function that multiplies, over all steps and images of a pass.

    `module`: plain name of the innermost module, "" the model.  `kind`: a value of KINDS, or "mask", "scale" (by a
    constant tensor), "constant" (by a number), "unknown".  `operand`: "spikes", where one side is, "constant" where the
    product merges away (`into` a layer, if that is known), else "real".  `most`, `rate`: the largest count that these
    spikes may have (the better side's), and their mean count.  `reads`: what the real numbers are, "image" or "average"
    (of spikes), if that is known.  `bits` of the weight, None without one.
    """

    module: str
    kind: str
    function: str
    products: int
    operand: str
    most: int = 0
    rate: float | None = None
    reads: str = ""
    into: str = ""
    bits: int | None = None


def products_of(model: nn.Module, images: Tensor) -> tuple[Trace, tuple[Product, ...]]:
    """Run `model(images)` once: its layers as `trace` counts them, and every product in order.

    Raises ValueError if it multiplies nothing, if the model has neurons and none of them ran, or if a part of it was
    scripted by torch.jit.
    """
    walk = Walk(model, images, neurons_of(model))
    found = walk.trace()
    if not walk.found:
        raise ValueError(f"{type(model).__name__} has nothing to count: it multiplies nothing")
    return found, tuple(walk.found)


ATTENTION = "scaled_dot_product_attention"
REAL_NUMBERS = ("real", 0, None)


class Source(NamedTuple):
    """What a tensor is made of; of a layer's output also its channels and the layer's name."""

    kind: str  # "fixed" (does not depend on the image), "image", "spikes", "average" (of spikes), "layer" or "real"
    channels: int = 0
    layer: str = ""


FIXED, IMAGE, AVERAGE, REAL, SPIKES = (Source(kind) for kind in ("fixed", "image", "average", "real", "spikes"))


class _Operand(NamedTuple):
    """A tensor as it was before the call (which may write to it)."""

    tensor: Tensor
    mark: Mark | None
    source: Source


@dataclass(frozen=True)
class Call:
    """One call of a function: its tensors before, the mean counts of each row of those that are spikes, and after."""

    name: str
    operands: list[_Operand]
    rates: list[Tensor | None]
    made: list[Tensor]
    below: Operators
    of_batch: bool

    @property
    def moving(self) -> list[_Operand]:
        """The operands that depend on the image."""
        return [each for each in self.operands if each.source != FIXED]

    def spikes(self, *places: int) -> tuple[str, int, float | None]:
        """Operand, most and rate of a product of the operands at `places` (of all, if none is given).

        The side with smaller counts says how it is driven, the sparser side what is added.
        """
        marks, rates = [], []
        for place in places or range(len(self.operands)):
            tensor, mark, _ = self.operands[place]
            if mark is not None:
                virtual = _virtual_steps(tensor)
                marks.append(mark if virtual == 1 else Mark(mark.unit, 1))
                rates.append(self.rates[place] / virtual)
        if not marks:
            return REAL_NUMBERS
        alike = len({len(rate) for rate in rates}) == 1
        rate = float(sparser(*rates).mean()) if alike else min(float(rate.mean()) for rate in rates)
        return "spikes", min(mark.most for mark in marks), rate


class Walk(SpikeMarks):
    """Sees every function of a pass, and knows of every tensor what it was made of."""

    def __init__(self, model: nn.Module, images: Tensor, neurons: Mapping[str, Spiking]) -> None:
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise ValueError(
                "a part of this model was scripted by torch.jit, which nobody can listen to: use the original"
            )
        super().__init__()
        self.model = model
        self.images = images
        self.neurons = neurons
        self.found: list[Product] = []
        self.open: list[tuple[str, nn.Module]] = [("", model)]
        self.calls: Counter[str] = Counter()  # products of two matrices, by name of the module
        self.sources = WeakTensorKeyDictionary()  # tensor -> source, version; parameters whatever their version
        kept = [tensor for module in model.modules() for tensor in vars(module).values() if isinstance(tensor, Tensor)]
        for tensor in (*model.parameters(), *model.buffers(), *kept):
            self.sources[tensor] = (FIXED, None)
        self.sources[images] = (IMAGE, images._version)

    def trace(self) -> Trace:
        """Run the model once: its layers as ops.py counts them."""
        with self.inside():
            return trace(self.model, self.images, marks=self, neurons=self.neurons)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Hooks that tell which module runs."""
        handles = []
        for name, module in self.model.named_modules():
            entry = (plain_name(name), module)
            handles.append(module.register_forward_pre_hook(lambda *_, entry=entry: self.open.append(entry)))
            handles.append(module.register_forward_hook(lambda *_: self.open.pop() and None))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def source(self, tensor: Tensor) -> Source:
        """What `tensor` is made of; "real" if that is not known."""
        if self.of(tensor) is not None:
            return SPIKES
        source, version = self.sources.get(tensor, (REAL, None))
        return source if version is None or version == tensor._version else REAL

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").split(".")[0]
        if self.aside or any(name in self.neurons for name, _ in self.open):
            return function(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        operands = [_Operand(tensor, self.of(tensor), self.source(tensor)) for tensor in tensors]
        plain = SAME.get(name.strip("_"), name.strip("_"))
        multiplies = plain in KINDS or plain == ATTENTION
        rates = [self.rates(each.tensor) if multiplies else None for each in operands]
        with Operators() as below:
            result = function(*args, **kwargs)
        self.follow(name, args, kwargs, result)
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if made:
            call = Call(plain, operands, rates, made, below, plain == "batch_norm" and _of_batch(*args[3:], **kwargs))
            source = self.note(call) if call.moving and name not in NEW else FIXED
            for tensor in made:
                self.sources[tensor] = (source, tensor._version)
        return result

    def after(self, name: str, args: tuple, kwargs: dict) -> Mark | None:
        """As SpikeMarks; a number that divides spikes merges into weights too, but a mean over time is real numbers."""
        mark = super().after(name, args, kwargs)
        if len(args) != 2 or kwargs:
            return mark
        if mark is None and name in ("div", "__truediv__") and not isinstance(self.open[-1][1], TimeMean):
            divided, number = self.of(args[0]), args[1]
            if divided is not None and isinstance(number, int | float) and number > 0:
                return Mark(divided.unit / number, divided.most)
        return mark

    def note(self, call: Call) -> Source:
        """Write down what the call multiplies; returns what its result is made of."""
        kind, below = KINDS.get(call.name), call.below
        if call.name == ATTENTION:
            self.note_attention(call)
        elif kind in ("conv", "linear", "matmul"):
            return self.note_matrix(call, kind)
        elif kind == "norm" and call.name == "batch_norm" and not call.of_batch:
            return self.note_scale(call, call.operands[0], size=call.made[0].shape[1], kind="norm")
        elif kind == "product" and below.products:
            return self.note_elements(call)
        elif kind in ("norm", "softmax", "taps", "product") and below.products:
            operand = call.spikes(0) if kind == "taps" else REAL_NUMBERS
            self.add(call, kind, below.products, *operand, reads=call.operands[0].source)
        elif below.products or below.foreign:
            self.add(call, "unknown", below.products + below.foreign, "real")
        elif below.by_numbers:
            self.add(call, "average" if kind == "average" else "constant", below.by_numbers, "constant")
        return self.passed_on(call)

    def add(
        self,
        call: Call,
        kind: str,
        products: int,
        operand: str,
        most: int = 0,
        rate: float | None = None,
        *,
        function: str = "",
        reads: Source = REAL,
        into: str = "",
        bits: int | None = None,
    ) -> None:
        name = self.open[-1][0]
        reads = reads.kind if operand == "real" and reads in (IMAGE, AVERAGE) else ""
        self.found.append(Product(name, kind, function or call.name, products, operand, most, rate, reads, into, bits))

    def note_matrix(self, call: Call, kind: str) -> Source:
        """A layer, or a product of matrices: additions where either side is spikes."""
        skipped = call.name in ("addmm", "baddbmm", "addmv")  # its first operand is only added
        places = range(2) if kind != "matmul" else range(skipped, len(call.operands))
        inputs = [call.operands[place] for place in places]
        weighted = kind != "matmul" or any(each.source == FIXED for each in inputs)
        first = next(each for each in inputs if each.source != FIXED or each is inputs[-1])
        bits = bits_of(self.open[-1][1]) if weighted else None
        function, foreign = call.name, call.below.foreign
        if not weighted:  # an attention has two
            self.calls[self.open[-1][0]] += 1
            function = f"{call.name} {self.calls[self.open[-1][0]]}"
        self.add(
            call,
            "unknown" if foreign else kind,
            call.below.products + foreign,
            *(REAL_NUMBERS if foreign else call.spikes(*places)),
            function=function,
            reads=first.source,
            bits=bits,
        )
        axis = -1 - int(call.name[-2]) if call.name[-1] == "d" and call.name[-2].isdigit() else -1
        return Source("layer", call.made[0].shape[axis], self.open[-1][0]) if weighted else REAL

    def note_attention(self, call: Call) -> None:
        """The three steps of scaled dot-product attention."""
        q, k, v = (each.tensor for each in call.operands[:3])
        scores = q.numel() // q.shape[-1] * k.shape[-2]
        self.add(call, "matmul", scores * q.shape[-1], *call.spikes(0, 1), function="q k^T")
        self.add(call, "softmax", scores, "real")
        self.add(call, "matmul", scores * v.shape[-1], *call.spikes(2), function="map v")

    def note_elements(self, call: Call) -> Source:
        """An element-wise product: by a constant, or a mask of spikes, or of real numbers."""
        moving = call.moving
        if len(moving) < len(call.operands) and len(moving) == 1 and not (call.name == "div" and self.divides(call)):
            fixed = max(each.tensor.numel() for each in call.operands if each.source == FIXED)
            return self.note_scale(call, moving[0], size=fixed, kind="scale")
        if any(each.tensor.dtype == torch.bool for each in moving):
            self.add(call, "mask", call.below.products, "spikes", 1)
            return REAL
        operand, most, rate = call.spikes()
        joint = self.rates(call.made[0])
        if joint is not None:
            rate = float(joint.mean()) / _virtual_steps(call.made[0])  # only where both fire
        self.add(call, "product" if operand == "real" else "mask", call.below.products, operand, most, rate)
        return self.passed_on(call)

    @staticmethod
    def divides(call: Call) -> bool:
        """True if what depends on the image is the divisor."""
        return call.operands[-1].source != FIXED

    def note_scale(self, call: Call, moving: _Operand, *, size: int, kind: str) -> Source:
        """A product by constants, `size` of them: gone where they merge into a threshold or the layer in front."""
        source, products = moving.source, call.below.products
        if size == 1 and kind == "scale":
            self.add(call, "constant", products, "constant")
            return self.passed_on(call)
        if source.kind == "layer" and size == source.channels:
            self.add(call, kind, products, "constant", into=source.layer)
            return source
        place = next(i for i, each in enumerate(call.operands) if each is moving)
        self.add(call, kind, products, *call.spikes(place), reads=source, bits=FLOAT_BITS)
        return IMAGE if source == IMAGE else REAL

    def passed_on(self, call: Call) -> Source:
        """What a function that neither is a layer nor scales by channel makes of its sources."""
        sources = {each.source for each in call.moving}
        moves = call.name in MOVES or call.name == "get" or call.name == "getitem"
        linear = call.name in SUMS or KINDS.get(call.name) == "average" or self.only_numbers(call)
        if sources == {IMAGE}:
            return IMAGE
        if sources <= {SPIKES, AVERAGE} and (moves or linear):
            return AVERAGE
        if len(call.moving) == 1 and (moves or call.name in ("add", "sub") or self.only_numbers(call)):
            scrambled = call.name in ("reshape", "view") and not self.keeps_channels(call)
            return REAL if scrambled else call.moving[0].source
        return REAL

    @staticmethod
    def keeps_channels(call: Call) -> bool:
        """True if a reshape leaves the channels of a layer one axis, where it was."""
        before, after, channels = call.moving[0].tensor.shape, call.made[0].shape, call.moving[0].source.channels
        at_end = before[-1] == after[-1] == channels
        return channels == 0 or at_end or before[:2] == after[:2]

    @staticmethod
    def only_numbers(call: Call) -> bool:
        """True if a product is one by numbers alone."""
        by_one = all(each.tensor.numel() == 1 for each in call.operands if each.source == FIXED)
        return call.name in ("mul", "div") and len(call.moving) == 1 and by_one


def _virtual_steps(spikes: Tensor) -> int:
    """Of the binary steps that an unrolled neuron fires its counts in (deploy/unroll.py), 1 for any other."""
    return len(getattr(spikes, "planes", (spikes,)))


def _of_batch(
    weight: object = None, bias: object = None, training: bool = False, *rest: object, **others: object
) -> bool:
    """True if F.batch_norm, called with these arguments after the first three, takes the statistics of the batch."""
    return training

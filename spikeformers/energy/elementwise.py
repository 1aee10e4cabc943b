"""What runs beside the layers: neurons, norms, taps, masks, averages, shortcuts; and the words that all of it moves.

Paper: none charges these; Meta-SpikeFormer, App. B.1, calls masks free. Only conventions that say so count them.
Arithmetic, per image and time step. A product of two real numbers is a multiply-accumulate; a product or a sum with
spikes is an addition for each count.
  neuron     D comparisons, an addition each; where its membrane lives from step to step, also a multiply-accumulate
             (leak and charge) and an addition (reset)
  norm       a product an element, unless it scales the channels of the layer in front, where a batch norm folds
  taps       a product for each of the 4 (bilinear) neighbours of an element, and of roi_align and grid_sample
  mask       a product an element: of spikes with spikes or with real numbers
  product    the same of two real numbers; "scale": by constants that fold into no layer
  softmax    a product (the division) and an addition an element; exponentials and activations are look-ups, and free
  average    an addition for each element read
  maximum    a comparison for each element read
  sum        an addition an element wherever two maps are added (a shortcut), and for each element of a map summed up
Free: biases, with which a sum starts; constants, which fold into thresholds and weights.
Memory, in words of 32 bits, a lower bound, since a layer reads a word once a step, however often it uses it:
  a layer reads its weights (at their bits) and its input once a step; a product of two maps reads both
  a count of at most D takes as many bits as D, real numbers 32
  a neuron writes its counts; a membrane that lives on is read and written in each step
  real numbers in front of a layer are written once; the image is not; a sum of two maps writes and reads one of them
  taps read a word for each neighbour; everything else works on what the layer in front has just made
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from spikeformers.attention import SDDA
from spikeformers.energy.foreign import ForeignNeuron, Spiking
from spikeformers.energy.functions import MULTI_HEAD
from spikeformers.energy.marks import Mark, sparser
from spikeformers.energy.ops import ATTENTION, FLOAT_BITS, Operation, Trace, alike, bits_of, inside, per_image
from spikeformers.energy.products import FIXED, IMAGE, KINDS, Call, Product, Source, Walk

MAXIMA = tuple(f"{adaptive}max_pool{n}d" for adaptive in ("", "adaptive_") for n in (1, 2, 3))
READERS = ("conv", "linear", "matmul")
ARITHMETIC = ("norm", "taps", "mask", "product", "scale", "softmax", "unknown")
"""Kinds of products that no layer makes."""


@dataclass(frozen=True, eq=False)
class Extra(Operation):
    """Arithmetic or traffic beside the layers, per image and time step; `macs`: products of two numbers.

    `additions`: sums beside them; both happen at `rates`, if spikes are one side.  `words`: of 32 bits, moved in a
    step, `ann_words`: if all numbers were real and no membrane lived on.  `kind`: as at the head of this file, or
    "memory".
    """

    additions: float = 0.0
    words: float = 0.0
    ann_words: float = 0.0


def trace_everything(
    model: nn.Module, images: Tensor, *, neurons: Mapping[str, Spiking]
) -> tuple[Trace, tuple[Extra, ...]]:
    """Run `model(images)` once: its layers as `trace` counts them, and what runs beside them, in order.

    Raises ValueError if the model has neurons and none of them ran, or if a part of it was scripted by torch.jit.
    """
    listener = _Listener(model, images, neurons)
    found = listener.trace()
    return found, tuple(_settled(extra, found, weights=weights) for extra, weights in listener.extras)


class _Listener(Walk):
    """Sees every function of a pass. Until they are settled, extras hold totals over the pass, `steps` their rows."""

    def __init__(self, model: nn.Module, images: Tensor, neurons: Mapping[str, Spiking]) -> None:
        super().__init__(model, images, neurons)
        self.extras: list[tuple[Extra, float]] = []  # and words of weights in one step
        self.stored = WeakTensorKeyDictionary()  # real numbers that were written to memory

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The hooks of the walk, and those of neurons."""
        with super().inside():
            modules = {
                name: each.module if isinstance(each, ForeignNeuron) else each for name, each in self.neurons.items()
            }
            handles = [module.register_forward_hook(self.listener(name)) for name, module in modules.items()]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def listener(self, name: str) -> Callable:
        """What hears the neuron of that name."""

        def hook(_, __, output: Tensor | tuple) -> None:
            neuron, spikes = self.neurons[name], output[0] if isinstance(output, tuple) else output
            elements, lives = spikes.numel(), neuron.carries and neuron.steps > 1
            additions, rows = elements * (neuron.levels + lives), spikes.shape[0]
            self.extra(name, "neuron", rows, macs=elements * lives, additions=additions)
            words = elements * (_bits(Mark(neuron.unit, neuron.levels)) / FLOAT_BITS + 2 * lives)
            self.extra(name, "memory", rows, words=words, ann_words=elements)

        return hook

    def extra(
        self, module: str, kind: str, rows: int, *, rates: Tensor | None = None, weights: float = 0, **totals: float
    ) -> None:
        """Write down an extra of a module: totals over the pass, and words of weights."""
        macs = totals.pop("macs", 0)
        self.extras.append((Extra(inside(module, kind), kind, macs, 0, rates, rows, **totals), weights))

    def note(self, call: Call) -> Source:
        """As the walk does; then what the call does beside layers."""
        before = len(self.found)
        source = super().note(call)
        kinds = {product.kind: product for product in self.found[before:]}
        for kind, product in kinds.items():
            if kind in ARITHMETIC and product.operand != "constant":
                self.arithmetic(call, product)
        readers = [kind for kind in kinds if kind in READERS]
        if readers:
            self.layer(call, weighted=readers != ["matmul"])
        else:
            self.additions(call)
        return source

    def arithmetic(self, call: Call, product: Product) -> None:
        """Products that no layer makes."""
        if isinstance(self.open[-1][1], SDDA) and product.kind in ("mask", "product"):
            return  # its weighted sum is an operation of its own
        if call.name == MULTI_HEAD:
            return  # it is counted as layers and products
        name, rows, count = product.module, _rows(call.made[0]), product.products
        if product.kind == "taps":
            words = count * _bits(call.operands[0].mark) / FLOAT_BITS
            self.extra(name, "memory", rows, words=words, ann_words=count)
        rates = None
        if product.operand == "spikes":
            rates = self.rates(call.made[0])
            rates = sparser(*alike(*call.rates)) if rates is None else rates
            if rates is None:  # a comparison's result: each element is passed on, or not
                return self.extra(name, product.kind, rows, additions=count)
        sums = count if product.kind == "softmax" else 0
        return self.extra(name, product.kind, rows, rates=rates, macs=count, additions=sums)

    def layer(self, call: Call, *, weighted: bool) -> None:
        """What a layer, or a product of two maps, reads."""
        name, module = self.open[-1]
        words = ann_words = weights = 0.0
        for place, (tensor, mark, source) in enumerate(call.operands):
            if source == FIXED or (weighted and place):
                bits = bits_of(module) if tensor.ndim > 1 else FLOAT_BITS
                weights += tensor.numel() * bits / FLOAT_BITS
                continue
            written = mark is None and source != IMAGE and tensor not in self.stored
            self.stored[tensor] = True
            words += tensor.numel() * (_bits(mark) / FLOAT_BITS + written)
            ann_words += tensor.numel() * (1 + written)
        self.extra(name, "memory", _rows(call.made[0]), words=words, ann_words=ann_words, weights=weights)

    def additions(self, call: Call) -> None:
        """Additions of what is added, averaged or compared."""
        (name, module), first = self.open[-1], call.moving[0].tensor
        if call.name in ("add", "sub") and len(call.moving) > 1:
            elements, rows = call.made[0].numel(), _rows(call.made[0])
            rates = sparser(*alike(*(self.rates(each.tensor) for each in call.moving)))
            bits = min(_bits(each.mark) for each in call.moving)
            self.extra(name, "sum", rows, rates=rates, additions=elements)
            self.extra(name, "memory", rows, words=2 * elements * bits / FLOAT_BITS, ann_words=2 * elements)
            return
        kind = "maximum" if call.name in MAXIMA else "sum" if call.name == "sum" else KINDS.get(call.name)
        if kind not in ("maximum", "sum", "average"):
            return
        if not isinstance(module, tuple(ATTENTION)):  # whose sums are operations of their own
            self.extra(name, kind, _rows(first), rates=self.rates(first), additions=first.numel())


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def _bits(mark: Mark | None) -> int:
    """Of an element of a map: as many as its largest count has, or those of a real number."""
    return FLOAT_BITS if mark is None else min(FLOAT_BITS, mark.most.bit_length())


def _settled(extra: Extra, found: Trace, *, weights: float) -> Extra:
    """Totals over a pass -> numbers per image and time step, in which the weights are read once."""
    own = found.steps if extra.steps % (found.steps * found.images) == 0 else 1
    share = own * found.images
    return replace(
        extra,
        macs=extra.macs / share,
        additions=extra.additions / share,
        words=extra.words / share + weights,
        ann_words=extra.ann_words / share + weights,
        rates=None if extra.rates is None else per_image(extra.rates, found.images),
        steps=own,
    )

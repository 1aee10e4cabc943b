"""What a network computes: multiply-accumulates (MACs) of every layer by hooks on real tensors, and what feeds it.

Paper: Meta-SpikeFormer, Eqs. 21-22 (MACs of convolution and linear layer), Table 6 and App. B (attention); Spikformer
V2, Table 1, whose "OPs" of products of real numbers are two to a MAC (everywhere else it counts one).
A layer is fed by spikes if its input is a neuron's output or made of such outputs so that it is still counts, from 0
up, times one unit (marks.py).
The rate of a layer is the mean count of its input (for binary spikes the share of non-zeros that the paper names).
Counted: nn.Conv*, nn.ConvTranspose*, nn.Linear, the products of every attention of spikeformers.attention, and every
other product of two matrices (@): of queries with a map's pixels, say. Batch norms fold into layers; biases, softmax,
scales and the taps of interpolations are free.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from spikeformers.attention import SDDA, SDSA1, SDSA2, SSA, VSA, IdentityMap
from spikeformers.energy.firing import neurons_of, plain_name
from spikeformers.energy.marks import Mark, SpikeMarks, row_means, sparser
from spikeformers.layers import RepConv, SepConv
from spikeformers.neurons import Neuron, temporal_modules


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of one layer in one forward pass of B images.

    `macs`: per image and time step, as executed.  `dense_macs`: the same after re-parameterisation (RepConv as one
    dense 3x3, the depthwise 7x7 and the pointwise convolution of SepConv as one dense 7x7) and, for "attention", as
    Table 6 has it.  `rates` [B]: mean count of an input element in one step, None if the input is not spikes; for
    attention the sum of the rates of Q, K, V, None unless all are spikes.  `parts`: the operations as executed, of one
    that is composed.  Table 6 has no rule for the kinds behind "attention": "attention_map", which forms its N x N map,
    "deformable", which adds up what it sampled, and "product", of two matrices anywhere else.
    """

    name: str
    kind: str  # "conv", "linear", "rep_conv", "sep_conv", "attention", "attention_map", "deformable" or "product"
    macs: float
    dense_macs: float
    rates: Tensor | None
    steps: int = 1
    parts: tuple["Operation", ...] = ()


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass: its operations in order of execution, and what its neurons fired.

    `spikes` [B]: counts of all neurons and steps, per image.  `sites`: the largest value that number could have, 0 for
    an ANN.
    """

    operations: tuple[Operation, ...]
    spikes: Tensor
    sites: int
    images: int
    steps: int


COMPOSED = {  # class -> kind, name of the composed operation inside the module, children that hold its convolutions
    RepConv: ("rep_conv", "", ("pw1", "dw", "pw2")),
    SepConv: ("sep_conv", "dw+pw2", ("dw", "pw2")),
}


def trace(model: nn.Module, images: Tensor, *, marks: SpikeMarks | None = None) -> Trace:
    """Run `model(images)` once, without gradients, and count. A model without neurons is an ANN: it fires nothing.

    `marks`: who follows the spikes, and sees every function; without, a SpikeMarks.
    Raises ValueError if the model has neither neurons nor a layer to count, or if it has neurons and none of them ran.
    """
    tracer = _Tracer(model, SpikeMarks() if marks is None else marks)
    try:
        # The version counter of a tensor, which tells that a mark is stale, needs inference mode off.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.inference_mode(False), torch.no_grad(), tracer.marks, _Matrices(tracer):
            model(images)
    finally:
        tracer.remove()
    if marks is None and not tracer.totals and not tracer.operations and not neurons_of(model):
        name = type(model).__name__
        raise ValueError(f"{name} has nothing to count: no spiking neuron, convolution, linear layer or attention")
    return tracer.result(rows=len(images))


class _Tracer:
    """Hooks on one model. Until `result`, operations hold totals over the pass, and rates one value a row [T*B]."""

    def __init__(self, model: nn.Module, marks: SpikeMarks) -> None:
        self.model = model
        self.marks = marks
        self.operations: list[Operation] = []
        self.layers: dict[str, nn.Module] = {}
        self.operands: dict[str, Tensor] = {}  # what an attention will multiply, by name of the module that gave it
        self.open: list[str] = []  # names of the modules that run, outermost first
        self.attentions = 0  # of these, those whose products are counted by a rule
        self.products: Counter[str] = Counter()  # of two matrices, by name of the module that made them
        self.totals: list[tuple[Neuron, Tensor, int]] = []
        self.opened: list[int] = []
        self.handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            self.attach(plain_name(name), module)

    def attach(self, name: str, module: nn.Module) -> None:
        """Register the hooks that `module` needs."""
        composed = [parts for kind, parts in COMPOSED.items() if isinstance(module, kind)]
        rule = next((rule for kind, rule in ATTENTION.items() if isinstance(module, kind)), None)
        self.handles.append(module.register_forward_pre_hook(lambda *_: self.enter(name, rule)))
        if isinstance(module, Neuron):
            self.add(module, name, self.on_neuron)
        elif isinstance(module, _ConvNd | nn.Linear):
            self.layers[name] = module
            self.add(module, name, self.on_layer)
        elif composed:
            self.handles.append(module.register_forward_pre_hook(lambda *_: self.opened.append(len(self.operations))))
            self.add(module, name, lambda *call: self.on_composed(*call, *composed[0]))
        elif rule is not None:
            for key in rule.operands or module.operands:
                self.add(getattr(module, key), _inside(name, key), self.on_operand)
            self.add(module, name, lambda *call: self.on_attention(*call, rule))
        self.handles.append(module.register_forward_hook(lambda *_: self.leave(rule)))

    def enter(self, name: str, rule: "_Rule | None") -> None:
        self.open.append(name)
        self.attentions += rule is not None

    def leave(self, rule: "_Rule | None") -> None:
        self.open.pop()
        self.attentions -= rule is not None

    def add(self, module: nn.Module, name: str, listener: Callable) -> None:
        self.handles.append(module.register_forward_hook(lambda *call: self.count(listener, name, *call)))

    def count(self, listener: Callable, *call) -> None:
        """Let `listener` look at a call."""
        self.marks.aside = True  # what is computed to count is no part of the pass
        listener(*call)
        self.marks.aside = False

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def on_neuron(self, name: str, neuron: Neuron, _, spikes: Tensor) -> None:
        means = self.marks.fired(spikes, Mark(neuron.unit, neuron.levels))
        self.totals.append((neuron, means, spikes[:1].numel()))

    def on_operand(self, name: str, _, __, output: Tensor) -> None:
        self.operands[name] = output

    def on_layer(self, name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        (x,) = inputs[:1]
        if isinstance(layer, nn.Linear):
            kind, macs = "linear", output.numel() * layer.in_features
        elif layer.transposed:
            kind, macs = "conv", x.numel() * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
        else:
            kind, macs = "conv", output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        self.operations.append(Operation(name, kind, macs, macs, self.marks.rates(x), steps=x.shape[0]))

    def on_composed(self, name: str, module: nn.Module, _, output: Tensor, kind: str, own: str, members: tuple) -> None:
        """Replace the convolutions of a module by one operation that has them as parts."""
        start = self.opened.pop()
        inside = len(_inside(name, "x")) - 1
        parts = tuple(o for o in self.operations[start:] if o.name[inside:].split(".")[0] in members)
        if tuple(part.name[inside:].split(".")[0] for part in parts) != members:
            return  # built otherwise by its owner: its layers count one by one
        layers = [self.layers[part.name] for part in parts]
        axes = zip(*(layer.kernel_size for layer in layers), strict=True)
        kernel = math.prod(1 + sum(size - 1 for size in sizes) for sizes in axes)
        dense, macs, first = output.numel() * layers[0].in_channels * kernel, sum(p.macs for p in parts), parts[0]
        place = self.operations.index(first)
        self.operations = [operation for operation in self.operations if operation not in parts]
        whole = Operation(_inside(name, own), kind, macs, dense, first.rates, first.steps, parts)
        self.operations.insert(place, whole)

    def on_product(self, left: Tensor, right: Tensor, result: Tensor) -> None:
        """A product of two matrices: the sparser side says what is added."""
        name = self.open[-1] if self.open else ""
        self.products[name] += 1
        macs, rates = result.numel() * left.shape[-1], sparser(*_alike(self.marks.rates(left), self.marks.rates(right)))
        place = _inside(name, f"product{self.products[name]}")
        self.operations.append(Operation(place, "product", macs, macs, rates, steps=result.shape[0]))

    def on_attention(self, name: str, module: nn.Module, _, __, rule: "_Rule") -> None:
        """Insert the products of Q, K, V in front of the projection."""
        operands = {key: self.operands.pop(_inside(name, key)) for key in rule.operands or module.operands}
        rates = {key: self.marks.rates(operand) for key, operand in operands.items()}
        table6, products = rule.count(module, operands, rates)
        rows = next(iter(operands.values())).shape[0]
        parts = tuple(
            Operation(_inside(name, product), "attention", macs, macs, rate, rows) for product, macs, rate in products
        )
        macs = sum(part.macs for part in parts)
        total = None if None in rates.values() else torch.stack(list(rates.values())).sum(0)
        projections = [i for i, o in enumerate(self.operations) if o.name.startswith(_inside(name, "proj"))]
        place = projections[-1] if len(projections) == 1 else len(self.operations)
        whole = Operation(_inside(name, "products"), rule.kind, macs, table6, total, rows, parts)
        self.operations.insert(place, whole)

    def result(self, *, rows: int) -> Trace:
        """Everything per image and time step. `rows`: of the input, where no layer tells how many there are."""
        steps = max((module.steps for module in temporal_modules(self.model).values()), default=1)
        if self.totals:
            first, means, _ = self.totals[0]
            images = len(means) // first.steps
        elif neurons_of(self.model):
            raise ValueError("no neuron of the model ran in its forward pass: there is no spike to count")
        else:  # an ANN: rows of the layer that reads the image
            images = (self.operations[0].steps if self.operations else rows) // steps
        spikes, sites = torch.zeros(images, dtype=torch.float64), 0
        for neuron, mean, elements in self.totals:
            spikes = spikes + _per_image(mean, images) * (elements * len(mean) / images)
            sites += elements * neuron.levels * len(mean) // images
        operations = tuple(_settled(operation, steps=steps, images=images) for operation in self.operations)
        return Trace(operations, spikes, sites, images, steps)


class _Matrices(TorchFunctionMode):
    """Hears products of two matrices, but those of attentions that a rule counts."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        multiplies = getattr(function, "__name__", "").strip("_") in ("matmul", "mm", "bmm") and not kwargs
        if multiplies and not self.tracer.attentions and min(each.ndim for each in args) > 1:
            self.tracer.count(self.tracer.on_product, *args, result)
        return result


def _alike(*rates: Tensor | None) -> list[Tensor | None]:
    """Rates of rows that belong together: each as its mean where their numbers differ."""
    most = max((len(rate) for rate in rates if rate is not None), default=0)
    return [rate if rate is None or len(rate) == most else rate.mean().expand(most) for rate in rates]


def _inside(name: str, child: str) -> str:
    """Name of a child of the module `name`; the model itself has the name ""."""
    return f"{name}.{child}".strip(".")


def _per_image(rows: Tensor, images: int) -> Tensor:
    """Mean of every image over the rows [T*B] that belong to it (time-major), [B]."""
    if rows.shape[0] % images:
        return rows.mean().expand(images)  # rows that are not images (windows, say): all images share them
    return rows.view(-1, images).mean(0)


def _settled(operation: Operation, *, steps: int, images: int) -> Operation:
    """Totals over a pass -> numbers per image and step; rates per row -> per image."""
    own = steps if operation.steps % (steps * images) == 0 else 1
    return replace(
        operation,
        macs=operation.macs / (own * images),
        dense_macs=operation.dense_macs / (own * images),
        rates=None if operation.rates is None else _per_image(operation.rates, images),
        steps=own,
        parts=tuple(_settled(part, steps=steps, images=images) for part in operation.parts),
    )


Rates = dict[str, Tensor | None]
"""Mean count of each row of every operand, None for one of real numbers."""

Products = tuple[int, list[tuple[str, int, Tensor | None]]]
"""MACs after Table 6, and (name, MACs, rate of each row) of every product as executed."""


def _sdsa1(module: SDSA1, operands: dict[str, Tensor], rates: Rates) -> Products:
    """A mask (free) and a sum over tokens of K * V: N C additions where both fire."""
    elements, both = operands["q"].numel(), sparser(rates["k"], rates["v"])
    if rates["k"] is not None and rates["v"] is not None:
        both = row_means(operands["k"] * operands["v"], module.k.unit * module.v.unit)
    return elements, [("sum_kv", elements, both)]


def _sdsa2(module: SDSA2, operands: dict[str, Tensor], rates: Rates) -> Products:
    """A sum of Q over tokens and a mask (free)."""
    elements = operands["q"].numel()
    return elements, [("sum_q", elements, rates["q"])]


def _ssa(module: SSA, operands: dict[str, Tensor], rates: Rates) -> Products:
    """Two matrix products per head, in the cheaper order as `spike_attention` picks it.

    In the first both sides are spikes and the sparser one says what is added; in the second the remaining spikes do.
    """
    rows, channels, *pixels = operands["q"].shape
    tokens, width = math.prod(pixels), channels // module.heads
    if tokens > width:
        macs, names, pair, last = rows * tokens * channels * width, ("k^T v", "q (k^T v)"), ("k", "v"), "q"
    else:
        macs, names, pair, last = rows * tokens * tokens * channels, ("q k^T", "(q k^T) v"), ("q", "k"), "v"
    first = sparser(rates[pair[0]], rates[pair[1]])
    return rows * tokens * channels**2, [(names[0], macs, first), (names[1], macs, rates[last])]


def _mapped(module: IdentityMap | VSA, operands: dict[str, Tensor], rates: Rates) -> Products:
    """The map of N x N real numbers per head, always first, and its product with V.

    Multiplied where both sides are real numbers, added where V is spikes.
    """
    rows, channels, *pixels = operands["q"].shape
    macs = rows * math.prod(pixels) ** 2 * channels
    return 2 * macs, [("q k^T", macs, sparser(rates["q"], rates["k"])), ("map v", macs, rates["v"])]


def _sdda(module: SDDA, operands: dict[str, Tensor], rates: Rates) -> Products:
    """A weight for every sampled point, times the channels of its group: added where the weight spikes."""
    macs = operands["attn"].numel() * operands["value"].shape[1] // module.groups
    return macs, [("weighted", macs, rates["attn"])]


class _Rule(NamedTuple):
    """How an attention is counted. `operands`: children that give what it multiplies; none: those that it names."""

    kind: str
    count: Callable[[nn.Module, dict[str, Tensor], Rates], Products]
    operands: tuple[str, ...] = ()


ATTENTION = {  # subclasses differ in what the operands are
    SDSA1: _Rule("attention", _sdsa1),
    SDSA2: _Rule("attention", _sdsa2),
    SSA: _Rule("attention", _ssa),  # SDSA-3 and 4 are SSA with other projections
    IdentityMap: _Rule("attention_map", _mapped),
    VSA: _Rule("attention_map", _mapped),
    SDDA: _Rule("deformable", _sdda, ("value", "attn")),
}

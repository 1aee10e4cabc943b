"""What a network computes: multiply-accumulates (MACs) of every layer by hooks on real tensors, and what feeds it.

Paper: Meta-SpikeFormer, Eqs. 21-22 (MACs of convolution and linear layer), Table 6 and App. B (attention); Spikformer
V2, Table 1, whose "OPs" of products of real numbers are two to a MAC (everywhere else it counts one).
A layer is fed by spikes if its input is a neuron's output or made of such outputs so that it is still counts, from 0
up, times one unit (marks.py).
The rate of a layer is the mean count of its input (for binary spikes the share of non-zeros that the paper names).
Counted: nn.Conv*, nn.ConvTranspose*, nn.Linear, the products of every attention of spikeformers.attention, and layers
and products of matrices that functions of torch make (functions.py): of queries with a map's pixels, say. Batch norms
fold into layers; biases, softmax, scales and the taps of interpolations are free.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from spikeformers.attention import SDDA, SDSA1, SDSA2, SSA, VSA, IdentityMap
from spikeformers.energy.firing import neurons_of, plain_name
from spikeformers.energy.foreign import ForeignNeuron, Spiking
from spikeformers.energy.functions import Functions, Leftovers, Part
from spikeformers.energy.marks import Mark, SpikeMarks, row_means, sparser
from spikeformers.layers import RepConv, SepConv
from spikeformers.neurons import Door, temporal_modules
from spikeformers.quantize import LSQLayer, PackedLayer

FLOAT_BITS = 32


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of one layer in one forward pass of B images.

    `macs`: per image and time step, as executed.  `dense_macs`: the same after re-parameterisation (RepConv as one
    dense 3x3, the depthwise 7x7 and the pointwise convolution of SepConv as one dense 7x7) and, for "attention", as
    Table 6 has it.  `rates` [B]: mean count of an input element in one step, None if the input is not spikes; for
    attention the sum of the rates of Q, K, V, None unless all are spikes.  `parts`: the operations as executed, of one
    that is composed.  Table 6 has no rule for the kinds behind "attention": "attention_map", which forms its N x N map,
    "deformable", which adds up what it sampled, and "product", of two matrices anywhere else.  A part of kind "softmax"
    is the scale and the softmax of a map, three products an element as in Table 6; `macs` of the whole leaves it out.
    `bits` of its weights.  `step_rates` [T, B]: `rates` of each step, None where those are.
    """

    name: str
    kind: str  # "conv", "linear", "rep_conv", "sep_conv", "attention", "attention_map", "deformable" or "product"
    macs: float
    dense_macs: float
    rates: Tensor | None
    steps: int = 1
    parts: tuple["Operation", ...] = ()
    bits: int = FLOAT_BITS
    step_rates: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass: its operations in order of execution, and what its neurons fired.

    `spikes` [B]: counts of all neurons and steps, per image.  `sites`: the largest value that number could have, 0 for
    an ANN.  `outputs`: elements of all neurons and steps, per image.  `uncounted`: what multiplies, or may, and is in
    no operation, such as "encoder.lstm (LSTM): mkldnn_rnn_layer".
    """

    operations: tuple[Operation, ...]
    spikes: Tensor
    sites: int
    images: int
    steps: int
    outputs: int = 0
    uncounted: tuple[str, ...] = ()


COMPOSED = {  # class -> kind, name of the composed operation inside the module, children that hold its convolutions
    RepConv: ("rep_conv", "", ("pw1", "dw", "pw2")),
    SepConv: ("sep_conv", "dw+pw2", ("dw", "pw2")),
}


def trace(
    model: nn.Module,
    images: Tensor,
    *,
    marks: SpikeMarks | None = None,
    neurons: Mapping[str, Spiking] | None = None,
) -> Trace:
    """Run `model(images)` once, without gradients, and count. A model without neurons is an ANN: it fires nothing.

    `marks`: who follows the spikes, and sees every function; without, a SpikeMarks.  `neurons`: those of the model by
    name, its spikeformers.neurons if it is not given; with others among them `images` are one image (see foreign.py).
    Raises ValueError if the model has neither neurons nor a layer to count, or if it has neurons and none of them ran.
    """
    neurons = neurons_of(model) if neurons is None else neurons
    tracer = _Tracer(model, SpikeMarks() if marks is None else marks, neurons)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator
    try:
        # The version counter of a tensor, which tells that a mark is stale, needs inference mode off.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.inference_mode(False), torch.no_grad(), tracer.marks, tracer.functions, tracer.leftovers:
            model(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        tracer.remove()
    if marks is None and not tracer.totals and not tracer.operations and not neurons:
        name = type(model).__name__
        raise ValueError(f"{name} has nothing to count: no spiking neuron, convolution, linear layer or attention")
    return tracer.result(images)


class _Tracer:
    """Hooks on one model. Until `result`, operations hold totals over the pass, and rates one value a row [T*B]."""

    def __init__(self, model: nn.Module, marks: SpikeMarks, neurons: Mapping[str, Spiking]) -> None:
        self.model = model
        self.marks = marks
        self.neurons = neurons
        self.foreign = any(isinstance(neuron, ForeignNeuron) for neuron in neurons.values())
        self.leftovers = Leftovers(self.where)
        self.functions = Functions(self.leftovers, idle=lambda: bool(self.ruled or self.inner), tell=self.on_part)
        self.operations: list[Operation] = []
        self.layers: dict[str, nn.Module] = {}
        self.operands: dict[str, Tensor] = {}  # what an attention will multiply, by name of the module that gave it
        self.kinds: dict[str, str] = {}  # class of every module
        self.open: list[str] = []  # names of the modules that run, outermost first
        self.ruled: list[str] = []  # of these, the attentions that a rule counts,
        self.inner: list[str] = []  # and the layers
        self.parts: dict[str, Counter[str]] = {}  # of one call of a module, what its functions made
        self.totals: list[tuple[Spiking, Tensor, int]] = []
        self.feeding: dict[str, int] = {}  # steps of the neuron in front of a layer that spikes feed
        self.opened: list[int] = []
        self.handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            self.kinds[plain_name(name)] = type(module).__name__
            self.attach(plain_name(name), module)

    def attach(self, name: str, module: nn.Module) -> None:
        """Register the hooks that `module` needs."""
        composed = [parts for kind, parts in COMPOSED.items() if isinstance(module, kind)]
        rule = next((rule for kind, rule in ATTENTION.items() if isinstance(module, kind)), None)
        layer = isinstance(module, _ConvNd | nn.Linear)
        lists = [self.open, *((self.ruled,) if rule else ()), *((self.inner,) if layer else ())]
        self.handles.append(module.register_forward_pre_hook(lambda *_: self.enter(name, lists)))
        if name in self.neurons:
            self.add(module, name, self.on_neuron)
        elif layer:
            self.layers[name] = module
            self.add(module, name, self.on_layer)
        elif composed:
            self.handles.append(module.register_forward_pre_hook(lambda *_: self.opened.append(len(self.operations))))
            self.add(module, name, lambda *call: self.on_composed(*call, *composed[0]))
        elif rule is not None:
            for key in rule.operands or module.operands:
                self.add(getattr(module, key), inside(name, key), self.on_operand)
            self.add(module, name, lambda *call: self.on_attention(*call, rule))
        self.handles.append(module.register_forward_hook(lambda *_: self.leave(lists)))

    def enter(self, name: str, lists: list[list[str]]) -> None:
        self.parts[name] = Counter()
        for each in lists:
            each.append(name)

    def leave(self, lists: list[list[str]]) -> None:
        for each in lists:
            each.pop()

    def where(self) -> str | None:
        """The module that runs, None inside neurons and attentions, which are accounted for."""
        aside = self.marks.aside or self.ruled or any(name in self.neurons for name in self.open)
        return None if aside else self.open[-1] if self.open else ""

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

    def on_neuron(self, name: str, _, __, spikes: Tensor | tuple) -> None:
        neuron = self.neurons[name]
        if isinstance(neuron, ForeignNeuron):
            spikes = neuron.emitted(name, spikes)
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
        self.leftovers.settle(name, macs)
        rates = self.marks.rates(x)
        if rates is not None and self.totals:
            self.feeding[name] = self.totals[-1][0].steps
        self.operations.append(Operation(name, kind, macs, macs, rates, x.shape[0], bits=bits_of(layer)))

    def on_composed(self, name: str, module: nn.Module, _, output: Tensor, kind: str, own: str, members: tuple) -> None:
        """Replace the convolutions of a module by one operation that has them as parts."""
        start = self.opened.pop()
        own_name = len(inside(name, "x")) - 1
        parts = tuple(o for o in self.operations[start:] if o.name[own_name:].split(".")[0] in members)
        if tuple(part.name[own_name:].split(".")[0] for part in parts) != members:
            return  # built otherwise by its owner: its layers count one by one
        layers = [self.layers[part.name] for part in parts]
        axes = zip(*(layer.kernel_size for layer in layers), strict=True)
        kernel = math.prod(1 + sum(size - 1 for size in sizes) for sizes in axes)
        dense, macs, first = output.numel() * layers[0].in_channels * kernel, sum(p.macs for p in parts), parts[0]
        place = self.operations.index(first)
        self.operations = [operation for operation in self.operations if operation not in parts]
        bits = max(part.bits for part in parts)
        whole = Operation(inside(name, own), kind, macs, dense, first.rates, first.steps, parts, bits)
        self.operations.insert(place, whole)

    def on_part(self, part: Part) -> None:
        """A layer or a product that a function made: the sparser side says what is added."""
        self.count(self.on_function, part)

    def on_function(self, part: Part) -> None:
        name = self.open[-1] if self.open else ""
        numbers = self.parts.setdefault(name, Counter())
        numbers[part.label] += 1
        label = f"{part.label}{numbers[part.label]}" if part.label == part.kind else part.label
        rates = sparser(*alike(*(self.marks.rates(factor) for factor in part.factors)))
        self.operations.append(Operation(inside(name, label), part.kind, part.macs, part.macs, rates, part.rows))

    def on_attention(self, name: str, module: nn.Module, _, __, rule: "_Rule") -> None:
        """Insert the products of Q, K, V in front of the projection."""
        operands = {key: self.operands.pop(inside(name, key)) for key in rule.operands or module.operands}
        rates = {key: self.marks.rates(operand) for key, operand in operands.items()}
        table6, products = rule.count(module, operands, rates)
        rows = next(iter(operands.values())).shape[0]
        parts = tuple(
            Operation(inside(name, product), "softmax" if product == "softmax" else "attention", macs, macs, rate, rows)
            for product, macs, rate in products
        )
        macs = sum(part.macs for part in parts if part.kind != "softmax")
        total = None if None in rates.values() else torch.stack(list(rates.values())).sum(0)
        projections = [i for i, o in enumerate(self.operations) if o.name.startswith(inside(name, "proj"))]
        place = projections[-1] if len(projections) == 1 else len(self.operations)
        whole = Operation(inside(name, "products"), rule.kind, macs, table6, total, rows, parts)
        self.operations.insert(place, whole)

    def result(self, batch: Tensor) -> Trace:
        """Everything per image and time step. `batch`: the input."""
        temporal = {**temporal_modules(self.model), **self.neurons} if self.foreign else temporal_modules(self.model)
        steps = max((module.steps for module in temporal.values()), default=1)
        if self.foreign and self.totals:
            images, self.operations = 1, _joined(self.operations)
        elif self.totals:
            first, means, _ = self.totals[0]
            images = len(means) // first.steps
        elif self.neurons:
            raise ValueError("no neuron of the model ran in its forward pass: there is no spike to count")
        elif any(isinstance(module, Door) for module in self.model.modules()):
            images = batch.shape[-4]
        else:
            images = len(batch) // steps
        spikes, sites, outputs = torch.zeros(images, dtype=torch.float64), 0, 0
        for neuron, mean, elements in self.totals:
            spikes = spikes + per_image(mean, images) * (elements * len(mean) / images)
            sites += elements * neuron.levels * len(mean) // images
            outputs += elements * len(mean) // images
        operations = tuple(
            _settled(each, steps=self.steps_of(each, most=steps, images=images), images=images)
            for each in self.operations
        )
        uncounted = (
            f"{name or 'model'} ({self.kinds.get(name, '')}): {operator}" for name, operator in self.leftovers.found
        )
        return Trace(operations, spikes, sites, images, steps, outputs, tuple(dict.fromkeys(uncounted)))

    def steps_of(self, operation: Operation, *, most: int, images: int) -> int:
        """How many time steps the rows of `operation` hold; `most`: the model's."""
        if operation.steps % (most * images) == 0:
            return most
        first = (operation.parts or (operation,))[0]
        return self.feeding.get(first.name, 1)  # rows of no image: regions, say, in the steps of their neuron


def alike(*rates: Tensor | None) -> list[Tensor | None]:
    """Rates of rows that belong together: each as its mean where their numbers differ."""
    most = max((len(rate) for rate in rates if rate is not None), default=0)
    return [rate if rate is None or len(rate) == most else rate.mean().expand(most) for rate in rates]


def bits_of(layer: nn.Module) -> int:
    """Bits of a layer's weights."""
    return layer.bits if isinstance(layer, LSQLayer | PackedLayer) else FLOAT_BITS


def inside(name: str, child: str) -> str:
    """Name of a child of the module `name`; the model itself has the name ""."""
    return f"{name}.{child}".strip(".")


def per_image(rows: Tensor, images: int) -> Tensor:
    """Mean of every image over the rows [T*B] that belong to it (time-major), [B]."""
    if not len(rows):
        return rows.new_zeros(images)
    if rows.shape[0] % images:
        return rows.mean().expand(images)  # rows that are not images (windows, say): all images share them
    return rows.view(-1, images).mean(0)


def _per_step(rows: Tensor, *, steps: int, images: int) -> Tensor:
    """Mean of every step and image over the rows [T*B] that belong to it, [T, B]."""
    if len(rows) and len(rows) % (steps * images) == 0:
        return rows.view(steps, -1, images).mean(1)
    return per_image(rows, images).expand(steps, images)


def _joined(operations: list[Operation]) -> list[Operation]:
    """The calls of each layer as one, rows after rows: of a pass of one image that may call it in every step."""
    calls: dict[str, list[Operation]] = {}
    for operation in operations:
        calls.setdefault(operation.name, []).append(operation)
    return [_one(each) for each in calls.values()]


def _one(calls: list[Operation]) -> Operation:
    """Calls of a layer as one; their rates are means over rows, None unless spikes feed all of them."""
    rates = [call.rates for call in calls]
    return replace(
        calls[0],
        macs=sum(call.macs for call in calls),
        dense_macs=sum(call.dense_macs for call in calls),
        rates=None if any(each is None for each in rates) else torch.cat(rates),
        steps=sum(call.steps for call in calls),
        parts=tuple(_one(list(parts)) for parts in zip(*(call.parts for call in calls), strict=True)),
    )


def _settled(operation: Operation, *, steps: int, images: int) -> Operation:
    """Totals over a pass -> numbers per image and step of `steps`; rates per row -> per image."""
    return replace(
        operation,
        macs=operation.macs / (steps * images),
        dense_macs=operation.dense_macs / (steps * images),
        rates=None if operation.rates is None else per_image(operation.rates, images),
        step_rates=None if operation.rates is None else _per_step(operation.rates, steps=steps, images=images),
        steps=steps,
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


def _softmaxed(module: VSA, operands: dict[str, Tensor], rates: Rates) -> Products:
    """The map as above; Table 6, VSA: each of its elements is scaled, N^2, and has a softmax, 2 N^2."""
    table6, products = _mapped(module, operands, rates)
    rows, _, *pixels = operands["q"].shape
    return table6, [*products, ("softmax", 3 * rows * module.heads * math.prod(pixels) ** 2, None)]


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
    VSA: _Rule("attention_map", _softmaxed),
    SDDA: _Rule("deformable", _sdda, ("value", "attn")),
}

"""What a network computes: multiply-accumulates (MACs) of every layer by hooks on real tensors, and what feeds it.

Paper: Meta-SpikeFormer, Eqs. 21-22 (MACs of convolution and linear layer), Table 6 and App. B (attention).
A layer is fed by spikes if its input is a neuron's output, or is made of such outputs by moving, adding, multiplying or
max-pooling them: then it is still whole numbers times one unit. Anything else, an average for example, is real numbers.
The rate of a layer is the mean count of its input (for binary spikes the share of non-zeros that the paper names).
Counted: nn.Conv*, nn.ConvTranspose*, nn.Linear and SDSA-1..4. Batch norms fold into them; biases are free.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from spikeformers.attention import SDSA1, SDSA2, SSA
from spikeformers.energy.firing import neurons_of, plain_name
from spikeformers.layers import RepConv, SepConv
from spikeformers.neurons import Neuron


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of one layer in one forward pass of B images.

    `macs`: per image and time step, as executed.  `dense_macs`: the same after re-parameterisation (RepConv as one
    dense 3x3, the depthwise 7x7 and the pointwise convolution of SepConv as one dense 7x7) and, for attention, as
    Table 6 has it.  `rates` [B]: mean count of an input element in one step, None if the input is not spikes; for
    attention the sum of the rates of Q, K, V.  `parts`: the operations as executed, of one that is composed.
    """

    name: str
    kind: str  # "conv", "linear", "rep_conv", "sep_conv" or "attention"
    macs: float
    dense_macs: float
    rates: Tensor | None
    steps: int = 1
    parts: tuple["Operation", ...] = ()


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward pass: its operations in order of execution, and what its neurons fired.

    `spikes` [B]: counts of all neurons and steps, per image.  `sites`: the largest value that number could have.
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


def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run `model(images)` once, without gradients, and count.

    Raises ValueError if the model has no neuron, or if none of its neurons ran.
    """
    tracer = _Tracer(model)
    try:
        # The version counter of a tensor, which tells that a mark is stale, needs inference mode off.
        with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.no_grad(), tracer.marks:
            model(images)
    finally:
        tracer.remove()
    return tracer.result()


class _SpikeMarks(TorchFunctionMode):
    """Knows, while active, which tensors hold spikes: whole numbers of units."""

    MOVES: ClassVar[tuple[str, ...]] = (
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "roll", "flip"),
        *("contiguous", "clone", "detach", "to", "float", "double", "repeat", "expand", "dropout"),
        *("__get__", "__getitem__", "chunk", "split", "unbind", "max_pool1d", "max_pool2d"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()

    def put(self, tensor: Tensor, unit: float) -> None:
        self.known[tensor] = (unit, tensor._version)

    def unit(self, tensor: object) -> float | None:
        """What one spike of `tensor` is worth, None if it does not hold spikes (or was written to since)."""
        unit, version = self.known.get(tensor, (None, 0)) if isinstance(tensor, Tensor) else (None, 0)
        return unit if unit is not None and tensor._version == version else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name in ("cat", "concat", "stack") and args:
            units = {self.unit(tensor) for tensor in args[0]}
            unit = units.pop() if len(units) == 1 else None
        else:
            unit = self.unit(args[0]) if args else None
        if unit is not None and name not in ("cat", "concat", "stack"):
            if name in ("add", "__add__", "mul", "__mul__") and len(args) > 1 and not kwargs:
                other = self.unit(args[1])
                unit = (unit if other == unit else None) if "add" in name else (other and unit * other)
            elif name not in self.MOVES:
                unit = None
        if unit is not None:
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.put(tensor, unit)
        return result


class _Tracer:
    """Hooks on one model. Until `result`, operations hold totals over the pass, and rates one value a row [T*B]."""

    def __init__(self, model: nn.Module) -> None:
        self.neurons = neurons_of(model)
        self.marks = _SpikeMarks()
        self.operations: list[Operation] = []
        self.layers: dict[str, nn.Module] = {}
        self.fired: dict[str, Tensor] = {}  # mean count of each row
        self.by_tensor = WeakTensorKeyDictionary()
        self.operands: set[str] = set()  # names of the neurons whose output an attention hook will want
        self.outputs: dict[str, Tensor] = {}
        self.totals: list[tuple[Neuron, Tensor, int]] = []
        self.opened: list[int] = []
        self.handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            self.attach(plain_name(name), module)

    def attach(self, name: str, module: nn.Module) -> None:
        """Register the hooks that `module` needs."""
        composed = [parts for kind, parts in COMPOSED.items() if isinstance(module, kind)]
        if isinstance(module, Neuron):
            self.add(module, name, self.on_neuron)
        elif isinstance(module, _ConvNd | nn.Linear):
            self.layers[name] = module
            self.add(module, name, self.on_layer)
        elif composed:
            self.handles.append(module.register_forward_pre_hook(lambda *_: self.opened.append(len(self.operations))))
            self.add(module, name, lambda *call: self.on_composed(*call, *composed[0]))
        elif isinstance(module, tuple(ATTENTION)):
            self.operands |= {_inside(name, key) for key in module.operands}
            self.add(module, name, self.on_attention)

    def add(self, module: nn.Module, name: str, listener: Callable) -> None:
        self.handles.append(module.register_forward_hook(lambda *call: listener(name, *call)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def on_neuron(self, name: str, neuron: Neuron, _, spikes: Tensor) -> None:
        self.marks.put(spikes, neuron.unit)
        self.fired[name] = self.by_tensor[spikes] = _row_means(spikes, neuron.unit)
        if name in self.operands:
            self.outputs[name] = spikes
        self.totals.append((neuron, self.fired[name], spikes[:1].numel()))

    def on_layer(self, name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        (x,) = inputs[:1]
        if isinstance(layer, nn.Linear):
            kind, macs = "linear", output.numel() * layer.in_features
        elif layer.transposed:
            kind, macs = "conv", x.numel() * layer.out_channels // layer.groups * math.prod(layer.kernel_size)
        else:
            kind, macs = "conv", output.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        unit = self.marks.unit(x)
        rates = self.by_tensor.get(x) if unit is not None else None
        if rates is None and unit is not None:
            rates = _row_means(x, unit)
        self.operations.append(Operation(name, kind, macs, macs, rates, steps=x.shape[0]))

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

    def on_attention(self, name: str, module: nn.Module, _, __) -> None:
        """Insert the products of Q, K, V in front of the projection."""
        operands = {key: self.outputs.pop(_inside(name, key)) for key in module.operands}
        rates = {key: self.fired[_inside(name, key)] for key in module.operands}
        count = next(function for kind, function in ATTENTION.items() if isinstance(module, kind))
        table6, products = count(module, operands, rates)
        rows = operands["q"].shape[0]
        parts = tuple(
            Operation(_inside(name, product), "attention", macs, macs, rate, rows) for product, macs, rate in products
        )
        macs, total = sum(part.macs for part in parts), torch.stack(list(rates.values())).sum(0)
        projections = [i for i, o in enumerate(self.operations) if o.name.startswith(_inside(name, "proj"))]
        place = projections[-1] if len(projections) == 1 else len(self.operations)
        whole = Operation(_inside(name, "products"), "attention", macs, table6, total, rows, parts)
        self.operations.insert(place, whole)

    def result(self) -> Trace:
        """Everything per image and time step."""
        if not self.totals:
            raise ValueError("no neuron of the model ran in its forward pass: there is no spike to count")
        first, rows, _ = self.totals[0]
        images, steps = rows.shape[0] // first.steps, max(neuron.steps for neuron in self.neurons.values())
        spikes, sites = 0, 0
        for neuron, mean, elements in self.totals:
            spikes = spikes + _per_image(mean, images) * (elements * len(mean) / images)
            sites += elements * neuron.levels * len(mean) // images
        operations = tuple(_settled(operation, steps=steps, images=images) for operation in self.operations)
        return Trace(operations, spikes, sites, images, steps)


def _inside(name: str, child: str) -> str:
    """Name of a child of the module `name`; the model itself has the name ""."""
    return f"{name}.{child}".strip(".")


def _row_means(spikes: Tensor, unit: float) -> Tensor:
    """Mean count of each row of spikes [T*B, ...], [T*B] in float64 on the CPU."""
    half = spikes.dtype in (torch.float16, torch.bfloat16)
    total = spikes.flatten(1).sum(1, dtype=torch.float32 if half else None)
    total = (total if total.is_meta else total.cpu()).double()  # off the device: Apple's has no float64
    return (total / unit).round() / max(1, spikes[:1].numel())  # a sum of counts is whole whatever the unit


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


Products = tuple[int, list[tuple[str, int, Tensor]]]
"""MACs after Table 6, and (name, MACs, rate of each row) of every product as executed."""


def _sdsa1(module: SDSA1, spikes: dict[str, Tensor], rates: dict[str, Tensor]) -> Products:
    """A mask (free) and a sum over tokens of K * V: N C additions where both fire."""
    elements = spikes["q"].numel()
    both = _row_means(spikes["k"] * spikes["v"], module.k.unit * module.v.unit)
    return elements, [("sum_kv", elements, both)]


def _sdsa2(module: SDSA2, spikes: dict[str, Tensor], rates: dict[str, Tensor]) -> Products:
    """A sum of Q over tokens and a mask (free)."""
    elements = spikes["q"].numel()
    return elements, [("sum_q", elements, rates["q"])]


def _ssa(module: SSA, spikes: dict[str, Tensor], rates: dict[str, Tensor]) -> Products:
    """Two matrix products per head, in the cheaper order as `spike_attention` picks it.

    In the first both sides are spikes and the sparser one says what is added; in the second the remaining spikes do.
    """
    rows, channels, *pixels = spikes["q"].shape
    tokens, width = math.prod(pixels), channels // module.heads
    if tokens > width:
        macs, names, pair, last = rows * tokens * channels * width, ("k^T v", "q (k^T v)"), ("k", "v"), "q"
    else:
        macs, names, pair, last = rows * tokens * tokens * channels, ("q k^T", "(q k^T) v"), ("q", "k"), "v"
    sparser = torch.minimum(rates[pair[0]], rates[pair[1]])
    return rows * tokens * channels**2, [(names[0], macs, sparser), (names[1], macs, rates[last])]


ATTENTION = {SDSA1: _sdsa1, SDSA2: _sdsa2, SSA: _ssa}  # SDSA-3 and 4 are SSA with other projections

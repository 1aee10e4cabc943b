"""ONNX: a network in float, or its integer engine, as a file that other runtimes read.

form "float"    the layers that the network has, low-bit weights as the numbers that they multiply by.
form "integer"  the engine's own operations: whole sums (ConvInteger), times a scale, plus a bias, clipped and rounded
                to uint8, or compared with thresholds. Every layer gives the engine's numbers, bit by bit.
form "qdq"      the same with QuantizeLinear and DequantizeLinear around float operators, a way of writing that
                runtimes turn into integer kernels of their own. Every number between the two is whole, so that a float
                kernel gives the same bits.
Layers of the engine turn into ONNX by the tables at the end of this file. A bias always follows the sum in float32: as
an int32 added to it (QLinearConv) it would be rounded to units of the scale, which moves thresholds.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int8
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.deploy.counts import CountNeuron, IntegerConv, IntegerLinear
from spikeformers.deploy.floats import FloatConv, FloatLinear, PerImage
from spikeformers.deploy.fuse import plain_copy
from spikeformers.deploy.outputs import named_outputs
from spikeformers.deploy.runtime import IntegerModel
from spikeformers.deploy.stages import refuse_two_stages
from spikeformers.layers import Pretrained
from spikeformers.layers.pretrained import write_files
from spikeformers.layers.version import __version__
from spikeformers.quantize import FixedPointNorm, convert

WEIGHT_ZERO = 128  # weights are written as uint8 from here: onnxruntime adds up int8 ones seven times as slowly


def export_onnx(model: nn.Module, images: Tensor, path: str | Path, *, form: str | None = None) -> Path:
    """Write `model` as the ONNX file `path`, replacing one that is there; returns the path.

    `model`: any network, form "float"; or an engine (`sf.deploy.integer`), form "integer" (the default) or "qdq".
    `images` [B, C, H, W] or clips [T, B, C, H, W]: any real batch; B stays free in the file, other sizes do not. The
    input is called "images" or "clips", the output "logits", or as the fields of the tuple are called that the model
    gives ("class_logits" and "mask_logits" of Spike2Former); metadata tell name, steps and version.
    Floats are as wide as the model's parameters; onnxruntime has no float64 convolution, onnx's own reference has.
    Raises ValueError for a form that the model has not, a model that gives no tensors, fixes the batch, or has two
    stages (of which `first_stage` can go), ImportError without the extra "onnx", and OSError if the disk is full; an
    earlier file is then left as it was.
    """
    graph = onnx_graph(model, images, form=form)
    path = Path(path)
    write_files(path.parent, {path.name: graph.SerializeToString()})
    return path


@torch.no_grad()
def onnx_graph(model: nn.Module, images: Tensor, *, form: str | None = None, listen: bool = False):
    """The checked onnx.ModelProto that `export_onnx` writes.

    `listen`: the counts of an engine's neurons are outputs too, uint8 [T*B, ...], called as the neurons are.
    """
    refuse_two_stages(model)
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise ImportError('ONNX files need the extra "onnx": pip install "spikeformers[onnx]"') from error
    form = _form(model, form)
    with torch.inference_mode(False):
        net = _in_float(model) if form == "float" else _in_onnx(model.net, TWINS[form])
        steps, name = getattr(net, "steps", 1), _name(net)
        dtype = next((each.dtype for each in net.parameters()), torch.float32) if form == "float" else torch.float32
        proto = _traced(_Flat(net, listen=listen).eval(), images.detach().to("cpu", dtype))
    _name_nodes(proto.graph, inside="net.")
    _forget_the_source(proto)
    described = {"model": name, "steps": str(steps), "form": form, "spikeformers": __version__}
    onnx.helper.set_model_props(proto, described)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _form(model: nn.Module, form: str | None) -> str:
    """The form to write. Raises ValueError for one that `model` has not."""
    engine = isinstance(model, IntegerModel)
    known = tuple(TWINS) if engine else ("float",)
    form = known[0] if form is None else form
    if form not in known:
        cure = "the float network itself" if engine else "sf.deploy.integer(model, images)"
        also = f'; for "{form}" export {cure}' if form in ("float", *TWINS) else ""
        raise ValueError(f"form of {type(model).__name__} must be one of {', '.join(known)}, got {form!r}{also}")
    return form


def _in_float(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, in which low-bit weights are numbers."""
    if any(isinstance(each, FixedPointNorm) for each in model.modules()):
        return convert(copy.deepcopy(getattr(model, "_orig_mod", model))).cpu().eval()
    return plain_copy(model).cpu()


def _name(net: nn.Module) -> str:
    origin = net.origin if isinstance(net, Pretrained) else None
    return type(net).__name__ if origin is None else origin.name


def _traced(net: "_Flat", images: Tensor):
    """`net` as an ONNX graph in which the batch is free."""
    axis = images.ndim - 4
    if axis not in (0, 1):
        raise ValueError(f"expected images [B, C, H, W] or clips [T, B, C, H, W], got shape {tuple(images.shape)}")
    two = images.narrow(axis, 0, 1).repeat_interleave(2, axis)  # an axis of length one would be fixed
    program = torch.onnx.export(
        net,
        (two,),
        dynamo=True,
        dynamic_shapes=({axis: torch.export.Dim("batch")},),
        input_names=["clips" if axis else "images"],
        output_names=[*named_outputs(net.net(two)), *net.neurons],
        custom_translation_table={torch.ops.aten.clamp.Tensor: _clip},
        verbose=False,
    )
    proto = program.model_proto
    if not proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param:
        raise ValueError("this network fixes the batch of its graph: has it len(x) where x.shape[0] would do?")
    return proto


def _clip(x, low=None, high=None):
    """clamp to numbers as one Clip, to tensors as Max and Min.

    onnxscript 0.7 makes a Clip of Max and Min too, but where two neurons read one tensor the second lacks its bounds.
    """
    from onnxscript import opset18 as operators

    bounds = [None if bound is None else operators.CastLike(bound, x) for bound in (low, high)]
    if all(bound is None or len(bound.shape) == 0 for bound in (low, high)):
        return operators.Clip(x, *bounds)
    for bound, limit in zip(bounds, (operators.Max, operators.Min), strict=True):
        x = x if bound is None else limit(x, bound)
    return x


def _name_nodes(graph, *, inside: str) -> None:
    """Call each layer's node as the layer is called, so that a runtime's profile can be read."""
    holds = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    taken = set()
    for node in graph.node:
        if node.op_type in ("Conv", "ConvInteger", "Gemm") and len(node.input) > 1:
            weight = holds.get(node.input[1], node.input[1])
            name = weight.removeprefix(inside).removesuffix(".weight").removesuffix(".layer")
            if name != weight and name not in taken:
                taken.add(name)
                node.name = name


def _forget_the_source(proto) -> None:
    """Drop what the exporter notes of this machine's source files and of its own passes."""
    graph = proto.graph
    for noted in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del noted.metadata_props[:]
        noted.doc_string = ""


class _Flat(nn.Module):
    """What a network gives as one tuple of tensors; `listen`: and then the counts of its neurons, uint8."""

    def __init__(self, net: nn.Module, *, listen: bool) -> None:
        super().__init__()
        self.net = net
        neurons = {name: each for name, each in net.named_modules() if isinstance(each, CountNeuron)}
        self.neurons = neurons if listen else {}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        heard = {}
        handles = [
            neuron.register_forward_hook(lambda m, _, out, name=name: heard.update({name: m.counts(out)}))
            for name, neuron in self.neurons.items()
        ]
        given = named_outputs(self.net(images))
        for handle in handles:
            handle.remove()
        return *given.values(), *(heard[name] for name in self.neurons)


def _in_onnx(net: nn.Module, twins: dict[type, Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """The engine's network `net` on the CPU, each layer as its twin."""
    changed = {name: twins[type(each)](each) for name, each in net.named_modules() if type(each) in twins}
    # Copied without what is replaced: weights that the engine packed cannot be copied, and need not be.
    memo = {id(net.get_submodule(name)): twin for name, twin in changed.items()}
    return copy.deepcopy(net, memo).cpu().eval()


def _operator(kind: str, *inputs: Tensor, dtype: torch.dtype, shape: torch.Size, **attributes) -> Tensor:
    """One operator of ONNX where torch has none, in a network that is being exported."""
    return torch.onnx.ops.symbolic(f"::{kind}", inputs, attributes, dtype=dtype, shape=shape)


def _quantized(x: Tensor, unit: float) -> Tensor:
    """x / unit, rounded half to even and clipped to 0..255, as uint8."""
    constants = torch.tensor(unit), torch.tensor(0, dtype=torch.uint8)
    return _operator("QuantizeLinear", x, *constants, dtype=torch.uint8, shape=x.shape)


def _dequantized(counts: Tensor, unit: float) -> Tensor:
    """Whole numbers of eight bits times `unit`, in float32."""
    constants = torch.tensor(unit), torch.tensor(0, dtype=counts.dtype)
    return _operator("DequantizeLinear", counts, *constants, dtype=torch.float32, shape=counts.shape)


class ConvTwin(nn.Module):
    """IntegerConv as whole sums and what its readable path makes of them, or its verified epilogue where it fires."""

    def __init__(self, layer: IntegerConv) -> None:
        super().__init__()
        self.geometry, self.unit, self.levels, self.emits = layer.geometry, layer.unit, layer.levels, layer.emits
        self.register_buffer("weight", self.written(layer.weight.detach().cpu()).contiguous())
        self.register_buffer("scale", layer.scale.detach().cpu())
        self.register_buffer("bias", layer.bias.detach().cpu())
        if layer.levels and not layer.emits:
            self.register_buffer("thresholds", layer.thresholds.detach().cpu().float())
            self.register_buffer("sign", layer.sign.detach().cpu().float())

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x if x.dtype == torch.uint8 else self.counted(x))

    def counted(self, spikes: Tensor) -> Tensor:
        """Spikes in floating point -> uint8 counts."""
        return (spikes / self.unit).round().to(torch.uint8)

    def run(self, counts: Tensor) -> Tensor:
        """What the layer makes of uint8 counts."""
        sums = self.sums(counts)
        if self.levels and not self.emits:
            return self.counts(self.crossed(sums))
        y = sums * self.scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return self.counts(y.clamp(0, self.levels)) if self.levels else y

    def written(self, weight: Int8[Tensor, "O I kh kw"]) -> Tensor:
        """The weight as the file has it."""
        return (weight.to(torch.int16) + WEIGHT_ZERO).to(torch.uint8)

    def sums(self, counts: Tensor) -> Tensor:
        """Whole sums, float32."""
        moves = self.geometry.moves
        stride, padding, dilation, groups = moves
        named = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation), "group": groups}
        size = (
            (length + 2 * pad - space * (width - 1) - 1) // step + 1
            for length, width, step, pad, space in zip(counts.shape[2:], self.geometry.kernel, *moves[:3], strict=True)
        )
        shape = (counts.shape[0], self.geometry.out_channels, *size)
        zeros = torch.tensor(0, dtype=torch.uint8), torch.tensor(WEIGHT_ZERO, dtype=torch.uint8)
        return _operator("ConvInteger", counts, self.weight, *zeros, dtype=torch.int32, shape=shape, **named).float()

    def counts(self, currents: Tensor) -> Tensor:
        """Currents 0..D, in units of one count, rounded half to even."""
        return currents.round().to(torch.uint8)

    def crossed(self, sums: Tensor) -> Tensor:
        """How many thresholds each sum reaches, in float32."""
        sums = sums * self.sign.view(-1, 1, 1)
        return sum((sums >= threshold.view(-1, 1, 1)).float() for threshold in self.thresholds.T)


class DepthwiseTwin(ConvTwin):
    """IntegerConv with one input channel a group: whole sums by a float convolution, many times as fast there."""

    def written(self, weight: Int8[Tensor, "O 1 kh kw"]) -> Tensor:
        return weight.float()

    def sums(self, counts: Tensor) -> Tensor:
        return F.conv2d(counts.float(), self.weight, None, *self.geometry.moves)


def _conv_twin(layer: IntegerConv) -> ConvTwin:
    depthwise = layer.geometry.groups == layer.geometry.in_channels > 1
    return (DepthwiseTwin if depthwise else ConvTwin)(layer)


class LinearTwin(ConvTwin):
    """IntegerLinear, as a convolution of single pixels."""

    def run(self, counts: Tensor) -> Tensor:
        return super().run(counts.reshape(-1, counts.shape[-1], 1, 1)).reshape(*counts.shape[:-1], -1)


class QDQConvTwin(ConvTwin):
    """IntegerConv between DequantizeLinear and QuantizeLinear, both of unit 1: whole sums also for a float kernel.

    Scale and bias stay outside: onnxruntime turns a bias inside such a convolution into whole units of the scale.
    """

    def counted(self, spikes: Tensor) -> Tensor:
        return _quantized(spikes, self.unit)

    def written(self, weight: Int8[Tensor, "O I kh kw"]) -> Tensor:
        return weight

    def sums(self, counts: Tensor) -> Tensor:
        """Whole sums, float32."""
        weight = _dequantized(self.weight, 1.0)
        return F.conv2d(_dequantized(counts, 1.0), weight, None, *self.geometry.moves)

    def counts(self, whole: Tensor) -> Tensor:
        return _quantized(whole, 1.0)


class QDQLinearTwin(QDQConvTwin):
    """IntegerLinear, as a convolution of single pixels."""

    def run(self, counts: Tensor) -> Tensor:
        return super().run(counts.reshape(-1, counts.shape[-1], 1, 1)).reshape(*counts.shape[:-1], -1)


class FloatConvTwin(nn.Module):
    """FloatConv with the weight that it multiplies by, batch by batch."""

    def __init__(self, layer: FloatConv) -> None:
        super().__init__()
        self.moves = layer.geometry.moves
        self.register_buffer("weight", layer.float_weight().detach().cpu().contiguous())
        self.register_buffer("bias", layer.bias.detach().cpu())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, *self.moves)


class FloatLinearTwin(FloatConvTwin):
    """FloatLinear likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class NeuronTwin(CountNeuron):
    """CountNeuron in the operations that define it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.neuron is None:
            return x if self.dtype is None else self.spikes(x)
        whole = self.whole(x)
        return whole.to(torch.uint8) if self.dtype is None else self.spikes(whole)

    def whole(self, x: Tensor) -> Tensor:
        """Counts of the currents `x`, in floating point."""
        if not self.stateless:
            return (self.neuron(x) / self.neuron.unit).round()
        current = self.neuron.charge(x, None).clamp(0, self.levels)
        return (current + 0.5).floor() if self.half_up else current.round()


class QDQNeuron(NeuronTwin):
    """CountNeuron by QuantizeLinear where only integer layers read it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype is None:
            return x if self.neuron is None else _quantized(self.currents(x), 1.0)
        if self.neuron is None:
            return _dequantized(x, self.unit).to(self.wide_dtype(x))
        return self.spikes(self.whole(x))

    def currents(self, x: Tensor) -> Tensor:
        """What gives the counts if it is rounded half to even, as QuantizeLinear does, which takes no float64."""
        if x.dtype == torch.float64:
            return self.whole(x).float()
        if not self.stateless:
            return self.neuron(x) / self.neuron.unit
        return self.whole(x) if self.half_up else self.neuron.charge(x, None).clamp(0, self.levels)


def _neuron_as(kind: type[CountNeuron]) -> Callable[[CountNeuron], CountNeuron]:
    """What makes a copy of a neuron that is of class `kind`."""

    def change(neuron: CountNeuron) -> CountNeuron:
        twin = copy.deepcopy(neuron)
        twin.__class__ = kind
        return twin

    return change


FLOATS = {FloatConv: FloatConvTwin, FloatLinear: FloatLinearTwin, PerImage: lambda layer: layer.layer}
TWINS: dict[str, dict[type, Callable[[nn.Module], nn.Module]]] = {
    "integer": FLOATS | {IntegerConv: _conv_twin, IntegerLinear: LinearTwin, CountNeuron: _neuron_as(NeuronTwin)},
    "qdq": FLOATS | {IntegerConv: QDQConvTwin, IntegerLinear: QDQLinearTwin, CountNeuron: _neuron_as(QDQNeuron)},
}
"""By form: what stands for each kind of layer of an engine. What no table names is exported as torch has it."""

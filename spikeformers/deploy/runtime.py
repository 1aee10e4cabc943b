"""Integer inference: counts as uint8, spike-fed layers with integer weights, convolution + neuron as one primitive.

A layer computes in integers if what it reads is spikes; the stem, the inner convolutions of RepConv, the last one of
SepConv and the membranes stay float32. Low-bit weights are taken as they are, so that a layer gives exactly the counts
that the network gives from the same input; float weights are rounded to 8 bits a channel (post-training), which changes
some counts: `compare` says how many.
"""

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spikeformers.attention import SSA
from spikeformers.deploy.agreement import Agreement, IntegerReport, LayerReport, compare, compare_layers
from spikeformers.deploy.counts import (
    EXACT_FLOAT32,
    LARGEST_COUNT,
    CountNeuron,
    IntegerConv,
    IntegerLinear,
    fires_by_itself,
)
from spikeformers.deploy.floats import FloatConv, FloatLinear, PerImage
from spikeformers.deploy.form import Factors, folded, packed, unscale
from spikeformers.deploy.geometry import Geometry
from spikeformers.deploy.joint import JointAttention, joined
from spikeformers.deploy.outputs import of_images
from spikeformers.deploy.rounding import Rounding
from spikeformers.deploy.wiring import OTHER, Wiring, is_layer, probe
from spikeformers.energy.marks import Mark
from spikeformers.heads.detections import Detections
from spikeformers.heads.mask_decoder import SpikeCrossAttention
from spikeformers.layers import LayerScaleBlock, TransformerBlock
from spikeformers.neurons import Door, Neuron, temporal_modules
from spikeformers.quantize import FixedPointNorm
from spikeformers.quantize.convert import PackedDepthwise
from spikeformers.quantize.exact import FixedPointDoor

logger = logging.getLogger(__name__)
BACKENDS = ("torch", "openvino")
KINDS = {
    "integer_conv": IntegerConv,
    "integer_linear": IntegerLinear,
    "float_conv": FloatConv,
    "float_linear": FloatLinear,
    "rounding": Rounding,
}


class IntegerModel(nn.Module):
    """The engine `integer` builds: images [B, C, H, W] or clip [T, B, C, H, W] -> what its network gives, float32.

    That is logits [B, num_classes], or what `semantic` makes classes of pixels of. Images may have any size that the
    network takes. Results do not depend on the batch size.
    Weights lie in int8 buffers; deepcopy, pickle and state_dict work.
    It is built on the CPU, where the fast path is, and takes images from any device. `.to("cuda")` works by the
    readable path: equal in integer layers, but float ones round as CUDA does. That needs float64: no Apple GPU has it.
    `sf.record` does not hear an engine, whose neurons are mostly fused into layers; `compare` gives the flip rate of
    every neuron, the share of its counts that differ from the float network's.
    `spike_fed`: names, in that network, of the layers that read spikes.
    `fused`: of those that a neuron follows at once, and that fire by themselves, the name of that neuron.
    `config`: of the catalogue's network that it came from, None if it came from another one.
    """

    def __init__(self, net: nn.Module, *, spike_fed: frozenset[str], fused: dict[str, str], config: Any = None) -> None:
        super().__init__()
        self.net = net
        self.spike_fed, self.fused = spike_fed, fused
        self.config = config
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        return self.net(images.to(self.device, torch.float32))

    def semantic(self, output: Any, size: tuple[int, int]) -> Float[Tensor, "B L H W"]:
        """Scores of every pixel at `size` = (H, W), of what `forward` gave, as the network itself makes them.

        Raises ValueError if the network classifies whole images.
        """
        if not hasattr(self.net, "semantic"):
            raise ValueError(f"{type(self.net).__name__} gives classes to images, not to pixels")
        return self.net.semantic(output, size)

    def detect(self, output: Any, sizes: Int64[Tensor, "B 2"] | None = None) -> list[Detections]:
        """What was found in each image, of what `forward` gave, as the network itself tells it.

        `sizes`: height and width of each picture within its padding. Raises ValueError if the network finds no boxes.
        """
        if not hasattr(self.net, "detect"):
            raise ValueError(f"{type(self.net).__name__} finds no boxes: it gives classes to images or pixels")
        return self.net.detect(output, sizes)

    @property
    def device(self) -> torch.device:
        """Where the weights lie; logits come from there."""
        return next(self.net.buffers()).device

    def report(self) -> IntegerReport:
        """Path, bits and bytes of every convolution and linear layer."""
        layers = []
        for name, module in self.net.named_modules():
            if isinstance(module, IntegerConv):
                path, bits = ("fused" if module.levels else "int8"), module.bits
                runs = module.runs_fast(module.weight)
            elif isinstance(module, FloatConv | PerImage):
                path, bits, runs = "float", getattr(module, "bits", 32), False
            else:
                continue
            size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
            layers.append(LayerReport(name, path, bits, path != "float", runs, size))
        return IntegerReport(tuple(layers))

    def compare(self, model: nn.Module, images: Tensor | Iterable) -> Agreement:
        """Run `model`, the network this engine came from, and the engine on the same images.

        `images`: one batch, or a loader of batches (a batch may be (images, labels)). Detections may lie in the padding
        of a batch, whose pictures' sizes are not known here. Model, engine and images may lie on different devices. The
        model runs in its own precision: `.double()` it to know what is due to rounding.
        Raises ValueError if `model` is in train mode or there is no image.
        """
        return compare(self, model, images)

    def compare_layers(self, model: nn.Module, images: Tensor | Iterable) -> dict[str, int]:
        """How many counts differ in each layer that fires, if it is given the very counts that `model` gives it.

        0 everywhere for a low-bit network in float64: what is left between the two is rounding in float layers. In
        float32 the network itself may miss a threshold that a sum comes within 1e-7 of.
        Raises ValueError if `model` is in train mode.
        """
        return compare_layers(self, model, images)

    def describe(self) -> dict[str, Any]:
        """Plain values from which `rebuild` makes this engine's modules again, without their tensors.

        "modules": [name, kind, values] of everything that replaced a module of the network, in order.
        """
        return {"modules": list(self._described()), "spike_fed": sorted(self.spike_fed), "fused": self.fused}

    def _described(self) -> Iterator[list]:
        kind_of = {made: kind for kind, made in KINDS.items()}
        for name, module in self.net.named_modules():
            if type(module) in kind_of:
                yield [name, kind_of[type(module)], module.describe()]
            elif isinstance(module, CountNeuron):
                yield [name, "neuron", module.describe()]
            elif isinstance(module, Factors):
                yield [name, "factors", {"names": [part for part, _ in module.named_children()]}]
            elif isinstance(module, JointAttention):
                yield [name, "joint", module.describe()]
            elif isinstance(module, SSA | SpikeCrossAttention):
                yield [name, "attention", {"scale": module.scale}]
            elif type(module) is TransformerBlock:
                yield [name, "unscaled", {}]
            elif type(module) is nn.Identity:
                yield [name, "identity", {}]
            elif isinstance(module, FixedPointDoor):
                yield [name, "fixed_point_door", {}]

    @classmethod
    def rebuild(cls, net: nn.Module, description: dict[str, Any], *, config: Any = None) -> "IntegerModel":
        """The engine that `description` tells of, with empty buffers, from the network `net`, which it takes over.

        Raises ValueError for anything it does not know or that does not fit the network.
        """
        for name, kind, values in description["modules"]:
            try:
                _place(net, name, kind, values)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"the description of {name!r} ({kind!r}) does not fit the network: {error}") from error
        fed, fused = frozenset(description["spike_fed"]), dict(description["fused"])
        return cls(net.float(), spike_fed=fed, fused=fused, config=config)


def _place(net: nn.Module, name: str, kind: str, values: dict[str, Any]) -> None:
    """Put what `kind` and `values` describe into the place `name` of `net`."""
    if kind in KINDS:
        if "geometry" in values:
            sizes = {key: tuple(each) if isinstance(each, list) else each for key, each in values["geometry"].items()}
            values = values | {"geometry": Geometry(**sizes)}
        net.set_submodule(name, KINDS[kind](**values), strict=True)
    elif kind == "identity":
        net.set_submodule(name, nn.Identity(), strict=True)
    elif kind == "fixed_point_door":
        door = net.get_submodule(name)
        if not isinstance(door, Door):
            raise ValueError(f"{name} is no door")
        door.__class__ = FixedPointDoor
    elif kind == "factors":
        places = OrderedDict((part, nn.Identity()) for part in values["names"])
        net.set_submodule(name, Factors(places), strict=True)
    elif kind == "neuron":
        neuron = net.get_submodule(name)
        if not isinstance(neuron, Neuron):
            raise ValueError(f"{name} is no neuron of the network")
        dtype = {None: None, "float32": torch.float32, "float64": torch.float64}[values["dtype"]]
        net.set_submodule(name, CountNeuron(neuron, **values | {"dtype": dtype}))
    elif kind in ("attention", "joint"):
        attention = net.get_submodule(name)
        if not isinstance(attention, SSA if kind == "joint" else SSA | SpikeCrossAttention):
            raise ValueError(f"{name} is no attention with a scale")
        _set_scale(attention, values["scale"])
        if kind == "joint":
            whole = JointAttention(attention, projection=attention.q_conv, neuron=attention.q)
            net.set_submodule(name, whole, strict=True)
    elif kind == "unscaled":
        block = net.get_submodule(name)
        if isinstance(block, LayerScaleBlock):
            unscale(block)
    else:
        raise ValueError(f"{name} is of an unknown kind {kind!r}")


def _set_scale(attention: SSA | SpikeCrossAttention, scale: float) -> None:
    del attention.scale  # a learnt one is a parameter, which a number may not replace
    attention.scale = scale


@torch.no_grad()
def integer(model: nn.Module, images: Tensor, *, fast: bool = True, backend: str = "torch") -> nn.Module:
    """Integer engine of `model` (low-bit, float, or fused), on the CPU; `model` stays as it is, where it is.

    `images`: any real batch of the size that the engine will see; its first image is run once to find who reads spikes.
    `fast=False` takes the readable path everywhere: the same numbers, slower.
    `backend` "openvino" runs the same graph in OpenVINO (extra `openvino`).
    Raises ValueError if no layer reads spikes, or for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if isinstance(model, IntegerModel):
        raise ValueError(
            "this is an integer engine already; in OpenVINO it runs as sf.deploy.OpenVINOModel(engine, images)"
        )
    with torch.inference_mode(False), torch.no_grad():
        image = _one_image(model, images).cpu().double()
        net = packed(model)
        wanted = net(image)
        net = folded(net)
        _check_same(net(image), wanted)
        wiring = probe(net, image)
        modules = dict(net.named_modules())
        fed = _spike_fed(modules, wiring)
        if not fed:
            raise ValueError(
                f"no convolution or linear layer of {type(model).__name__} reads spikes: nothing to convert"
            )
        fused = _fusible(modules, wiring, fed)
        _swap_layers(net, modules, fed, fused, fast=fast)
        _swap_neurons(net, modules, wiring, fed, frozenset(firing.neuron for firing in fused.values()))
        _keep_counts_in_attention(modules, wiring)
        _join_attention(net)
        config = getattr(getattr(model, "_orig_mod", model), "config", None)
        engine = IntegerModel(
            net.float().to(memory_format=torch.channels_last),
            spike_fed=frozenset(fed),
            fused={name: firing.neuron for name, firing in fused.items()},
            config=config if is_dataclass(config) else None,
        )
    if fast:
        _say_what_is_slow(engine)
    if backend == "torch":
        return engine
    from spikeformers.deploy.openvino import OpenVINOModel

    return OpenVINOModel(engine, images)


def _one_image(model: nn.Module, images: Tensor) -> Tensor:
    """The first image in all its steps; a network without a door takes [T*B, ...]."""
    if images.ndim == 5:
        return images[:, :1]
    temporal = list(temporal_modules(model).values())
    door = any(isinstance(module, Door) for module in temporal)
    return images[: 1 if door else max((module.steps for module in temporal), default=1)]


def _check_same(found: Any, wanted: Any) -> None:
    """Raises ValueError if folding norms changed what the network computes of whole images.

    The order of regions, and so all of a second stage, hangs on the last bits of scores that are equal.
    """
    for got, due in zip(tree_leaves(of_images(found)), tree_leaves(of_images(wanted)), strict=True):
        if isinstance(due, Tensor) and not torch.allclose(got, due, rtol=1e-6, atol=1e-9 * float(due.abs().max() + 1)):
            raise ValueError(
                f"folding batch norms changed what the network gives by {float((got - due).abs().max()):.2g}: does a "
                "plain nn.Sequential serve as a list, with something between a convolution and its norm? Make it a "
                "module of your own"
            )


def _spike_fed(modules: dict[str, nn.Module], wiring: Wiring) -> dict[str, Mark]:
    """Convolutions and linear layers that read spikes, with what one is worth and how many there can be."""
    fed = {}
    for name, mark in wiring.fed.items():
        module = modules[name]
        if isinstance(module, Neuron) or mark.most > LARGEST_COUNT:
            continue
        if isinstance(module, nn.Linear) or pads_with_zeros(module):
            fed[name] = mark
    return fed


def pads_with_zeros(conv: nn.Conv2d) -> bool:
    """True for a convolution that `Geometry` describes."""
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


@dataclass(frozen=True)
class Firing:
    """The neuron that alone reads a layer, and the norm between the two, if one is there that rounds."""

    neuron: str
    norm: str | None = None


def _fusible(modules: dict[str, nn.Module], wiring: Wiring, fed: dict[str, Mark]) -> dict[str, Firing]:
    """Spike-fed layers that run once and whose output one neuron, and nothing else, reads."""
    fused = {}
    for name in (each for each in fed if wiring.calls[each] == 1):
        reader, norm = _only_reader(wiring, name), None
        if isinstance(modules.get(reader), FixedPointNorm):
            reader, norm = _only_reader(wiring, reader), reader
        neuron = modules.get(reader)
        if isinstance(neuron, Neuron) and fires_by_itself(neuron):
            fused[name] = Firing(reader, norm)
    return fused


def _only_reader(wiring: Wiring, name: str) -> str | None:
    """The one module that reads what `name` wrote, and runs once; None if there are others."""
    readers = wiring.readers[name]
    return readers[0] if len(readers) == 1 and readers[0] != OTHER and wiring.calls[readers[0]] == 1 else None


def _swap_layers(
    net: nn.Module, modules: dict[str, nn.Module], fed: dict[str, Mark], fused: dict[str, Firing], *, fast: bool
) -> None:
    """Integer layers for spike-fed ones, float layers image by image for the others; norms that round."""
    gone = {firing.norm for firing in fused.values()}
    for name, module in modules.items():
        if name in fed:
            kind = IntegerLinear if isinstance(module, nn.Linear) else IntegerConv
            firing, mark = fused.get(name, Firing("")), fed[name]
            neuron, norm = modules.get(firing.neuron or None), modules.get(firing.norm)
            new = kind.of(module, unit=mark.unit, max_count=mark.most, neuron=neuron, norm=norm, fast=fast)
        elif is_layer(module):
            new = FloatLinear.of(module) if isinstance(module, nn.Linear) else FloatConv.of(module)
            new = new if isinstance(module, nn.Linear) or pads_with_zeros(module) else PerImage(module)
        elif isinstance(module, FixedPointNorm):
            new = nn.Identity() if name in gone else Rounding.of(module)
        else:
            continue
        if isinstance(module, PackedDepthwise):
            rounding = Rounding(module.out_channels, grid=module.grid, limit=module.limit)
            new = Factors(OrderedDict(conv=new, rounding=rounding))
        net.set_submodule(name, new)


def _swap_neurons(
    net: nn.Module, modules: dict[str, nn.Module], wiring: Wiring, fed: dict[str, Mark], fused: frozenset[str]
) -> None:
    """Neurons that emit counts: uint8 where only integer layers read them, else float32 spikes."""
    for name, readers in wiring.readers.items():
        if isinstance(modules[name], Neuron):
            dtype = None if all(reader in fed for reader in readers) else torch.float32
            net.set_submodule(name, CountNeuron(modules[name], fused=name in fused, dtype=dtype))


def _keep_counts_in_attention(modules: dict[str, nn.Module], wiring: Wiring) -> None:
    """Let attentions multiply whole counts and put their units into the scale: sums are then exact.

    SSA (and SDSA-3, 4) in float32 as far as that holds them, attention between maps of two sizes in float64.
    """
    for name, attention in modules.items():
        if isinstance(attention, SSA):
            operands = [getattr(attention, operand) for operand in attention.operands]
            shape = wiring.shapes[f"{name}.q"]
            exact = EXACT_FLOAT32 // (shape[1] // attention.heads * math.prod(each.levels for each in operands))
            dtype = torch.float32 if shape[2:].numel() <= exact else torch.float64
        elif isinstance(attention, SpikeCrossAttention):
            operands = [attention.q.spikes, attention.k.spikes, attention.v.spikes]
            exact, dtype = 0, torch.float64
        else:
            continue
        scale = attention.scale.item() if isinstance(attention.scale, Tensor) else attention.scale
        for operand in operands:
            scale *= operand.unit
            operand.unit, operand.dtype, operand.exact_pixels = 1.0, dtype, exact
        _set_scale(attention, scale)


def _join_attention(net: nn.Module) -> None:
    """Let attentions take q, k and v from one projection, where that can be."""
    for name, attention in list(net.named_modules()):
        whole = joined(attention) if isinstance(attention, SSA) else None
        if whole is not None:
            net.set_submodule(name, whole)


def _say_what_is_slow(engine: IntegerModel) -> None:
    """Log, once for an engine, which layers no primitive may run."""
    layers = {name: each for name, each in engine.net.named_modules() if isinstance(each, IntegerConv)}
    if slow := [name for name, each in layers.items() if not each.fast]:
        logger.warning(
            "%d of %d integer layers take the readable path, since the primitive could saturate or round their sums; "
            "first: %s (counts up to %d)",
            *(len(slow), len(layers), slow[0], layers[slow[0]].max_count),
        )

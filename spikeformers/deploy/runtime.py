"""Integer inference: counts as uint8, spike-fed layers with 8-bit weights, convolution + neuron as one primitive.

What reads spikes is found by following tensors through one forward pass (wiring.py), so any model runs; what the
layers compute is defined in counts.py. Un-spiked layers (the stem, pw2 of SepConv), residual sums and membranes stay
float32; attention multiplies counts, exactly.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikeformers.attention import SSA
from spikeformers.deploy.counts import CountNeuron, IntegerConv, IntegerLinear, PerImage, fires_by_itself
from spikeformers.deploy.fuse import fuse, plain_copy
from spikeformers.deploy.wiring import OTHER, Wiring, probe
from spikeformers.energy.firing import record
from spikeformers.neurons import Neuron

EXACT_FLOAT32 = 2**24  # up to here float32 holds every integer
LARGEST_COUNT = 255


@dataclass(frozen=True)
class LayerReport:
    """One layer of the engine. `path`: "fused" (convolution + neuron), "int8", or "float"; `bits` of its weights."""

    name: str
    path: str
    bits: int
    spike_fed: bool
    primitive: bool  # runs as one oneDNN call; else in plain torch
    weight_bytes: int  # weights, and scales and biases


@dataclass(frozen=True)
class IntegerReport:
    """Every convolution and linear layer of the engine, in order of the model."""

    layers: tuple[LayerReport, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.weight_bytes for layer in self.layers)

    def table(self) -> str:
        """One line a layer, and the total."""
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'layer':{width}}  path   bits  spikes in  primitive       bytes"]
        for layer in self.layers:
            fed, runs = ("yes" if flag else "no" for flag in (layer.spike_fed, layer.primitive))
            cells = f"{layer.path:5}  {layer.bits:4}  {fed:>9}  {runs:>9}  {layer.weight_bytes:10,}"
            lines.append(f"{layer.name:{width}}  {cells}")
        return "\n".join([*lines, f"{'total':{width}}  {self.weight_bytes:44,}"])

    def to_json(self) -> dict:
        """Plain values for a JSON file."""
        return {"layers": [asdict(layer) for layer in self.layers], "weight_bytes": self.weight_bytes}


@dataclass(frozen=True)
class Agreement:
    """How far the engine predicts what the float model predicts, over `total` images.

    `different`: indices of the images whose predicted class differs. `flip_rates`: per neuron, the share of its counts
    that differ. `largest_error`: of any logit.
    """

    same: int
    total: int
    different: tuple[int, ...]
    flip_rates: dict[str, float]
    largest_error: float

    def to_json(self) -> dict:
        """Plain values for a JSON file."""
        return asdict(self) | {"different": list(self.different)}


class IntegerModel(nn.Module):
    """The engine `integer` builds: images [B, C, H, W] or clip [T, B, C, H, W] -> logits [B, num_classes], float32.

    Weights lie in int8 buffers; deepcopy, pickle and state_dict work. Results do not depend on the batch size.
    It is built on the CPU, where the fast path is, and takes images from any device. `.to("cuda")` works by the
    readable path: equal in integer layers, but float ones round as CUDA does. That needs float64: no Apple GPU has it.
    `sf.record` does not hear an engine, whose neurons are mostly fused into layers; `compare` gives the flip rate of
    every neuron, the share of its counts that differ from the float network's.
    """

    def __init__(self, net: nn.Module, *, spike_fed: frozenset[str]) -> None:
        super().__init__()
        self.net = net
        self.spike_fed = spike_fed
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Float[Tensor, "B L"]:
        return self.net(images.to(self.device, torch.float32))

    @property
    def device(self) -> torch.device:
        """Where the weights lie; logits come from there."""
        return next(self.net.buffers()).device

    def report(self) -> IntegerReport:
        """Path, bits and bytes of every convolution and linear layer."""
        layers = []
        for name, module in self.net.named_modules():
            if isinstance(module, IntegerConv):
                path, bits = ("fused" if module.levels else "int8"), 8
                runs = module.runs_fast(module.weight)
            elif isinstance(module, PerImage):
                path, bits, runs = "float", 32, False
            else:
                continue
            size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
            layers.append(LayerReport(name, path, bits, name in self.spike_fed, runs, size))
        return IntegerReport(tuple(layers))

    @torch.no_grad()
    def compare(self, model: nn.Module, images: Tensor | Iterable) -> Agreement:
        """Run `model`, the float network this engine came from, and the engine on the same images.

        `images`: one batch, or a loader of batches (a batch may be (images, labels)). Model, engine and images may lie
        on different devices.
        Raises ValueError if `model` is in train mode or there is no image.
        """
        if model.training:
            raise ValueError("compare needs model.eval(): batch norm in train mode is another function")
        engine = {name: module for name, module in self.net.named_modules() if isinstance(module, CountNeuron)}
        flips, sizes = dict.fromkeys(engine, 0), dict.fromkeys(engine, 0)
        different, total, largest = [], 0, 0.0
        place = next(model.parameters()).device
        for batch in [images] if isinstance(images, Tensor) else images:
            batch = (batch if isinstance(batch, Tensor) else batch[0]).to(place)
            with record(model) as wanted, _listen(engine) as got:
                expected, logits = model(batch).to(self.device), self(batch)
            wrong = (expected.argmax(1) != logits.argmax(1)).nonzero().flatten()
            different += (wrong + total).tolist()
            total += len(logits)
            largest = max(largest, float((expected - logits).abs().max()))
            for name in engine:
                flips[name] += int((wanted[name].to(self.device) != got[name]).sum())
                sizes[name] += got[name].numel()
        if not total:
            raise ValueError("no image to compare: the loader gave no batch")
        rates = {name: flips[name] / sizes[name] for name in engine}
        return Agreement(total - len(different), total, tuple(different), rates, largest)


@torch.no_grad()
def integer(model: nn.Module, images: Tensor, *, fast: bool = True) -> IntegerModel:
    """Post-training integer engine of `model` (float or fused), on the CPU; `model` stays as it is, where it is.

    `images`: any real batch of the size that the engine will see; its first image is run once to find who reads spikes.
    `fast=False` takes the readable path everywhere: the same numbers, slower.
    Raises ValueError if no layer reads spikes or a neuron emits counts above 255.
    """
    with torch.inference_mode(False):
        net = fuse(plain_copy(model).cpu().double())  # merged and quantised from float64, then run in float32
        wiring = probe(net, (images[:, :1] if images.ndim == 5 else images[:1]).cpu().double())
        modules = dict(net.named_modules())
        fed = _spike_fed(modules, wiring)
        if not fed:
            raise ValueError(
                f"no convolution or linear layer of {type(model).__name__} reads spikes: nothing to convert"
            )
        fused = _fusible(modules, wiring, fed)
        _swap_layers(net, modules, fed, fused, fast=fast)
        _swap_neurons(net, modules, wiring, fed, frozenset(fused.values()))
        _keep_counts_in_attention(modules, wiring)
        return IntegerModel(net.float().to(memory_format=torch.channels_last), spike_fed=frozenset(fed))


def _spike_fed(modules: dict[str, nn.Module], wiring: Wiring) -> dict[str, Neuron]:
    """Convolutions and linear layers that read what one neuron wrote, with that neuron."""
    fed = {}
    for name, calls in wiring.calls.items():
        module, source = modules[name], modules.get(wiring.sources.get(name, OTHER))
        if isinstance(module, Neuron) or not isinstance(source, Neuron) or calls > 1:
            continue
        if source.levels > LARGEST_COUNT:
            raise ValueError(f"counts are uint8: levels must be at most {LARGEST_COUNT}, got {source.levels}")
        if isinstance(module, nn.Linear) or (module.padding_mode == "zeros" and not isinstance(module.padding, str)):
            fed[name] = source
    return fed


def _fusible(modules: dict[str, nn.Module], wiring: Wiring, fed: dict[str, Neuron]) -> dict[str, str]:
    """Spike-fed layers whose output one neuron, and nothing else, reads: layer name -> neuron name."""
    fused = {}
    for name in fed:
        readers = wiring.readers[name]
        neuron = modules[readers[0]] if len(readers) == 1 and readers[0] != OTHER else None
        if isinstance(neuron, Neuron) and fires_by_itself(neuron) and wiring.calls[readers[0]] == 1:
            fused[name] = readers[0]
    return fused


def _swap_layers(
    net: nn.Module, modules: dict[str, nn.Module], fed: dict[str, Neuron], fused: dict[str, str], *, fast: bool
) -> None:
    """Integer layers for spike-fed ones, float layers image by image for the others."""
    for name, module in modules.items():
        if name in fed:
            kind = IntegerLinear if isinstance(module, nn.Linear) else IntegerConv
            neuron = modules[fused[name]] if name in fused else None
            new = kind(module, unit=fed[name].unit, max_count=fed[name].levels, neuron=neuron, fast=fast)
            net.set_submodule(name, new)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            net.set_submodule(name, PerImage(module))


def _swap_neurons(
    net: nn.Module, modules: dict[str, nn.Module], wiring: Wiring, fed: dict[str, Neuron], fused: frozenset[str]
) -> None:
    """Neurons that emit counts: uint8 where only integer layers read them, else float32 spikes."""
    for name, readers in wiring.readers.items():
        if isinstance(modules[name], Neuron):
            dtype = None if all(reader in fed for reader in readers) else torch.float32
            net.set_submodule(name, CountNeuron(modules[name], fused=name in fused, dtype=dtype))


def _keep_counts_in_attention(modules: dict[str, nn.Module], wiring: Wiring) -> None:
    """Let SSA (and SDSA-3, 4) multiply whole counts and put their units into the scale: sums are then exact."""
    for name, attention in modules.items():
        if not isinstance(attention, SSA):
            continue
        operands = [getattr(attention, operand) for operand in attention.operands]
        shape = wiring.shapes[f"{name}.q"]
        largest = shape[1] // attention.heads * shape[2:].numel()
        for operand in operands:
            largest *= operand.levels
        scale = attention.scale.item() if isinstance(attention.scale, Tensor) else attention.scale
        for operand in operands:
            scale *= operand.unit
            operand.unit, operand.dtype = 1.0, torch.float32 if largest <= EXACT_FLOAT32 else torch.float64
        del attention.scale  # a learnt one is a parameter, which a number may not replace
        attention.scale = scale


@contextmanager
def _listen(modules: dict[str, CountNeuron]) -> Iterator[dict[str, Tensor]]:
    """Counts that each of `modules` emits in the forward pass inside the context, by name."""
    heard: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, _, out, name=name: heard.__setitem__(name, m.counts(out)))
        for name, module in modules.items()
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()

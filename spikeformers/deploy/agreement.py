"""What an integer engine is made of, and how far it agrees with the network that it came from."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from spikeformers.deploy.counts import CountNeuron, to_uint8
from spikeformers.deploy.joint import OPERANDS
from spikeformers.deploy.outputs import equal_predictions, largest_difference
from spikeformers.energy.firing import record

JOINT = ".qkv"  # the neuron of a joint attention, which stands for those of q, k and v


@dataclass(frozen=True)
class LayerReport:
    """One layer of the engine. `path`: "fused" (convolution + neuron), "int8", or "float"; `bits` of its weights."""

    name: str
    path: str
    bits: int
    spike_fed: bool
    primitive: bool  # runs as one oneDNN call; else in plain torch
    weight_bytes: int  # weights, and scales, biases and thresholds, as they lie in memory


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

    A prediction is the class of an image, or of a pixel where pixels have classes; of a detector, a detection whose
    score is at least CERTAIN in either: two are the same, and count once, if they are of one class and their boxes have
    an IoU of SAME_BOX.  `different`: indices of the images where any prediction differs; `flipped`: of those where any
    count of any neuron does.  `predictions`: how many there are; `equal`: the share that is the same, 1 if there are
    none.  `flip_rates`: per neuron, the share of its counts that differ.  `largest_error`: of any logit.
    Of two stages, flips and errors are the first one's: the second may look at other regions, which cannot be compared.
    """

    same: int
    total: int
    different: tuple[int, ...]
    flipped: tuple[int, ...]
    predictions: int
    equal: float
    flip_rates: dict[str, float]
    largest_error: float

    def to_json(self) -> dict:
        """Plain values for a JSON file."""
        return asdict(self) | {"different": list(self.different), "flipped": list(self.flipped)}


@torch.no_grad()
def compare(engine: nn.Module, model: nn.Module, images: Tensor | Iterable) -> Agreement:
    """Run the network `model` and the engine that came from it on the same images; see `IntegerModel.compare`."""
    if model.training:
        raise ValueError("compare needs model.eval(): batch norm in train mode is another function")
    neurons, first_names = neurons_of_images(engine, model), _first_names(model)
    flips, sizes, alike = Counter(), Counter(), Counter()
    different, flipped, total, largest = [], [], 0, 0.0
    first = next(model.parameters())
    for batch in [images] if isinstance(images, Tensor) else images:
        batch = (batch if isinstance(batch, Tensor) else batch[0]).to(first.device, first.dtype)
        with record(model) as wanted, listening(neurons) as got:
            expected, found = tree_map_only(Tensor, lambda each: each.to(engine.device), model(batch)), engine(batch)
        predicted = equal_predictions(model, expected, found, tuple(batch.shape[-2:]))
        count, wrong = len(predicted.total), (~predicted.everywhere).nonzero().flatten()
        alike.update({name: int(each.sum()) for name, each in predicted._asdict().items()})
        anywhere = torch.zeros(count, dtype=torch.bool, device=engine.device)
        largest = max(largest, largest_difference(expected, found))
        for name, counts in got.items():
            differs = wanted[first_names[name]].to(engine.device) != counts
            flips[name] += int(differs.sum())
            sizes[name] += differs.numel()
            anywhere |= differs.flatten(1).any(1).view(-1, count).any(0)  # rows are time-major
        different += (wrong + total).tolist()
        flipped += (anywhere.nonzero().flatten() + total).tolist()
        total += count
    if not total:
        raise ValueError("no image to compare: the loader gave no batch")
    rates = {name: flips[name] / sizes[name] for name in sizes}
    return Agreement(
        same=total - len(different),
        total=total,
        different=tuple(different),
        flipped=tuple(flipped),
        predictions=alike["total"],
        equal=alike["equal"] / alike["total"] if alike["total"] else 1.0,
        flip_rates=rates,
        largest_error=largest,
    )


def neurons_of_images(engine: nn.Module, model: nn.Module) -> dict[str, CountNeuron]:
    """Neurons of the engine of `model` by name, without those of a second stage, whose rows are regions."""
    behind = tuple(
        f"{name}.{part}.".removeprefix(".")
        for name, module in getattr(model, "_orig_mod", model).named_modules()
        for part in getattr(module, "second_stage", ())
    )
    named = engine.net.named_modules()
    return {name: each for name, each in named if isinstance(each, CountNeuron) and not name.startswith(behind)}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Of every name of every module the first one that the module has, by which the recorder calls it."""
    first: dict[nn.Module, str] = {}
    named = getattr(model, "_orig_mod", model).named_modules(remove_duplicate=False)
    return {name: first.setdefault(module, name) for name, module in named}


@torch.no_grad()
def compare_layers(engine: nn.Module, model: nn.Module, images: Tensor | Iterable) -> dict[str, int]:
    """Layers of the engine that fire, each given the counts that it is given in `model`; see `IntegerModel`."""
    if model.training:
        raise ValueError("compare_layers needs model.eval(): batch norm in train mode is another function")
    places = dict(engine.net.named_modules())
    pairs = {layer: neuron for layer, neuron in engine.fused.items() if layer in places}
    wrong = dict.fromkeys(pairs, 0)
    first = next(model.parameters())
    for batch in [images] if isinstance(images, Tensor) else images:
        batch = (batch if isinstance(batch, Tensor) else batch[0]).to(first.device, first.dtype)
        with record(model) as wanted, overhearing(model, pairs) as given:
            model(batch)
        for name, neuron in pairs.items():
            layer = places[name]
            counts = to_uint8((given[name] / layer.unit).round()).to(engine.device)
            if counts.ndim == 4:
                counts = counts.contiguous(memory_format=torch.channels_last)
            wrong[name] += int((layer(counts) != wanted[neuron].to(engine.device)).sum())
    return wrong


@contextmanager
def overhearing(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules `names` of `model` are given in the forward pass inside the context, by name."""
    given: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
        for name in names
    ]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def listening(neurons: dict[str, CountNeuron]) -> Iterator[dict[str, Tensor]]:
    """Counts that each of `neurons` emits in the forward pass inside the context, by name in the network."""
    heard: dict[str, Tensor] = {}

    def keep(neuron: CountNeuron, output: Tensor, *, name: str) -> None:
        counts = neuron.counts(output)
        if name.removesuffix(JOINT) == name:
            heard[name] = counts
        else:
            for operand, part in zip(OPERANDS, counts.chunk(len(OPERANDS), 1), strict=True):
                heard[f"{name.removesuffix(JOINT)}.{operand}"] = part

    handles = [
        neuron.register_forward_hook(lambda m, _, out, name=name: keep(m, out, name=name))
        for name, neuron in neurons.items()
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()

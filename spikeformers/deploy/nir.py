"""NIR export: the largest parts of a network that the neuromorphic intermediate representation can express.

Paper: Pedersen et al., "Neuromorphic intermediate representation", Nature Communications, 2024. What becomes what:
LIF                    nir.LIF, equal to it under Euler steps of dt = 1 that start from v = v_leak (below)
integer neurons        D nir.Threshold, the d-th fires for counts from d on, joined by nir.Scale (worth of one spike)
Conv2d, Linear         nir.Conv2d; nir.Affine or nir.Linear; batch norms, RepConv and SepConv are merged first
AvgPool2d, mean        nir.AvgPool2d; a mean over pixels pools the whole map and flattens it
MaxPool2d of spikes    nir.SumPool2d, then nir.Threshold at 1/2: the largest of zeros and ones is their "or"
x + y                  edges that join; NIR sums what arrives, here in the order of the edges
x * constant           nir.Scale (a layer scale, say)
1 - x, x * y           of zeros and ones ("not", "and", as in IAND) nir.Threshold of -x and of x + y
LIF: v += dt / tau * ((v_leak - v) + r I), fires where v > v_threshold, there v = v_reset. Ours has dt = 1, v_leak =
v_reset and r = 1, the same floats; or r = tau without `decay_input`, equal but for rounding unless tau is a power of 2.
It fires from its threshold on, NIR only above: v_threshold is the largest float below.
NIR cannot reset by subtraction. So soft resets and membranes of integer neurons stay behind, and so would an nir.IF
over D virtual steps: at its first spike it would lose what is left of the current. Thresholds lose nothing.
Departures from NIR: none. nir 1.0 cannot read back a grouped convolution, so those are written dense, with zeros; and
a SepConv goes as the one dense 7x7 that it equals, so that only the first layer reads real numbers.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spikeformers.deploy.fuse import fuse, plain_copy, refuse_exact
from spikeformers.deploy.nir_nodes import REASONS, Step
from spikeformers.deploy.nir_trace import steps_of
from spikeformers.deploy.stages import refuse_two_stages
from spikeformers.energy import trace
from spikeformers.energy.firing import neurons_of
from spikeformers.layers import SepConv
from spikeformers.layers.pretrained import write_files
from spikeformers.neurons import Door, Neuron, temporal_modules

REPORT = "report.json"


@dataclass(frozen=True)
class NIRPart:
    """One exported sub-graph. `nodes`: name -> kind; a node has the name of its module.

    `inputs`: Input node -> what to feed it with at every step.  `outputs`: Output node -> who reads it.
    `macs`: per image and step; `share`: of those of the whole network.
    """

    file: str
    nodes: dict[str, str]
    inputs: dict[str, str]
    outputs: dict[str, str]
    macs: float
    share: float


@dataclass(frozen=True)
class LeftOut:
    """What stays behind of one module: functions, or its own kind; the reason; its share of all MACs."""

    module: str
    what: tuple[str, ...]
    reason: str
    share: float


@dataclass(frozen=True)
class NIRReport:
    """What `export_nir` wrote, in order of execution, and what it could not write."""

    steps: int
    parts: tuple[NIRPart, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def share(self) -> float:
        """Exported share of the merged network's multiply-accumulates (MACs), 0..1."""
        return sum(part.share for part in self.parts)

    def table(self) -> str:
        """Every part with its boundaries, then what stays behind and why."""
        lines = [
            f"{len(self.parts)} parts hold {self.share:.1%} of the MACs; run each for {self.steps} steps of dt = 1"
        ]
        for part in self.parts:
            lines.append(f"{part.file}: {len(part.nodes)} nodes, {part.share:.1%} of the MACs")
            lines += [f"  {name} <- {source}" for name, source in part.inputs.items()]
            lines += [f"  {name} -> {reader}" for name, reader in part.outputs.items()]
        for each in self.left_out:
            what = ", ".join(each.what)
            lines.append(
                f"left out: {each.module or 'the model'} ({what}), {each.share:.1%} of the MACs: {each.reason}"
            )
        return "\n".join(lines)

    def to_json(self) -> dict:
        """Plain values for a JSON file."""
        return asdict(self) | {"share": self.share}


@torch.no_grad()
def export_nir(model: nn.Module, images: Tensor, folder: str | Path) -> NIRReport:
    """Write the parts of `model` that NIR can express to `folder`, one .nir file each, and report.json.

    `images`: a batch [B, C, H, W] or clip [T, B, C, H, W] of the size that the parts shall take; one image is run.
    A part is the graph of one time step: run it T times, neurons keep their membranes in between. What `input` reads is
    the image, the same at every step, or the frame of that step. Parts are numbered in order of execution and named by
    their first layer; a later one reads outputs of earlier ones, or what layers left out make of those. A part without
    a neuron is left out as well. `model` stays as it is; numbers keep its precision.
    Raises ValueError if `folder` is not empty, no neuron of the model can be expressed, what it computes depends on
    numbers read off a tensor, or it has two stages (of which `first_stage` can go); ImportError without nir. Nothing is
    written then.
    """
    refuse_two_stages(model)
    _require_nir()
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder, so that parts of two exports do not mix")
    if not neurons_of(model):
        raise ValueError(f"{type(model).__name__} has no spiking neuron: NIR describes spiking networks")
    net = _merged(model)
    count = max((module.steps for module in temporal_modules(net).values()), default=1)
    repeats = any(isinstance(module, Door) for module in net.modules())
    first = images[:, :1] if images.ndim == 5 else images[: 1 if repeats else count]
    first = first.detach().cpu().to(_precision(net))
    steps, results = steps_of(net, first)
    levels = groupby(sorted((step for step in steps if step.expressible), key=lambda s: s.level), key=lambda s: s.level)
    parts = [part for part in (list(group) for _, group in levels) if any(_fires(step) for step in part)]
    if not parts:
        why = sorted({step.reason for step in steps if isinstance(net.get_submodule(step.module), Neuron)})
        raise ValueError(f"NIR can express no neuron of {type(model).__name__}: " + ("; ".join(why) or "none ran"))
    graphs, report = _described(steps, results, parts, count, _macs(net, first))
    contents = {part.file: _written(graph) for part, graph in zip(report.parts, graphs, strict=True)}
    write_files(folder, contents | {REPORT: json.dumps(report.to_json(), indent=2).encode() + b"\n"})
    return report


def _require_nir() -> None:
    try:
        import nir  # noqa: F401
    except ImportError:
        raise ImportError('NIR export needs the package nir: pip install "spikeformers[nir]"') from None


def _merged(model: nn.Module) -> nn.Module:
    """A copy on the CPU, merged in float64, in its own precision again."""
    refuse_exact(model, "go as NIR")
    net = plain_copy(model).cpu().double()
    for module in net.modules():
        if type(module) is SepConv:
            module.dw, module.pw2 = module.merge_spatial(), nn.Identity()
    return fuse(net).to(_precision(model))


def _precision(model: nn.Module) -> torch.dtype:
    """float64 if the model has it, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32


def _macs(net: nn.Module, images: Tensor) -> dict[str, float]:
    """Multiply-accumulates per image and step of every layer and product, by name."""
    found = {}
    for operation in trace(net, images).operations:
        for part in operation.parts or (operation,):
            found[part.name] = found.get(part.name, 0) + part.macs
    return found


def _fires(step: Step) -> bool:
    return step.piece is not None and any(
        type(node).__name__ in ("LIF", "Threshold") for node in step.piece.nodes.values()
    )


def _graph(part: list[Step], *, outputs: set[Step], metadata: dict) -> Any:
    """The steps of one part as a graph: what comes from elsewhere by Input nodes, what goes there by Output nodes."""
    import nir

    mine, nodes, edges = set(part), {}, []

    def senders(step: Step) -> list[str]:
        if step not in mine:
            name = _input(step)
            nodes.setdefault(name, nir.Input({"input": torch.tensor(step.shape).numpy()}))
            return [name]
        return [step.piece.last] if step.piece else [name for each in step.operands for name in senders(each)]

    for step in part:
        arriving = [name for each in step.operands for name in senders(each)]
        if step.piece:
            nodes.update(step.piece.nodes)
            edges += [(sender, taker) for taker in step.piece.first for sender in arriving]
            edges += step.piece.edges
        if step in outputs:
            nodes[_output(step)] = nir.Output({"output": torch.tensor(step.shape).numpy()})
            edges += [(sender, _output(step)) for sender in senders(step)]
    return nir.NIRGraph(nodes, edges, metadata=metadata)


def _input(step: Step) -> str:
    return step.place if not step.operands else f"{step.place}.input"


def _output(step: Step) -> str:
    return f"{step.place}.output"


def _written(graph: Any) -> bytes:
    import nir

    buffer = BytesIO()
    nir.write(buffer, graph)
    return buffer.getvalue()


def _described(
    steps: list[Step], results: set[Step], parts: list[list[Step]], count: int, macs: dict[str, float]
) -> tuple[list[Any], NIRReport]:
    """The graphs of `parts`, and the report of them and of the rest of `steps`."""
    files = {}
    for index, part in enumerate(parts, start=1):
        layer = next(step.place for step in part if step.piece)
        files |= dict.fromkeys(part, f"{index:02}_{layer}.nir")
    readers: dict[Step, list[str]] = {step: ["the result"] for step in results}
    for step in steps:
        for each in step.operands:
            if files.get(step, step) != files.get(each, each):
                readers.setdefault(each, []).append(files.get(step) or f"{step.what} in {step.module or 'the model'}")
    total, graphs, described, written = sum(macs.values()), [], [], _shares_of_modules(steps)
    for part in parts:
        outside = [each for step in part for each in step.operands if each not in set(part)]
        outputs = [step for step in part if step in readers]
        graph = _graph(part, outputs=set(outputs), metadata={"steps": count, "dt": 1.0})
        own = sum(macs.get(step.module, 0) * written[step] for step in part if step.piece)
        graphs.append(graph)
        described.append(
            NIRPart(
                file=files[part[0]],
                nodes={name: type(node).__name__ for name, node in graph.nodes.items()},
                inputs={_input(step): _origin(step, files) for step in outside},
                outputs={_output(step): ", ".join(dict.fromkeys(readers[step])) for step in outputs},
                macs=own,
                share=own / total,
            )
        )
    gone = {step.module for step in files if step.piece}
    rest = {name: each for name, each in macs.items() if name not in gone}
    left_out = tuple(_left_out([step for step in steps if step not in files], rest, total))
    return graphs, NIRReport(count, tuple(described), left_out)


def _shares_of_modules(steps: list[Step]) -> dict[Step, float]:
    """The part that each step has in what its module computes: one that runs on several maps has several steps."""
    sizes = {step: math.prod(step.shape) for step in steps if step.piece}
    whole = Counter()
    for step, size in sizes.items():
        whole[step.module] += size
    return {step: size / whole[step.module] for step, size in sizes.items()}


def _origin(step: Step, files: dict[Step, str]) -> str:
    """Where an Input node finds what it is fed with."""
    if not step.operands:
        return "the image, or the frame of this step"
    if step in files:
        return f"{_output(step)} of {files[step]}"
    return f"what {step.what} gives in {step.module or 'the model'}"


def _left_out(steps: list[Step], macs: dict[str, float], total: float) -> Iterator[LeftOut]:
    """The steps that are in no part, by module. `macs`: of what is in none."""
    by_module: dict[str, list[Step]] = {}
    for step in steps:
        by_module.setdefault(step.module, []).append(step)
    for module, members in by_module.items():
        reasons = dict.fromkeys(step.reason for step in members if step.reason)
        named = [reason for reason in reasons if reason != REASONS["flatten"]] or list(reasons)
        own = sum(each for name, each in macs.items() if name == module or name.startswith(f"{module}."))
        reason = "; ".join(named) or "no neuron stands in its part: run it as it is"
        yield LeftOut(module, tuple(dict.fromkeys(step.what for step in members)), reason, own / total)

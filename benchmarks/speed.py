"""Training step and inference of Meta-SpikeFormer beside the same network with spikingjelly 2.0's neurons, in one run.

Both networks are one object, built once and deep-copied; in the copy every neuron is replaced by spikingjelly's LIFNode
or ILIFNode behind an adapter that unfolds [T*B, ...] to [T, B, ...]. Before anything is timed, both must give equal
spikes and equal logits. A training step is forward, cross-entropy and backward, without an optimiser; spikingjelly's
`reset_net` belongs to its time, since its neurons keep their state until it is called. Repeats are interleaved (ours
first, theirs first, in turn), so that other load on the machine falls on both. Before them stands a neuron alone,
forward and backward, as it runs and as its readable loop.

    pip install "spikingjelly>=2.0,<2.1" && python benchmarks/speed.py --threads 2 --json benchmarks/results/speed.json
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

import spikeformers as sf
from spikeformers import kernels
from spikeformers.neurons import ILIF, LIF, Neuron
from spikeformers.train.summary import hardware


@dataclass(frozen=True)
class Case:
    """One pair of networks to time: the neuron by our name, and its steps."""

    neuron: str
    steps: int

    def __str__(self) -> str:
        return f"{self.neuron} T={self.steps}" + (" D=4" if self.neuron == "i_lif" else "")


CASES = (Case("lif", 1), Case("lif", 4), Case("i_lif", 1))


class Peer(nn.Module):
    """A multi-step neuron of spikingjelly where tensors are [T*B, ...]."""

    def __init__(self, node: nn.Module, *, steps: int) -> None:
        super().__init__()
        self.node = node
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return self.node(x.unflatten(0, (self.steps, x.shape[0] // self.steps))).flatten(0, 1)


def peer_of(ours: Neuron) -> Peer:
    """spikingjelly's counterpart of one of our neurons. Raises ValueError if it has none."""
    if isinstance(ours, LIF):
        node = neuron.LIFNode(
            tau=ours.tau,
            decay_input=ours.decay_input,
            v_threshold=ours.threshold,
            v_reset=ours.v_reset,
            surrogate_function=surrogate.Sigmoid(alpha=ours.surrogate.slope),
            detach_reset=ours.detach_reset,
            step_mode="m",
        )
    elif isinstance(ours, ILIF) and ours.steps == 1:
        # At one step from rest the membrane's decay plays no part, so any tau gives our stateless counts.
        node = neuron.ILIFNode(
            v_threshold=ours.threshold,
            surrogate_function=surrogate.MultiLevelSpikeCount(ours.levels),
            step_mode="m",
        )
    else:
        raise ValueError(f"spikingjelly has no counterpart of {ours}")
    return Peer(node, steps=ours.steps)


@torch.no_grad()
def fire(model: nn.Module, images: Tensor) -> nn.Module:
    """Give `model` weights and statistics under which every kind of neuron fires, in train and in eval mode."""
    for path, module in model.named_modules():
        if path.endswith(("q_conv.bn3", "k_conv.bn3", "v_conv.bn3")):
            module.bias.fill_(1.0)  # attention is silent at initialisation otherwise, and equality would be empty
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = {norm: norm.momentum for norm in norms}
    for norm in norms:
        norm.momentum = 1.0  # running statistics of these very images
    model(images)
    for norm in norms:
        norm.momentum = momentum[norm]
    return model


def with_neurons(model: nn.Module, build: Callable[[Neuron], nn.Module]) -> nn.Module:
    """A copy of `model` with every neuron exchanged. Raises ValueError where `build` does."""
    other = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, Neuron):
            other.set_submodule(name, build(module))
    return other


def build_pair(name: str, case: Case, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """Our network and its copy with spikingjelly's neurons."""
    torch.manual_seed(0)
    ours = fire(sf.create_model(name, neuron=case.neuron, steps=case.steps).to(images.device), images)
    return ours, with_neurons(ours, peer_of)


def spikes_of(model: nn.Module, images: Tensor, kind: type[nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
    """Output of every module of `kind` by name, and the logits, from one forward pass without gradients."""
    fired: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: fired.__setitem__(name, out))
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    with torch.no_grad():
        logits = model(images)
    for hook in hooks:
        hook.remove()
    return fired, logits


def check_equal(ours: nn.Module, theirs: nn.Module, images: Tensor) -> dict:
    """Compare both networks in train and eval mode. Raises ValueError unless every spike and logit is equal."""
    found: dict = {}
    for training in (True, False):
        # Copies: a forward pass in train mode moves the running statistics.
        pair = [copy.deepcopy(model).train(training) for model in (ours, theirs)]
        spikes, logits = spikes_of(pair[0], images, Neuron)
        peer_spikes, peer_logits = spikes_of(pair[1], images, Peer)
        mode = "train" if training else "eval"
        differing = [name for name in spikes if not torch.equal(spikes[name], peer_spikes[name])]
        if differing or spikes.keys() != peer_spikes.keys():
            raise ValueError(f"{mode}: spikes differ from {differing[:3]}; a timing of different networks says nothing")
        if not torch.equal(logits, peer_logits):
            raise ValueError(f"{mode}: logits differ by {(logits - peer_logits).abs().max():.3g}")
        found[mode] = {
            "neurons": len(spikes),
            "neurons_that_fired": sum(bool(s.any()) for s in spikes.values()),
            "mean_count": sum(float(s.double().sum()) for s in spikes.values())
            / sum(s.numel() for s in spikes.values()),
        }
    return found


def step_of(model: nn.Module, images: Tensor, targets: Tensor, *, training: bool, peer: bool) -> Callable[[], None]:
    """A function of no arguments that runs one training step or one inference of `model`."""

    def train_step() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), targets).backward()
        if peer:
            functional.reset_net(model)

    @torch.no_grad()
    def infer() -> None:
        model(images)
        if peer:
            functional.reset_net(model)

    model.train(training)
    return train_step if training else infer


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(ours: Callable[[], None], theirs: Callable[[], None], *, repeats: int, device: torch.device) -> dict:
    """Medians over `repeats` interleaved calls after one warm-up each.

    ratio: ours / theirs of neighbouring calls, median, so that load that comes and goes cancels; below 1 is faster.
    """
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    steps = {"ours": ours, "theirs": theirs}
    for step in steps.values():
        seconds_of(step, device)
    for repeat in range(repeats):
        for key in ("ours", "theirs") if repeat % 2 == 0 else ("theirs", "ours"):
            times[key].append(seconds_of(steps[key], device))
    medians = {key: statistics.median(values) for key, values in times.items()}
    paired = [round(a / b, 4) for a, b in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "ours_ms": round(1e3 * medians["ours"], 2),
        "theirs_ms": round(1e3 * medians["theirs"], 2),
        "ratio": round(statistics.median(paired), 4),
        "ratio_of_fastest": round(min(times["ours"]) / min(times["theirs"]), 4),
        "paired_ratios": paired,
    }


def saved_mib(model: nn.Module, images: Tensor, *, readable: bool = False) -> float:
    """MiB that a forward pass in train mode keeps for backward, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, kernels.readable() if readable else nullcontext():
        logits = model(images)
    for module in model.modules():
        if isinstance(module, Peer):
            module.node.reset()
    del logits
    return round(sum(kept.values()) / 2**20, 1)


def neuron_step(module: nn.Module, currents: Tensor, upstream: Tensor, *, readable: bool) -> Callable[[], None]:
    """A function of no arguments: forward and backward of one neuron, which starts from rest."""

    def step() -> None:
        currents.grad = None
        with kernels.readable() if readable else nullcontext():
            module(currents).backward(upstream)
        if isinstance(module, Peer):
            module.node.reset()

    return step


def run_neurons(shape: list[int], *, device: torch.device, repeats: int) -> list[dict]:
    """Rows of LIF alone at four steps, [T*B, C, H, W]: as it runs, and its readable loop, against spikingjelly's."""
    ours = LIF(steps=4)
    theirs = peer_of(ours)
    currents = (1.5 * torch.randn(shape, device=device)).requires_grad_()
    upstream = torch.randn(shape, device=device)
    peer = neuron_step(theirs, currents, upstream, readable=False)
    peer()
    wanted = currents.grad
    rows = []
    for what, readable in (("neuron", False), ("neuron, loop", True)):
        step = neuron_step(ours, currents, upstream, readable=readable)
        step()
        torch.testing.assert_close(currents.grad, wanted, rtol=1e-4, atol=1e-5)
        row = compare(step, peer, repeats=repeats, device=device)
        row["ours_saved_mib"], row["theirs_saved_mib"] = (
            saved_mib(module, currents.detach().requires_grad_(), readable=readable) for module in (ours, theirs)
        )
        print(
            f"{'x'.join(map(str, shape)):22}{'lif T=4':14}{what:12}{row['ours_ms']:>8.1f}ms{row['theirs_ms']:>8.1f}ms"
            f"{row['ratio']:>8.3f}{row['ratio_of_fastest']:>9.3f}"
            f"{row['ours_saved_mib']:>10.1f}{row['theirs_saved_mib']:>10.1f}",
            flush=True,
        )
        rows.append({"model": shape, "neuron": "lif", "steps": 4, "what": what, **row})
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Meta-SpikeFormer beside spikingjelly's neurons: time ours / theirs.")
    parser.add_argument("--models", nargs="+", default=["meta_spikeformer_15m"])
    parser.add_argument("--size", type=int, default=112, help="pixels of the square images")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--currents", type=int, nargs=4, default=[32, 64, 56, 56], help="shape T*B C H W for the neuron alone"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def run_case(name: str, case: Case, images: Tensor, *, repeats: int) -> tuple[list[dict], dict]:
    """Rows of inference and training step of one pair, printed as they come, and what `check_equal` found."""
    ours, theirs = build_pair(name, case, images)
    equal = check_equal(ours, theirs, images)
    targets = torch.arange(len(images), device=images.device)
    rows = []
    for what, training in (("inference", False), ("train step", True)):
        steps = [step_of(model, images, targets, training=training, peer=model is theirs) for model in (ours, theirs)]
        row = compare(*steps, repeats=repeats, device=images.device)
        line = (
            f"{name:22}{case!s:14}{what:12}{row['ours_ms']:>8.1f}ms{row['theirs_ms']:>8.1f}ms"
            f"{row['ratio']:>8.3f}{row['ratio_of_fastest']:>9.3f}"
        )
        if training:
            row |= {"ours_saved_mib": saved_mib(ours, images), "theirs_saved_mib": saved_mib(theirs, images)}
            line += f"{row['ours_saved_mib']:>10.1f}{row['theirs_saved_mib']:>10.1f}"
        print(line, flush=True)
        rows.append({"model": name, "neuron": case.neuron, "steps": case.steps, "what": what, **row})
    return rows, equal


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    images = torch.rand(options.batch, 3, options.size, options.size, device=options.device)
    work = f"{options.threads} threads; batch {options.batch} of {options.size} px; {options.repeats} repeats"
    print(f"{hardware()}, {os.cpu_count()} cores; {work}; torch {version('torch')}")
    print(
        f"{'model':22}{'neuron':14}{'what':12}{'ours':>10}{'theirs':>10}{'ratio':>8}  fastest  saved for backward, MiB"
    )
    load_before = os.getloadavg()[0]
    device = torch.device(options.device)
    rows, checks = run_neurons(options.currents, device=device, repeats=2 * options.repeats), {}
    for name in options.models:
        for case in CASES:
            found, checks[f"{name} {case}"] = run_case(name, case, images, repeats=options.repeats)
            rows += found
    if options.json:
        result = {
            "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
            "hardware": f"{hardware()}, {os.cpu_count()} cores",
            "device": options.device,
            "threads": options.threads,
            "load_average_before_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in ("torch", "spikeformers", "spikingjelly")},
            },
            "batch": options.batch,
            "size": options.size,
            "repeats": options.repeats,
            "ratio": "time ours / time theirs, median over neighbouring calls; below 1 means ours is faster",
            "equal_spikes_and_logits": checks,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()

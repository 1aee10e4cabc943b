"""A whole training step, each switch alone and together, beside spikingjelly 2.0's neurons and the ANN twin.

A step is data (images to the device, in their layout), forward with cross-entropy, backward, AdamW. Every row is
timed in turn with one reference, our network as recipes train it (channels_last, float32, no other switch), so that
other load falls on both.
Sides: ours; spikingjelly; and the ANN twin, where each neuron is a ReLU: what it saves is the neurons' share.
Memory: MiB that a step keeps for backward; on CUDA also what a step allocates at its peak, beyond weights and states.
Before it is timed, a network must give the spikes and logits of the one with spikingjelly's neurons, to the bit.

    pip install "spikingjelly>=2.0,<2.1" && python benchmarks/train_speed.py --json benchmarks/results/train_speed.json
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
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from speed import Peer, check_equal, fire, peer_of, saved_mib, with_neurons
from spikingjelly.activation_based import functional
from torch import Tensor, nn

import spikeformers as sf
from spikeformers.train.optimise import build_optimizer
from spikeformers.train.recipe import Optim, Speed
from spikeformers.train.speed import apply_speed
from spikeformers.train.summary import hardware

PARTS = ("data", "forward", "backward", "optimiser")


@dataclass(frozen=True)
class Case:
    """One network at one size: what `create_model` is told, the images, and how many of them on a CPU and a GPU."""

    name: str
    overrides: dict
    size: int
    batch: int
    gpu_batch: int

    def __str__(self) -> str:
        neuron = self.overrides.get("neuron", "")
        return " ".join(filter(None, [self.name, neuron, f"T={self.overrides['steps']}", f"{self.size} px"]))


CASES = (
    Case("meta_spikeformer_15m", {"neuron": "lif", "steps": 1}, 224, 4, 128),
    Case("meta_spikeformer_15m", {"neuron": "lif", "steps": 4}, 224, 2, 64),
    Case("meta_spikeformer_15m", {"neuron": "i_lif", "steps": 1}, 224, 4, 128),
    Case("qsd_transformer_t", {"steps": 1}, 224, 4, 128),
    Case("spikformer_cifar_4_384", {"steps": 4}, 32, 16, 256),
)


@dataclass(frozen=True)
class Form:
    """How a step is computed."""

    name: str
    channels_last: bool = True
    bf16: bool = False
    speed: Speed = field(default_factory=Speed)


PLAIN = Form("plain", channels_last=False)
REFERENCE = Form("channels_last")
TOGETHER = {"fused_norms": True, "fused_optimizer": True}
OURS = (
    PLAIN,
    REFERENCE,
    Form("+ fused_qkv", speed=Speed(fused_qkv=True)),
    Form("+ fused_norms", speed=Speed(fused_norms=True)),
    Form("+ fused_optimizer", speed=Speed(fused_optimizer=True)),
    Form("+ recompute", speed=Speed(recompute=True)),
    Form("+ norms, optimizer", speed=Speed(**TOGETHER)),
    Form("+ norms, optimizer, recompute", speed=Speed(**TOGETHER, recompute=True)),
    Form("+ bf16", bf16=True),
    Form("+ bf16, norms, optimizer", bf16=True, speed=Speed(**TOGETHER)),
    Form("+ compile", speed=Speed(compile=True)),
    Form("+ compile, bf16", bf16=True, speed=Speed(compile=True)),
)
THEIRS = (
    PLAIN,
    REFERENCE,
    Form("+ bf16", bf16=True),
    Form("+ compile", speed=Speed(compile=True)),
    Form("+ compile, bf16", bf16=True, speed=Speed(compile=True)),
)
TWIN = (PLAIN, REFERENCE, Form("+ bf16", bf16=True))


class Step:
    """A network in one form with its optimiser: `run` is one training step and gives the seconds of its parts."""

    def __init__(self, model: nn.Module, form: Form, images: Tensor, *, device: torch.device) -> None:
        self.form, self.device = form, device
        self.layout = torch.channels_last if form.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=self.layout).train()
        self.peer = any(isinstance(module, Peer) for module in model.modules())
        self.images = images.pin_memory() if device.type == "cuda" else images
        self.targets = torch.arange(len(images), device=device) % 10
        if self.peer and form.speed.compile:
            model.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")
        else:
            apply_speed(model, form.speed, self.placed())
        self.optimizer = build_optimizer(model, Optim(name="adamw", lr=1e-4), fused=form.speed.fused_optimizer)

    def placed(self) -> Tensor:
        """The images where the network is."""
        return self.images.to(self.device, memory_format=self.layout, non_blocking=True)

    def loss(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.form.bf16):
            logits = self.model(images)
        return nn.functional.cross_entropy(logits.float(), self.targets)

    def run(self) -> list[float]:
        marks = [self.now()]
        images = self.placed()
        marks.append(self.now())
        loss = self.loss(images)
        marks.append(self.now())
        loss.backward()
        marks.append(self.now())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.peer:
            functional.reset_net(self.model)
        marks.append(self.now())
        return [after - before for before, after in pairwise(marks)]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self) -> dict[str, float]:
        """MiB of a step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.form.bf16):
            found = {"kept_mib": saved_mib(self.model, self.placed())}
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.run()
            found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        return found


def measured(step: Step, reference: Step | None, *, repeats: int) -> dict:
    """Medians of `repeats` steps, each next to one of the reference; `ratio`: time / the reference's, of neighbours."""
    began = time.perf_counter()
    step.run()
    first = time.perf_counter() - began
    step.run()
    pairs = []
    for repeat in range(repeats):
        order = (step, reference or step) if repeat % 2 else (reference or step, step)
        found = {id(each): each.run() for each in order}
        pairs.append((found[id(step)], found[id(reference or step)]))
    parts = [statistics.median(part) for part in zip(*(ours for ours, _ in pairs), strict=True)]
    seconds = statistics.median(sum(ours) for ours, _ in pairs)
    return {
        "images_per_second": round(len(step.images) / seconds, 2),
        "ratio": round(statistics.median(sum(ours) / sum(theirs) for ours, theirs in pairs), 4) if reference else 1.0,
        **{f"{name}_ms": round(1e3 * part, 2) for name, part in zip(PARTS, parts, strict=True)},
        "first_step_s": round(first, 1),
        **step.memory(),
    }


def run_case(case: Case, *, device: torch.device, repeats: int, forms: list[str], keep: Callable[[dict], None]) -> None:
    """Every side and form of one network."""
    torch.manual_seed(0)
    batch = case.gpu_batch if device.type == "cuda" else case.batch
    images = torch.rand(batch, 3, case.size, case.size)
    ours = fire(sf.create_model(case.name, **case.overrides, num_classes=10).to(device), images.to(device))
    sides = {"ours": (ours, OURS), "ANN twin": (with_neurons(ours, lambda _: nn.ReLU()), TWIN)}
    try:
        peer = with_neurons(ours, peer_of)
    except ValueError as error:
        print(f"{case}: {error}", file=sys.stderr)
    else:
        check_equal(ours, peer, images.to(device))
        sides["spikingjelly"] = (peer, THEIRS)
    reference = Step(copy.deepcopy(ours), REFERENCE, images, device=device)
    for side, (model, listed) in sides.items():
        for form in listed:
            if form.name not in forms and (side, form) != ("ours", REFERENCE):
                continue
            about = {"case": str(case), "batch": batch, "side": side, "form": form.name}
            torch.compiler.reset()
            try:
                step = reference
                if (side, form) != ("ours", REFERENCE):
                    step = Step(copy.deepcopy(model), form, images, device=device)
                found = measured(step, reference if step is not reference else None, repeats=repeats)
            except (
                RuntimeError,
                ValueError,
                TypeError,
                AttributeError,
            ) as error:
                # A switch that a network or this torch refuses is a result.
                found = {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            keep(about | found)


def show(rows: list[dict], console: Console) -> None:
    """A table for each network."""
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        by = {(row["side"], row["form"]): row for row in mine if "ratio" in row}
        table = Table(title=f"{case}, batch {mine[0]['batch']}; ratio: time / ours, channels_last")
        columns = ("side", "form", "images/s", "ratio", *(f"{part} ms" for part in PARTS), "kept MiB")
        for column in (*columns, "peak MiB"):
            table.add_column(column, justify="left" if column in columns[:2] else "right")
        for row in mine:
            if "refused" in row:
                table.add_row(row["side"], row["form"], row["refused"][:40])
                continue
            numbers = [row["images_per_second"], row["ratio"], *(row[f"{part}_ms"] for part in PARTS)]
            table.add_row(row["side"], row["form"], *map(str, [*numbers, row["kept_mib"], row.get("peak_mib", "-")]))
        console.print(table)
        for side in ("ours", "spikingjelly"):
            pair = [by.get((each, REFERENCE.name)) for each in ("ANN twin", side)]
            if all(pair):
                console.print(f"neurons' share of {side}: {1 - pair[0]['ratio'] / pair[1]['ratio']:.0%}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whole training steps: each switch alone and together.")
    every = range(len(CASES))
    names = "; ".join(f"{index}: {case}" for index, case in enumerate(CASES))
    known = list(dict.fromkeys(form.name for form in (*OURS, *THEIRS, *TWIN)))
    parser.add_argument(
        "--cases", type=int, nargs="*", default=list(every), choices=every, help=f"default all. {names}"
    )
    parser.add_argument("--forms", nargs="*", default=known, choices=known, help="the reference is always there")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the results to this file, row by row")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    device, rows, load = torch.device(options.device), [], os.getloadavg()[0]
    about = {
        "command": " ".join(["python", "benchmarks/train_speed.py", *sys.argv[1:]]),
        "hardware": f"{hardware()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": options.threads,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "spikeformers", "spikingjelly")},
        },
    }

    def keep(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if options.json:
            loads = {"load_average_before_after": [round(load, 2), round(os.getloadavg()[0], 2)]}
            options.json.write_text(json.dumps(about | loads | {"rows": rows}, indent=1) + "\n")

    for index in options.cases:
        run_case(CASES[index], device=device, repeats=options.repeats, forms=options.forms, keep=keep)
    show(rows, Console(width=150))


if __name__ == "__main__":
    main()

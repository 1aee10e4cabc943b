"""Memory and time of a training step against the time steps T, with and without recomputation: a table and a plot.

Every point is a process of its own, so that none finds memory of another. Memory on a CPU is what the process grows by
at the peak of a step (Linux; the allocator gives back at once what is freed), on CUDA what torch allocates at the peak:
what is kept for backward, gradients and work space, without weights.

    pip install "spikingjelly>=2.0,<2.1" && python benchmarks/memory.py --plot memory.png --json memory.json
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import track
from speed import peer_of, with_neurons
from train_speed import Form, Step

import spikeformers as sf
from spikeformers.train.recipe import Speed
from spikeformers.train.summary import hardware

THEIRS = "spikingjelly's neurons"
FORMS = {
    "as it is": Form("as it is"),
    "fused_norms": Form("fused_norms", speed=Speed(fused_norms=True)),
    "recompute": Form("recompute", speed=Speed(recompute=True)),
    THEIRS: Form(THEIRS),
}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # of glibc


def resident_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def point(options: argparse.Namespace, *, form: str, steps: int) -> dict[str, float]:
    """Peak MiB and median seconds of a step of one network in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    model = sf.create_model(options.model, neuron="lif", steps=steps, num_classes=10)
    if form == THEIRS:
        model = with_neurons(model, peer_of)
    step = Step(model, FORMS[form], torch.rand(options.batch, 3, options.size, options.size), device=device)
    step.run()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    else:
        before = resident_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        step.run()
        peak = resident_mib("VmHWM") - before
    return {
        "mib": round(peak, 1),
        "seconds": round(statistics.median(sum(step.run()) for _ in range(options.repeats)), 4),
    }


def in_a_process(form: str, steps: int) -> dict:
    """`point` of the same command line in a new process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--point", form, str(steps)]
    done = subprocess.run(command, env=os.environ | GIVES_BACK, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{form}, T={steps}: {done.stderr.strip().splitlines()[-1]}")
    return {"form": form, "steps": steps, **json.loads(done.stdout.splitlines()[-1])}


def plot(rows: list[dict], title: str, path: Path) -> None:
    """Memory and time over T, a line for each form."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, (key, label) in zip(
        panels, (("mib", "peak of a step, MiB"), ("seconds", "time of a step, s")), strict=True
    ):
        for form in FORMS:
            line = [row for row in rows if row["form"] == form]
            panel.plot([row["steps"] for row in line], [row[key] for row in line], marker="o", label=form)
        panel.set(xlabel="time steps T", ylabel=label, ylim=(0, None), xticks=sorted({row["steps"] for row in rows}))
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory and time of a training step against the time steps T.")
    parser.add_argument("--model", default="meta_spikeformer_15m")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="values of T")
    parser.add_argument("--size", type=int, default=112, help="pixels of the square images")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="also draw them into this picture")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.point:
        form, steps = options.point
        print(json.dumps(point(options, form=form, steps=int(steps))))
        return
    load = os.getloadavg()[0]
    points = [(form, steps) for steps in options.steps for form in FORMS]
    rows = [in_a_process(*each) for each in track(points, "measuring")]
    print(f"{'':24}" + "".join(f"{f'T={steps}':>18}" for steps in options.steps))
    for form in FORMS:
        cells = [f"{row['mib']:.0f} MiB, {row['seconds']:.2f} s" for row in rows if row["form"] == form]
        print(f"{form:24}" + "".join(f"{cell:>18}" for cell in cells))
    where = f"{hardware()}, {os.cpu_count()} cores"
    if options.plot:
        what = f"{options.model}, LIF, batch {options.batch} of {options.size} px, {options.threads} threads"
        plot(rows, what, options.plot)
    if options.json:
        result = {
            "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
            "hardware": where,
            "load_average_before_after": [round(load, 2), round(os.getloadavg()[0], 2)],
            **{name: getattr(options, name) for name in ("model", "device", "threads", "batch", "size", "repeats")},
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("torch", "spikeformers", "spikingjelly")},
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

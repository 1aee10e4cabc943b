"""How long one step of a stream takes: the network and its integer engine, beside a step's share of the whole clip.

Networks of event clips with random weights whose norms have seen clips of random events, batch 1, one thread. Rows are
timed in turn, so that a busy machine slows all alike; medians over the repeats.

    python benchmarks/streaming.py --json benchmarks/results/streaming.json
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import spikeformers as sf
from spikeformers.train.clips import stream
from spikeformers.train.summary import hardware

NETWORKS = {  # name -> pixels a side, steps, overrides of spikformer_dvs_2_256
    "spikformer_dvs_2_256": (128, 16, {}),
    "the network of digits_dvs": (32, 4, {"dim": 64, "depth": 1, "heads": 4, "patch_size": 4}),
}
RATE = 0.05  # events of a pixel and polarity in a frame


def settled(side: int, steps: int, overrides: dict) -> tuple[nn.Module, Tensor]:
    """A network whose norms know such clips, and a clip [T, 1, 2, H, W]."""
    torch.manual_seed(0)
    model = sf.create_model("spikformer_dvs_2_256", steps=steps, **overrides)
    clips = torch.poisson(torch.full((steps, 4, 2, side, side), RATE))
    with torch.no_grad():
        for _ in range(3):
            model(clips)
    return model.eval(), clips[:, :1].contiguous()


def step_times(run: Callable[[], None]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def measured(name: str, *, repeats: int) -> dict:
    """Milliseconds of a step, three ways."""
    model, clip = settled(*NETWORKS[name])
    engine = sf.deploy.integer(model, clip)
    steps = len(clip)
    with torch.no_grad():
        ways = {
            "stream": lambda: list(stream(model, clip)),
            "stream, integer engine": lambda: list(stream(engine, clip)),
            "whole clip": lambda: model(clip),
            "whole clip, integer engine": lambda: engine(clip),
        }
        for run in ways.values():
            run()
        times = {way: [] for way in ways}
        for _ in range(repeats):
            for way, run in ways.items():
                times[way].append(step_times(run) / steps)
    row = {"network": name, "pixels": clip.shape[-1], "steps": steps}
    row |= {f"{way}, ms a step": round(statistics.median(spent), 3) for way, spent in times.items()}
    print(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency of a step of a stream, one thread.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    result = {
        "command": " ".join(["python", "benchmarks/streaming.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "threads": 1,
        "versions": {"python": platform.python_version()} | {each: version(each) for each in ("torch", "spikeformers")},
        "repeats": options.repeats,
        "rows": [measured(name, repeats=options.repeats) for name in NETWORKS],
        "load_average_before_after": [round(before, 2), round(os.getloadavg()[0], 2)],
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

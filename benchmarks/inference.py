"""Inference of one network in every way that users have beside the integer engine: milliseconds, memory, and logits.

The network is a QSD-Transformer T at 224 pixels (or any other, --model), with random weights whose batch norms know
these images, so that neurons fire. Rows hold the same network in eager float32 (ordinary layers with the effective
weights), compiled with frozen weights, under bfloat16 autocast, as it trains (low-bit weights rounded in every call),
in onnxruntime, in OpenVINO, and as the integer engine of `sf.deploy.integer` on both of its backends. Every number of
threads and batch size has a process of its own, in which rows take turns: an untimed call, so that caches hold what
they hold when nothing else runs, then a timed one. Eager rows run in the memory layout that is faster here. Memory is
the peak of a process that only runs one row, above what it held before the model was there, building not counted.
Speed of arithmetic is 2 x multiply-accumulates (MACs, all layers) / time, beside the peak of one large convolution.
Logits are compared with those of the network in float64. One count that rounding flips changes, in a network of random
weights, all that follows, and with it the prediction: the row of eager float32 shows how often rounding alone does so.

    python benchmarks/inference.py --json benchmarks/results/inference.json
    python benchmarks/inference.py --threads 1 --sizes 1 --rows eager integer --override "dims=(32, 64, 128, 160)"
"""

import argparse
import ast
import copy
import ctypes
import gc
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

import spikeformers as sf
from spikeformers.neurons import IELIF, LIF, Neuron
from spikeformers.train.summary import hardware

Run = Callable[[Tensor], Tensor]
CHANNELS_LAST = torch.channels_last
DEFAULTS = {"qsd_transformer_t": {"layer_scale": 1.0}}  # at 1e-6, where training starts, attention does next to nothing
CALIBRATION = 8  # images for batch norms
QKV = re.compile(r"\.[qkv]_conv\.(bn|bn3)$")
FLIPPED = 1e-4  # difference of logits; roundings alone stay below 1e-6
SPARSE = -0.7  # counts by which currents of q, k and v lie lower
BASES = ("eager", "bf16", "openvino", "fake_quant")


class SkippedError(Exception):
    """A row that cannot run here, and why."""


@dataclass(frozen=True)
class Case:
    """What a row is built from: the network as it trains, in eval mode, and images of the size that it will see."""

    model: nn.Module
    images: Tensor
    threads: int
    folder: Path  # of exported files, shared by the processes of one run


def network(name: str, overrides: dict, size: int) -> nn.Module:
    """The network with random weights and batch norms that make its neurons fire as trained ones do, in eval mode.

    Currents vary by about one count, around another value in each channel; q, k and v are sparser (LIF: denser), or
    their products would saturate every neuron of attention (or silence it).
    """
    torch.manual_seed(0)
    model = sf.create_model(name, **(DEFAULTS.get(name, {}) | overrides))
    neurons = [module for module in model.modules() if isinstance(module, Neuron)]
    count = 1 / next((neuron.gain for neuron in neurons if isinstance(neuron, IELIF)), 1.0)  # current of one count
    shift = 1.0 if any(isinstance(neuron, LIF) for neuron in neurons) else SPARSE
    norms = {path: module for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    momentum = {path: norm.momentum for path, norm in norms.items()}
    for path, norm in norms.items():
        norm.momentum = 1.0
        nn.init.constant_(norm.weight, count)
        nn.init.normal_(norm.bias, shift * count if QKV.search(path) else 0.0, count / 2)
    with torch.no_grad():
        model.train()(pictures(CALIBRATION, size, seed=1))
    for path, norm in norms.items():
        norm.momentum = momentum[path]
    return model.eval()


def pictures(count: int, size: int, *, seed: int) -> Tensor:
    """Images [count, 3, size, size] of patches and noise: pure noise looks all the same to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return smooth + 0.3 * torch.randn(count, 3, size, size, generator=generator)


def plain(case: Case) -> nn.Module:
    """Ordinary float layers with the weights that the network multiplies by."""
    return sf.quantize.plain(copy.deepcopy(case.model))


def faster_layout(model: nn.Module, images: Tensor) -> nn.Module:
    """`model`, or it with weights in channels-last order if that runs faster on `images`."""
    layouts = {"contiguous": model, "channels last": copy.deepcopy(model).to(memory_format=CHANNELS_LAST)}
    seconds = {}
    for layout, each in layouts.items():
        each.layout = layout
        each(images)
        seconds[layout] = min(seconds_of(each, images) for _ in range(3))
    return layouts[min(seconds, key=seconds.get)]


def eager(case: Case) -> Run:
    return faster_layout(plain(case), case.images)


def fake_quant(case: Case) -> Run:
    return faster_layout(case.model, case.images)


def bf16(case: Case) -> Run:
    model = plain(case)

    class Autocast(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(images).float()

    return faster_layout(Autocast(model), case.images)


def compiled(case: Case) -> Run:
    torch._inductor.config.freezing = True
    run = torch.compile(faster_layout(plain(case), case.images))
    run(case.images)
    return run


def onnx_file(case: Case) -> Path:
    """The float network as ONNX with the shape of the images, exported once a run."""
    path = case.folder / f"float_{len(case.images)}.onnx"
    if not path.exists():
        program = torch.onnx.export(plain(case), (case.images,), dynamo=True, verbose=False)
        program.save(path)
    return path


def onnxruntime(case: Case) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    session = ort.InferenceSession(onnx_file(case), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def openvino(case: Case, *, precision: str = "f32") -> Run:
    import openvino as ov

    core = ov.Core()
    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    network = core.compile_model(core.read_model(onnx_file(case)), "CPU", settings)
    request = network.create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.numpy()])[0].copy())

    return run


def openvino_bf16(case: Case) -> Run:
    return openvino(case, precision="bf16")


def integer(case: Case, *, backend: str = "torch") -> Run:
    return sf.deploy.integer(case.model, case.images, backend=backend)


def integer_openvino(case: Case) -> Run:
    return integer(case, backend="openvino")


ROWS: dict[str, tuple[str, Callable[[Case], Run]]] = {
    "eager": ("eager float32", eager),
    "compiled": ("torch.compile, frozen", compiled),
    "bf16": ("bfloat16 autocast", bf16),
    "fake_quant": ("low-bit training model", fake_quant),
    "onnxruntime": ("onnxruntime float32", onnxruntime),
    "openvino": ("OpenVINO float32", openvino),
    "openvino_bf16": ("OpenVINO bfloat16", openvino_bf16),
    "integer": ("integer engine, torch", integer),
    "integer_openvino": ("integer engine, OpenVINO", integer_openvino),
}


def built(row: str, case: Case) -> Run:
    """The row, ready to run. Raises SkippedError if a package or a part of this project is missing."""
    try:
        return ROWS[row][1](case)
    except ImportError as error:
        raise SkippedError(f"not installed: {error}") from error


def seconds_of(run: Run, images: Tensor) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start


def timed(runs: dict[str, Run], images: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each row, in turns; every second turn goes backwards."""
    times: dict[str, list[float]] = {row: [] for row in runs}
    for repeat in range(repeats):
        for row in list(runs) if repeat % 2 == 0 else reversed(runs):
            runs[row](images)
            times[row].append(1e3 * seconds_of(runs[row], images))
    return times


def against_float64(runs: dict[str, Run], case: Case, images: Tensor) -> dict[str, dict]:
    """Of each row: how far the logits of images are from those of the network in float64.

    median_error, largest_error: over images, of the largest difference of a logit. flipped: images where that exceeds
    FLIPPED, so that counts differ and not roundings alone. different: images with another prediction.
    """
    batches = images.split(len(case.images))
    exact = plain(case).double()
    wanted = torch.cat([exact(batch.double()) for batch in batches])
    found = {}
    for row, run in runs.items():
        logits = torch.cat([run(batch).double() for batch in batches])
        errors = (logits - wanted).abs().amax(1)
        found[row] = {
            "median_error": float(errors.median()),
            "largest_error": float(errors.max()),
            "flipped": int((errors > FLIPPED).sum()),
            "different": int((logits.argmax(1) != wanted.argmax(1)).sum()),
        }
    return found


def peaks(channels: int = 512, pixels: int = 28) -> dict[str, float]:
    """GOPS of one large 3x3 convolution in 8 bits (uint8 x int8, oneDNN), float32 and bfloat16."""
    work = 2 * (3 * channels) ** 2 * pixels**2
    counts = torch.randint(0, 5, (1, channels, pixels, pixels), dtype=torch.uint8).to(memory_format=CHANNELS_LAST)
    weight = torch.randint(-127, 128, (channels, channels, 3, 3), dtype=torch.int8)
    scale, bias = torch.full((channels,), 1e-3), torch.zeros(channels)
    moves = ([1, 1], [1, 1], [1, 1], 1)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *moves, counts.shape)
    zero = torch.zeros(1, dtype=torch.int32)

    def int8(x: Tensor) -> Tensor:
        end = (1.0, 0, torch.uint8, "hardtanh", [0, 4], None)
        return torch.ops.onednn.qconv2d_pointwise(x, 1.0, 0, packed, scale, zero, bias, *moves, *end)

    conv = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=CHANNELS_LAST)
    half = copy.deepcopy(conv).bfloat16()
    kinds = {"int8": (int8, counts), "float32": (conv, counts.float()), "bfloat16": (half, counts.bfloat16())}
    found = {}
    for kind, (run, x) in kinds.items():
        run(x)
        found[kind] = round(work / min(seconds_of(run, x) for _ in range(5)) / 1e9, 1)
    return found


def loaded(job: dict) -> Case:
    """What a process works on: the network of the run and images of its own batch size."""
    torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    model = sf.from_pretrained(folder / "model").eval()
    return Case(model, pictures(job["batch"], job["size"], seed=2), job["threads"], folder)


@torch.no_grad()
def time_rows(job: dict) -> dict:
    """Times and errors of all rows for one number of threads and one batch size."""
    case, runs, skipped = loaded(job), {}, {}
    for row in job["rows"]:
        say(f"  building {ROWS[row][0]}")
        try:
            runs[row] = built(row, case)
        except SkippedError as reason:
            skipped[row] = str(reason)
            say(f"  skipped {ROWS[row][0]}: {reason}")
    count = max(1, job["checked"] // job["batch"]) * job["batch"]
    say(f"  comparing logits of {count} images")
    errors = against_float64(runs, case, pictures(count, job["size"], seed=3))
    say(f"  timing {len(runs)} rows, {job['repeats']} turns")
    times = timed(runs, case.images, job["repeats"])
    rows = {
        row: {"ms": times[row], **errors[row], "compared": count, "layout": getattr(run, "layout", None)}
        for row, run in runs.items()
    }
    return {"rows": rows, "skipped": skipped, "peak_gops": peaks()}


@torch.no_grad()
def remember(job: dict) -> dict:
    """Peak memory of one row while it runs, MiB above this process without a network; None where it cannot run."""
    gc.collect()
    before = resident("VmRSS")
    try:
        case = loaded(job)
        run, images = built(job["row"], case), case.images
    except SkippedError:
        return {"peak_mib": None}
    del case
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what building freed would count as held
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(2):
        run(images)
    return {"peak_mib": round(resident("VmHWM") - before, 1)}


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


WORK = {"time": time_rows, "memory": remember}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def apart(job: dict) -> dict:
    """The result of `job` in a process of its own, on its number of threads."""
    result = Path(job["folder"]) / "result.json"
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--worker", json.dumps(job | {"result": str(result)})]
    subprocess.run(command, env=os.environ | threads, check=True)
    return json.loads(result.read_text())


def table(found: dict, memory: dict[str, float | None], macs: float) -> list[dict]:
    """Rows of one number of threads and batch size: medians, and how many times faster than the rows in BASES.

    faster_than: time of that row / time of this one in the same turn, median over turns; above 1 is faster.
    """
    rows, batch = [], found["batch"]
    for row, one in found["rows"].items():
        faster = {
            base: round(statistics.median(a / b for a, b in zip(found["rows"][base]["ms"], one["ms"], strict=True)), 3)
            for base in BASES
            if base in found["rows"]
        }
        median = statistics.median(one["ms"])
        rows.append(
            {
                "row": row,
                "threads": found["threads"],
                "batch": batch,
                "size": found["size"],
                "ms": round(median, 2),
                "faster_than": faster,
                "gops": round(2 * macs * batch / median / 1e6, 1),
                "peak_mib": memory.get(row),
                **{name: value for name, value in one.items() if name != "ms"},
                "all_ms": [round(each, 2) for each in one["ms"]],
            }
        )
    return rows


def show(rows: list[dict], peak: dict[str, float]) -> None:
    """Print the rows of one process."""
    first = rows[0]
    print(f"\n{first['threads']} threads, batch {first['batch']} of {first['size']} px; times faster than, median:")
    bases = "".join(f"{base:>11}" for base in BASES)
    print(f"{'':26}{'ms':>9}{bases}{'GOPS':>8}{'peak MiB':>10}  logit error: median, largest; flipped, other class")
    for row in rows:
        ratios = "".join(f"{row['faster_than'].get(base, float('nan')):>11.2f}" for base in BASES)
        memory = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        errors = f"{row['median_error']:.1e} {row['largest_error']:.1e}"
        print(
            f"{ROWS[row['row']][0]:26}{row['ms']:>9.1f}{ratios}{row['gops']:>8.0f}"
            f"{memory:>10}  {errors}; {row['flipped']}, {row['different']} of {row['compared']}"
        )
    print("peak of one 3x3 convolution, GOPS: " + ", ".join(f"{kind} {value:.0f}" for kind, value in peak.items()))


def macs_of(model: nn.Module, size: int) -> dict[str, float]:
    """Multiply-accumulates of one image over all steps, and those of layers and products that read spikes."""
    measured = sf.energy.trace(model, pictures(1, size, seed=2))
    parts = [part for operation in measured.operations for part in operation.parts or (operation,)]
    fed = sum(part.macs for part in parts if part.rates is not None)
    return {"all": sum(part.macs for part in parts) * measured.steps, "spike_fed": fed * measured.steps}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "spikeformers", "onnx", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def override(text: str) -> tuple[str, object]:
    """name=value; a value that is no Python literal is text."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qsd_transformer_t")
    parser.add_argument("--override", nargs="+", type=override, default=[], metavar="NAME=VALUE", help="of the model")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224], help="pixels of the square images")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each row at batch 1")
    parser.add_argument("--checked", type=int, default=16, help="images whose logits are compared")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def measured(options: argparse.Namespace, size: int) -> list[dict]:
    """Everything about one size of images: a dict for each number of threads and batch size, printed as they come."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        model = network(options.model, dict(options.override), size)
        model.save_pretrained(Path(folder) / "model")
        macs = macs_of(model, size)
        del model
        say(
            f"{options.model} at {size} px: {macs['all'] / 1e9:.3f} G MACs, {macs['spike_fed'] / 1e9:.3f} fed by spikes"
        )
        for batch in options.batches:
            memory: dict[str, float | None] = {}
            for threads in options.threads:
                job = {"threads": threads, "batch": batch, "size": size, "folder": folder}
                say(f"{threads} threads, batch {batch}")
                repeats = max(3, options.repeats // batch) | 1
                work = {"what": "time", "rows": options.rows, "repeats": repeats, "checked": options.checked}
                load = os.getloadavg()[0]
                found = apart(job | work) | job
                if not memory:
                    for row in found["rows"]:
                        say(f"  memory of {ROWS[row][0]}")
                        memory[row] = apart(job | {"what": "memory", "row": row})["peak_mib"]
                rows = table(found, memory, macs["all"])
                show(rows, found["peak_gops"])
                loads = [round(load, 2), round(os.getloadavg()[0], 2)]
                shared = {"macs": macs, "peak_gops": found["peak_gops"], "skipped": found["skipped"]}
                results.append({"rows": rows, **shared, "load_average_before_after": loads})
    return results


def main() -> None:
    options = arguments()
    if options.worker:
        job = json.loads(options.worker)
        Path(job["result"]).write_text(json.dumps(WORK[job["what"]](job)))
        return
    print(f"{hardware()}; {', '.join(f'{name} {number}' for name, number in versions().items())}")
    cases = [case for size in options.sizes for case in measured(options, size)]
    if options.json:
        result = {
            "command": shlex.join(["python", "benchmarks/inference.py", *sys.argv[1:]]),
            "hardware": hardware(),
            "cores": os.cpu_count(),
            "versions": versions(),
            "model": options.model,
            "overrides": DEFAULTS.get(options.model, {}) | dict(options.override),
            "columns": table.__doc__,
            "memory": remember.__doc__,
            "cases": cases,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()

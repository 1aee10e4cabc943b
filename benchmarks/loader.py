"""Images a second that the loader decodes and augments, for pictures of CIFAR's size and at 224 pixels.

In this process (workers 0) augmentations are added one after the other, which tells what each costs; then everything
is on, with worker processes, and with pictures streamed from the files instead of held in memory. Real pictures where
`$SPIKEFORMERS_DATA` has `cifar10` and `imagenet1k_sample`, else JPEGs of 500 x 375 and PNGs drawn at random. Medians
over the repeats, after one that is not counted.

    python benchmarks/loader.py --json benchmarks/results/loader.json
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader

from spikeformers.data import Augment, ImageData, load_split, sources
from spikeformers.data.sampler import ResumableSampler
from spikeformers.train.summary import hardware

POLICY = "rand-m9-mstd0.5-inc1"
SETS = {  # name: folder of $SPIKEFORMERS_DATA, side, size and format if drawn, augmentations added one after the other
    "cifar": ("cifar10", 32, (32, 32), "PNG", {"crop and flip": {"crop_padding": 4, "flip": 0.5}}),
    "224": (
        "imagenet1k_sample",
        224,
        (500, 375),
        "JPEG",
        {"resized crop and flip": {"resized_crop": 0.08, "flip": 0.5}},
    ),
}
COMMON = {"RandAugment": {"policy": POLICY}, "erasing": {"erase": 0.25}}


def drawn(folder: Path, *, size: tuple[int, int], kind: str, count: int) -> None:
    """A training file of smooth random pictures, which pack about as well as photographs."""
    random, pictures = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(256, size=(size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": pictures, "label": [0] * count}), folder / "train.parquet", row_group_size=100)


def images_per_second(spec: ImageData, *, workers: int, batch_size: int, repeats: int) -> float:
    split = load_split(spec, "train")
    sampler = ResumableSampler(len(split), batch_size=batch_size, shuffled=split.shuffled)
    loader = DataLoader(
        split, batch_size=batch_size, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )
    found = []
    for epoch in range(repeats + 1):
        sampler.set_position(epoch)
        began, count = time.perf_counter(), 0
        for images, _ in loader:
            count += len(images)
        found.append(count / (time.perf_counter() - began))
    return statistics.median(found[1:])


def row_of(name: str, what: str, rate: float, *, workers: int) -> dict:
    """Printed as it comes."""
    row = {"pictures": name, "what": what, "workers": workers, "images_per_s": round(rate, 1)}
    row["ms_per_image"] = round(1e3 / rate, 3)
    print(f"{name:8}{what:45}{workers:>3} workers{rate:>10.0f} images/s{row['ms_per_image']:>9.3f} ms", flush=True)
    return row


def rows_of(name: str, options: argparse.Namespace, root: Path) -> list[dict]:
    _, side, *_, added = SETS[name]
    base = {"source": "parquet", "root": str(root), "size": side, "train_limit": options.images}
    rate = {"batch_size": options.batch_size, "repeats": options.repeats}
    rows, augment, label = [], {}, "none"
    for what, settings in ({"none": {}} | added | COMMON).items():
        augment |= settings
        label = what if what == "none" else f"+ {what}"
        spec = ImageData(**base, augment=Augment(**augment))
        rows.append(row_of(name, label, images_per_second(spec, workers=0, **rate), workers=0))
    for workers in options.workers:
        rows.append(row_of(name, "all", images_per_second(spec, workers=workers, **rate), workers=workers))
    with patch.object(sources, "ENCODED_LIMIT", 0), patch("spikeformers.data.images.MEMORY_LIMIT", 0):
        rows.append(row_of(name, "all, streamed", images_per_second(spec, workers=0, **rate), workers=0))
    return rows


def measured(options: argparse.Namespace) -> list[dict]:
    rows = []
    for name, (known, _, size, kind, _) in SETS.items():
        real = Path(options.data) / known if options.data else None
        with tempfile.TemporaryDirectory() as made:
            if real is None or not real.is_dir():
                drawn(Path(made), size=size, kind=kind, count=options.images)
                real = None
            found = rows_of(name, options, real or Path(made))
        rows += [row | {"files": known if real else "drawn"} for row in found]
    return rows


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Images a second that the loader decodes and augments.")
    parser.add_argument("--images", type=int, default=512, help="of each set, in an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="epochs")
    parser.add_argument("--data", default=os.environ.get("SPIKEFORMERS_DATA", ""), help="where real pictures lie")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    result = {
        "command": " ".join(["python", "benchmarks/loader.py", *sys.argv[1:]]),
        "hardware": f"{hardware()}, {os.cpu_count()} cores",
        "versions": {
            name: version(name) for name in ("torch", "torchvision", "timm", "pillow", "pyarrow", "spikeformers")
        },
        "images": options.images,
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "rows": measured(options),
        "load_average_before_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()

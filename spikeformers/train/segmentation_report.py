"""What the report page of a segmentation shows besides what all runs have: its tiles, classes and pictures."""

import numpy as np

from spikeformers.train.results import pixels_agreeing, short
from spikeformers.train.segmentation_pictures import QUERIES, SAMPLES, SAMPLING

CLASS_HEADING = "IoU of each class"
PER_CLASS = "per_class_iou"  # of a summary
MASK_NEURON = "mask_spikes.neuron"  # of Spike2Former: the last one, whose spikes meet the pixels
CAPTIONS = {
    SAMPLES: "Test pictures, their labels, and the classes that the network gives to their pixels.",
    QUERIES: "Mean mask of each query over test pictures, each from dark (its lowest value) to bright (its highest).",
    SAMPLING: "Where the last deformable attention samples (yellow) for the middle pixel (red), in all its groups.",
}


def tiles(summary: dict) -> list[tuple[str, str, str]]:
    """Rows of the tiles at the top: label, value and a small line below each."""
    mj, ann, found = summary["energy_mj"], summary["ann_energy_mj"], summary["integer_agreement"]
    ratio = f": {ann / mj:.1f}x" if mj else ""  # a network that never fires may cost nothing
    known = [iou for iou in summary["per_class_iou"].values() if iou is not None]
    rows = [
        ("mIoU", f"{100 * summary['miou']:.2f} %", f"last epoch; best {100 * summary['best_miou']:.2f} %"),
        ("Classes", f"{len(known)} of {len(summary['classes'])}", "occur in test labels or predictions"),
        (
            "Pixel accuracy",
            f"{100 * summary['pixel_accuracy']:.2f} %",
            f"mean of classes {100 * summary['mean_accuracy']:.2f} %",
        ),
        ("Firing rate", f"{100 * summary['firing_rate']:.1f} %", "of the largest count, mean of neurons"),
        ("Energy per image", f"{short(mj)} mJ", f"{short(ann)} mJ as an ANN{ratio}"),
        ("Parameters", short(summary["parameters"]), f"{short(summary['size_mb'])} MB on disk"),
    ]
    if mask := [rate for name, rate in summary["layers"].items() if name.endswith(MASK_NEURON)]:
        rows.append(("Firing of masks", f"{100 * mask[0]:.1f} %", "of the last neuron, on the mask embedding"))
    if found is not None:
        rows.append(("Integer engine", f"{100 * found['same'] / found['total']:.2f} %", "of pixels get the same class"))
    return rows


def engine_note(summary: dict) -> str:
    """A sentence about the integer engine."""
    return pixels_agreeing(summary["integer_agreement"], refused=summary["integer_refused"])


def in_percent(summary: dict) -> dict:
    """A summary whose confusion is whole per cents of the pixels of each true class, which fit into a table."""
    counts = np.asarray(summary["confusion"], dtype=np.float64)
    shares = np.rint(100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)).astype(int)
    return summary | {"confusion": shares.tolist()}

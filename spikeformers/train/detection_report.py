"""What the report page of a detection shows besides what all runs have: its tiles, classes, curves and pictures."""

import numpy as np

from spikeformers.heads.detections import CERTAIN
from spikeformers.train.detection_pictures import SAMPLES
from spikeformers.train.results import detections_agreeing, short

CLASS_HEADING = "AP50 of each class"
PER_CLASS = "per_class_ap50"  # of a summary
LINES = 3  # of a chart
CAPTIONS = {
    SAMPLES: "Test pictures in pairs: the boxes that annotations say, and what the network finds with a score of "
    f"{CERTAIN} or more.",
}


def tiles(summary: dict) -> list[tuple[str, str, str]]:
    """Rows of the tiles at the top: label, value and a small line below each."""
    mj, ann = summary["energy_mj"], summary["ann_energy_mj"]
    ratio = f": {ann / mj:.1f}x" if mj else ""  # a network that never fires may cost nothing
    areas = ", ".join(f"{name} {100 * ap:.1f}" for name, ap in summary["by_area"].items() if ap is not None)
    rows = [
        ("mAP", f"{100 * summary['map']:.2f} %", f"last epoch; best {100 * summary['best_map']:.2f} %"),
        ("AP50", f"{100 * summary['ap50']:.2f} %", f"the best fixed boxes {100 * summary['floor_ap50']:.2f} %"),
        ("AP75", f"{100 * summary['ap75']:.2f} %", f"mAP by area: {areas}"),
        ("Firing rate", f"{100 * summary['firing_rate']:.1f} %", "of the largest count, mean of neurons"),
        ("Energy per image", f"{short(mj)} mJ", f"{short(ann)} mJ as an ANN{ratio}"),
        ("Parameters", short(summary["parameters"]), f"{short(summary['size_mb'])} MB on disk"),
    ]
    if summary["mask_map"] is not None:
        note = f"AP50 {100 * summary['mask_ap50']:.2f} %"
        rows.insert(3, ("mAP of masks", f"{100 * summary['mask_map']:.2f} %", note))
    return rows


def precisions(summary: dict) -> dict[str, list[tuple[float, float]]]:
    """Points (recall, precision) in percent, at most three lines: of each class, or their mean, the best and the worst.

    Classes that the test split does not hold are left out.
    """
    known = {name: ap for name, ap in summary["per_class_ap50"].items() if ap is not None}
    curves = {name: np.asarray(summary["curves"][name]) for name in sorted(known, key=lambda name: -known[name])}
    if len(curves) > LINES:
        names = list(curves)
        mean = np.mean(list(curves.values()), axis=0)
        curves = {f"mean of {len(names)} classes": mean} | {name: curves[name] for name in (names[0], names[-1])}
    return {name: list(enumerate((100 * curve).tolist())) for name, curve in curves.items()}


def engine_note(summary: dict) -> str:
    """A sentence about the integer engine."""
    return detections_agreeing(summary["integer_agreement"], refused=summary["integer_refused"])

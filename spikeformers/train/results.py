"""Results as people read them: numbers with units, and rows that are a table on a terminal and plain text elsewhere."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # it brings torch and accelerate, which a list of models does not need
    from spikeformers.train.summary import (
        AnySummary,
        DetectionSummary,
        FinishedTask,
        PretrainSummary,
        SegmentationSummary,
        Summary,
    )

NAMED = 5  # test images named one by one on a line
EXTREMES = 3  # best classes, and worst ones


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes} min {seconds % 60:02d} s" if hours == 0 else f"{hours} h {minutes % 60:02d} min"


def short(value: float) -> str:
    """Three significant digits: 4.1e-6, 0.000412, 3.14, 1,280, 4.12 M."""
    if not math.isfinite(value):
        return str(value)
    for limit, letter in ((1e9, " G"), (1e6, " M")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-")
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"


def print_results(summary: "AnySummary", report: Path) -> None:
    """What a run achieved."""
    from spikeformers.train.summary import DetectionSummary, PretrainSummary, SegmentationSummary, Summary

    rows_of = {
        Summary: training_rows,
        PretrainSummary: pretraining_rows,
        SegmentationSummary: segmentation_rows,
        DetectionSummary: detection_rows,
    }
    rows = rows_of[type(summary)](summary)
    print_facts(f"{summary.recipe['name']}: {summary.model}", [*rows, ("Report", str(report))])


def pretraining_rows(summary: "PretrainSummary") -> list[tuple[str, str]]:
    """Lines about a pre-training."""
    return [
        ("Loss of hidden patches", f"{summary.loss:.4f} at the last epoch (best {summary.best_loss:.4f})"),
        ("Visible patches", f"{summary.visible} of {summary.patches}"),
        ("Firing rate", f"{100 * summary.firing_rate:.2f} %"),
        ("Parameters", f"{summary.parameters:,}, and {summary.decoder_parameters:,} of the decoder, which is dropped"),
        ("Time", f"{duration(summary.seconds)} for {summary.epochs} epoch{'s' * (summary.epochs != 1)}"),
    ]


def training_rows(summary: "Summary") -> list[tuple[str, str]]:
    """Lines about a trained classifier."""
    return [
        (
            "Test accuracy",
            f"{100 * summary.accuracy:.2f} % at the last epoch (best {100 * summary.best_accuracy:.2f} %)",
        ),
        *cost_rows(summary),
        *low_bit_rows(summary),
        ("Integer engine", agreement(summary.integer_agreement)),
        ("Time", f"{duration(summary.seconds)} for {summary.epochs} epoch{'s' * (summary.epochs != 1)}"),
    ]


def segmentation_rows(summary: "SegmentationSummary") -> list[tuple[str, str]]:
    """Lines about a trained segmenter."""
    return [
        ("mIoU", f"{100 * summary.miou:.2f} % at the last epoch (best {100 * summary.best_miou:.2f} %)"),
        *accuracy_rows(summary),
        *cost_rows(summary),
        *low_bit_rows(summary),
        ("Integer engine", pixels_agreeing(summary.integer_agreement, refused=summary.integer_refused)),
        ("Time", f"{duration(summary.seconds)} for {summary.epochs} epoch{'s' * (summary.epochs != 1)}"),
    ]


def accuracy_rows(found: "SegmentationSummary") -> list[tuple[str, str]]:
    """Pixels right, and the classes that are found best and worst."""
    accuracy = f"{100 * found.pixel_accuracy:.2f} %, mean of classes {100 * found.mean_accuracy:.2f} %"
    rows = [("Pixel accuracy", accuracy)]
    known = sorted((iou, name) for name, iou in found.per_class_iou.items() if iou is not None)
    return [*rows, *extremes(known, "IoU")]


def _named(ious: Sequence[tuple[float, str]]) -> str:
    return ", ".join(f"{name} {100 * iou:.1f} %" for iou, name in ious)


def detection_rows(summary: "DetectionSummary") -> list[tuple[str, str]]:
    """Lines about a trained detector."""
    rows = [
        ("mAP", f"{100 * summary.map:.2f} % at the last epoch (best {100 * summary.best_map:.2f} %)"),
        ("AP50, AP75", f"{100 * summary.ap50:.2f} %, {100 * summary.ap75:.2f} % of {summary.images:,} images"),
        ("Best fixed boxes", f"AP50 {100 * summary.floor_ap50:.2f} %: the same in every image, whatever it shows"),
    ]
    if summary.mask_map is not None:
        rows.append(("Masks", f"mAP {100 * summary.mask_map:.2f} %, AP50 {100 * summary.mask_ap50:.2f} %"))
    known = sorted((ap, name) for name, ap in summary.per_class_ap50.items() if ap is not None)
    return [
        *rows,
        *extremes(known, "AP50"),
        *cost_rows(summary),
        *low_bit_rows(summary),
        ("Integer engine", detections_agreeing(summary.integer_agreement, refused=summary.integer_refused)),
        ("Time", f"{duration(summary.seconds)} for {summary.epochs} epoch{'s' * (summary.epochs != 1)}"),
    ]


def extremes(known: Sequence[tuple[float, str]], metric: str) -> list[tuple[str, str]]:
    """The best and the worst classes, given in ascending order; all of them if they are few."""
    if len(known) <= 2 * EXTREMES:
        return [(f"{metric} by class", _named(known[::-1]))]
    return [(f"Best {metric}", _named(known[: -EXTREMES - 1 : -1])), (f"Worst {metric}", _named(known[:EXTREMES]))]


def cost_rows(summary: "FinishedTask") -> list[tuple[str, str]]:
    """Spikes, energy and size of a trained network."""
    ann = f"{short(summary.ann_energy_mj)} mJ"
    if summary.energy_mj:
        ann += f", {summary.ann_energy_mj / summary.energy_mj:.2f} times as much"
    return [
        ("Firing rate", f"{100 * summary.firing_rate:.2f} %"),
        ("Spikes per image", short(summary.spikes_per_image)),
        ("Energy per image", f"{short(summary.energy_mj)} mJ (convention {summary.energy_convention})"),
        ("The same as an ANN", ann),
        ("Parameters", f"{summary.parameters:,} ({short(summary.size_mb)} MB)"),
    ]


def low_bit_rows(summary: "FinishedTask") -> list[tuple[str, str]]:
    """Sizes of low-bit weights, and what a teacher of q, k and v reached and cost."""
    rows = []
    if found := summary.quantized:
        packed, fp32 = short(found["packed_mb"]), short(found["fp32_mb"])
        rows.append(("Low-bit weights", f"{packed} MB packed, scales and biases included ({fp32} MB as 32-bit floats)"))
    if found := getattr(summary, "distillation", None):  # of classifiers only
        slower, larger = (found[a] / found[b] for a, b in (("seconds", "seconds_plain"), ("kept_mb", "kept_plain_mb")))
        rows.append(("Teacher", f"{100 * found['teacher_accuracy']:.2f} % test accuracy"))
        rows.append(("Distillation", f"a step takes {slower:.2f} times as long and {larger:.2f} times the memory"))
    return rows


def agreement(found: dict | None) -> str:
    """How many test predictions the integer engine shares, what it reaches, and which it does not share."""
    if found is None:
        return "none: this network has no spiking neuron"
    if found["same"] == found["total"]:
        return f"same prediction for all {found['total']:,} test images"
    which, more = found["different"][:NAMED], len(found["different"]) - NAMED
    named = ", ".join(map(str, which)) + (f" and {more} more (see the report)" if more > 0 else "")
    return f"same prediction for {found['same']:,} of {found['total']:,} test images, not for {named}; {reached(found)}"


def pixels_agreeing(found: dict | None, *, refused: str) -> str:
    """In how many pixels the integer engine gives the same class, or why it does not run."""
    if found is None:
        return f"none: {refused}"
    share = "all" if found["same"] == found["total"] else f"{100 * found['same'] / found['total']:.2f} % of"
    return f"same class for {share} {found['total']:,} pixels of {found['images']} test images"


def detections_agreeing(found: dict | None, *, refused: str) -> str:
    """How many detections the integer engine shares, or why it does not run."""
    if found is None:
        return f"none: {refused}"
    if not found["total"]:
        return f"nothing certain enough to compare in {found['images']} test images"
    share = "all" if found["same"] == found["total"] else f"{100 * found['same'] / found['total']:.2f} % of"
    return f"same box and class for {share} {found['total']:,} detections in {found['images']} test images"


def reached(found: dict) -> str:
    """The accuracy of the integer engine beside that of the network, over the images that were compared."""
    return f"its accuracy is {100 * found['accuracy']:.2f} %, the network's {100 * found['float_accuracy']:.2f} %"


def print_spread(seeds: Sequence[int], results: "Sequence[FinishedTask]") -> None:
    """Mean and standard deviation (of a sample: n - 1) over the seeds."""
    from spikeformers.train.summary import spread

    rows = []
    for name, label, factor, unit in (
        (results[0].METRIC, results[0].LABEL, 100, "%"),
        ("firing_rate", "Firing rate", 100, "%"),
        ("energy_mj", "Energy per image", 1, "mJ"),
    ):
        mean, sd = spread([factor * getattr(result, name) for result in results])
        rows.append((label, f"{mean:.4g} ± {sd:.2g} {unit}"))
    print_facts(f"mean ± sd of seeds {', '.join(map(str, seeds))}", rows)


def print_facts(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Label and value lines: a table on a terminal, aligned plain text elsewhere."""
    console = Console()
    if console.is_terminal:
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        for label, value in rows:
            table.add_row(Text(label, style="cyan"), Text(value, overflow="fold"))
        console.print(table)
        return
    width = max(len(label) for label, _ in rows)
    print(title)
    for label, value in rows:
        print(f"  {label:<{width}}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Columns under a header: a table on a terminal, aligned plain text elsewhere; `right` columns hold numbers."""
    console = Console()
    if console.is_terminal:
        table = Table()
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index in right else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())

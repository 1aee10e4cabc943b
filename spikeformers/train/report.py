"""The run report: one HTML page that needs nothing but itself, written from the files of a run folder.

Reads `recipe.json`, `log.jsonl` and, once the run has ended, `summary.json`; a run that is still going (or was stopped)
gets a page with the curves so far. Style and pictures are inside the page and a content policy in it forbids every
request, so it can be mailed, archived and opened without a network. Python computes, `report.html.j2` draws.
"""

import base64
import io
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import jinja2
import numpy as np
from PIL import Image

from spikeformers.data.augment import to_pil
from spikeformers.data.splits import load_split
from spikeformers.train import detection_report, segmentation_report
from spikeformers.train.checkpoint import read_json
from spikeformers.train.logs import read_log
from spikeformers.train.pretraining import PICTURES
from spikeformers.train.recipe import from_json
from spikeformers.train.results import duration, reached, short
from spikeformers.train.summary import detects, pretrains, segments

CHART_WIDTH, CHART_HEIGHT = 440, 250  # units of the drawing, about the pixels of a phone, so that text stays readable
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 46, 12, 12, 32
PALETTE = ("var(--spike)", "var(--second)", "var(--other)")  # colours of the page, so that they follow light and dark
NUMBERED_CLASSES = 20  # a larger confusion matrix is drawn as a picture without numbers
LARGEST_SAMPLE = 112  # pixels a side
SAMPLES = 12  # right ones and, again, at most so many wrong ones


def write_report(run: Path) -> Path:
    """Write `run/report.html` and return its path.

    Raises ValueError if `run` holds no run (no `recipe.json`) or one of its files is not readable as JSON.
    """
    run = Path(run)
    recipe = read_json(run / "recipe.json")
    summary = read_json(run / "summary.json") if (run / "summary.json").is_file() else None
    epochs, steps = (read_log(run, kind) if (run / "log.jsonl").is_file() else [] for kind in ("epoch", "step"))
    pictures, picture_note = sample_pictures(recipe, summary)
    dense = dense_page(recipe)
    agreement = None if dense else (summary or {}).get("integer_agreement")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = pages.get_template("report.html.j2").render(
        title=recipe.get("name", run.name),
        folder=run.name,
        finished=summary is not None,
        progress=progress_line(recipe, epochs, summary),
        tiles=headline(summary) if summary else [],
        curves=curves(epochs, steps) + step_curves(summary),
        palette=PALETTE,
        confusion=confusion_table(segmentation_report.in_percent(summary) if summary and segments(recipe) else summary),
        pictures=pictures,
        picture_note=picture_note,
        layers=layer_bars(summary),
        stages=stage_bars(summary),
        convention=(summary or {}).get("energy_convention", ""),
        agreement=agreement,
        reached=reached(agreement) if agreement else "",
        segments=segments(recipe),
        precision=precision_chart(summary) if summary and detects(recipe) else None,
        classes=class_bars(summary, dense.PER_CLASS) if dense and summary else [],
        class_heading=dense.CLASS_HEADING if dense else "",
        drawn=drawn_pictures(run, dense.CAPTIONS) if dense else [],
        engine_note=dense.engine_note(summary) if dense and summary else "",
        reconstructions=reconstructions(run),
        normalised=recipe.get("pretrain", {}).get("normalise_target", False),
        recipe=sorted_recipe(recipe),
        facts=facts(summary),
    )
    target, partial = run / "report.html", run / ".report.html.tmp"
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def progress_line(recipe: dict, epochs: Sequence[dict], summary: dict | None) -> str:
    """One sentence under the title: what was trained, or how far the run has come."""
    if summary:
        took = duration(summary.get("seconds", 0))
        return f"{summary.get('model', '')}, {summary.get('epochs', len(epochs))} epochs in {took}"
    planned = recipe.get("epochs")
    of = f" of {planned}" if planned else ""
    return f"This run is not finished: {len(epochs)}{of} epochs so far. Results appear here when it ends."


def dense_page(recipe: dict) -> ModuleType | None:
    """What knows the pages of a dense task; None for others."""
    if segments(recipe):
        return segmentation_report
    return detection_report if detects(recipe) else None


def class_bars(summary: dict, values: str) -> list[dict]:
    """The field `values` of every class with its colour, best first; classes that the test split lacks are left out."""
    known = {name: value for name, value in summary[values].items() if value is not None}
    colours = {name: f"rgb{tuple(rgb)}" for name, rgb in zip(summary["classes"], summary["colours"], strict=True)}
    return [
        {"name": name, "width": round(100 * value, 2), "text": f"{100 * value:.1f} %", "colour": colours[name]}
        for name, value in sorted(known.items(), key=lambda each: -each[1])
    ]


def drawn_pictures(run: Path, captions: dict[str, str]) -> list[tuple[str, str]]:
    """The pictures that a run left, as data addresses, with what to say about each."""
    files = [(run / name, caption) for name, caption in captions.items() if (run / name).is_file()]
    return [(as_png(Image.open(path)), caption) for path, caption in files]


def headline(summary: dict) -> list[dict]:
    """The tiles at the top: label, value and a small line below each."""
    if dense := dense_page(summary["recipe"]):
        rows = dense.tiles(summary)
    else:
        rows = pretraining_tiles(summary) if pretrains(summary["recipe"]) else training_tiles(summary)
    return [{"label": label, "value": value, "note": note} for label, value, note in rows]


def pretraining_tiles(summary: dict) -> list[tuple[str, str, str]]:
    """Rows of the tiles of a masked pre-training."""
    return [
        ("Loss of hidden patches", f"{summary['loss']:.4f}", f"last epoch; best {summary['best_loss']:.4f}"),
        ("Visible patches", f"{summary['visible']} of {summary['patches']}", "of each image, drawn anew each time"),
        ("Firing rate", f"{100 * summary['firing_rate']:.1f} %", "of the largest count, on whole images"),
        ("Parameters", short(summary["parameters"]), f"and {short(summary['decoder_parameters'])} of the decoder"),
    ]


def training_tiles(summary: dict) -> list[tuple[str, str, str]]:
    """Rows of the tiles of a classifier."""
    mj, ann, found = summary["energy_mj"], summary["ann_energy_mj"], summary["integer_agreement"]
    ratio = f": {ann / mj:.1f}x" if mj else ""  # a network that never fires may cost nothing
    rows = [
        (
            "Test accuracy",
            f"{100 * summary['accuracy']:.2f} %",
            f"last epoch; best {100 * summary['best_accuracy']:.2f} %",
        ),
        ("Firing rate", f"{100 * summary['firing_rate']:.1f} %", "of the largest count, mean of neurons"),
        ("Spikes per image", short(summary["spikes_per_image"]), "integer counts summed"),
        ("Energy per image", f"{short(mj)} mJ", f"{short(ann)} mJ as an ANN{ratio}"),
        ("Parameters", short(summary["parameters"]), f"{short(summary['size_mb'])} MB on disk"),
        *low_bit_tiles(summary),
    ]
    if found is not None:
        equal = "test predictions equal" if found["same"] == found["total"] else "see below which differ"
        rows.append(("Integer engine", f"{found['same']:,} of {found['total']:,}", equal))
    return rows


def low_bit_tiles(summary: dict) -> list[tuple[str, str, str]]:
    """Rows of the tiles of low-bit weights and of a teacher of q, k and v; none for a run without."""
    rows = []
    if found := summary.get("quantized"):
        note = f"scales and biases included; {short(found['fp32_mb'])} MB as 32-bit floats"
        rows.append(("Packed weights", f"{short(found['packed_mb'])} MB", note))
    if found := summary.get("distillation"):
        slower, larger = found["seconds"] / found["seconds_plain"], found["kept_mb"] / found["kept_plain_mb"]
        note = f"test accuracy; a step takes {slower:.2f}x the time, {larger:.2f}x the memory"
        rows.append(("Teacher", f"{100 * found['teacher_accuracy']:.1f} %", note))
    return rows


@dataclass(frozen=True)
class Line:
    """One series of a chart: its corners as svg points, the place of the last one and its value as text."""

    name: str
    points: str
    last: tuple[float, float]
    value: str


@dataclass(frozen=True)
class Curve:
    """A line chart, ready to draw; ticks are (place, label)."""

    title: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    x_label: str
    width: int = CHART_WIDTH
    height: int = CHART_HEIGHT
    left: int = MARGIN_LEFT
    right: int = CHART_WIDTH - MARGIN_RIGHT
    bottom: int = CHART_HEIGHT - MARGIN_BOTTOM


def curves(epochs: Sequence[dict], steps: Sequence[dict]) -> list[Curve]:
    """Loss, accuracy and whatever else the log holds, each only if it has a point to show."""
    wanted = (
        ("Loss", {"train": "train_loss", "test": "test_loss"}, 1),
        ("Accuracy, %", {"test": "test_accuracy"}, 100),
        ("mIoU, %", {"test": "test_miou"}, 100),
        ("Average precision, %", {"mAP": "test_map", "AP50": "test_ap50", "AP75": "test_ap75"}, 100),
        ("Masks, %", {"mAP": "test_mask_map", "AP50": "test_mask_ap50", "AP75": "test_mask_ap75"}, 100),
        ("Pixels right, %", {"all": "test_pixel_accuracy", "mean of classes": "test_mean_accuracy"}, 100),
        ("Firing rate, %", {"mean of neurons": "firing_rate"}, 100),
        ("Learning rate", {"rate": "lr"}, 1),
    )
    drawn = []
    for title, keys, factor in wanted:
        series = {
            name: [(entry["epoch"] + 1, factor * entry[key]) for entry in epochs if finite(entry.get(key))]
            for name, key in keys.items()
        }
        drawn.append(draw(title, series, "epoch"))
    if len(epochs) < 2:  # too early for epochs to say anything
        points = [(entry["step"], entry["loss"]) for entry in steps if finite(entry.get("loss"))]
        drawn.insert(0, draw("Loss by step", {"train": points}, "step"))
    return [chart for chart in drawn if chart is not None]


def step_curves(summary: dict | None) -> list[Curve]:
    """Accuracy and firing of a network of clips, after each step of a stream; nothing for others."""
    wanted = (("Accuracy by step, %", "accuracy", "all frames so far"), ("Firing by step, %", "firing_rate", "neurons"))
    found = (summary or {}).get("by_step") or {}
    drawn = [
        draw(title, {name: [(step, 100 * value) for step, value in enumerate(found.get(key, []), start=1)]}, "step")
        for title, key, name in wanted
    ]
    return [chart for chart in drawn if chart is not None]


def precision_chart(summary: dict) -> Curve | None:
    """Precision by recall of a detector's boxes."""
    return draw("Precision, %", detection_report.precisions(summary), "recall in %, boxes with an IoU of 0.5")


def finite(value: object) -> bool:
    """Whether a log entry's value can be drawn; None stands for an absent one."""
    return isinstance(value, int | float) and math.isfinite(value)


def draw(title: str, series: dict[str, list[tuple[float, float]]], x_label: str) -> Curve | None:
    """Scale the series to the drawing; None without a point."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(min(ys), max(ys))
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return round(MARGIN_LEFT + (x - low_x) / (high_x - low_x) * (CHART_WIDTH - MARGIN_LEFT - MARGIN_RIGHT), 1)

    def up(y: float) -> float:
        return round(MARGIN_TOP + (high_y - y) / (high_y - low_y) * (CHART_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM), 1)

    lines = []
    for name, points in series.items():
        places = [(across(x), up(y)) for x, y in points]
        corners = " ".join(f"{x},{y}" for x, y in places)
        lines.append(Line(name, corners, places[-1], short(points[-1][1])))
    shown = [(across(x), f"{x:g}") for x in x_ticks if low_x <= x <= high_x]
    return Curve(title, lines, shown, [(up(y), tick_label(y)) for y in y_ticks], x_label)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to eight round numbers (1, 2 or 5 times a power of ten apart) from below `low` to above `high`."""
    spread = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 7 >= spread)
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(index * step, 12) for index in range(first, last + 1)]


def tick_label(value: float) -> str:
    """At most about five letters: 0.25, 1000, 2e-4."""
    text = f"{value:.6g}"
    if len(text) > 5:
        text = f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    return text


def confusion_table(summary: dict | None) -> dict | None:
    """Rows (true class) of cells (predicted) with a shade in 0..1; for many classes a picture and the worst pairs."""
    if not summary or not summary.get("confusion"):
        return None
    counts = np.asarray(summary["confusion"], dtype=np.int64)
    names = class_names(summary, len(counts))
    shade = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(wrong, axis=None, kind="stable")[::-1][:8]
    pairs = [(names[i], names[j], int(wrong[i, j])) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    rows = []
    if len(counts) <= NUMBERED_CLASSES:
        rows = [
            (names[i], [(int(n), round(float(s), 3), i == j) for j, (n, s) in enumerate(zip(*line, strict=True))])
            for i, line in enumerate(zip(counts, shade, strict=True))
        ]
    return {
        "names": names,
        "rows": rows,
        "picture": "" if rows else shade_picture(shade),
        "pairs": [pair for pair in pairs if pair[2] > 0],
    }


def class_names(summary: dict, count: int) -> list[str]:
    """The summary's names of `count` classes, or numbers where it has others."""
    names = [str(name) for name in summary.get("classes") or []]
    return names if len(names) == count else [str(index) for index in range(count)]


def shade_picture(shade: np.ndarray) -> str:
    """A matrix of 0..1 as a picture whose ink is opaque where the value is high, so it fits light and dark pages."""
    ink = np.zeros((*shade.shape, 4), dtype=np.uint8)
    ink[..., :3] = (13, 148, 136)
    ink[..., 3] = np.round(255 * np.sqrt(shade))  # the root makes single mistakes visible
    return as_png(Image.fromarray(ink, mode="RGBA"))


def as_png(picture: Image.Image) -> str:
    """A picture as a data address for `src`."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def sample_pictures(recipe: dict, summary: dict | None) -> tuple[list[tuple[str, str, list[dict]]], str]:
    """Groups (heading, kind, samples) of test images the final model got right and wrong, and a note for the reader.

    The images are read again through the recipe's data; where that fails (a folder that is no longer there) the note
    says so and the report goes on without them.
    """
    predictions = (summary or {}).get("predictions")
    if pretrains(recipe) or dense_page(recipe):
        return [], ""
    if not predictions:
        return [], "" if summary is None else "This run stored no predictions of single images."
    try:
        split = load_split(from_json(recipe).data, "test")
        labels, names = split.labels.tolist(), split.classes
        if len(labels) != len(predictions):
            raise ValueError(f"there are {len(labels)} now, and {len(predictions)} predictions")
        right, wrong = choose(predictions, labels)
        pictures = {index: as_png(small(to_pil(split.picture(index)))) for index in (*right, *wrong)}
    except (ValueError, OSError) as error:
        return [], f"The test images could not be read for this page: {error}"

    def described(index: int) -> dict:
        return {
            "index": index,
            "picture": pictures[index],
            "true": names[labels[index]],
            "predicted": names[predictions[index]],
        }

    misses = sum(label != guess for label, guess in zip(labels, predictions, strict=True))
    some = f"Wrong ({misses:,} of {len(predictions):,}" + (f", {len(wrong)} shown)" if len(wrong) < misses else ")")
    groups = [("Right", "right", [described(i) for i in right]), (some, "wrong", [described(i) for i in wrong])]
    return [group for group in groups if group[2]], "Captions are predictions; # is the index in the test split."


def reconstructions(run: Path) -> str:
    """The pictures that a pre-training drew, as a data address; empty without them."""
    path = run / PICTURES
    return as_png(Image.open(path)) if path.is_file() else ""


def choose(predictions: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices of at most `SAMPLES` right images, one of each class in turn, and the first `SAMPLES` wrong ones."""
    wrong = [i for i, (label, guess) in enumerate(zip(labels, predictions, strict=True)) if label != guess]
    by_class: dict[int, list[int]] = {}
    for index in sorted(set(range(len(labels))) - set(wrong)):
        by_class.setdefault(labels[index], []).append(index)
    rounds = itertools.zip_longest(*(by_class[label] for label in sorted(by_class)))
    right = [index for each in rounds for index in each if index is not None]
    return right[:SAMPLES], wrong[:SAMPLES]


def small(picture: Image.Image) -> Image.Image:
    """`picture` itself, shrunk to at most `LARGEST_SAMPLE` pixels a side."""
    picture.thumbnail((LARGEST_SAMPLE, LARGEST_SAMPLE))
    return picture


def layer_bars(summary: dict | None) -> list[dict]:
    """Firing rate of every neuron layer in network order, with its share of the widest bar in per cent."""
    rates = (summary or {}).get("layers") or {}
    largest = max(rates.values(), default=0) or 1
    return [
        {"name": name, "width": round(100 * rate / largest, 2), "text": f"{100 * rate:.1f} %"}
        for name, rate in rates.items()
    ]


def stage_bars(summary: dict | None) -> list[dict]:
    """Energy of every stage beside the same stage of the ANN; widths are per cent of the largest."""
    stages = (summary or {}).get("energy_by_stage") or {}
    largest = max((value for stage in stages.values() for value in (stage["mj"], stage["ann_mj"])), default=0) or 1
    return [
        {
            "name": name,
            "width": round(100 * stage["mj"] / largest, 2),
            "ann_width": round(100 * stage["ann_mj"] / largest, 2),
            "text": f"{short(stage['mj'])} mJ",
            "ann_text": f"{short(stage['ann_mj'])} mJ",
        }
        for name, stage in stages.items()
    ]


def sorted_recipe(recipe: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of (field, value): the recipe's own leaves first, then each nested part, nested deeper with dots."""
    own = [(key, plain(value)) for key, value in recipe.items() if not isinstance(value, dict)]
    parts = [(key, list(leaves(value))) for key, value in recipe.items() if isinstance(value, dict)]
    return [("recipe", own), *(part for part in parts if part[1])]


def leaves(part: dict, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, value as text) of everything in a nested part of a recipe."""
    for key, value in part.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain(value)


def plain(value: object) -> str:
    """A value of a recipe as text: yes or no, lists with commas, a dash for what is empty."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "–"
    return str(value) or "–"


def facts(summary: dict | None) -> list[tuple[str, str]]:
    """Versions, hardware and command, so that somebody else can repeat the run."""
    if not summary:
        return []
    rows = [(name, str(version)) for name, version in summary.get("versions", {}).items()]
    for key in ("hardware", "threads", "command"):
        if summary.get(key) is not None:
            rows.append((key, str(summary[key])))
    return rows

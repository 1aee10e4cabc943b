"""`energy`: what a run, a saved model or a named model spends, and on which images it is measured."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from spikeformers.energy import EnergyReport

RANDOM_IMAGES, RUN_IMAGES = 4, 64  # default number of images for `energy`


def measure(arguments: Namespace) -> None:
    """The energy table of a run, a saved model or a named model, or a row for each of several."""
    if len(arguments.models) > 1:
        return compare(arguments)
    found = measured(arguments.models[0], arguments)
    print(found.table())
    if arguments.json:
        print(f"written: {found.save(arguments.json)}")
    for path, text in ((arguments.csv, found.to_csv), (arguments.latex, found.to_latex)):
        write(path, text())
    if arguments.plot:
        print(f"written: {found.plot(arguments.plot, kind=arguments.kind or 'stages')}")
    return None


def measured(source: str, arguments: Namespace) -> "EnergyReport":
    """The report of one model; says what was measured, and with --strict refuses what is not counted in full."""
    from spikeformers import energy

    model, images, note = energy_subject(source, arguments.images)
    found = energy.measure(model, images, convention=arguments.convention)
    print(note)
    if arguments.strict and found.uncounted:
        raise ValueError(f"{source} has parts that are not counted: {'; '.join(found.uncounted)}")
    return found


def compare(arguments: Namespace) -> None:
    """A row for each of several models; of runs also their scores, a column for each kind, and a bubble chart.

    Raises ValueError, before anything is measured, for a chart of models without one kind of score.
    """
    if arguments.kind:
        raise ValueError(f"--kind {arguments.kind} draws one model, got {len(arguments.models)}: leave it out")
    from spikeformers.energy import Run, compare_runs, tables
    from spikeformers.train.results import print_table

    scores = {source: score_of(source) for source in arguments.models}
    labels = list(dict.fromkeys(label for label, _, _ in scores.values() if label))
    if arguments.plot and (len(labels) != 1 or any(label is None for label, _, _ in scores.values())):
        raise ValueError(
            "--plot of several needs finished runs that have one score, all accuracy, all mIoU or all mAP: leave it out"
        )
    found = {source: measured(source, arguments) for source in arguments.models}
    percent = [f"{label} %" for label in labels]
    head = ("model", *percent, "mJ", "sd", "ANN mJ", "firing rate %", "T", "images", "parameters")
    rows = []
    for source, each in found.items():
        own, score, parameters = scores[source]
        columns = [100 * score if label == own else None for label in labels]
        spent = (each.total_mj, each.sd_mj, each.ann_mj)
        rows.append((source, *columns, *spent, 100 * each.firing_rate, each.steps, each.images, parameters))
    print_table(
        head, [["-" if cell is None else short(cell) for cell in row] for row in rows], right=range(1, len(head))
    )
    for source, each in found.items():
        print("".join(f"NOT COUNTED in {source}: {part}\n" for part in each.uncounted), end="")
    rules = next(iter(found.values())).rules.describe(frozenset().union(*(each.kinds for each in found.values())))
    print(rules)
    write(arguments.json, json.dumps({source: each.to_json() for source, each in found.items()}, indent=1) + "\n")
    write(arguments.csv, tables.as_csv(head, rows))
    write(arguments.latex, tables.as_latex(head, rows, note=rules))
    if arguments.plot:
        runs = [
            Run(Path(source).name, score, found[source].total_mj, size) for source, (_, score, size) in scores.items()
        ]
        print(f"written: {compare_runs(runs, arguments.plot, score=labels[0])}")


def score_of(source: str) -> tuple[str | None, float | None, int | None]:
    """What the score of a run is called, its score 0..1 and its parameters; all None for a model that is no run."""
    from spikeformers.train.saved import run_of
    from spikeformers.train.summary import FinishedTask, read_summary

    run = run_of(Path(source))
    summary = read_summary(run) if run else None
    if not isinstance(summary, FinishedTask):
        return None, None, None
    return summary.LABEL, getattr(summary, summary.METRIC), summary.parameters


def short(cell: str | float) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell


def write(path: str, text: str) -> None:
    """Write `text` to the file `path`, if it is named, and say so."""
    if path:
        Path(path).write_text(text, encoding="utf-8")
        print(f"written: {path}")


def energy_subject(source: str, images: int | None) -> tuple["nn.Module", "DataLoader | Tensor", str]:
    """Model, images to measure it on, and a sentence that says what both are."""
    if images is not None and images < 1:
        raise ValueError(f"--images must be at least 1, got {images}")
    import torch

    from spikeformers import create_model, list_models, zoo
    from spikeformers.data.splits import load_split
    from spikeformers.train.evaluate import batches_of
    from spikeformers.train.saved import read_run, read_trained, run_of

    if Path(source).is_file():
        raise ValueError(f"{source} is a file: give the run or the saved model that it came from")
    if run := run_of(Path(source)):
        model, recipe = read_trained(source)[0], read_run(run)[1]
        split = load_split(recipe.data, "test", seed=recipe.seed)
        count = min(images or RUN_IMAGES, len(split))
        loader = batches_of(split, batch_size=recipe.batch_size, images=count)
        return model, loader, f"{source}: trained weights, {count} images of its test split"
    fresh = source in list_models() or not (Path(source).is_dir() or "/" in source)
    model, weights = (create_model(source), "RANDOM weights") if fresh else (read_trained(source)[0], "saved weights")
    count, side = images or RANDOM_IMAGES, zoo.CATALOGUE[model.origin.name].image_size
    batch = torch.randn(count, model.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    if fresh:
        settle_batch_norm(model, batch)
    drawn = f"{count} RANDOM images of {side}x{side}"
    return model, batch, f"{source}: {weights}, {drawn}: firing rates and energy are not those of real use"


def settle_batch_norm(model: "nn.Module", images: "Tensor") -> None:
    """Give a fresh network the statistics of `images`: with those it is built with (0 and 1) hardly a neuron fires."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    model.eval()

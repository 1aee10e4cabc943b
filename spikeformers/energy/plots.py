"""Pictures of energy reports: bars of stages or layers, firing rates over layers and steps, and runs beside each other.

Papers: Meta-SpikeFormer, Table 11 (rates of layers and steps); Spikformer V2, Fig. 1 (accuracy, energy, parameters).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spikeformers.energy.report import EnergyReport


@dataclass(frozen=True)
class Run:
    """A network in a comparison. `accuracy`: 0..1, or another score the more the better; `energy_mj` of an image."""

    name: str
    accuracy: float
    energy_mj: float
    parameters: int


def compare_runs(runs: Iterable[Run], path: str | Path, *, score: str = "accuracy") -> Path:
    """Bubble chart of runs as the image file `path`: energy across, `score` upwards, area in proportion to parameters.

    Raises ValueError for no runs, or for one that spends nothing.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("there are no runs to compare")
    for run in runs:
        if not run.energy_mj > 0:
            raise ValueError(f"{run.name} spends {run.energy_mj:g} mJ an image: measure it on images first")
    figure = _figure(7, 4.5)
    axes, largest = figure.add_subplot(), max(run.parameters for run in runs)
    for run in runs:
        axes.scatter(run.energy_mj, run.accuracy, s=1200 * run.parameters / largest, alpha=0.6)
        label, place = f"{run.name}\n{_short(run.parameters)}", (run.energy_mj, run.accuracy)
        axes.annotate(label, place, ha="center", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.margins(0.2)
    axes.set_xlabel("mJ per image")
    axes.set_ylabel(score)
    axes.set_title("area: parameters", fontsize=10)
    return _saved(figure, path)


def stages(report: "EnergyReport") -> "Figure":
    """Bars of every stage, spiking beside ANN."""
    found = report.stages()
    figure = _figure(max(5, 1.1 * len(found) + 2), 4)
    axes = figure.add_subplot()
    for offset, key, label in ((-0.2, "mj", f"spiking, T={report.steps}"), (0.2, "ann_mj", "as an ANN")):
        places = [i + offset for i in range(len(found))]
        bars = axes.bar(places, [stage[key] for stage in found.values()], 0.4, label=label)
        axes.bar_label(bars, fmt="%.2g", fontsize=8)
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("mJ per image")
    axes.set_title(f"{report.total_mj:.4g} mJ, as an ANN {report.ann_mj:.4g} mJ ({report.convention})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def layers(report: "EnergyReport") -> "Figure":
    """A bar for every layer with its deviation over the images; coloured by what feeds it."""
    figure = _figure(8, max(3, 0.16 * len(report.layers) + 1.5))
    axes = figure.add_subplot()
    for label, spiking in (("fed by spikes", True), ("fed by real numbers", False)):
        rows = [i for i, layer in enumerate(report.layers) if (layer.rate is not None) == spiking]
        chosen = [report.layers[i] for i in rows]
        axes.barh(rows, [each.mj for each in chosen], xerr=[each.sd_mj for each in chosen], label=label)
    axes.set_yticks(range(len(report.layers)), [layer.name for layer in report.layers], fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("mJ per image")
    axes.set_title(f"{report.total_mj:.4g} mJ ({report.convention})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def rates(report: "EnergyReport") -> "Figure":
    """Mean count of what feeds each layer, in each time step. Raises ValueError if spikes feed none."""
    found = report.rates
    if not found:
        raise ValueError("spikes feed no layer of this network: it has no firing rates to draw")
    figure = _figure(2.5 + max(2.5, 0.6 * report.steps), max(3, 0.16 * len(found) + 1.5))
    axes = figure.add_subplot()
    # Layers behind the mean over time run one step: the rest of their row stays empty.
    grid = [[*row, *[math.nan] * (report.steps - len(row))] for row in found.values()]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    if report.steps <= 8:
        for y, row in enumerate(found.values()):
            for x, rate in enumerate(row):
                dark = rate < 0.6 * image.norm.vmax
                axes.text(x, y, f"{rate:.2f}", ha="center", va="center", fontsize=5, color="white" if dark else "black")
    axes.set_yticks(range(len(found)), list(found), fontsize=6)
    axes.set_xticks(range(report.steps), [str(step + 1) for step in range(report.steps)])
    axes.set_xlabel("time step")
    figure.colorbar(image, label="mean count of an input element")
    return figure


KINDS = {"stages": stages, "layers": layers, "rates": rates}


def draw(report: "EnergyReport", path: str | Path, kind: str) -> Path:
    """One of KINDS as the image file `path` (its ending says which format). Raises ValueError for another kind."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return _saved(KINDS[kind](report), path)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: "Figure", path: str | Path) -> Path:
    figure.savefig(path)
    return Path(path)


def _short(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"

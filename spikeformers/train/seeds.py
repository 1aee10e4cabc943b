"""The same recipe from several seeds: the mean is the result, the deviation says what it is worth."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from rich.console import Console

from spikeformers.train.checkpoint import write_json
from spikeformers.train.loop import train
from spikeformers.train.recipe import Recipe
from spikeformers.train.summary import FinishedTask, spread


@dataclass(frozen=True)
class SeedsSummary:
    """Results of all seeds, with mean and sample standard deviation of the last epoch's accuracy or mIoU (0..1)."""

    seeds: tuple[int, ...]
    summaries: tuple[FinishedTask, ...]
    mean: float
    sd: float


def train_seeds(
    recipe: Recipe, seeds: Sequence[int], *, run: Path, resume: bool = False, console: Console | None = None
) -> SeedsSummary:
    """Train `recipe` once for each seed, in `run/seed-S`, and write `run/seeds.json`. Raises as `train` does."""
    if recipe.pretrain.mask_ratio:
        raise ValueError(f"{recipe.name} pre-trains: it has no accuracy to average; train its seeds one by one")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {list(seeds)}")
    summaries = [
        train(dataclasses.replace(recipe, seed=seed), run=Path(run) / f"seed-{seed}", resume=resume, console=console)
        for seed in seeds
    ]
    metric = summaries[0].METRIC
    values = [getattr(each, metric) for each in summaries]
    mean, sd = spread(values)
    plural = {"accuracy": "accuracies", "miou": "mious", "map": "maps"}[metric]
    content = {"seeds": list(seeds), plural: values, f"{metric}_mean": mean, f"{metric}_sd": sd}
    if PartialState().is_main_process:
        write_json(Path(run) / "seeds.json", content)
    return SeedsSummary(tuple(seeds), tuple(summaries), mean, sd)

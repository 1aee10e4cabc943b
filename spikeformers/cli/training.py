"""`train` and `pretrain`: one run or one for each seed, resumed or new, in one process or several."""

import os
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from spikeformers.cli.run_folders import run_of
from spikeformers.cli.settings import configured

if TYPE_CHECKING:
    from rich.console import Console

    from spikeformers.train.recipe import Recipe


def train(arguments: Namespace) -> None:
    """Train a classifier by a recipe, once or for each seed, write the reports and print the results."""
    run_recipe(arguments, command="train", seeds=read_seeds(arguments.seeds))


def pretrain(arguments: Namespace) -> None:
    """Pre-train an encoder by a recipe, write the report with its pictures, and say how to finetune it."""
    run = run_recipe(arguments, command="pretrain", seeds=[])
    if is_main_process():
        print(f"finetune it: spikeformers train RECIPE --set init.backbone={run}, with a recipe of the same network")


def run_recipe(arguments: Namespace, *, command: str, seeds: list[int]) -> Path:
    """Do what the recipe says, once or for each seed, report and print; returns the run folder."""
    from spikeformers import recipes
    from spikeformers.train.loop import train as run_training
    from spikeformers.train.report import write_report
    from spikeformers.train.results import print_results, print_spread
    from spikeformers.train.seeds import train_seeds

    resume = partial(resume_command, command=command)
    with run_of(recipes.get(arguments.recipe).name, arguments, resume=resume) as run:
        if arguments.resume and not seeds and any(run.glob("seed-*")):
            raise ValueError(f"{run} holds a run for each of several seeds: name them again with --seeds")
        recipe = configured(arguments, run)
        check_command(recipe, command)
        common = {"run": run, "resume": arguments.resume, "console": main_console()}
        if seeds:
            found = train_seeds(recipe, seeds, **common)
            results = {run / f"seed-{seed}": each for seed, each in zip(seeds, found.summaries, strict=True)}
        else:
            results = {run: run_training(recipe, **common)}
    for folder, summary in results.items() if is_main_process() else ():
        print_results(summary, write_report(folder))
    if len(seeds) > 1 and is_main_process():
        print_spread(seeds, list(results.values()))
    return run


def check_command(recipe: "Recipe", command: str) -> None:
    """Raises ValueError if a recipe, as it is after --set, is one for the other command."""
    other = "pretrain" if recipe.pretrain.mask_ratio else "train"
    if other != command:
        does = "pre-trains without labels" if other == "pretrain" else "trains with labels"
        raise ValueError(
            f"{recipe.name} {does} (pretrain.mask_ratio={recipe.pretrain.mask_ratio:g}): use `spikeformers {other}`"
        )


def read_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    seeds = text.split(",") if text else []
    if not all(seed.strip().isdecimal() for seed in seeds):
        raise ValueError(f"--seeds takes whole numbers with commas between them, such as 0,1,2; got {text!r}")
    if len(set(map(int, seeds))) < len(seeds):
        raise ValueError(f"--seeds names a seed twice: {text}")
    return [int(seed) for seed in seeds]


def resume_command(arguments: Namespace, run: Path, *, command: str) -> str:
    """What to type to go on with an interrupted run."""
    words = ["spikeformers", command, arguments.recipe, "--resume", "--out", str(run)]
    words += ["--seeds", arguments.seeds] if arguments.get("seeds") else []
    words += ["--threads", str(arguments.threads)] if arguments.threads is not None else []
    words += ["--set", *arguments.set] if arguments.set else []
    return shlex.join(words)


def is_main_process() -> bool:
    """Only the first of several processes prints and writes reports."""
    return int(os.environ.get("RANK", "0")) == 0


def main_console() -> "Console | None":
    from rich.console import Console

    return Console() if is_main_process() else None

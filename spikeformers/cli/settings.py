"""`--set a.b=c` and `--threads`: what changes a recipe before it is used."""

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from spikeformers.train.recipe import Recipe


def configured(arguments: Namespace, run: Path) -> "Recipe":
    """The named recipe, or on resuming the one that `run` was started with, with --set and --threads applied."""
    from spikeformers import recipes
    from spikeformers.train.recipe import override
    from spikeformers.train.saved import stored_recipe

    recipe = recipes.get(arguments.recipe)
    if arguments.resume:
        recipe = stored_recipe(run, name=recipe.name) or recipe
    changes = [split_assignment(each) for each in arguments.set]
    if arguments.threads is not None:
        changes.append(("threads", str(arguments.threads)))
    for path, text in changes:
        if path == "data.source":
            check_source(recipe, text)
        recipe = override(recipe, path, text)
    return recipe


def check_source(recipe: "Recipe", source: str) -> None:
    """Raises ValueError for a source that is there, but of another kind of data than the recipe's."""
    from spikeformers.data.splits import KINDS

    wanted = type(recipe.data)
    if KINDS.get(source, wanted) is not wanted:
        fitting = ", ".join(name for name, kind in KINDS.items() if kind is wanted)
        raise ValueError(
            f"{recipe.name} cannot learn from data.source={source}, which is of another kind than its "
            f"{recipe.data.source}: choose one of {fitting}, or a recipe for {source} (`spikeformers list`)"
        )


def split_assignment(text: str) -> tuple[str, str]:
    """`a.b=c` -> (`a.b`, `c`)."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"--set takes a.b=c, got {text!r}; what follows --set belongs to it")
    return path, value

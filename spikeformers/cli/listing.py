"""`list`: the models and recipes that there are."""

import difflib
import fnmatch

from jsonargparse import Namespace

CLOSE = 5  # names shown where none matches


def list_names(arguments: Namespace) -> None:
    """Models (parameters, default sizes, paper) and recipes whose names match."""
    import torch

    from spikeformers import create_model, list_models, zoo
    from spikeformers.recipes import RECIPES
    from spikeformers.train.results import print_table

    pattern = arguments.pattern if set(arguments.pattern) & set("*?[") else f"*{arguments.pattern}*"
    models = []
    for name in list_models(pattern):
        with torch.device("meta"):  # sizes without memory or initialisation
            model = create_model(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        models.append((name, f"{count:,}", sizes(model.config), zoo.CATALOGUE[name].paper))
    recipes = [(name, first_line(RECIPES[name])) for name in fnmatch.filter(RECIPES, pattern)]
    if models:
        print_table(("model", "parameters", "sizes", "paper"), models, right=(1,))
    if models and recipes:
        print()
    if recipes:
        print_table(("recipe", "what it trains"), recipes)
    if not models and not recipes:
        known = dict.fromkeys((*list_models(), *RECIPES))  # some recipes are called as their model is
        close = difflib.get_close_matches(arguments.pattern, known, n=CLOSE, cutoff=0.0)
        raise ValueError(
            f"no model and no recipe matches {arguments.pattern!r}; closest: {', '.join(close)} (`spikeformers list` "
            "shows all)"
        )


def first_line(documented: object) -> str:
    documented = getattr(documented, "func", documented)  # a partial's own words are functools'
    return (documented.__doc__ or "").strip().split("\n")[0]


def sizes(config: object) -> str:
    """The size arguments of a model's config, as `dims 64-128-256-360, blocks 1-1-2-6-2`."""
    shown = []
    for name in ("dims", "dim", "depth", "blocks", "heads", "steps"):
        value = getattr(config, name, None)
        if value is not None:
            shown.append(f"{name} {'-'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ", ".join(shown)

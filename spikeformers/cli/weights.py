"""`weights import`: checkpoints that others trained, as model folders."""

from pathlib import Path

from jsonargparse import Namespace

from spikeformers.cli.run_folders import holds_something
from spikeformers.cli.settings import split_assignment


def import_weights(arguments: Namespace) -> None:
    """Turn an authors' checkpoint into a model folder and say what was dropped."""
    from spikeformers.train.recipe import literal  # so that --set reads alike everywhere
    from spikeformers.zoo import import_checkpoint

    out = Path(arguments.out)
    if holds_something(out) or out.is_file():
        raise ValueError(f"{out} is there already and not empty: choose another --out")
    overrides = {name: literal(text) for name, text in map(split_assignment, arguments.set)}
    print(import_checkpoint(arguments.file, name=arguments.model, out=out, overrides=overrides))

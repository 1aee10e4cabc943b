"""`--set`: several at once, repeated, remembered on resuming."""

from pathlib import Path

from spikeformers.cli.parsers import build_parser
from spikeformers.cli.settings import configured


def test_set_takes_several_values_and_repeats():
    top, _ = build_parser()
    command = "train digits --set data.source=imagefolder data.root=DIR --set epochs=3 optim.lr=1e-2 --threads 1"
    recipe = configured(top.parse_args(command.split()).train, Path("unused"))
    assert (recipe.data.source, recipe.data.root, recipe.epochs, recipe.threads) == ("imagefolder", "DIR", 3, 1)
    assert recipe.optim.lr == 0.01


def test_resuming_needs_no_setting_again_and_takes_new_ones(said_by, refused, trained):
    top, _ = build_parser()

    def recipe(*more: str):
        return configured(top.parse_args(["train", "digits", *more]).train, trained[0])

    assert recipe("--resume").data.size == 16
    changed = recipe("--resume", "--set", "workers=1")
    assert (changed.data.size, changed.workers) == (16, 1)
    assert recipe().data.size != 16
    assert said_by("train", "digits", "--resume", "--out", trained[0])[0] == 0
    assert "digits" in refused("train", "cifar10_small", "--resume", "--out", trained[0])

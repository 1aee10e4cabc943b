"""`energy`: what a run, a saved model or a named model spends, and on which images it is measured."""

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

RANDOM_IMAGES, RUN_IMAGES = 4, 64  # default number of images for `energy`


def measure(arguments: Namespace) -> None:
    """The energy table of a run, a saved model or a named model."""
    from spikeformers import energy

    model, images, note = energy_subject(arguments.model, arguments.images)
    found = energy.measure(model, images, convention=arguments.convention)
    print(note)
    print(found.table())
    if arguments.json:
        print(f"written: {found.save(arguments.json)}")
    if arguments.plot:
        print(f"written: {found.plot(arguments.plot)}")


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

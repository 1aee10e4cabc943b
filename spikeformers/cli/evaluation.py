"""`eval`, `predict` and `report`: what a trained model is good for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from torch import Tensor

SEEN = 5  # classes that `predict` prints


def evaluate(arguments: Namespace) -> None:
    """Test the final model of a run again on the whole test split."""
    import torch

    from spikeformers.data.images import load_split
    from spikeformers.train.evaluate import batches_of
    from spikeformers.train.evaluate import evaluate as run_test
    from spikeformers.train.results import print_facts
    from spikeformers.train.saved import read_run

    model, recipe, _ = read_run(Path(arguments.run))
    if recipe.threads:  # float32 sums depend on the number of threads, and one flipped spike can turn a close call
        torch.set_num_threads(recipe.threads)
    split = load_split(recipe.data, "test", seed=recipe.seed)
    found = run_test(model, batches_of(split, batch_size=recipe.batch_size, workers=recipe.workers))
    rows = [("Test accuracy", f"{100 * found.accuracy:.2f} % of {len(split):,} images"), ("Loss", f"{found.loss:.4f}")]
    if split.skipped:
        rows.append(("Unreadable", f"{len(split.skipped)} images skipped, first: {split.skipped[0]}"))
    print_facts(arguments.run, rows)


def predict(arguments: Namespace) -> None:
    """The likeliest classes of each image and the energy that its inference takes."""
    if Path(arguments.model).is_file():
        return predict_by_artifact(arguments)
    if arguments.backend != "torch":
        raise ValueError("--backend goes with a file of `export`: runs and saved models run in torch")
    import torch

    from spikeformers import energy
    from spikeformers.data.images import read_image
    from spikeformers.train.results import short
    from spikeformers.train.saved import read_trained, run_of

    model, spec, classes = read_trained(arguments.model)
    images = [read_image(Path(file), spec=spec) for file in arguments.files]  # all of them first: no half answer
    if run_of(Path(arguments.model)) is None:
        print(
            f"{arguments.model}: no recipe beside it, so images are read at {spec.size}x{spec.size} as its paper does"
        )
    for file, image in zip(arguments.files, images, strict=True):
        batch = image[None]
        with torch.no_grad():
            logits = model(batch)[0]
        spent = energy.measure(model, batch)
        print(f"{file}: {short(spent.total_mj)} mJ ({short(spent.ann_mj)} mJ as an ANN, {spent.convention})")
        print_likely(logits, classes)


def predict_by_artifact(arguments: Namespace) -> None:
    """The same from the one file that `export` writes: the energy is the mean that its card holds."""
    from spikeformers.deploy import load
    from spikeformers.train.results import short
    from spikeformers.train.saved import class_labels, read_picture

    try:
        model = load(arguments.model, backend=arguments.backend)
    except ImportError as error:  # an extra that is not installed; the message names it
        raise ValueError(str(error)) from error
    if model.preprocessing is None:
        raise ValueError(
            f"{arguments.model} does not say how to prepare pictures: it takes clips, or was saved without; run it by "
            "spikeformers.deploy.load in Python"
        )
    images = [read_picture(Path(file), model.preprocessing) for file in arguments.files]  # first: no half answer
    classes = model.labels or class_labels(model.engine.config.num_classes)
    card = model.card
    if card.energy_mj is not None:
        ann = "" if card.ann_energy_mj is None else f"{short(card.ann_energy_mj)} mJ as an ANN, "
        print(f"By its card {short(card.energy_mj)} mJ a picture on average ({ann}{card.energy_convention})")
    for file, image in zip(arguments.files, images, strict=True):
        print(f"{file}:")
        print_likely(model(image[None])[0], classes)


def print_likely(logits: "Tensor", classes: Sequence[str]) -> None:
    """The likeliest classes of one image, from its logits."""
    likely = logits.softmax(-1).topk(min(SEEN, len(classes)))
    for share, index in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
        print(f"  {100 * share:6.2f} %  {classes[index]}")


def report(arguments: Namespace) -> None:
    """Write the page again, for example of a run that is still going."""
    from spikeformers.train.report import write_report

    print(write_report(Path(arguments.run)))

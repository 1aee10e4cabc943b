"""What exactness costs: the reduced QSD-Transformer of qsd_tables.py at 4 bits, with and without `exact_integer`.

Both rows have the same images, epochs, seed and learning rate, and no layer scale, which exact networks refuse. Then
each network predicts the same test images in batches in float32, in float64, one by one, and by the integer engine; a
flip is a spike count that differs. Each training has a folder of its own below --runs and is resumed; finished ones are
only read.

    python benchmarks/exact_integer.py cifar10 --json benchmarks/results/exact_integer.json
"""

import copy
from pathlib import Path

import torch
from tables import changed, done, make, parser_of
from torch import Tensor, nn

from spikeformers import deploy, energy, from_pretrained, recipes
from spikeformers.data import load_split
from spikeformers.train.evaluate import batches_of
from spikeformers.train.recipe import Recipe

EPOCHS = 4
COMPARED_IMAGES = 1_000
BATCH = 50
Forms = tuple[Tensor, dict[str, Tensor]]  # logits, and counts by neuron


def recipe_of(images: int, *, exact: bool) -> Recipe:
    """The recipe of a row."""
    return changed(
        recipes.get("qsd_transformer_cifar10_small"),
        name="exact_integer_table",
        data__train_limit=images,
        epochs=EPOCHS,
        testing__every=100,
        testing__integer_images=50,
        model__options__layer_scale=0.0,
        model__options__bits=0,
        quantize__bits=4,
        quantize__exact_integer=exact,
    )


@torch.no_grad()
def outcome(model: nn.Module, pictures: Tensor) -> Forms:
    """What `model` makes of a batch."""
    with energy.record(model) as counts:
        logits = model(pictures)
    return logits.double(), dict(counts)


def differing(logits: Tensor, others: Tensor) -> dict[str, float]:
    """Images with another prediction, and the largest difference of a logit."""
    return {
        "predictions": int((logits.argmax(1) != others.argmax(1)).sum()),
        "logits": float((logits - others).abs().max()),
    }


def flipped(counts: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    """Images with any flip, and flips in all."""
    flips = sum((own != others[name]).flatten(1).sum(1) for name, own in counts.items())
    return {"images": int((flips > 0).sum()), "flips": int(flips.sum())}


def compared(run: Path, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Differences of the trained network, in batches in float32, from its other forms (no hook hears the engine)."""
    model = from_pretrained(run / "model")
    double, engine = copy.deepcopy(model).double(), None
    found: dict[str, list[dict[str, float]]] = {"float64": [], "one by one": [], "integer engine": []}
    split = load_split(recipe.data, "test", seed=0)
    for pictures, _ in batches_of(split, batch_size=BATCH, images=COMPARED_IMAGES):
        engine = engine or deploy.integer(model, pictures)
        logits, counts = outcome(model, pictures)
        alone = [outcome(model, picture) for picture in pictures.split(1)]
        joined = {name: torch.cat([each[name] for _, each in alone]) for name in counts}
        forms = {
            "float64": outcome(double, pictures.double()),
            "one by one": (torch.cat([each for each, _ in alone]), joined),
        }
        for name, (others, other_counts) in forms.items():
            found[name].append(differing(logits, others) | flipped(counts, other_counts))
        found["integer engine"].append(differing(logits, engine(pictures).double()))
    return {
        form: {name: (max if name == "logits" else sum)(each[name] for each in parts) for name in parts[0]}
        for form, parts in found.items()
    }


def cifar10(runs: Path, images: int) -> list[dict]:
    """Accuracy in percent (10,000 test images); of 1,000, those with a flip; the largest difference of a logit."""
    rows = []
    for method, exact in (("4 bits", False), ("4 bits, exact_integer", True)):
        recipe = recipe_of(images, exact=exact)
        run = runs / ("exact" if exact else "plain")
        accuracy = 100 * done(recipe, run).accuracy
        found = compared(run, recipe)
        flips = {f"flips, {form}": each["images"] for form, each in found.items() if "images" in each}
        logits = {f"logits, {form}": each["logits"] for form, each in found.items()}
        rows.append({"method": method, "ours": {"accuracy": accuracy} | flips | logits, "differences": found})
    return rows


TABLES = {"cifar10": cifar10}


def main() -> None:
    options = parser_of(__doc__, TABLES, runs="runs/exact_integer", images=10_000).parse_args()
    make("exact_integer", TABLES, options, ground={"epochs": EPOCHS, "compared_images": COMPARED_IMAGES})


if __name__ == "__main__":
    main()

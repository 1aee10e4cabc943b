"""What a trained network is worth: accuracy, loss, confusion, firing, energy, and what the integer engine shares."""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import MulticlassConfusionMatrix

from spikeformers import energy
from spikeformers.deploy import integer
from spikeformers.neurons import Neuron
from spikeformers.train.recipe import Recipe

_BATCH = 64  # of a split that comes without a loader


@dataclass(frozen=True)
class Evaluation:
    """Result over a split: `accuracy` 0..1, mean cross-entropy `loss`, `confusion[true][predicted]`, `predictions`."""

    accuracy: float
    loss: float
    confusion: list[list[int]]
    predictions: list[int]

    @property
    def score(self) -> float:
        """What the best epoch has most of."""
        return self.accuracy

    def metrics(self) -> dict[str, float]:
        """What the log of an epoch keeps."""
        return {"test_loss": self.loss, "test_accuracy": self.accuracy}


def batches_of(split: Dataset, *, batch_size: int, images: int = 0, workers: int = 0) -> DataLoader:
    """Batches of `split` in order; of `images` samples chosen by `drawn` only, if that is above 0.

    Samples of a split that is not `uniform` (pictures of several sizes) come one by one.
    """
    chosen = split if len(drawn(len(split), images)) == len(split) else Subset(split, drawn(len(split), images))
    return DataLoader(
        chosen,
        batch_size=batch_size if getattr(split, "uniform", True) else 1,
        num_workers=workers,
        collate_fn=getattr(split, "collate", None),
    )


def drawn(length: int, images: int) -> list[int]:
    """Indices, ascending, of `images` samples, the same at every call; 0: of all.

    By chance: a prefix would favour classes where files lie class by class, and even steps where classes take turns.
    """
    if not 0 < images < length:
        return list(range(length))
    return sorted(np.random.RandomState(0).permutation(length)[:images].tolist())


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable | Dataset, *, accelerator: Accelerator | None = None) -> Evaluation:
    """Test `model` on batches (images [B,C,H,W], labels [B]), or on a split, in its own precision, without autocast.

    With an `accelerator` and a loader that it prepared, every process tests its share and gets the whole result.
    Leaves the model in the mode it was in. Raises ValueError for images or logits that are not finite.
    """
    if isinstance(loader, Dataset):
        loader = batches_of(loader, batch_size=_BATCH)
    first = next(model.parameters())
    matrix, losses, predictions = None, [], []
    with evaluating(model):
        for number, (images, labels) in enumerate(loader):
            images, labels = images.to(first.device, first.dtype), labels.to(first.device)
            # Spikes hide what is not finite. As logits it reaches all processes, so that all stop and none waits.
            whole = torch.isfinite(images).flatten(-3).all(-1)  # clips have frames: [T, B]
            logits = model(images).masked_fill(~whole.view(-1, len(labels)).all(0)[:, None], torch.nan)
            if accelerator is not None:
                logits, labels = accelerator.gather_for_metrics((logits, labels))
            logits, labels = logits.cpu(), labels.cpu()
            if not torch.isfinite(logits).all():
                raise ValueError(f"test batch {number} gives values that are not finite; check images and weights")
            if matrix is None:
                # Gathered above: torchmetrics must not sum over the processes once more.
                matrix = MulticlassConfusionMatrix(logits.shape[1], sync_on_compute=False)
            predictions.append(logits.argmax(1))
            matrix.update(predictions[-1], labels)
            losses.append(F.cross_entropy(logits.double(), labels, reduction="none"))
    if matrix is None:
        raise ValueError("there is nothing to test on: the test split is empty")
    confusion = matrix.compute()
    return Evaluation(
        accuracy=int(confusion.diag().sum()) / int(confusion.sum()),
        loss=float(torch.cat(losses).mean()),
        confusion=confusion.tolist(),
        predictions=torch.cat(predictions).tolist(),
    )


@torch.no_grad()
def firing_rates(model: nn.Module, loader: Iterable) -> tuple[dict[str, float], float]:
    """Counts over levels, 0..1: the mean of each neuron by name, and of all elements together; nothing for an ANN.

    `loader`: batches (images [B,C,H,W], labels [B]); at least one.
    """
    first = next(model.parameters())
    levels = {name: module.levels for name, module in model.named_modules() if isinstance(module, Neuron)}
    if not levels:
        return {}, 0.0
    spikes, elements = dict.fromkeys(levels, 0), dict.fromkeys(levels, 0)
    with evaluating(model), energy.record(model) as counts:
        for images, _ in loader:
            model(images.to(first.device, first.dtype))
            for name, value in counts.items():  # whole numbers: exact, and float64 is not everywhere (MPS)
                spikes[name] += int(value.sum())
                elements[name] += value.numel()
    fired = {name: spikes[name] / levels[name] for name in levels if elements[name]}
    return {name: fired[name] / elements[name] for name in fired}, sum(fired.values()) / sum(elements.values())


@torch.no_grad()
def summarise(model: nn.Module, recipe: Recipe, split: Dataset, *, predictions: list[int] | None = None) -> dict:
    """Energy, firing and integer part of a summary, for a network in float32 on the CPU and a test split.

    `predictions` are those of `evaluate` over the whole split, if they are known already.
    """
    spent = energy_and_firing(model, recipe, split)
    return spent | {
        "integer_agreement": integer_agreement(
            model,
            split,
            batch_size=recipe.batch_size,
            images=recipe.testing.integer_images,
            predictions=predictions,
        )
        if spent["layers"]
        else None,  # an ANN has no counts to run on
    }


@torch.no_grad()
def energy_and_firing(model: nn.Module, recipe: Recipe, split: Dataset) -> dict:
    """What a network of any task spends on `testing.energy_images` of a split, and how often each neuron fires."""
    model.eval()
    loader = batches_of(split, batch_size=recipe.batch_size, images=recipe.testing.energy_images)
    report = energy.measure(model, loader)
    return {
        "firing_rate": report.firing_rate,
        "spikes_per_image": report.spikes_per_image,
        "energy_mj": report.total_mj,
        "energy_mj_sd": report.sd_mj,
        "ann_energy_mj": report.ann_mj,
        "energy_convention": report.convention,
        "energy_by_stage": report.stages(),
        "layers": firing_rates(model, loader)[0],
    }


@torch.no_grad()
def integer_agreement(
    model: nn.Module, split: Dataset, *, batch_size: int, images: int = 0, predictions: list[int] | None = None
) -> dict:
    """Test the integer engine against the network, on `images` samples of `split` chosen by `drawn` (0: all).

    Gives "same" of "total" predictions, the indices in the split of "different" ones, and over these samples the
    "accuracy" of the engine and the "float_accuracy" of the network, 0..1. `predictions` are the network's over the
    whole split: with them it does not run again, which `IntegerModel.compare` would need.
    """
    indices = drawn(len(split), images)
    engine, guesses, own, labels = None, [], [], []
    for batch, truth in batches_of(split, batch_size=batch_size, images=images):
        if engine is None:
            engine = integer(model, batch)
        guesses += engine(batch).argmax(1).tolist()
        own += [] if predictions else model(batch).argmax(1).tolist()
        labels += truth.tolist()
    own = [predictions[i] for i in indices] if predictions else own
    different = [i for i, guess, mine in zip(indices, guesses, own, strict=True) if guess != mine]
    right, right_own = (sum(map(operator.eq, found, labels)) for found in (guesses, own))
    return {
        "same": len(indices) - len(different),
        "total": len(indices),
        "different": different,
        "accuracy": right / len(indices),
        "float_accuracy": right_own / len(indices),
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, the mode as before after it."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)

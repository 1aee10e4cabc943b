"""A finished run to export, by its task: what its network is given, what is right, and how a picture is prepared."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spikeformers.data.images import ImageData, ImageSplit
from spikeformers.data.segmentation import SegmentationData, SegmentationSplit
from spikeformers.data.splits import load_split
from spikeformers.layers.pretrained import CONFIG
from spikeformers.neurons import Neuron
from spikeformers.train.evaluate import batches_of, drawn
from spikeformers.train.recipe import Recipe
from spikeformers.train.results import short
from spikeformers.train.saved import PACKED, framing_of, preprocessing_of, read_run, run_of
from spikeformers.train.segmentation import windows_of
from spikeformers.train.segmentation_evaluate import Windows, evaluate_segmentation
from spikeformers.train.summary import SegmentationSummary, Summary, read_summary
from spikeformers.zoo import CATALOGUE, from_pretrained


@dataclass(frozen=True)
class Exportable(ABC):
    """A finished run of a spiking network (the packed form, if there is one), and what is known of it.

    `split`: its test images. `SCORES`: fields of a model's card that hold what it is worth, and their names in a table.
    """

    SCORES: ClassVar[dict[str, str]]
    BATCH: ClassVar[int]  # test images at once, in float64

    run: Path
    model: nn.Module
    recipe: Recipe
    summary: Summary | SegmentationSummary
    split: ImageSplit | SegmentationSplit

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if the test images are no longer those that the run was tested on."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """How to prepare pictures, and what classes are called, as `spikeformers.deploy.save` takes it."""

    @abstractmethod
    def before(self, images: int) -> dict[str, float]:
        """The scores of the network on `images` test images, 0..1."""

    @abstractmethod
    def after(self, engine: Callable, images: int) -> dict[str, float]:
        """The scores of what computes the same as the network."""

    @abstractmethod
    def agreeing(self, same: int, share: float) -> str:
        """In words that `same` inputs give the same predictions everywhere, which are a `share` of all predictions."""

    @property
    def unit(self) -> str:
        """What the network is given."""
        return "images"

    def batches(self, images: int) -> DataLoader:
        """Batches of `images` test images with their labels, the same at every call."""
        return batches_of(self.split, batch_size=self.BATCH, images=images)

    def inputs(self, images: int) -> Iterator[Tensor]:
        """Batches of what the network is given of `images` test images."""
        for batch, _ in self.batches(images):
            yield from self._parts(batch)

    def image(self) -> Tensor:
        """What the network is given first, [1, C, H, W]."""
        return next(self._parts(self.split[0][0][None]))

    def _parts(self, batch: Tensor) -> Iterator[Tensor]:
        yield batch


class ExportableClassifier(Exportable):
    """Of a network that gives a class to each image."""

    SCORES: ClassVar = {"accuracy": "Accuracy"}
    BATCH: ClassVar = 8

    def check(self) -> None:
        tested, there = len(self.summary.predictions), len(self.split)
        if tested != there:
            raise ValueError(
                f"{self.run} was tested on {tested:,} images, and {self.recipe.data.source} has {there:,} now: put the "
                "test images back that it was trained with"
            )

    def about(self) -> dict[str, Any]:
        return {"preprocessing": preprocessing_of(self.recipe.data), "labels": self.summary.classes}

    def before(self, images: int) -> dict[str, float]:
        """As the run was tested."""
        return self._accuracy(torch.tensor(self.summary.predictions)[drawn(len(self.split), images)], images)

    def after(self, engine: Callable, images: int) -> dict[str, float]:
        return self._accuracy(torch.cat([engine(batch).argmax(1) for batch in self.inputs(images)]), images)

    def _accuracy(self, guesses: Tensor, images: int) -> dict[str, float]:
        labels = torch.as_tensor(self.split.labels)[drawn(len(self.split), images)]
        return {"accuracy": float((guesses == labels).double().mean())}

    def agreeing(self, same: int, share: float) -> str:
        return f"same prediction for {same:,}"


class ExportableSegmenter(Exportable):
    """Of a network that gives a class to each pixel, seeing pictures as a whole or through windows."""

    SCORES: ClassVar = {"miou": "mIoU", "accuracy": "Pixel accuracy"}
    BATCH: ClassVar = 1  # pictures are large, and may be of several sizes

    @property
    def windows(self) -> Windows | None:
        return windows_of(self.recipe)

    @property
    def unit(self) -> str:
        return "windows" if self.windows else "images"

    def check(self) -> None:
        tested, there = tuple(self.summary.classes), tuple(self.split.classes)
        if tested != there:
            raise ValueError(
                f"{self.run} was tested on {len(tested)} classes ({', '.join(tested[:3])}, ...), and "
                f"{self.recipe.data.source} has {len(there)} now ({', '.join(there[:3])}, ...): put the test images "
                "back that it was trained with"
            )

    def about(self) -> dict[str, Any]:
        framing = framing_of(self.recipe.data, windows=self.windows)
        return {"preprocessing": framing, "labels": self.summary.classes, "colours": self.summary.colours}

    def before(self, images: int) -> dict[str, float]:
        return self.after(self.model, images)

    def after(self, engine: Callable, images: int) -> dict[str, float]:
        found = evaluate_segmentation(self.model, self.batches(images), windows=self.windows, run=engine)
        return {"miou": found.miou, "accuracy": found.pixel_accuracy}

    def agreeing(self, same: int, share: float) -> str:
        return f"same class for {in_share(share)} of the pixels"

    def _parts(self, batch: Tensor) -> Iterator[Tensor]:
        if self.windows is None:
            yield batch
        else:
            yield from (batch[..., rows, columns] for rows, columns in self.windows.over(tuple(batch.shape[-2:])))


def in_share(equal: float) -> str:
    """A share close to 1, without rounding to it what is less."""
    if equal == 1:
        return "all"
    return f"{100 * equal:.3f} %" if equal < 0.9999 else f"all but {short(100 * (1 - equal))} %"


EXPORTABLES = {ImageData: ExportableClassifier, SegmentationData: ExportableSegmenter}


def read_exportable(source: Path) -> Exportable:
    """Raises ValueError for anything but a finished run of a network that spikes, and says what to do instead."""
    run = run_of(source) or source
    if not (run / "recipe.json").is_file() and (run / CONFIG).is_file():
        data = CATALOGUE[from_pretrained(run).origin.name].data
        kind = "test clips" if data == "events" else "test images"
        raise ValueError(
            f"{source} is a saved model without its run, whose {kind} export needs: give the run, or use "
            "spikeformers.deploy.integer and spikeformers.deploy.save in Python"
        )
    model, recipe, _ = read_run(run)
    if type(recipe.data) not in EXPORTABLES:
        raise ValueError(
            f"{source} gives classes neither to images nor to pixels, which `export` does not compare yet: use "
            "spikeformers.deploy.integer and spikeformers.deploy.export_onnx in Python"
        )
    if source.name != "model" and (run / PACKED).is_dir():
        model = from_pretrained(run / PACKED)
    if not any(isinstance(module, Neuron) for module in model.modules()):
        raise ValueError(f"{source} is an ANN: nothing in it spikes, so it has no integer form; give a spiking run")
    split = load_split(recipe.data, "test", seed=recipe.seed)
    subject = EXPORTABLES[type(recipe.data)](run, model, recipe, read_summary(run), split)
    subject.check()
    return subject

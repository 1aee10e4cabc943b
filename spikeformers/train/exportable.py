"""A finished run to export, by its task: what its network is given, what is right, and how a picture is prepared."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spikeformers.data.detection import DetectionData, DetectionSplit
from spikeformers.data.event_clips import ClipSplit, EventData
from spikeformers.data.images import ImageData, ImageSplit
from spikeformers.data.segmentation import SegmentationData, SegmentationSplit
from spikeformers.data.splits import load_split
from spikeformers.deploy.stages import completed, first_stage, has_two_stages
from spikeformers.heads.detections import CERTAIN
from spikeformers.layers.pretrained import CONFIG
from spikeformers.neurons import Neuron
from spikeformers.train.detection_evaluate import evaluate_detection
from spikeformers.train.evaluate import batches_of, drawn
from spikeformers.train.recipe import Recipe
from spikeformers.train.results import short
from spikeformers.train.saved import PACKED, framing_of, preprocessing_of, read_run, run_of
from spikeformers.train.segmentation import windows_of
from spikeformers.train.segmentation_evaluate import Windows, evaluate_segmentation
from spikeformers.train.summary import DetectionSummary, SegmentationSummary, Summary, read_summary
from spikeformers.zoo import CATALOGUE, from_pretrained


@dataclass(frozen=True)
class Exportable(ABC):
    """A finished run of a spiking network (the packed form, if there is one), and what is known of it.

    `split`: its test images. `SCORES`: fields of a model's card that hold what it is worth, and their names in a table;
    not every network has all. `ONE_SIZE`: the setting that makes all test images of one size. `EACH`, `TESTED`: what
    the split holds, in words.
    """

    SCORES: ClassVar[dict[str, str]]
    BATCH: ClassVar[int]  # test images at once, in float64
    ONE_SIZE: ClassVar[str] = "data.test_size"
    EACH: ClassVar[str] = "an image"
    TESTED: ClassVar[str] = "test images"

    run: Path
    model: nn.Module
    recipe: Recipe
    summary: Summary | SegmentationSummary | DetectionSummary
    split: ImageSplit | ClipSplit | SegmentationSplit | DetectionSplit

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
    def agreeing(self, same: int, equal: float, *, predictions: int) -> str:
        """In words that `same` inputs give the same predictions everywhere, which are a share `equal` of them all."""

    @property
    def unit(self) -> str:
        """What the network is given."""
        return "images"

    @property
    def missing(self) -> str:
        """What of the network no graph (ONNX, OpenVINO, NIR) can hold, in words; "" if it holds all."""
        return ""

    @property
    def by_hand(self) -> str:
        """How to run a file of this package where `predict` does not, in words; "" where it does."""
        return ""

    def in_graph(self, model: nn.Module) -> nn.Module:
        """The part of the network, or of its engine, that a graph can hold."""
        return model

    def completed(self, model: nn.Module, run: Callable) -> Callable:
        """What gives all that `model` gives, if `run` gives what `in_graph(model)` does."""
        return run

    def batches(self, images: int) -> DataLoader:
        """Batches of `images` test images with their labels, the same at every call."""
        return batches_of(self.split, batch_size=self.BATCH, images=images)

    def inputs(self, images: int) -> Iterator[Tensor]:
        """Batches of what the network is given of `images` test images."""
        for batch, _ in self.batches(images):
            yield from self._parts(batch)

    def _check_classes(self) -> None:
        tested, there = tuple(self.summary.classes), tuple(self.split.classes)
        if tested != there:
            raise ValueError(
                f"{self.run} was tested on {len(tested)} classes ({', '.join(tested[:3])}, ...), and "
                f"{self.recipe.data.source} has {len(there)} now ({', '.join(there[:3])}, ...): put the test images "
                "back that it was trained with"
            )

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

    def agreeing(self, same: int, equal: float, *, predictions: int) -> str:
        return f"same prediction for {same:,}"


class ExportableClips(ExportableClassifier):
    """Of a network that gives a class to each clip of events. A file does not say how events become frames."""

    EACH: ClassVar = "a clip"
    TESTED: ClassVar = "test clips"

    @property
    def unit(self) -> str:
        return "clips"

    @property
    def by_hand(self) -> str:
        return "in Python, spikeformers.deploy.load(FILE)(clips) with clips [T, B, C, H, W]; `predict` takes the run"

    def about(self) -> dict[str, Any]:
        return {"labels": self.summary.classes}

    def image(self) -> Tensor:
        """The first clip, [T, 1, C, H, W]."""
        return self.split[0][0][:, None]


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
        self._check_classes()

    def about(self) -> dict[str, Any]:
        framing = framing_of(self.recipe.data, windows=self.windows)
        return {"preprocessing": framing, "labels": self.summary.classes, "colours": self.summary.colours}

    def before(self, images: int) -> dict[str, float]:
        return self.after(self.model, images)

    def after(self, engine: Callable, images: int) -> dict[str, float]:
        found = evaluate_segmentation(self.model, self.batches(images), windows=self.windows, run=engine)
        return {"miou": found.miou, "accuracy": found.pixel_accuracy}

    def agreeing(self, same: int, equal: float, *, predictions: int) -> str:
        return f"same class for {in_share(equal)} of the pixels"

    def _parts(self, batch: Tensor) -> Iterator[Tensor]:
        if self.windows is None:
            yield batch
        else:
            yield from (batch[..., rows, columns] for rows, columns in self.windows.over(tuple(batch.shape[-2:])))


class ExportableDetector(Exportable):
    """Of a network that finds boxes, and perhaps draws masks, in whole pictures."""

    SCORES: ClassVar = {"map": "mAP", "ap50": "AP50", "mask_map": "mAP of masks"}
    BATCH: ClassVar = 1  # pictures are large, and may be of several sizes
    ONE_SIZE: ClassVar = "data.fit=letterbox"

    def check(self) -> None:
        self._check_classes()
        if self.summary.images != len(self.split):
            raise ValueError(
                f"{self.run} was tested on {self.summary.images:,} images, and {self.recipe.data.source} has "
                f"{len(self.split):,} now: put the test images back that it was trained with"
            )

    def about(self) -> dict[str, Any]:
        letterbox = self.recipe.data.letterbox
        return {"preprocessing": letterbox, "labels": self.summary.classes, "colours": self.summary.colours}

    def before(self, images: int) -> dict[str, float]:
        return self.after(self.model, images)

    def after(self, engine: Callable, images: int) -> dict[str, float]:
        count = len(self.split.classes)
        found = evaluate_detection(self.model, self.batches(images), num_classes=count, run=engine)
        scores = {"map": found.boxes.mean(), "ap50": found.boxes.mean(iou=0.5)}
        return scores if found.masks is None else scores | {"mask_map": found.masks.mean()}

    @property
    def missing(self) -> str:
        return "the second stage, which chooses regions: it stays in torch" if has_two_stages(self.model) else ""

    def in_graph(self, model: nn.Module) -> nn.Module:
        return first_stage(model) if has_two_stages(model) else model

    def completed(self, model: nn.Module, run: Callable) -> Callable:
        return completed(model, run) if has_two_stages(model) else run

    def agreeing(self, same: int, equal: float, *, predictions: int) -> str:
        if not predictions:
            return f"neither finds anything with a score of {CERTAIN} or more"
        return f"same box and class for {in_share(equal)} of {predictions:,} detections"

    def image(self) -> Tensor:
        return self.split.collate([self.split[0]])[0]


def in_share(equal: float) -> str:
    """A share close to 1, without rounding to it what is less."""
    if equal == 1:
        return "all"
    return f"{100 * equal:.3f} %" if equal < 0.9999 else f"all but {short(100 * (1 - equal))} %"


EXPORTABLES = {
    EventData: ExportableClips,
    ImageData: ExportableClassifier,
    SegmentationData: ExportableSegmenter,
    DetectionData: ExportableDetector,
}


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
            f"{source} gives classes neither to images nor to pixels, and finds no boxes, so `export` does not compare "
            "it yet: use spikeformers.deploy.integer and spikeformers.deploy.export_onnx in Python"
        )
    if source.name != "model" and (run / PACKED).is_dir():
        model = from_pretrained(run / PACKED)
    if not any(isinstance(module, Neuron) for module in model.modules()):
        raise ValueError(f"{source} is an ANN: nothing in it spikes, so it has no integer form; give a spiking run")
    split = load_split(recipe.data, "test", seed=recipe.seed)
    subject = EXPORTABLES[type(recipe.data)](run, model, recipe, read_summary(run), split)
    subject.check()
    return subject

"""`summary.json`: what a finished run achieved, on what, and with which versions."""

import copy
import dataclasses
import logging
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset

from spikeformers.data.detection import DetectionData
from spikeformers.data.event_clips import EventData
from spikeformers.data.segmentation import SegmentationData
from spikeformers.data.splits import KINDS
from spikeformers.quantize import size
from spikeformers.train.checkpoint import read_json, write_json
from spikeformers.train.clips import step_by_step
from spikeformers.train.evaluate import Evaluation, batches_of, summarise
from spikeformers.train.recipe import Recipe, to_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What every finished run tells. Rates 0..1; `layers`: the firing rate of each neuron."""

    recipe: dict
    model: str
    parameters: int
    epochs: int
    seconds: float  # of training and testing, over all interruptions
    firing_rate: float
    layers: dict[str, float]
    versions: dict[str, str]
    threads: int
    hardware: str
    command: str


@dataclass(frozen=True, kw_only=True)
class PretrainSummary(Finished):
    """A finished pre-training. `loss`: of hidden patches of the test split; `visible` of `patches` are seen.

    Parameters are the encoder's, its unused classifier included; firing rates the encoder's on whole images.
    """

    decoder_parameters: int
    loss: float  # at the last epoch
    best_loss: float
    visible: int
    patches: int


@dataclass(frozen=True, kw_only=True)
class FinishedTask(Finished):
    """What every finished run of a task tells that a network is used for. Energies in mJ an image."""

    METRIC: ClassVar[str]  # the field that runs are compared by
    LABEL: ClassVar[str]  # what people call it
    size_mb: float
    spikes_per_image: float
    energy_mj: float
    energy_mj_sd: float
    ann_energy_mj: float
    energy_convention: str
    energy_by_stage: dict[str, dict[str, float]]
    integer_agreement: dict | None  # None for an ANN, or where the engine refuses
    classes: list[str]
    quantized: dict[str, float] | None = None  # quantize.Size of low-bit weights


@dataclass(frozen=True, kw_only=True)
class Summary(FinishedTask):
    """A finished classification. Accuracies 0..1."""

    METRIC: ClassVar[str] = "accuracy"
    LABEL: ClassVar[str] = "Test accuracy"
    accuracy: float  # at the last epoch, on the whole test split
    best_accuracy: float
    loss: float
    confusion: list[list[int]]  # [true][predicted]
    predictions: list[int]  # over the test split, in order
    distillation: dict[str, float] | None = None  # of q, k, v: accuracy of the teacher, distill.Cost of a step
    by_step: dict[str, list[float]] | None = None  # of clips: clips.StepByStep over the whole test split
    sensor: list[int] | None = None  # of clips: height and width of the camera, if it was one


@dataclass(frozen=True, kw_only=True)
class SegmentationSummary(FinishedTask):
    """A finished segmentation. Accuracies and IoUs 0..1; `integer_agreement` is of pixels.

    `per_class_iou` is None for a class that neither truth nor prediction knows; `miou` is the mean of the others.
    """

    METRIC: ClassVar[str] = "miou"
    LABEL: ClassVar[str] = "mIoU"
    miou: float  # at the last epoch, on the whole test split
    best_miou: float
    pixel_accuracy: float
    mean_accuracy: float
    per_class_iou: dict[str, float | None]
    integer_refused: str  # why there is no integer engine; "" if there is one
    confusion: list[list[int]]  # pixels [true][predicted]
    colours: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class DetectionSummary(FinishedTask):
    """A finished detection. Average precisions 0..1, at the last epoch, on the whole test split of `images` pictures.

    `floor_*`: of the same boxes in every picture, fitted to the training set. Classes and areas that the split does not
    hold have None. `curves`: precision of each class at the recalls 0, 0.01, ... 1, for boxes with an IoU of 0.5; -1
    without such objects. `integer_agreement` is of detections.
    """

    METRIC: ClassVar[str] = "map"
    LABEL: ClassVar[str] = "mAP"
    map: float
    ap50: float
    ap75: float
    best_map: float
    floor_map: float
    floor_ap50: float
    by_area: dict[str, float | None]
    per_class_ap: dict[str, float | None]
    per_class_ap50: dict[str, float | None]
    curves: dict[str, list[float]]
    mask_map: float | None  # None without masks
    mask_ap50: float | None
    images: int
    integer_refused: str  # why there is no integer engine; "" if there is one
    colours: list[list[int]]


AnySummary = Summary | PretrainSummary | SegmentationSummary | DetectionSummary


def finish(
    model: nn.Module,
    recipe: Recipe,
    run: Path,
    *,
    split: Dataset,
    evaluation: Evaluation,
    best_accuracy: float,
    seconds: float,
    distillation: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Save the network in `run/model`, count its energy, test its integer form, and write `run/summary.json` last.

    `distillation` measures what a teacher of q, k and v gave and cost. It is asked once the network is safe, and may
    run out of the device's memory: then nothing is known of it.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    model.save_pretrained(run / "model")
    summary = Summary(
        recipe=to_json(recipe),
        model=recipe.model.name,
        **weights_of(model),
        accuracy=evaluation.accuracy,
        best_accuracy=best_accuracy,
        loss=evaluation.loss,
        epochs=recipe.epochs,
        seconds=seconds,
        confusion=evaluation.confusion,
        predictions=evaluation.predictions,
        classes=[str(each) for each in split.classes],
        distillation=_measured(distillation),
        by_step=_streamed(model, recipe, split),
        sensor=list(split.sensor) if isinstance(recipe.data, EventData) and split.sensor else None,
        **circumstances(),
        **summarise(model, recipe, split, predictions=evaluation.predictions),
    )
    write_json(run / "summary.json", dataclasses.asdict(summary))


def _measured(distillation: Callable[[], dict[str, float]] | None) -> dict[str, float] | None:
    try:
        return distillation() if distillation else None
    except torch.OutOfMemoryError:
        logger.warning("not enough memory to measure what the distillation costs")
        return None


def _streamed(model: nn.Module, recipe: Recipe, split: Dataset) -> dict[str, list[float]] | None:
    """How accuracy and firing grow over the steps of clips; None for pictures."""
    if not isinstance(recipe.data, EventData):
        return None
    return dataclasses.asdict(step_by_step(model, batches_of(split, batch_size=recipe.batch_size)))


def weights_of(model: nn.Module) -> dict[str, object]:
    """How many numbers a network holds, and how large they are."""
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "parameters": sum(each.numel() for each in model.parameters()),
        "size_mb": sum(each.numel() * each.element_size() for each in tensors) / 1e6,
        "quantized": dataclasses.asdict(size(model)) if model.quantization else None,
    }


def circumstances() -> dict[str, object]:
    """Versions, threads, hardware and command: what somebody needs to repeat a run."""
    return {
        "versions": {"python": platform.python_version()}
        | {each: version(each) for each in ("torch", "timm", "spikeformers")},
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "command": shlex.join(["spikeformers" if "spikeformers" in sys.argv[0] else sys.argv[0], *sys.argv[1:]]),
    }


def read_summary(run: Path) -> AnySummary:
    """The summary of a finished run. Raises ValueError if `run` holds none or one of another version."""
    stored = read_json(run / "summary.json")
    try:
        return kind_of_summary(stored["recipe"])(**stored)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{run / 'summary.json'} was written by another version ({error})") from None


def kind_of_summary(recipe: dict) -> type[AnySummary]:
    """What a run of a stored recipe leaves."""
    dense = {SegmentationData: SegmentationSummary, DetectionData: DetectionSummary}
    return dense.get(_kind(recipe), PretrainSummary if pretrains(recipe) else Summary)


def segments(recipe: dict) -> bool:
    """Whether a stored recipe is one of segmentation."""
    return _kind(recipe) is SegmentationData


def detects(recipe: dict) -> bool:
    """Whether a stored recipe is one of detection."""
    return _kind(recipe) is DetectionData


def _kind(recipe: dict) -> type | None:
    return KINDS.get(recipe.get("data", {}).get("source"))


def pretrains(recipe: dict) -> bool:
    """Whether a stored recipe is one of masked pre-training."""
    return recipe.get("pretrain", {}).get("mask_ratio", 0) > 0


def hardware() -> str:
    """Name of the processor, and of the first CUDA device if there is one."""
    name = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        lines = [line for line in listing.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

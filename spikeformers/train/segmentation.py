"""Semantic segmentation as a task of the loop: its loss, its test, and what a run leaves behind.

Papers: Meta-SpikeFormer, Sec. 4.4; Spike2Former, Sec. 4. Losses are in heads/, mIoU in segmentation_evaluate.py.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spikeformers.data.segmentation import SegmentationSplit
from spikeformers.data.segmentation_augment import IGNORE
from spikeformers.deploy import integer
from spikeformers.train.checkpoint import write_json
from spikeformers.train.evaluate import energy_and_firing
from spikeformers.train.recipe import Recipe, refuse_others, to_json
from spikeformers.train.segmentation_evaluate import (
    SegmentationResult,
    Windows,
    balanced_weights,
    evaluate_segmentation,
    pixel_agreement,
)
from spikeformers.train.segmentation_pictures import (
    QUERIES,
    SAMPLES,
    SAMPLING,
    draw_queries,
    draw_samples,
    draw_sampling,
)
from spikeformers.train.summary import SegmentationSummary, circumstances, weights_of
from spikeformers.weights.load import few

logger = logging.getLogger(__name__)


def windows_of(recipe: Recipe) -> Windows | None:
    """The sliding windows that a recipe tests with; None for whole pictures.

    Raises ValueError for gaps, and for sizes of windows beside whole pictures.
    """
    chosen = recipe.segmentation
    if chosen.test == "whole":
        for name in ("crop", "stride"):
            if value := getattr(chosen, name):
                raise ValueError(
                    f"segmentation.{name}={value} is of windows, and segmentation.test=whole has none: leave it out or "
                    "set segmentation.test=slide"
                )
        return None
    crop = chosen.crop or recipe.data.size
    stride = chosen.stride or tuple(max(1, 2 * side // 3) for side in crop)
    if any(step > side for step, side in zip(stride, crop, strict=True)):
        raise ValueError(f"segmentation.stride={stride} leaves gaps between windows of {crop}: make it no larger")
    return Windows(tuple(crop), tuple(stride))


def check_occurring(split: SegmentationSplit) -> None:
    """Warn of classes without a pixel in the training masks; nothing is known of a set too large for memory.

    Raises ValueError if no pixel has a label.
    """
    found = split.labels_in_memory()
    if found is None:
        return
    hint = f"if it is {IGNORE} in the masks: {IGNORE} is ignored, so write class numbers (0 and 1 instead of 0 and 255)"
    if not found:
        raise ValueError(f"no pixel of the {len(split)} training masks has a class, all are {IGNORE}: {hint}")
    if absent := [name for number, name in enumerate(split.classes) if number not in found]:
        logger.warning("no pixel of the %d training masks is %s; %s", len(split), few(absent), hint)


class SemanticSegmentation:
    """A class for every pixel, by a network with `loss(output, labels)` and `semantic(output, size)`."""

    sampled_images = 4

    def __init__(self, recipe: Recipe, *, split: SegmentationSplit, device: torch.device) -> None:
        """`split`: for training; class weights come from it.

        Raises ValueError for settings that only classifiers and pre-trainings have, and for masks without a label.
        """
        refuse_others(recipe, "segmentation")
        check_occurring(split)
        self.windows = windows_of(recipe)
        self.class_weights: Tensor | None = None
        if power := recipe.segmentation.class_weights:
            masks = (split.mask(index) for index in range(len(split)))
            self.class_weights = balanced_weights(masks, num_classes=len(split.classes)).pow(power).to(device)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network itself. Raises ValueError for one that gives no class to pixels."""
        if not hasattr(network, "semantic"):
            raise ValueError(
                f"{type(network).__name__} gives a class to pictures, not to pixels: choose a model.name with a "
                "segmentation head, such as meta_spikeformer_15m_fpn_ade20k"
            )
        return network

    def network(self, model: nn.Module) -> nn.Module:
        return model

    def loss(self, model: Callable, images: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Scalar loss of images [B,C,H,W] with labels [B,H,W]; calls `model` once."""
        output = model(images)
        weights = None if self.class_weights is None else self.class_weights.to(images.dtype)
        return getattr(model, "module", model).loss(output, labels, class_weights=weights)

    def test(
        self, model: nn.Module, loader: DataLoader, *, accelerator: Accelerator | None = None
    ) -> SegmentationResult:
        return evaluate_segmentation(model, loader, windows=self.windows, accelerator=accelerator)

    def finish(
        self,
        model: nn.Module,
        recipe: Recipe,
        run: Path,
        *,
        split: SegmentationSplit,
        result: SegmentationResult,
        best: float,
        seconds: float,
    ) -> None:
        """Save the network in `run/model`, draw pictures, and write `run/summary.json` last."""
        model = copy.deepcopy(model).cpu().float().eval()
        model.save_pretrained(run / "model")
        draw_samples(model, split, run / SAMPLES, windows=self.windows)
        draw_queries(model, split, run / QUERIES)
        draw_sampling(model, split, run / SAMPLING)
        summary = SegmentationSummary(
            recipe=to_json(recipe),
            model=recipe.model.name,
            **weights_of(model),
            miou=result.miou,
            best_miou=best,
            pixel_accuracy=result.pixel_accuracy,
            mean_accuracy=result.mean_accuracy,
            per_class_iou=result.by_class(split.classes),
            epochs=recipe.epochs,
            seconds=seconds,
            confusion=result.confusion.tolist(),
            classes=list(split.classes),
            colours=split.colours.tolist(),
            **circumstances(),
            **energy_and_firing(model, recipe, split),
            **self._integer_part(model, recipe, split),
        )
        write_json(run / "summary.json", dataclasses.asdict(summary))

    def _integer_part(self, model: nn.Module, recipe: Recipe, split: SegmentationSplit) -> dict[str, object]:
        """How many pixels the integer engine gives the same class, or why it does not take this network."""
        image = split[0][0][None]
        try:
            engine = integer(model, image)
        except ValueError as error:
            return {"integer_agreement": None, "integer_refused": str(error)}
        images = recipe.testing.integer_images
        found = pixel_agreement(model, engine, split, images=images, windows=self.windows)
        return {"integer_agreement": found, "integer_refused": ""}

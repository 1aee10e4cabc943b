"""Object detection as a task of the loop: its loss, its test, and what a run leaves behind.

Paper: Meta-SpikeFormer, Sec. 4.3 and App. C.2. Losses are in heads/, average precision in detection_evaluate.py.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spikeformers.data.detection import DetectionSplit
from spikeformers.deploy import integer
from spikeformers.heads.detections import Target, certain, matched
from spikeformers.train.checkpoint import write_json
from spikeformers.train.detection_evaluate import DetectionResult, constant_boxes, evaluate_detection
from spikeformers.train.detection_pictures import SAMPLES, draw_samples
from spikeformers.train.evaluate import batches_of, drawn, energy_and_firing
from spikeformers.train.recipe import Recipe, refuse_others, to_json
from spikeformers.train.summary import DetectionSummary, circumstances, weights_of


class ObjectDetection:
    """Boxes with classes, by a network with `loss(output, targets)` and `detect(output, sizes)`."""

    sampled_images = 4

    def __init__(self, recipe: Recipe, *, split: DetectionSplit) -> None:
        """`split`: for training; boxes that do not look at the picture are fitted to it.

        Raises ValueError for settings that only other tasks have.
        """
        refuse_others(recipe, "detection")
        self.train_split = split

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network itself. Raises ValueError for one that gives no boxes."""
        if not hasattr(network, "detect"):
            raise ValueError(
                f"{type(network).__name__} gives no boxes: choose a model.name with a detection head, such as "
                "meta_spikeformer_15m_yolo"
            )
        return network

    def network(self, model: nn.Module) -> nn.Module:
        return model

    def loss(self, model: Callable, images: Tensor, targets: Sequence[Target], *, epoch: int) -> Tensor:
        """Scalar loss of images [B,C,H,W] with a target each; calls `model` once."""
        output = model(images, targets)
        parts = getattr(model, "module", model).loss(output, targets)
        return torch.stack(list(parts.values())).sum()

    def test(self, model: nn.Module, loader: DataLoader, *, accelerator: Accelerator | None = None) -> DetectionResult:
        return evaluate_detection(model, loader, num_classes=len(self.train_split.classes), accelerator=accelerator)

    def finish(
        self,
        model: nn.Module,
        recipe: Recipe,
        run: Path,
        *,
        split: DetectionSplit,
        result: DetectionResult,
        best: float,
        seconds: float,
    ) -> None:
        """Save the network in `run/model`, draw pictures, and write `run/summary.json` last."""
        model = copy.deepcopy(model).cpu().float().eval()
        model.save_pretrained(run / "model")
        draw_samples(model, split, run / SAMPLES)
        floor = constant_boxes(self.train_split, split).boxes
        masks = result.masks
        summary = DetectionSummary(
            recipe=to_json(recipe),
            model=recipe.model.name,
            **weights_of(model),
            map=result.boxes.mean(),
            ap50=result.boxes.mean(iou=0.5),
            ap75=result.boxes.mean(iou=0.75),
            best_map=best,
            floor_map=floor.mean(),
            floor_ap50=floor.mean(iou=0.5),
            by_area=result.boxes.by_area(),
            per_class_ap=result.boxes.by_class(split.classes),
            per_class_ap50=result.boxes.by_class(split.classes, iou=0.5),
            curves={name: result.boxes.curve(label).tolist() for label, name in enumerate(split.classes)},
            mask_map=masks and masks.mean(),
            mask_ap50=masks and masks.mean(iou=0.5),
            images=result.images,
            epochs=recipe.epochs,
            seconds=seconds,
            classes=list(split.classes),
            colours=split.colours.tolist(),
            **circumstances(),
            **energy_and_firing(model, recipe, split),
            **self._integer_part(model, recipe, split),
        )
        write_json(run / "summary.json", dataclasses.asdict(summary))

    def _integer_part(self, model: nn.Module, recipe: Recipe, split: DetectionSplit) -> dict[str, object]:
        """How many detections the integer engine shares, or why it does not take this network."""
        images, _ = split.collate([split[0]])
        try:
            engine = integer(model, images)
        except ValueError as error:
            return {"integer_agreement": None, "integer_refused": str(error)}
        agreement = box_agreement(model, engine, split, images=recipe.testing.integer_images)
        return {"integer_agreement": agreement, "integer_refused": ""}


@torch.no_grad()
def box_agreement(model: nn.Module, engine: nn.Module, split: DetectionSplit, *, images: int) -> dict[str, int]:
    """Test a network's integer `engine` against it on `images` pictures of `split` chosen by `drawn` (0: all).

    Gives "same" of "total" detections that either is certain of: one class, and boxes with an IoU of SAME_BOX.
    """
    same = total = 0
    for image, targets in batches_of(split, batch_size=1, images=images):
        sizes = torch.stack([target["size"] for target in targets])
        own, other = (certain(model.detect(run(image), sizes)[0]) for run in (model, engine))
        shared = matched(own, other)
        same += shared
        total += len(own.labels) + len(other.labels) - shared
    return {"same": same, "total": total, "images": len(drawn(len(split), images))}

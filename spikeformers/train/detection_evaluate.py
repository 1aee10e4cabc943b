"""What a detector is worth: COCO's average precision of its boxes and masks, in pixels of the pictures' files.

AP of a class is the mean precision over 101 recalls; mAP is its mean over the IoU thresholds 0.5, 0.55, ... 0.95 and
the classes that the split holds; AP50 and AP75 are at one threshold (Lin et al., ECCV 2014; cocodataset.org).  At most
100 detections of a class count in a picture.  All of it is computed by faster-coco-eval.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import box_convert, box_iou

from spikeformers.data.detection import DetectionSplit
from spikeformers.data.detection_sources import Objects
from spikeformers.data.held import spread
from spikeformers.heads.detections import Detections
from spikeformers.train.evaluate import evaluating

Size = tuple[int, int]  # height, width
AREAS = ("all", "small", "medium", "large")  # below 32 x 32 pixels, below 96 x 96, and above
IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
_MASKS_AT_ONCE = 16  # float masks of a large picture are large
_CANDIDATES = 500  # boxes of a class among which `constant_boxes` chooses
_SAMPLED = 1000  # training pictures that it looks at


@dataclass(frozen=True)
class AveragePrecision:
    """Precision of a whole split: `table` float64 [IoU, recall, class, area], of IOUS, 0 to 1 by 0.01, and AREAS.

    It is -1 where the split holds no such object.
    """

    table: np.ndarray

    def mean(self, *, iou: float | None = None, area: str = "all", label: int | None = None) -> float | None:
        """AP at a threshold of IOUS (None: mean of all) and of a class (None: likewise); None without such objects."""
        chosen = self.table[..., AREAS.index(area)]
        if iou is not None:
            chosen = chosen[IOUS.index(iou)]
        if label is not None:
            chosen = chosen[..., label]
        known = chosen[chosen >= 0]
        return float(known.mean()) if known.size else None

    def by_class(self, names: Sequence[str], *, iou: float | None = None) -> dict[str, float | None]:
        """AP of every class by its name; None for one that the split does not hold."""
        return {name: self.mean(iou=iou, label=label) for label, name in enumerate(names)}

    def by_area(self) -> dict[str, float | None]:
        """mAP of small, medium and large objects; None where there are none."""
        return {area: self.mean(area=area) for area in AREAS[1:]}

    def curve(self, label: int, *, iou: float = 0.5) -> np.ndarray:
        """Precision of a class at the recalls 0, 0.01, ... 1, float64 [101], to be drawn."""
        return self.table[IOUS.index(iou), :, label, 0]


@dataclass(frozen=True)
class DetectionResult:
    """Result over a split of `images` pictures: AP of the boxes, and of the masks if there are any."""

    boxes: AveragePrecision
    masks: AveragePrecision | None
    images: int

    @property
    def score(self) -> float:
        """What the best epoch has most of: mAP of the boxes."""
        return self.boxes.mean()

    def metrics(self) -> dict[str, float]:
        """What the log of an epoch keeps."""
        kinds = {"test_": self.boxes} | ({"test_mask_": self.masks} if self.masks else {})
        thresholds = {"map": None, "ap50": 0.5, "ap75": 0.75}
        return {
            f"{kind}{name}": found.mean(iou=iou) for kind, found in kinds.items() for name, iou in thresholds.items()
        }


class Found(NamedTuple):
    """What was found in one picture of a split and what is there, both in pixels of its file, of height, width `size`.

    `boxes` float64 [N,4]: x, y, width and height.  `masks`: compressed run lengths, or None.  `finite`: whether the
    picture and all that the network gave are.
    """

    index: int
    size: Size
    truth: Objects
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict] | None = None
    finite: bool = True


def in_file(found: Detections, *, size: Tensor, original: Tensor) -> Detections:
    """Detections in pixels of the picture's file, whose masks become bool [N,H,W].

    `size`, `original`: height and width, int64 [2], of the picture in the network's input and in its file.
    """
    height, width = size.tolist()
    factor = (original.to(found.boxes) / size.to(found.boxes)).flip(0).repeat(2)  # each side was rounded by itself
    masks = found.masks
    if masks is not None:
        target = tuple(original.tolist())
        parts = masks[:, None, :height, :width].split(_MASKS_AT_ONCE)
        drawn = [F.interpolate(part, target, mode="bilinear", align_corners=False)[:, 0] > 0.5 for part in parts]
        masks = torch.cat(drawn) if len(masks) else masks.new_zeros(0, *target, dtype=torch.bool)
    return Detections(found.boxes * factor, found.scores, found.labels, masks)


@torch.no_grad()
def evaluate_detection(
    model: nn.Module,
    loader: Iterable,
    *,
    num_classes: int,
    accelerator: Accelerator | None = None,
    run: Callable | None = None,
) -> DetectionResult:
    """Test `model` on batches of a test split (images [B,C,H,W], targets) of `num_classes`, in its own precision,
    without autocast.

    `model(images)` is given to `model.detect(output, sizes)`; masks count if the network gives some and the split reads
    them.  `run`: what computes the output instead of the model itself, such as its integer engine.
    With an `accelerator` and a loader that it prepared, every process tests its share and gets the whole result.
    Leaves the model in the mode it was in.  Raises ValueError for images, outputs, boxes or scores that are not finite,
    and for a split without objects.
    """
    first = next(model.parameters())
    found: list[Found] = []
    with evaluating(model):
        for images, targets in loader:
            images = images.to(first.device, first.dtype)
            sizes = torch.stack([target["size"] for target in targets]).to(first.device)
            output = (run or model)(images)
            finite = _finite(*(each for each in tree_leaves(output) if isinstance(each, Tensor)))
            detections = model.detect(output, sizes)
            found += [_found(*each, finite=finite) for each in zip(images, targets, detections, strict=True)]
    if accelerator is not None:
        found = gather_object(found)
    # Pictures that only fill the last batch of several processes come twice.
    whole = {each.index: each for each in found}
    return score([whole[index] for index in sorted(whole)], num_classes=num_classes)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in tensors)


def _found(image: Tensor, target: dict[str, Any], detections: Detections, *, finite: bool) -> Found:
    """`finite`: whether what the network gave for the batch of this picture is."""
    here = in_file(detections, size=target["size"], original=target["original"])
    return Found(
        int(target["index"]),
        tuple(target["original"].tolist()),
        target["truth"],
        box_convert(here.boxes.cpu().double(), "xyxy", "xywh").numpy(),  # not every device has float64
        here.scores.cpu().double().numpy(),
        here.labels.cpu().numpy(),
        None if here.masks is None else _run_lengths(here.masks),
        # Spikes hide images that are not finite, and heads drop scores that are not.
        finite and _finite(image, detections.boxes, detections.scores),
    )


def _run_lengths(masks: Tensor) -> list[dict]:
    """Masks bool [N,H,W], compressed one by one."""
    return [rle.encode(np.asfortranarray(mask.byte().cpu().numpy())) for mask in masks]


def score(found: Sequence[Found], *, num_classes: int) -> DetectionResult:
    """The AP of what was found in the pictures of a split of `num_classes`.

    Raises ValueError if it holds what is not finite, or no picture with an object that counts.
    """
    if wrong := next((each for each in found if not each.finite), None):
        raise ValueError(f"test picture {wrong.index} gives values that are not finite; check images and weights")
    boxes = _precision(found, "bbox", num_classes=num_classes)
    if boxes.mean() is None:
        raise ValueError("there is nothing to test on: no test picture holds an object, or all are crowds")
    drawn = all(each.masks is not None and each.truth.masks is not None for each in found)
    masks = _precision(found, "segm", num_classes=num_classes) if drawn else None
    return DetectionResult(boxes, masks, len(found))


def _precision(found: Sequence[Found], kind: str, *, num_classes: int) -> AveragePrecision:
    """AP of "bbox" or "segm"."""
    truth = COCO(
        {
            "images": [{"id": i, "height": each.size[0], "width": each.size[1]} for i, each in enumerate(found)],
            "categories": [{"id": label} for label in range(num_classes)],
            # Numbered from 1: a match with 0 reads as none.
            "annotations": [{"id": i} | each for i, each in enumerate(_truths(found, kind), start=1)],
        }
    )
    test = COCOeval_faster(truth, truth.loadRes(_guesses(found, kind)), kind)
    test.evaluate()
    test.accumulate()
    return AveragePrecision(np.array(test.eval["precision"])[..., -1])  # of 1, 10 and 100 detections


def _truths(found: Sequence[Found], kind: str) -> Iterable[dict]:
    for image, each in enumerate(found):
        there = each.truth
        shapes = there.masks if kind == "segm" else [None] * len(there.labels)
        parts = (there.boxes.tolist(), there.labels.tolist(), there.crowd.tolist(), there.areas.tolist(), shapes)
        for box, label, crowd, area, shape in zip(*parts, strict=True):
            entry = {"image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            yield entry if shape is None else entry | {"segmentation": shape}


def _guesses(found: Sequence[Found], kind: str) -> list[dict]:
    """Either boxes or masks: COCO takes the area of a mask only where there is no box."""
    key = "bbox" if kind == "bbox" else "segmentation"
    return [
        {"image_id": image, "category_id": label, "score": certainty, key: shape}
        for image, each in enumerate(found)
        for label, certainty, shape in zip(
            each.labels.tolist(),
            each.scores.tolist(),
            each.boxes.tolist() if kind == "bbox" else each.masks,
            strict=True,
        )
    ]


def constant_boxes(train: DetectionSplit, test: DetectionSplit, *, limit: int = 100) -> DetectionResult:
    """What the same boxes for every picture are worth on `test`: a detector below it has learnt nothing from pixels.

    At most `limit` boxes, relative to the picture, are chosen one by one among training objects: always the one whose
    class and box (IoU at least 0.5) meet most objects that those before it leave; that number is its score.
    """
    chosen = _greedy(*_relative(train), limit=limit)
    found = []
    for index in range(len(test)):
        height, width = size = test.original_size(index)
        scale = np.array([width, height, width, height])
        boxes, labels, scores = (np.array([each[part] for each in chosen]) for part in range(3))
        found.append(Found(index, size, test.truth(index), boxes.reshape(-1, 4) * scale, scores, labels))
    return score(found, num_classes=len(test.classes))


def _relative(split: DetectionSplit) -> tuple[Tensor, Tensor]:
    """Boxes x, y, w, h over the sides of their pictures, float64 [N,4], and labels, of some training pictures."""
    boxes, labels = [np.zeros((0, 4))], [np.zeros(0, dtype=np.int64)]
    for index in spread(len(split), _SAMPLED):
        objects, (height, width) = split.truth(index), split.original_size(index)
        counted = objects.covering(height, width) & ~objects.crowd
        boxes.append(objects.boxes[counted] / [width, height, width, height])
        labels.append(objects.labels[counted])
    return torch.from_numpy(np.concatenate(boxes)), torch.from_numpy(np.concatenate(labels))


def _greedy(boxes: Tensor, labels: Tensor, *, limit: int) -> list[tuple[np.ndarray, int, int]]:
    """Boxes, labels and scores, best first."""
    corners, chosen = box_convert(boxes, "xywh", "xyxy"), []
    for label in labels.unique().tolist():
        here = torch.nonzero(labels == label).flatten()
        candidates = here[spread(len(here), _CANDIDATES)]
        left = box_iou(corners[candidates], corners[here]) >= 0.5  # candidates that meet objects not yet met
        for _ in range(limit):
            best = int(left.sum(1).argmax())
            if not left[best].any():
                break
            chosen.append((boxes[candidates[best]].numpy(), label, int(left[best].sum())))
            left = left & ~left[best]
    return sorted(chosen, key=lambda each: -each[2])[:limit]

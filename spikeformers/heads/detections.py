"""What detectors are taught and what they give: boxes with classes, and masks where a network draws them."""

from collections.abc import Sequence
from typing import NamedTuple, NotRequired, TypedDict

from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_area, box_iou, clip_boxes_to_image

CERTAIN = 0.3  # score from which on detections are shown and compared
SAME_BOX = 0.5  # IoU from which on two boxes count as one, as in AP50


class Detections(NamedTuple):
    """What was found in one image, the most certain first.

    `boxes`: x and y of two corners, in pixels of the network's input.  `labels`: classes, from 0.  `masks`:
    probabilities at the size of the input, or None.
    """

    boxes: Float[Tensor, "N 4"]
    scores: Float[Tensor, " N"]
    labels: Int64[Tensor, " N"]
    masks: Float[Tensor, "N H W"] | None = None


def certain(found: Detections, *, threshold: float = CERTAIN) -> Detections:
    """The detections with a score of at least `threshold`."""
    kept = found.scores >= threshold
    return Detections(*(None if part is None else part[kept] for part in found))


def matched(found: Detections, other: Detections) -> int:
    """The most pairs of one detection and one of `other`, each taken once, that share their class and SAME_BOX."""
    fits = (box_iou(found.boxes, other.boxes.to(found.boxes)) >= SAME_BOX) & (found.labels[:, None] == other.labels)
    pairs = linear_sum_assignment(fits.cpu().numpy(), maximize=True)
    return int(fits.cpu().numpy()[pairs].sum())


class Target(TypedDict):
    """What is in one image.

    `boxes` [N, 4]: x and y of two corners, in pixels of the network's input.  `labels` int64 [N]: classes, from 0.
    `size` int64 [2]: height and width of the picture, which lies at the top left of its batch's padding.  `crowd` bool
    [N]: groups too dense to be told apart, which are neither learnt nor held against a network.  `masks` bool
    [N, H, W]: at the size of the input.
    """

    boxes: Tensor
    labels: Tensor
    size: Tensor
    crowd: Tensor
    masks: NotRequired[Tensor]


def check_targets(targets: Sequence[Target], *, images: Tensor, num_classes: int) -> None:
    """Raises ValueError, with the place and the cure, for targets that do not fit `images` [B, C, H, W]."""
    check_boxes(targets, images=len(images), num_classes=num_classes)
    for index, target in enumerate(targets):
        count = len(target["labels"])
        if "masks" in target and target["masks"].shape != (count, *images.shape[2:]):
            raise ValueError(
                f"target {index} has masks of shape {tuple(target['masks'].shape)}: {count} boxes in images of "
                f"{tuple(images.shape[2:])} need ({count}, {images.shape[2]}, {images.shape[3]})"
            )


def check_boxes(targets: Sequence[Target], *, images: int, num_classes: int) -> None:
    """The part of `check_targets` that needs to know only how many `images` there are."""
    if len(targets) != images:
        raise ValueError(f"{images} images came with {len(targets)} targets: give one for each image")
    for index, target in enumerate(targets):
        if missing := sorted(Target.__required_keys__ - target.keys()):
            raise ValueError(f"target {index} has no {' and no '.join(missing)}: add what Target names")
        boxes, labels, count = target["boxes"], target["labels"], len(target["labels"])
        if boxes.shape != (count, 4) or target["crowd"].shape != (count,):
            raise ValueError(
                f"target {index} has {count} labels, boxes of shape {tuple(boxes.shape)} and crowd of shape "
                f"{tuple(target['crowd'].shape)}: {count} labels need boxes ({count}, 4) and crowd ({count},)"
            )
        if not boxes.isfinite().all():
            raise ValueError(f"target {index} has a box with a number that is not finite: {boxes.tolist()}")
        least, most = (int(labels.min()), int(labels.max())) if count else (0, 0)
        if not 0 <= least <= most < num_classes:
            other = "" if least < 0 else f", or build it with num_classes={most + 1}"
            raise ValueError(
                f"target {index} has labels {least} to {most}, and this network tells {num_classes} classes apart, "
                f"from 0: map them{other}"
            )


def usable(target: Target) -> Target:
    """The part of a target that can be learnt: boxes clipped to the picture, without crowds and boxes of no area."""
    height, width = target["size"].tolist()
    boxes = clip_boxes_to_image(target["boxes"], (height, width))
    kept = (box_area(boxes) > 0) & ~target["crowd"]
    chosen: Target = {
        "boxes": boxes[kept],
        "labels": target["labels"][kept],
        "size": target["size"],
        "crowd": target["crowd"][kept],
    }
    if "masks" in target:
        chosen["masks"] = target["masks"][kept]
    return chosen

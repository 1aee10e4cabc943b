"""Losses of mask classification: every class in an image is matched to one query, which learns its class and its mask.

Paper: MaskFormer (Cheng et al., 2021) with the weights of Spike2Former's code; matching after DETR (Carion et al.,
2020). Focal loss: Lin et al., 2017. Dice: Milletari et al., 2016.
As in that code: a pixel without a label belongs to no mask, so that masks learn to leave it out; a mask that no class
wants learns nothing, its query learns "no object"; an image with more classes than queries leaves classes unmatched.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from spikeformers.heads.masks import IGNORE, MaskClassification, check_labels
from spikeformers.neurons import as_membrane

EPSILON = torch.finfo(torch.float32).eps  # the authors' code adds it to what it divides sums by


@dataclass(frozen=True)
class MaskLossWeights:
    """What class, mask (focal) and dice count for, in the costs of matching and in the losses.

    `no_object`: weight of that class in the cross entropy.  `alpha`, `gamma`: of the focal loss.
    `resolution`: masks grow to the size of the "labels", as the authors' do, or the labels shrink to that of the
    "masks", which at half size costs a quarter.
    """

    class_cost: float = 1.0
    mask_cost: float = 20.0
    dice_cost: float = 1.0
    class_loss: float = 1.0
    mask_loss: float = 20.0
    dice_loss: float = 1.0
    no_object: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0
    resolution: str = "labels"


class Matches(NamedTuple):
    """M pairs of a query and a class that its image holds."""

    images: Int[Tensor, " M"]
    queries: Int[Tensor, " M"]
    classes: Int[Tensor, " M"]


def matching_costs(
    class_logits: Float[Tensor, "Q K"],
    mask_logits: Float[Tensor, "Q h w"],
    *,
    classes: Int[Tensor, " n"],
    targets: Bool[Tensor, "n h w"],
    weights: MaskLossWeights,
) -> tuple[Float[Tensor, "Q n"], Float[Tensor, "Q n"], Float[Tensor, "Q n"]]:
    """What giving each class to each query would cost: in class, mask and dice, weighted."""
    by_class = -class_logits.softmax(-1)[:, classes]
    logits, wanted = mask_logits.flatten(1), targets.flatten(1).to(mask_logits.dtype)
    inside = logits.sigmoid()
    # -log sigmoid(x) = max(-x, 0) - log sigmoid(|x|): on a CPU F.logsigmoid takes ten times as long.
    least = logits.abs().sigmoid().log()
    hit = ((-logits).relu() - least) * weights.alpha * (1 - inside) ** weights.gamma
    miss = (logits.relu() - least) * (1 - weights.alpha) * inside**weights.gamma
    by_focal = (hit @ wanted.T + miss @ (1 - wanted).T) / wanted.shape[1]
    by_dice = 1 - (2 * inside @ wanted.T + 1) / (inside.sum(1)[:, None] + wanted.sum(1) + 1)
    return weights.class_cost * by_class, weights.mask_cost * by_focal, weights.dice_cost * by_dice


@torch.no_grad()
def match(output: MaskClassification, labels: Int[Tensor, "B H W"], *, weights: MaskLossWeights) -> Matches:
    """The cheapest way to give each class of each image a query of its own.

    Masks are compared at the resolution of the head, to which labels shrink by taking the nearest pixel.
    Raises ValueError for a label that is no class of the head.
    """
    class_logits, mask_logits = as_membrane(output.class_logits), as_membrane(output.mask_logits)
    small = shrunk(labels, mask_logits.shape[2:])
    found = []
    for image, present in enumerate(classes_of(labels, num_classes=class_logits.shape[-1] - 1)):
        costs = matching_costs(
            class_logits[image],
            mask_logits[image],
            classes=present,
            targets=small[image] == present[:, None, None],
            weights=weights,
        )
        # Of a network that diverges any matching will do: its loss is not finite either, and training reports that.
        queries, columns = linear_sum_assignment(sum(costs).nan_to_num().cpu().numpy())
        queries, columns = (torch.as_tensor(each, device=labels.device) for each in (queries, columns))
        found.append((torch.full_like(queries, image), queries, present[columns]))
    return Matches(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def shrunk(labels: Int[Tensor, "B H W"], size: tuple[int, int]) -> Int[Tensor, "B h w"]:
    """Labels at another size, by the nearest pixel."""
    return F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].to(labels.dtype)


def classes_of(labels: Int[Tensor, "B H W"], *, num_classes: int) -> list[Int[Tensor, " n"]]:
    """The classes that each image holds, sorted. Raises ValueError for a label that is neither a class nor 255."""
    check_labels(labels, num_classes=num_classes)
    return [classes[classes != IGNORE] for classes in (image.unique() for image in labels)]


def dice_losses(mask_logits: Float[Tensor, "M H W"], targets: Float[Tensor, "M H W"]) -> Float[Tensor, " M"]:
    """1 - (2 |P and G| + 1) / (|P| + |G| + 1) of each mask, P its probabilities."""
    inside, wanted = mask_logits.sigmoid().flatten(1), targets.flatten(1)
    return 1 - (2 * (inside * wanted).sum(1) + 1) / (inside.sum(1) + wanted.sum(1) + 1)


def mask_losses(
    output: MaskClassification,
    labels: Int[Tensor, "B H W"],
    *,
    weights: MaskLossWeights,
    class_weights: Float[Tensor, " C"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Weighted losses of one layer by name: "loss_cls", "loss_mask", "loss_dice"; `auxiliary` is left out.

    `class_weights` weigh queries by the class that each should give, all 1 if None.  Masks are compared at the
    resolution of the labels and averaged over the masks of all processes.
    """
    class_logits, mask_logits = as_membrane(output.class_logits), as_membrane(output.mask_logits)
    matches = match(output, labels, weights=weights)
    no_object = class_logits.shape[-1] - 1
    wanted = torch.full(class_logits.shape[:2], no_object, device=labels.device)
    wanted[matches.images, matches.queries] = matches.classes
    counts_for = class_logits.new_ones(no_object + 1)
    if class_weights is not None:
        counts_for[:no_object] = class_weights
    counts_for[no_object] = weights.no_object
    entropy = F.cross_entropy(class_logits.mT, wanted, counts_for, reduction="sum")

    chosen = mask_logits[matches.images, matches.queries][:, None]
    chosen = F.interpolate(chosen, labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    targets = (labels[matches.images] == matches.classes[:, None, None]).to(chosen.dtype)
    focal = sigmoid_focal_loss(chosen, targets, alpha=weights.alpha, gamma=weights.gamma, reduction="sum")
    masks = mean_over_processes(class_logits.new_tensor(len(chosen))).clamp(min=1)
    return {
        "loss_cls": weights.class_loss * entropy / (counts_for[wanted].sum() + EPSILON),
        "loss_mask": weights.mask_loss * focal / (masks * labels[0].numel() + EPSILON),
        "loss_dice": weights.dice_loss * dice_losses(chosen, targets).sum() / (masks + EPSILON),
    }


def all_mask_losses(
    output: MaskClassification,
    labels: Int[Tensor, "B H W"],
    *,
    weights: MaskLossWeights,
    class_weights: Float[Tensor, " C"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """`mask_losses` of the output, and of auxiliary output i under the same names behind "d<i>."."""
    if weights.resolution == "masks":
        labels = shrunk(labels, output.mask_logits.shape[2:])
    losses = mask_losses(output, labels, weights=weights, class_weights=class_weights)
    for index, earlier in enumerate(output.auxiliary):
        of_layer = mask_losses(earlier, labels, weights=weights, class_weights=class_weights)
        losses |= {f"d{index}.{name}": loss for name, loss in of_layer.items()}
    return losses


def mean_over_processes(count: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean of `count` over the processes that train together; itself for one alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    torch.distributed.all_reduce(count)
    return count / torch.distributed.get_world_size()

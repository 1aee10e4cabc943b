"""Mask classification: what a head predicts that gives every query a class and a mask, and the map it stands for.

Also what the labels of all heads have in common.

Paper: Cheng et al., "Per-Pixel Classification is Not All You Need" (MaskFormer), 2021, which Spike2Former follows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255
"""Label of pixels that no loss and no score counts."""


def check_labels(labels: Int[Tensor, " *shape"], *, num_classes: int) -> None:
    """Raises ValueError for a label that is neither one of `num_classes` classes nor IGNORE."""
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= num_classes))]
    if wrong.numel():
        raise ValueError(
            f"label {int(wrong[0])} is no class of this head: labels are 0 to {num_classes - 1}, or {IGNORE} for "
            "pixels to ignore; build the model with more num_classes or map the labels"
        )


class MaskClassification(NamedTuple):
    """Q queries, each with scores of C classes and "no object" (last), and a mask at the resolution of the head.

    `auxiliary`: what earlier layers of the decoder predict, first to last, where the head was training.
    """

    class_logits: Float[Tensor, "B Q K"]
    mask_logits: Float[Tensor, "B Q h w"]
    auxiliary: tuple["MaskClassification", ...] = ()

    def semantic(self, size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        """Scores of the C classes at every pixel of an image of `size` (height, width).

        sum over queries of softmax(class)[:C] * sigmoid(mask), masks enlarged bilinearly before the sigmoid.
        """
        masks = F.interpolate(self.mask_logits, size, mode="bilinear", align_corners=False).sigmoid()
        classes = self.class_logits.softmax(-1)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", classes, masks)

"""Mask classification: what a head predicts that gives every query a class and a mask, and the map it stands for.

Paper: Cheng et al., "Per-Pixel Classification is Not All You Need" (MaskFormer), 2021, which Spike2Former follows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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

"""A backbone and a segmentation head as one network: images in, a class or masks for every pixel out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeformers.heads.composite import Composite, CompositeConfig
from spikeformers.heads.masks import MaskClassification


@dataclass(frozen=True)
class SegmenterConfig(CompositeConfig):
    """A backbone, a segmentation head, and what both share."""

    def build(self) -> "Segmenter":
        return Segmenter(self)


class Segmenter(Composite):
    """Images [B, C, H, W] -> what its head gives: logits of pixels, or classes and masks of queries.

    `semantic(output, size)` makes scores [B, classes, H, W] of either.
    """

    def forward(self, x: Tensor) -> Tensor | MaskClassification:
        return self.head(self.backbone.forward_features(x))

    def semantic(self, output: Tensor | MaskClassification, size: tuple[int, int]) -> Tensor:
        """What `forward` gave -> scores [B, classes, H, W] at `size` = (H, W); the largest is the pixel's class.

        Raises ValueError for a size that is not two numbers.
        """
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise ValueError(f"size must be a height and a width, such as (48, 64), got {size!r}")
        return self.head.semantic(output, size)

    def loss(
        self, output: Tensor | MaskClassification, labels: Tensor, *, class_weights: Tensor | None = None
    ) -> Tensor:
        """Scalar loss of what `forward` gave in training against labels int64 [B, H, W] (255: ignored).

        Labels keep their size, which need not be that of the images: the head brings its output to them, or them to it.
        Raises ValueError for labels of another type.
        """
        if labels.dtype != torch.int64:
            raise ValueError(f"labels must be of torch.int64, got {labels.dtype}: give labels.long()")
        return self.head.loss(output, labels, class_weights=class_weights)

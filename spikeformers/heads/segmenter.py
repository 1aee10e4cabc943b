"""A backbone and a segmentation head as one network: images in, a class or masks for every pixel out."""

from dataclasses import dataclass

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
        """What `forward` gave -> scores [B, classes, H, W] at `size` = (H, W); the largest is the pixel's class."""
        return self.head.semantic(output, size)

    def loss(
        self, output: Tensor | MaskClassification, labels: Tensor, *, class_weights: Tensor | None = None
    ) -> Tensor:
        """Scalar loss of what `forward` gave in training against labels [B, H, W] (255: ignored)."""
        return self.head.loss(output, labels, class_weights=class_weights)

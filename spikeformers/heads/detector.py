"""A backbone and a detection head as one network: images in, boxes with classes (and masks) out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from spikeformers.heads.composite import Composite, CompositeConfig
from spikeformers.heads.detections import Detections, Target, check_boxes, check_targets, usable


@dataclass(frozen=True)
class DetectorConfig(CompositeConfig):
    """A backbone, a detection head, and what both share."""

    num_classes: int = 80

    def build(self) -> "Detector":
        return Detector(self)


class Detector(Composite):
    """Images [B, C, H, W] -> what its head gives; `loss` judges that, `detect` makes boxes of it."""

    def forward(self, x: Float[Tensor, "B C H W"], targets: Sequence[Target] | None = None) -> Any:
        """In training `targets` tell a head of two stages which regions to look at.

        Raises ValueError for targets that do not fit the images.
        """
        if targets is not None:
            check_targets(targets, images=x, num_classes=self.config.num_classes)
            targets = [usable(target) for target in targets]
        return self.head(self.backbone.forward_features(x), image_size=tuple(x.shape[-2:]), targets=targets)

    def loss(self, output: Any, targets: Sequence[Target]) -> dict[str, Float[Tensor, ""]]:
        """Parts of the loss of what `forward` gave in training; their sum is what is trained.

        Raises ValueError for targets that do not fit it.
        """
        check_boxes(targets, images=output.images, num_classes=self.config.num_classes)
        return self.head.loss(output, [usable(target) for target in targets])

    def detect(self, output: Any, sizes: Int64[Tensor, "B 2"] | None = None) -> list[Detections]:
        """What was found in each image, in pixels of the input.

        `sizes`: height and width of each picture within its padding; None if nothing is padded.
        """
        return self.head.detect(output, sizes)

"""Mask R-CNN of spiking layers: boxes with classes and masks in two stages, regions first.

Paper: He et al., ICCV 2017, as Meta-SpikeFormer, Sec. 4.3 and Table 3, and QSD-Transformer, Table 2, use it: a neuron
in front of every convolution and linear layer, time kept up to the results, which are averaged over it.
Parts: heads/pyramid.py (neck), heads/proposals.py (first stage), heads/regions.py (second stage).
Departures from the papers: they say only its name, so wiring and sizes are the authors' code's; those of the parts,
named there.  `norm="batch_norm"` is ours, for training without a trained backbone.  Regions end at the edges of each
picture in training, of the padded batch in evaluation, where `detect` cuts off what was found in them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import maskrcnn_inference, paste_masks_in_image
from torchvision.ops import box_area, clip_boxes_to_image

from spikeformers.heads.detections import Detections, Target
from spikeformers.heads.proposals import Anchors, Dense, ProposalHead, ProposalNetwork
from spikeformers.heads.pyramid import FeaturePyramid, plain_conv
from spikeformers.heads.regions import BoxHead, MaskHead, RegionChoice, RegionPool, Samples
from spikeformers.layers import ConvBN, FeatureInfo
from spikeformers.neurons import NeuronBuilder, as_membrane, choose

MAPS = 4
"""How many of the backbone's maps are read, its last ones; one more is made of the coarsest."""
BOX_CELLS, MASK_CELLS = 7, 14
"""Cells of RoIAlign in either direction, for boxes and for masks."""


class RegionOutput(NamedTuple):
    """What two stages say of images of `image_size`, height and width.

    `classes`, `deltas`: of the regions that were looked at.  `masks`: logits of each class, of the boxes in `found` or,
    in training, of the `samples` on objects; None without a mask head.  With targets there are samples, else boxes.
    """

    image_size: tuple[int, int]
    dense: Dense
    classes: Float[Tensor, "R L1"]
    deltas: Float[Tensor, "R L 4"]
    masks: Float[Tensor, "M L S S"] | None
    samples: Samples | None = None
    found: list[Detections] | None = None

    @property
    def images(self) -> int:
        """How many it is of."""
        return len(self.dense.objectness)


class MaskRCNN(nn.Module):
    """Maps of all levels of a backbone, [T*B, C_i, H_i, W_i] -> RegionOutput.

    `masks`: None for boxes alone.  What needs no choice of regions is `dense`, the rest of `forward` is `complete`:
    for deployment, where networks run elsewhere (`boxes` and `masks` are networks of pooled regions).
    """

    second_stage: ClassVar[tuple[str, ...]] = ("boxes", "masks")

    def __init__(
        self,
        neck: FeaturePyramid,
        *,
        proposals: ProposalNetwork,
        boxes: BoxHead,
        masks: MaskHead | None,
        choice: RegionChoice,
        strides: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.neck = neck
        self.proposals = proposals
        self.box_pool = RegionPool(strides, size=BOX_CELLS)
        self.boxes = boxes
        self.mask_pool = RegionPool(strides, size=MASK_CELLS)
        self.masks = masks
        self.choice = choice
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier, as Sec. 4.3 says; near 0 where results come from, so that nothing is likely at the start."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        for layer in (self.proposals.head.objectness, self.proposals.head.deltas, self.boxes.classify):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.normal_(self.boxes.deltas.weight, std=0.001)

    def forward(
        self,
        maps: list[Real[Tensor, "TB _ _ _"]],
        *,
        image_size: tuple[int, int],
        targets: Sequence[Target] | None = None,
    ) -> RegionOutput:
        """With `targets`, which are `usable`, the second stage looks at samples to learn from; else at proposals.

        Raises ValueError for targets without masks, if masks are to be learnt.
        """
        dense = self.dense(maps)
        if targets is None:
            return self.complete(dense, image_size=image_size)
        if self.masks is not None and not all("masks" in target for target in targets):
            raise ValueError(
                'this head learns masks, and there is a target without "masks": add them, or build it for boxes alone '
                'with mask_head="none"'
            )
        sizes = [tuple(target["size"].tolist()) for target in targets]
        samples = self.choice.sample(self.proposals.regions(dense, sizes), targets)
        classes, deltas = self.boxes(self.box_pool(dense.maps, samples.regions))
        masks = None
        if self.masks is not None:
            on = samples.on_objects(self.choice.num_classes)
            if not torch.cat(on).any():  # one is painted all the same, unjudged: for norms and for every gradient
                on[0][0] = True
            painted = [each[chosen] for each, chosen in zip(samples.regions, on, strict=True)]
            masks = self.masks(self.mask_pool(dense.maps, painted))
        return RegionOutput(image_size, dense, classes, deltas, masks, samples=samples)

    def dense(self, maps: list[Real[Tensor, "TB _ _ _"]]) -> Dense:
        """The first stage, without the choice of regions."""
        pyramid = [as_membrane(each) for each in self.neck(maps[-MAPS:])]
        return self.proposals([*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)])

    def complete(self, dense: Dense, *, image_size: tuple[int, int]) -> RegionOutput:
        """All that follows on the first stage, on images of `image_size` = (height, width)."""
        sizes = [image_size] * len(dense.objectness)
        regions = self.proposals.regions(dense, sizes)
        classes, deltas = self.boxes(self.box_pool(dense.maps, regions))
        found = self.choice.found(classes, deltas, regions, sizes)
        masks = None
        if self.masks is not None:
            masks = self.masks(self.mask_pool(dense.maps, [each.boxes for each in found]))
        return RegionOutput(image_size, dense, classes, deltas, masks, found=found)

    def loss(self, output: RegionOutput, targets: Sequence[Target]) -> dict[str, Float[Tensor, ""]]:
        """The parts "objectness", "rpn_box", "classes", "boxes" and "masks", of what `forward` gave for `targets`."""
        if output.samples is None:
            raise ValueError("forward drew no regions to learn from: give it the targets too, then the loss")
        losses = self.proposals.losses(output.dense, targets)
        losses |= self.choice.losses(output.classes, output.deltas, output.samples)
        if output.masks is not None:
            losses |= self.choice.mask_losses(output.masks, output.samples, targets)
        return losses

    @torch.no_grad()
    def detect(self, output: RegionOutput, sizes: Int64[Tensor, "B 2"] | None = None) -> list[Detections]:
        """What was found in each image: boxes within `sizes` (height and width), if given, and masks of whole images.

        Raises ValueError for what `forward` gave with targets.
        """
        if output.found is None:
            raise ValueError("forward was given targets, so it looked at samples and not at proposals: leave them out")
        found = output.found
        if output.masks is not None:
            painted = maskrcnn_inference(output.masks, [each.labels for each in found])
            found = [
                each._replace(masks=paste_masks_in_image(masks, each.boxes, output.image_size)[:, 0])
                for each, masks in zip(found, painted, strict=True)
            ]
        if sizes is None:
            return found
        return [_within(each, *size) for each, size in zip(found, sizes.tolist(), strict=True)]


def _within(found: Detections, height: int, width: int) -> Detections:
    """Boxes cut off at the edges of the picture, without those outside it."""
    found = found._replace(boxes=clip_boxes_to_image(found.boxes, (height, width)))
    inside = box_area(found.boxes) > 0
    return Detections(*(each if each is None else each[inside] for each in found))


class DenseStage(nn.Module):
    """Images [B, C, H, W] -> Dense: a backbone and the first stage of `head`, as one network of tensors alone."""

    def __init__(self, backbone: nn.Module, head: MaskRCNN) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def steps(self) -> int:
        """Time steps T that it runs."""
        return self.backbone.steps

    def forward(self, images: Float[Tensor, "B C H W"]) -> Dense:
        return self.head.dense(self.backbone.forward_features(images))


NORMS = {"none": (plain_conv, nn.Identity), "batch_norm": (ConvBN, nn.BatchNorm2d)}
"""What builds convolutions, called as `(in, out, kernel, bias=)`, and what stands behind one that levels share."""
MASK_HEADS = {"fcn": MaskHead, "none": None}


@dataclass(frozen=True)
class MaskRCNNConfig:
    """`region_dim`: channels of everything but the linear layers of boxes, which have `fc_dim`.

    `norm`: "none", the authors', with which a head of LIF starts silent and learns slowly (integer neurons fire at
    once), or "batch_norm" behind the convolutions.  `mask_head`: "fcn", or "none" for boxes alone.  `anchor_sizes`: in
    pixels, one for each map, fine to coarse.  `regions`: of an image, for the second stage; `samples`: how many of them
    are learnt from, up to a quarter of them on objects.  Boxes are kept whose score exceeds `score_threshold`, which
    overlap no better one of their class by more than `nms_threshold`, and are the best `limit` of an image.
    """

    own_neurons: ClassVar[tuple[str, ...]] = ()

    region_dim: int = 256
    fc_dim: int = 1024
    norm: str | tuple[Callable[..., nn.Module], Callable[[int], nn.Module]] = "none"
    mask_head: str | Callable[..., nn.Module] = "fcn"
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    regions: int = 1000
    samples: int = 512
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    limit: int = 100

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != MAPS + 1 or not all(0 < size < math.inf for size in self.anchor_sizes):
            raise ValueError(
                f"anchor_sizes needs one size above 0 for each of {MAPS + 1} maps, got {self.anchor_sizes}"
            )
        for name, least in (("region_dim", 1), ("fc_dim", 1), ("regions", 1), ("samples", 4), ("limit", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def build(self, features: FeatureInfo, *, num_classes: int, neuron: NeuronBuilder, steps: int = 1) -> MaskRCNN:
        """The head for a backbone with these `features`. Raises ValueError for too few maps."""
        if len(features) < MAPS:
            raise ValueError(f"Mask R-CNN reads {MAPS} maps, and this backbone gives {len(features)}: take another")
        convolution, norm = choose("norm", self.norm, NORMS)
        spiking = {"neuron": neuron, "steps": steps}
        strides = features.strides[-MAPS:]
        mask_head = choose("mask_head", self.mask_head, MASK_HEADS)
        if mask_head is not None:
            mask_head = mask_head(self.region_dim, num_classes=num_classes, convolution=convolution, **spiking)
        return MaskRCNN(
            FeaturePyramid(features.channels[-MAPS:], self.region_dim, convolution=convolution, neuron=neuron),
            proposals=ProposalNetwork(
                ProposalHead(self.region_dim, levels=MAPS + 1, norm=norm, **spiking),
                anchors=Anchors(self.anchor_sizes, strides=(*strides, 2 * strides[-1])),
                limit=self.regions,
            ),
            boxes=BoxHead(self.region_dim * BOX_CELLS**2, dim=self.fc_dim, num_classes=num_classes, **spiking),
            masks=mask_head,
            choice=RegionChoice(
                num_classes,
                samples=self.samples,
                score_threshold=self.score_threshold,
                nms_threshold=self.nms_threshold,
                limit=self.limit,
            ),
            strides=strides,
        )

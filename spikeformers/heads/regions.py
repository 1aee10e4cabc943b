"""What becomes of regions: pooled from the maps, told apart, moved onto objects, and painted with masks.

Papers: He et al., ICCV 2017 (Mask R-CNN, RoIAlign); Lin et al., CVPR 2017, Eq. 1 (the level that a region is read
from). As Meta-SpikeFormer, Sec. 4.3, uses them: a neuron in front of every layer.  Choosing regions to learn from,
filtering boxes, and losses are torchvision's.
Departures from the authors' code: RoIAlign takes 2x2 samples in each cell, for as many as it has pixels; the transposed
convolution of masks is a 1x1 convolution and a shuffle of pixels, which is the same (but for a bias of each of four
pixels), and which deployment knows; boxes are learnt by the smooth L1 loss with beta 1/9, for L1; the whole picture is
among the regions to learn from.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Real
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from spikeformers.heads.detections import Detections, Target
from spikeformers.heads.pyramid import SpikingConv
from spikeformers.neurons import NeuronBuilder, TimeMean, as_membrane

SAMPLES = 2
"""Points in a cell of RoIAlign, in either direction."""


class RegionPool(nn.Module):
    """Membrane maps [T*B, C, H_i, W_i] and regions of B images -> [T*R, C, size, size], time-major as all else.

    A region of more than 28 cells of the finest map in its (geometric) mean side is read from the next, one of more
    than 56 from the one after that, and so on: as if each had half the resolution of the one before, also where it has
    the same.
    """

    def __init__(self, strides: Sequence[int], *, size: int) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.size = size
        finest = round(math.log2(self.strides[0]))
        self.level_of = LevelMapper(finest, finest + len(self.strides) - 1)

    def forward(
        self, maps: Sequence[Float[Tensor, "TB C _ _"]], regions: Sequence[Float[Tensor, "_ 4"]]
    ) -> Float[Tensor, "TR C S S"]:
        steps = len(maps[0]) // len(regions)
        boxes = torch.cat(list(regions)).to(maps[0].dtype)
        counts = torch.tensor([len(each) for each in regions], device=boxes.device).repeat(steps)
        image = torch.arange(len(counts), device=boxes.device).repeat_interleave(counts)
        regions = torch.cat((image[:, None].to(boxes), boxes.repeat(steps, 1)), 1)
        levels = self.level_of([boxes]).repeat(steps)
        pooled = boxes.new_zeros(len(regions), maps[0].shape[1], self.size, self.size)
        for level, stride in enumerate(self.strides):
            here = levels == level
            pooled[here] = roi_align(
                maps[level], regions[here], self.size, 1 / stride, sampling_ratio=SAMPLES, aligned=True
            )
        return pooled


class BoxHead(nn.Module):
    """Pooled maps [T*R, C, S, S] -> class logits [R, L+1], the last of background, and deltas [R, L, 4] for each class.

    SN - FC - SN - FC - SN, then one linear layer for each result; both are averaged over time.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("classify", "deltas")

    def __init__(self, inputs: int, *, dim: int, num_classes: int, neuron: NeuronBuilder, steps: int = 1) -> None:
        super().__init__()
        self.neuron1 = neuron()
        self.fc1 = nn.Linear(inputs, dim)
        self.neuron2 = neuron()
        self.fc2 = nn.Linear(dim, dim)
        self.neuron3 = neuron()
        self.classify = nn.Linear(dim, num_classes + 1)
        self.deltas = nn.Linear(dim, num_classes * 4)
        self.classes_mean = TimeMean(steps=steps)
        self.deltas_mean = TimeMean(steps=steps)

    def forward(self, pooled: Real[Tensor, "TR C S S"]) -> tuple[Float[Tensor, "R L1"], Float[Tensor, "R L 4"]]:
        x = self.fc1(self.neuron1(pooled.flatten(1)))
        spikes = self.neuron3(self.fc2(self.neuron2(x)))
        classes = self.classes_mean(as_membrane(self.classify(spikes)))
        deltas = self.deltas_mean(as_membrane(self.deltas(spikes)))
        return classes, deltas.unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Pooled maps [T*R, C, S, S] -> mask logits [R, L, 2S, 2S] for each class, averaged over time.

    `depth` times SN - Conv 3x3 (- BN), doubling by SN - Conv 1x1 (- BN) - shuffle, then SN - Conv 1x1.
    `convolution(in, out, kernel, bias=)` builds the layers.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("classify",)

    def __init__(
        self,
        dim: int,
        *,
        num_classes: int,
        convolution: Callable[..., nn.Module],
        neuron: NeuronBuilder,
        steps: int = 1,
        depth: int = 4,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            SpikingConv(convolution(dim, dim, 3, bias=True), neuron=neuron) for _ in range(depth)
        )
        self.enlarge = SpikingConv(convolution(dim, 4 * dim, 1, bias=True), neuron=neuron)
        self.neuron = neuron()
        self.classify = nn.Conv2d(dim, num_classes, 1)
        self.mean = TimeMean(steps=steps)

    def forward(self, x: Real[Tensor, "TR C S S"]) -> Float[Tensor, "R L S2 S2"]:
        if self.training and not len(x):  # a norm has no statistics of nothing
            return as_membrane(x).new_zeros(0, self.classify.out_channels, 2 * x.shape[2], 2 * x.shape[3])
        for layer in self.convs:
            x = layer(x)
        return self.mean(as_membrane(self.classify(self.neuron(F.pixel_shuffle(self.enlarge(x), 2)))))


class Samples(NamedTuple):
    """Regions of each image to learn from: the target that each lies on, its class (`num_classes`: background), and the
    deltas from it to that target."""

    regions: list[Float[Tensor, "_ 4"]]
    matched: list[Int64[Tensor, " _"]]
    labels: list[Int64[Tensor, " _"]]
    deltas: list[Float[Tensor, "_ 4"]]

    def on_objects(self, num_classes: int) -> list[Bool[Tensor, " _"]]:
        """Which regions lie on an object."""
        return [labels < num_classes for labels in self.labels]


class RegionChoice(RoIHeads):
    """Which regions are learnt from and which boxes are kept, without torchvision's networks.

    Here classes count from 0 and background is the last, as in the authors' code; in torchvision it is the first.
    """

    def __init__(
        self, num_classes: int, *, samples: int, score_threshold: float, nms_threshold: float, limit: int
    ) -> None:
        super().__init__(
            None,
            None,
            None,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=limit,
        )
        self.num_classes = num_classes

    @torch.no_grad()
    def sample(self, regions: Sequence[Float[Tensor, "_ 4"]], targets: Sequence[Target]) -> Samples:
        """Regions drawn by lot, a quarter of them on objects if there are so many.

        The boxes of the targets are among those to draw from, and the whole picture, so that no image has none.
        """
        corners = [target["size"].flip(0).to(boxes) for boxes, target in zip(regions, targets, strict=True)]
        regions = [
            torch.cat((boxes, F.pad(corner, (2, 0))[None])) for boxes, corner in zip(regions, corners, strict=True)
        ]
        shifted = [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets]
        regions, matched, labels, deltas = self.select_training_samples(regions, shifted)
        labels = [(each - 1) % (self.num_classes + 1) for each in labels]
        return Samples(regions, matched, labels, list(deltas))

    @torch.no_grad()
    def found(
        self,
        classes: Float[Tensor, "R L1"],
        deltas: Float[Tensor, "R L 4"],
        regions: list[Float[Tensor, "_ 4"]],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Detections]:
        """Boxes of each image that are likely enough and not of the same object, the most likely first."""
        boxes, scores, labels = self.postprocess_detections(*_background_first(classes, deltas), regions, list(sizes))
        return [Detections(*each) for each in zip(boxes, scores, [each - 1 for each in labels], strict=True)]

    def losses(
        self, classes: Float[Tensor, "R L1"], deltas: Float[Tensor, "R L 4"], samples: Samples
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of classes, and smooth L1 of the deltas of regions on objects."""
        labels = [(each + 1) % (self.num_classes + 1) for each in samples.labels]
        classes, boxes = fastrcnn_loss(*_background_first(classes, deltas), labels, samples.deltas)
        return {"classes": classes, "boxes": boxes}

    def mask_losses(
        self, masks: Float[Tensor, "M L S S"], samples: Samples, targets: Sequence[Target]
    ) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of the pixels of masks, each against that of its target below it; 0 if no region has one."""
        on = samples.on_objects(self.num_classes)
        regions, matched = ([each[chosen] for each, chosen in zip(parts, on, strict=True)] for parts in samples[:2])
        drawn, labels = [target["masks"] for target in targets], [target["labels"] for target in targets]
        return {"masks": maskrcnn_loss(masks, regions, drawn, labels, matched)}


def _background_first(classes: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits [R, L+1] and deltas [R, (L+1)*4] in torchvision's order."""
    return classes.roll(1, dims=1), F.pad(deltas.flatten(1), (4, 0))

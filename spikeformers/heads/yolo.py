"""A lightweight YOLO of spiking convolutions: on three grids, every cell predicts a box near each of three anchors.

Paper: Meta-SpikeFormer, App. C.2 and Table 9: "Yolov5" made spike-driven, 16.8 M parameters with the 15M backbone, and
nothing more. What others published and this uses: top-down and bottom-up paths (Liu et al., "PANet", CVPR 2018), the
published formulas of YOLOv5 for boxes (`decode`) and for who learns them (`learners`), CIoU (Zheng et al., AAAI 2020).
Our reading, for want of any: every block is the residual ChannelConv of the paper's Eq. 10, without expansion, 128
channels wide, since that makes the total 16.83 M with 80 classes; neurons are the only activations, and time is
averaged behind the last convolutions. Weights of the loss are YOLOv5's proportions, rounded, for means over all grids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_area, clip_boxes_to_image, complete_box_iou_loss

from spikeformers.heads.detections import Detections, Target
from spikeformers.heads.pyramid import SpikingConv
from spikeformers.layers import ChannelConv, ConvBN, FeatureInfo, MembraneShortcut
from spikeformers.neurons import NeuronBuilder, TimeMean, as_membrane

GRIDS = 3
LARGEST_RATIO = 4.0  # of sides of boxes and anchors: what `decode` can reach
SMALLEST_SIDE = 0.01  # pixels; CIoU divides by heights
PRIOR = 0.01  # share of cells that an untrained network takes for objects
NEIGHBOURS = ((0, 0), (1, 0), (0, 1))  # cells that learn a box: the one of its centre, the next in x, the next in y


class GridOutput(NamedTuple):
    """What every cell of three grids says about each anchor a, time averaged, in channels 5 + C at a (5 + C).

    Four numbers for `decode`, one for whether there is an object, and one for each class, all before sigmoids.
    """

    fine: Float[Tensor, "B K _ _"]
    middle: Float[Tensor, "B K _ _"]
    coarse: Float[Tensor, "B K _ _"]

    @property
    def images(self) -> int:
        """How many it is of."""
        return len(self.fine)


class Cells(NamedTuple):
    """Where predictions stand, a row for each: top left corner and side of the cell, and the anchor, all in pixels."""

    corner: Float[Tensor, "P 2"]
    stride: Float[Tensor, "P 1"]
    anchor: Float[Tensor, "P 2"]

    def at(self, places: Int64[Tensor, " M"]) -> "Cells":
        return Cells(*(each[places] for each in self))


def decode(raw: Float[Tensor, "P 4"], cells: Cells) -> Float[Tensor, "P 4"]:
    """x and y of two corners, in pixels: centres from half a cell before their cell to half a cell behind it, sides up
    to four times the anchor's.

    centre = corner + stride (2 sigmoid(raw_xy) - 1/2), sides = anchor (2 sigmoid(raw_wh))^2.  Source: YOLOv5.
    """
    centre = cells.corner + cells.stride * (2 * raw[:, :2].sigmoid() - 0.5)
    half = (cells.anchor * (2 * raw[:, 2:].sigmoid()) ** 2).clamp(min=SMALLEST_SIDE) / 2
    return torch.cat([centre - half, centre + half], 1)


def learners(
    boxes: Float[Tensor, "N 4"], *, anchors: Float[Tensor, "A 2"], stride: int, size: tuple[int, int]
) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " M"]]:
    """Who learns which box on a grid of `size` (height, width): M places [A, height, width] flattened, M boxes.

    An anchor learns a box if neither side is LARGEST_RATIO times the other's or more; then the cell of the box's centre
    does, and the nearest one beside it and the nearest above or below, where the grid has them.  Source: YOLOv5.
    """
    height, width = size
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    ratio = (high - low) / anchors
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < LARGEST_RATIO
    centre = (low + high) / 2 / stride
    nearest = torch.where(centre - centre.floor() < 0.5, -1, 1)
    cells = centre.floor().long() + nearest * torch.tensor(NEIGHBOURS, device=boxes.device)
    inside = ((cells >= 0) & (cells < cells.new_tensor([width, height]))).all(-1)
    box, anchor, neighbour = (fits[:, :, None] & inside[:, None]).nonzero(as_tuple=True)
    column, row = cells[box, neighbour].unbind(-1)
    return (anchor * height + row) * width + column, box


def fit_anchors(sides: Float[Tensor, "N 2"], *, count: int = 9) -> tuple[float, ...]:
    """`anchors` for boxes of these widths and heights, in pixels of the network's input: `count` pairs, small to large.

    By k-means on logarithms, since a box fits an anchor by the ratio of their sides; the same boxes give the same ones.
    Raises ValueError for sides that are not positive, or fewer than `count` different boxes.
    """
    from sklearn.cluster import KMeans  # seconds to import, and most who detect never fit anchors

    if not (sides.isfinite().all() and (sides > 0).all()):
        raise ValueError("widths and heights must be positive numbers: drop the boxes of no area")
    if (different := len(sides.unique(dim=0))) < count:
        raise ValueError(f"{count} anchors need as many boxes of different sizes, got {different}: ask for fewer")
    fitted = KMeans(count, n_init=10, random_state=0).fit(sides.double().log().cpu().numpy())
    centres = torch.from_numpy(fitted.cluster_centers_).exp()
    return tuple(centres[centres.prod(1).argsort()].flatten().tolist())


class ResidualConv(nn.Module):
    """U' = U + ChannelConv(SN(U)), of two 3x3 convolutions.  Source: Meta-SpikeFormer, Eq. 10."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        self.shortcut = MembraneShortcut(neuron=neuron)
        self.channel_conv = ChannelConv(dim, neuron=neuron, ratio=1)

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        return self.shortcut(u, self.channel_conv)


class PathAggregation(nn.Module):
    """Maps of two scales, [TB, C_i, H_i, W_i], fine to coarse -> of three, of `dim` channels, that know one another.

    The third comes from the second by a convolution of stride 2.  Down the pyramid coarse maps are repeated onto finer
    ones (nearest), back up fine ones reach coarser ones by convolutions of stride 2; a block follows every sum.
    """

    def __init__(self, channels: tuple[int, int], dim: int, *, neuron: NeuronBuilder) -> None:
        super().__init__()
        conv = partial(SpikingConv, neuron=neuron)
        self.entry = nn.ModuleList(conv(ConvBN(width, dim, 1)) for width in channels)
        self.coarser = conv(ConvBN(dim, dim, 3, stride=2))
        self.top_down = nn.ModuleList(ResidualConv(dim, neuron=neuron) for _ in range(GRIDS))
        self.down = nn.ModuleList(conv(ConvBN(dim, dim, 3, stride=2)) for _ in range(GRIDS - 1))
        self.bottom_up = nn.ModuleList(ResidualConv(dim, neuron=neuron) for _ in range(GRIDS - 1))

    def forward(self, maps: Sequence[Real[Tensor, "TB _ _ _"]]) -> list[Real[Tensor, "TB _ _ _"]]:
        fine, middle = (as_membrane(layer(each)) for layer, each in zip(self.entry, maps, strict=True))
        pyramid = [fine, middle, self.top_down[-1](self.coarser(middle))]
        for level in (1, 0):
            above = F.interpolate(pyramid[level + 1], size=pyramid[level].shape[2:])
            pyramid[level] = self.top_down[level](pyramid[level] + above)
        for level in (1, 2):
            below = as_membrane(self.down[level - 1](pyramid[level - 1]))
            pyramid[level] = self.bottom_up[level - 1](pyramid[level] + below)
        return pyramid


# The scale of COCO at 640 pixels: round numbers, so that boxes of 3 to 1300 pixels a side have an anchor in reach.
ANCHORS = (
    *(12.0, 14.0, 20.0, 36.0, 40.0, 24.0),  # fine: three widths and heights
    *(44.0, 76.0, 88.0, 52.0, 96.0, 120.0),
    *(120.0, 220.0, 240.0, 150.0, 320.0, 300.0),
)


@dataclass(frozen=True)
class YOLOConfig:
    """`dim`: channels of neck and predictions.  `anchors`: width and height in turn, in pixels of the network's input,
    for each grid as many, fine to coarse (`fit_anchors` finds them for data of your own).
    `box_weight`, `objectness_weight`, `class_weight`: of the parts of the loss.
    `score_threshold`, `candidates`: detections need that score, and at most so many, the most certain, are compared.
    `overlap`: of two of one class whose IoU is larger, the less certain goes.  `limit`: the most detections per image.
    """

    own_neurons: ClassVar[tuple[str, ...]] = ()

    dim: int = 128
    anchors: tuple[float, ...] = ANCHORS
    box_weight: float = 1.0
    objectness_weight: float = 30.0
    class_weight: float = 0.1
    score_threshold: float = 0.001
    candidates: int = 3000
    overlap: float = 0.6
    limit: int = 100

    def __post_init__(self) -> None:
        positive = all(0 < side < math.inf for side in self.anchors)
        if not (self.anchors and positive) or len(self.anchors) % (2 * GRIDS):
            raise ValueError(
                f"anchors must be positive widths and heights in turn, as many for each of {GRIDS} grids, so a "
                f"multiple of {2 * GRIDS} numbers, got {len(self.anchors)}: {self.anchors}"
            )
        for name in ("dim", "candidates", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("box_weight", "objectness_weight", "class_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number, at least 0, got {getattr(self, name)}")
        for name in ("score_threshold", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def build(self, features: FeatureInfo, *, num_classes: int, neuron: NeuronBuilder, steps: int) -> "YOLO":
        """The head for a backbone with these `features`."""
        return YOLO(features, self, num_classes=num_classes, neuron=neuron, steps=steps)


class YOLO(nn.Module):
    """Maps of all levels of a backbone, [T*B, C_i, H_i, W_i], of which it reads the two coarsest scales -> GridOutput.

    Grids have the sizes that convolutions of stride 2 give, halves rounded up, so any size of image will do.
    Raises ValueError for a backbone whose two coarsest strides are not one half of the other.
    """

    last_layers: ClassVar[tuple[str, ...]] = tuple(f"predict.{grid}.conv" for grid in range(GRIDS))

    def __init__(
        self, features: FeatureInfo, config: YOLOConfig, *, num_classes: int, neuron: NeuronBuilder, steps: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.inputs = features.pyramid()[-2:]
        strides = tuple(features.strides[level] for level in self.inputs)
        if len(strides) < 2 or strides[1] != 2 * strides[0]:
            raise ValueError(
                f"YOLO reads maps of two strides, such as 8 and 16, from a backbone; this one ends with {strides}: "
                "take a backbone of several stages"
            )
        self.strides = (*strides, 2 * strides[1])
        channels = tuple(features.channels[level] for level in self.inputs)
        self.neck = PathAggregation(channels, config.dim, neuron=neuron)
        outputs = len(config.anchors) // (2 * GRIDS) * (5 + num_classes)
        self.predict = nn.ModuleList(
            SpikingConv(nn.Conv2d(config.dim, outputs, 1), neuron=neuron) for _ in range(GRIDS)
        )
        self.time_means = nn.ModuleList(TimeMean(steps=steps) for _ in range(GRIDS))
        for layer in self.predict:
            self._expect_little(layer.conv)

    @property
    def limit(self) -> int:
        """The most detections per image."""
        return self.config.limit

    @torch.no_grad()
    def _expect_little(self, conv: nn.Conv2d) -> None:
        """Start from PRIOR for objects, equal classes, and boxes that are the anchors in the middle of their cells."""
        nn.init.normal_(conv.weight, std=0.01)
        bias = conv.bias.view(-1, 5 + self.num_classes).zero_()
        bias[:, 4] = torch.tensor(PRIOR).logit()
        bias[:, 5:] = -torch.tensor(max(self.num_classes - 1.0, 1.0)).log()

    def forward(
        self,
        maps: Sequence[Real[Tensor, "TB _ _ _"]],
        *,
        image_size: tuple[int, int],
        targets: Sequence[Target] | None = None,
    ) -> GridOutput:
        """`image_size` and `targets` are for heads of two stages: here every cell answers, whatever there is."""
        pyramid = self.neck([maps[level] for level in self.inputs])
        parts = zip(self.time_means, self.predict, pyramid, strict=True)
        return GridOutput(*(mean(as_membrane(predict(each))) for mean, predict, each in parts))

    def anchors(self, like: Tensor) -> Float[Tensor, "G A 2"]:
        """Widths and heights in pixels, for each grid, in the dtype and place of `like`."""
        return torch.tensor(self.config.anchors, dtype=like.dtype, device=like.device).view(GRIDS, -1, 2)

    def rows(self, output: GridOutput) -> tuple[Float[Tensor, "B P K"], Cells]:
        """Predictions of all grids one below the other, ordered by grid, anchor, row and column, and their places."""
        rows, cells = [], []
        for grid, anchors, stride in zip(output, self.anchors(output.fine), self.strides, strict=True):
            each = as_membrane(grid).unflatten(1, (len(anchors), 5 + self.num_classes)).movedim(2, -1)
            height, width = grid.shape[2:]
            y, x = torch.meshgrid(*(torch.arange(side).to(anchors) for side in (height, width)), indexing="ij")
            corner = stride * torch.stack([x, y], -1).flatten(0, 1)
            rows.append(each.flatten(1, 3))
            cells.append(
                Cells(
                    corner.repeat(len(anchors), 1),
                    torch.full_like(anchors[:1, :1], stride).expand(len(anchors) * len(corner), 1),
                    anchors.repeat_interleave(len(corner), 0),
                )
            )
        return torch.cat(rows, 1), Cells(*map(torch.cat, zip(*cells, strict=True)))

    def loss(self, output: GridOutput, targets: Sequence[Target]) -> dict[str, Float[Tensor, ""]]:
        """Three parts: `boxes` (CIoU) and `classes` (cross-entropy of each against the rest, summed over classes) are
        means over all `learners`; `objectness` is the mean cross-entropy of all cells.

        Cells that learn a box should say how well theirs covers it (1 - CIoU loss, the best if they learn several), all
        others 0.  A box that fits no anchor teaches nothing: give `anchors` of its size.
        """
        rows, cells = self.rows(output)
        boxes = torch.cat([target["boxes"] for target in targets]).to(rows)
        labels = torch.cat([target["labels"] for target in targets]).to(rows.device)
        counts = torch.tensor([len(target["labels"]) for target in targets], device=rows.device)
        place, box = self._all_learners(output, boxes)
        image = torch.arange(len(targets), device=rows.device).repeat_interleave(counts)[box]
        learning = rows[image, place]
        distance = complete_box_iou_loss(decode(learning[:, :4], cells.at(place)), boxes[box])
        covered = (1 - distance.detach()).clamp(0, 1)
        wanted = torch.zeros_like(rows[..., 4]).flatten()
        wanted = wanted.scatter_reduce(0, image * rows.shape[1] + place, covered, "amax").view(rows.shape[:2])
        classes = F.one_hot(labels[box], self.num_classes).to(rows)
        mistaken = F.binary_cross_entropy_with_logits(learning[:, 5:], classes, reduction="sum")
        number = max(len(box), 1)
        return {
            "boxes": self.config.box_weight * distance.sum() / number,
            "objectness": self.config.objectness_weight * F.binary_cross_entropy_with_logits(rows[..., 4], wanted),
            "classes": self.config.class_weight * mistaken / number,
        }

    def _all_learners(
        self, output: GridOutput, boxes: Float[Tensor, "N 4"]
    ) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " M"]]:
        """Places among all rows, and the boxes that they learn."""
        places, taught, before = [], [], 0
        for grid, anchors, stride in zip(output, self.anchors(boxes), self.strides, strict=True):
            place, box = learners(boxes, anchors=anchors, stride=stride, size=tuple(grid.shape[2:]))
            places.append(before + place)
            taught.append(box)
            before += len(anchors) * grid.shape[2] * grid.shape[3]
        return torch.cat(places), torch.cat(taught)

    @torch.no_grad()
    def detect(self, output: GridOutput, sizes: Int64[Tensor, "B 2"] | None = None) -> list[Detections]:
        """What was found in each image, the most certain first; a cell may find several classes.

        `sizes`: height and width of each picture, to which boxes are clipped; None: the finest grid's.
        """
        rows, cells = self.rows(output)
        if sizes is None:
            extent = [self.strides[0] * side for side in output.fine.shape[2:]]
            sizes = torch.tensor([extent] * len(rows))
        return [self._found(row, cells, tuple(size)) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def _found(self, row: Float[Tensor, "P K"], cells: Cells, size: tuple[int, int]) -> Detections:
        """What one image's predictions amount to."""
        boxes = clip_boxes_to_image(decode(row[:, :4], cells), size)
        scores = row[:, 4:5].sigmoid() * row[:, 5:].sigmoid()
        certain = (scores > self.config.score_threshold) & (box_area(boxes) > 0)[:, None]
        place, label = certain.nonzero(as_tuple=True)
        scores, best = scores[place, label].topk(min(self.config.candidates, len(place)))
        boxes, labels = boxes[place[best]], label[best]
        kept = batched_nms(boxes, scores, labels, self.config.overlap)[: self.limit]
        return Detections(boxes[kept], scores[kept], labels[kept])

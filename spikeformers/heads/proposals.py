"""Region proposals of spiking convolutions: which of many anchors hold an object, and how far each is off.

Paper: Ren et al., NeurIPS 2015 (RPN), as Meta-SpikeFormer, Sec. 4.3, uses it: a neuron in front of every convolution.
Matching, sampling, filtering and losses are torchvision's.
Departures from the authors' code: anchors lie at the true strides of the maps (they declare 32 and 64 for the last two,
which have 16 and 32); each level has neurons of its own; boxes are learnt by the smooth L1 loss with beta 1/9, for L1.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork

from spikeformers.heads.detections import Target
from spikeformers.heads.pyramid import plain_conv
from spikeformers.neurons import NeuronBuilder, TimeMean, as_membrane

RATIOS = (0.5, 1.0, 2.0)
"""Heights over widths of the anchors at every place of every map."""


class Dense(NamedTuple):
    """What is computed of whole images, for N anchors: by level, row, column and ratio, in this order.

    `objectness`: logits.  `deltas`: from each anchor to its box, as torchvision's BoxCoder has them.  `maps`: membranes
    of every level, with time, which regions are pooled from.
    """

    objectness: Float[Tensor, "B N"]
    deltas: Float[Tensor, "B N 4"]
    maps: tuple[Float[Tensor, "TB C _ _"], ...]


class Anchors(AnchorGenerator):
    """Boxes of one size and the three RATIOS around every place of a map, one size and one stride for each map.

    torchvision's guesses strides from sizes, which is wrong where these are no multiples of strides.
    """

    def __init__(self, sizes: Sequence[int], *, strides: Sequence[int]) -> None:
        super().__init__(tuple((size,) for size in sizes), (RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, maps: Sequence[Float[Tensor, "TB C _ _"]]) -> list[Float[Tensor, "_ 4"]]:
        """Corners of the anchors of each of `maps`, in pixels of the image."""
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        return self.grid_anchors([each.shape[2:] for each in maps], [(stride, stride) for stride in self.strides])


class ProposalHead(nn.Module):
    """Membrane maps [T*B, C, H_i, W_i] of all levels -> objectness [B, N] and deltas [B, N, 4], averaged over time.

    SN - Conv 3x3 (- norm) - SN, then one 1x1 convolution for each result.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("objectness", "deltas")

    def __init__(
        self, dim: int, *, levels: int, norm: Callable[[int], nn.Module], neuron: NeuronBuilder, steps: int = 1
    ) -> None:
        super().__init__()
        self.level_neurons = nn.ModuleList(neuron() for _ in range(levels))
        self.conv = nn.Sequential(plain_conv(dim, dim, 3), norm(dim))
        self.neuron = neuron()
        self.objectness = nn.Conv2d(dim, len(RATIOS), 1)
        self.deltas = nn.Conv2d(dim, 4 * len(RATIOS), 1)
        self.objectness_mean = TimeMean(steps=steps)
        self.deltas_mean = TimeMean(steps=steps)

    def forward(self, maps: Sequence[Real[Tensor, "TB C _ _"]]) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N 4"]]:
        conv, norm = self.conv
        # Behind the 3x3 all is of single pixels: one batch for the norm, one call for each layer, whatever the levels.
        pixels = [conv(neuron(each)).flatten(2) for neuron, each in zip(self.level_neurons, maps, strict=True)]
        spikes = self.neuron(norm(torch.cat(pixels, 2).unsqueeze(3)))
        objectness = self.objectness_mean(as_membrane(self.objectness(spikes)))
        deltas = self.deltas_mean(as_membrane(self.deltas(spikes)))
        return objectness.squeeze(3).mT.flatten(1), deltas.squeeze(3).mT.unflatten(2, (-1, 4)).flatten(1, 2)


class ProposalNetwork(RegionProposalNetwork):
    """`head`, what becomes of what it gives (`regions`), and how it is taught (`losses`).

    `limit`: regions of each image; from each level twice as many are looked at in training, as many in evaluation.
    """

    def __init__(self, head: ProposalHead, *, anchors: Anchors, limit: int = 1000) -> None:
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * limit, "testing": limit},
            post_nms_top_n={"training": limit, "testing": limit},
            nms_thresh=0.7,
        )

    def forward(self, maps: Sequence[Float[Tensor, "TB C _ _"]]) -> Dense:
        return Dense(*self.head(maps), tuple(maps))

    @torch.no_grad()
    def regions(self, dense: Dense, sizes: Sequence[tuple[int, int]]) -> list[Float[Tensor, "_ 4"]]:
        """The most likely boxes of each image, clipped to `sizes` (height and width), the best first."""
        anchors = self.anchor_generator(dense.maps)
        boxes = self.box_coder.decode(dense.deltas.flatten(0, 1), [torch.cat(anchors)] * len(dense.deltas))
        boxes = boxes.view(dense.deltas.shape)
        regions, _ = self.filter_proposals(boxes, dense.objectness, list(sizes), [len(each) for each in anchors])
        return regions

    def losses(self, dense: Dense, targets: Sequence[Target]) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy of objectness and smooth L1 of deltas, over anchors drawn by lot."""
        anchors = [torch.cat(self.anchor_generator(dense.maps))] * len(targets)
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        kind = dense.deltas.dtype
        deltas = self.box_coder.encode([each.to(kind) for each in matched], anchors)
        objectness, box = self.compute_loss(
            dense.objectness, dense.deltas.flatten(0, 1), [each.to(kind) for each in labels], deltas
        )
        return {"objectness": objectness, "rpn_box": box}

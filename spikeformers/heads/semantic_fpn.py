"""Semantic FPN of spiking convolutions: a feature pyramid, and a class for every pixel at half the image's resolution.

Paper: Kirillov et al., CVPR 2019 (Panoptic FPN), as Meta-SpikeFormer, Sec. 4.4 (LIF), and QSD-Transformer, Table 3
(integer neurons, a batch norm behind every convolution), use it; Spike2Former calls it SpikeFPN.
Departures from the papers: they say nothing about it; wiring and sizes are the authors' code's. Maps are averaged over
the time steps first, so the head runs one step, as there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn

from spikeformers.heads.masks import IGNORE, check_labels
from spikeformers.heads.pyramid import FeaturePyramid, SpikingConv, plain_conv
from spikeformers.layers import ConvBN, FeatureInfo
from spikeformers.neurons import AfterTime, NeuronBuilder, TimeMean, as_membrane, choose


class AveragedPyramid(AfterTime, FeaturePyramid):
    """The pyramid of maps averaged over time."""


class PixelClassifier(AfterTime):
    """Pyramid [B, C, H_i, W_i], fine to coarse -> logits [B, classes, H_0, W_0].

    Level i passes max(1, i) convolutions, each but level 0's followed by doubling; their sum is classified.
    """

    def __init__(self, in_dim: int, dim: int, *, levels: int, num_classes: int, neuron: NeuronBuilder) -> None:
        super().__init__()

        def branch(level: int) -> nn.ModuleList:
            widths = (in_dim, *[dim] * max(1, level))
            layers = (ConvBN(before, after, 3) for before, after in pairwise(widths))
            return nn.ModuleList(SpikingConv(layer, neuron=neuron) for layer in layers)

        self.branches = nn.ModuleList(map(branch, range(levels)))
        self.neuron = neuron()
        self.dropout = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, maps: list[Real[Tensor, "B _ _ _"]]) -> Float[Tensor, "B L H W"]:
        total = None
        for level, (branch, x) in enumerate(zip(self.branches, maps, strict=True)):
            for layer in branch:
                x = as_membrane(layer(x))
                if level:
                    x = F.interpolate(x, scale_factor=2, mode="bilinear")
            total = x if total is None else total + _resized(x, total)
        return self.classify(self.dropout(self.neuron(total)))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the size of `like`: doubling misses it where sides are odd."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, size=like.shape[2:], mode="bilinear")


class SemanticFPN(nn.Module):
    """Maps of all levels of a backbone, [T*B, C_i, H_i, W_i] -> logits [B, num_classes, H_0, W_0]."""

    def __init__(
        self,
        features: FeatureInfo,
        *,
        num_classes: int,
        neck_dim: int,
        dim: int,
        neck_convolution: Callable[..., nn.Module],
        neuron: NeuronBuilder,
        steps: int = 1,
    ) -> None:
        super().__init__()
        self.levels = features.pyramid()
        channels = tuple(features.channels[level] for level in self.levels)
        neuron = partial(neuron, steps=1)
        self.time_means = nn.ModuleList(TimeMean(steps=steps) for _ in channels)
        self.neck = AveragedPyramid(channels, neck_dim, convolution=neck_convolution, neuron=neuron)
        self.classifier = PixelClassifier(neck_dim, dim, levels=len(channels), num_classes=num_classes, neuron=neuron)

    def forward(self, maps: list[Float[Tensor, "TB _ _ _"]]) -> Float[Tensor, "B L H W"]:
        means = [mean(maps[level]) for mean, level in zip(self.time_means, self.levels, strict=True)]
        return self.classifier(self.neck(means))

    def semantic(self, logits: Float[Tensor, "B L _ _"], size: tuple[int, int]) -> Float[Tensor, "B L H W"]:
        """Logits [B, classes, H, W] at `size` = (H, W), in float32 or wider; the largest is the pixel's class."""
        return F.interpolate(as_membrane(logits), size=tuple(size), mode="bilinear")

    def loss(
        self, logits: Float[Tensor, "B L _ _"], labels: Int64[Tensor, "B H W"], *, class_weights: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Cross-entropy at the size of `labels`, averaged over pixels that are not IGNORE; 0 if all are.

        `class_weights` [classes] weigh each pixel by its label.  Raises ValueError for a label that is no class.
        """
        check_labels(labels, num_classes=logits.shape[1])
        logits = F.interpolate(as_membrane(logits), size=labels.shape[1:], mode="bilinear")
        total = F.cross_entropy(logits, labels, weight=class_weights, ignore_index=IGNORE, reduction="sum")
        counted = labels != IGNORE
        if class_weights is None:
            return total / counted.sum().clamp(min=1)
        weights = torch.where(counted, class_weights[labels.clamp(max=len(class_weights) - 1)], 0)
        return total / weights.sum().clamp(min=torch.finfo(total.dtype).tiny)


NECKS = {"plain": plain_conv, "batch_norm": ConvBN}


@dataclass(frozen=True)
class SemanticFPNConfig:
    """`neck_dim`, `fpn_dim`: channels of the pyramid and of the head behind it.  `neck`: "plain" convolutions, as in
    the LIF form, or "batch_norm" behind each, as in the integer form."""

    own_neurons: ClassVar[tuple[str, ...]] = ()

    neck_dim: int = 128
    fpn_dim: int = 128
    neck: str | Callable[..., nn.Module] = "plain"

    def build(self, features: FeatureInfo, *, num_classes: int, neuron: NeuronBuilder, steps: int) -> SemanticFPN:
        """The head for a backbone with these `features`."""
        return SemanticFPN(
            features,
            num_classes=num_classes,
            neck_dim=self.neck_dim,
            dim=self.fpn_dim,
            neck_convolution=choose("neck", self.neck, NECKS),
            neuron=neuron,
            steps=steps,
        )

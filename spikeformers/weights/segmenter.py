"""Checkpoints of mmsegmentation as a whole: a backbone's tensors beside those of a neck and a decode head.

Of mmdetection's only the backbone's are known.
"""

import re
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from spikeformers.backbones import MetaSpikeFormerConfig, QSDTransformerConfig
from spikeformers.heads import SemanticFPNConfig, Spike2FormerConfig
from spikeformers.heads.composite import CompositeConfig
from spikeformers.weights import meta_spikeformer, qsd_transformer, semantic_fpn, spike2former

BACKBONES: dict[type, ModuleType] = {MetaSpikeFormerConfig: meta_spikeformer, QSDTransformerConfig: qsd_transformer}
HEADS: dict[type, ModuleType] = {SemanticFPNConfig: semantic_fpn, Spike2FormerConfig: spike2former}


@dataclass(frozen=True)
class StageKeys:
    """The key map of a backbone that stands in front of a head; keys come without `backbone.` in front."""

    backbone: ModuleType

    @property
    def UNUSED(self) -> re.Pattern[str]:  # noqa: N802 - as in a module
        return self.backbone.UNUSED

    def own_key(self, key: str) -> str | None:
        """Our name of the authors' `key`, or None if the network has no such tensor."""
        name = self.backbone.own_key(key)
        return None if name is None or name.startswith("head") else f"backbone.{name}"

    def own_tensor(self, key: str, tensor: Tensor) -> Tensor:
        """`tensor` of the authors' `key` in our shape."""
        return self.backbone.own_tensor(key, tensor)

    def describe_widths(self, weights: dict[str, Tensor]) -> str:
        """Which sizes `weights` (our keys) look like, for the message when they do not fit."""
        return self.backbone.describe_widths({key.removeprefix("backbone."): each for key, each in weights.items()})


@dataclass(frozen=True)
class SegmenterKeys(StageKeys):
    """The key maps of a backbone and of a segmentation head as one."""

    head: ModuleType

    @property
    def UNUSED(self) -> re.Pattern[str]:  # noqa: N802 - as in a module
        return re.compile(f"{self.backbone.UNUSED.pattern}|{self.head.UNUSED.pattern}")

    def own_key(self, key: str) -> str | None:
        name = self.head.own_key(key)
        return super().own_key(key) if name is None else name

    def own_tensor(self, key: str, tensor: Tensor) -> Tensor:
        return super().own_tensor(key, tensor) if self.head.own_key(key) is None else self.head.own_tensor(key, tensor)

    def describe_widths(self, weights: dict[str, Tensor]) -> str:
        sizes = self.head.describe_sizes(weights)
        return super().describe_widths(weights) + (f" with a head of {sizes}" if sizes else "")


def keys_of(config: CompositeConfig) -> StageKeys | None:
    """The key maps for networks of `config`, of the stages alone for a head without one; None for other stages."""
    backbone, head = BACKBONES.get(type(config.backbone)), HEADS.get(type(config.head))
    if backbone is None:
        return None
    return StageKeys(backbone) if head is None else SegmenterKeys(backbone, head)


def untold(config: CompositeConfig) -> dict[str, str]:
    """Options on which depends what weights of such a network compute and that no tensor shows; their usual values."""
    names = keys_of(config)
    return names.head.UNTOLD if isinstance(names, SegmenterKeys) else {}

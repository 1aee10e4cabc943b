"""Checkpoints of mmsegmentation as a whole: a backbone's tensors beside those of a neck and a decode head."""

import re
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from spikeformers.backbones import MetaSpikeFormerConfig, QSDTransformerConfig
from spikeformers.heads import SegmenterConfig, SemanticFPNConfig, Spike2FormerConfig
from spikeformers.weights import meta_spikeformer, qsd_transformer, semantic_fpn, spike2former

BACKBONES: dict[type, ModuleType] = {MetaSpikeFormerConfig: meta_spikeformer, QSDTransformerConfig: qsd_transformer}
HEADS: dict[type, ModuleType] = {SemanticFPNConfig: semantic_fpn, Spike2FormerConfig: spike2former}


@dataclass(frozen=True)
class SegmenterKeys:
    """The key maps of a backbone and of a head as one; keys come without `backbone.` in front."""

    backbone: ModuleType
    head: ModuleType

    @property
    def UNUSED(self) -> re.Pattern[str]:  # noqa: N802 - as in a module
        return re.compile(f"{self.backbone.UNUSED.pattern}|{self.head.UNUSED.pattern}")

    def own_key(self, key: str) -> str | None:
        """Our name of the authors' `key`, or None if the network has no such tensor."""
        if (name := self.head.own_key(key)) is not None:
            return name
        name = self.backbone.own_key(key)
        return None if name is None or name.startswith("head") else f"backbone.{name}"

    def own_tensor(self, key: str, tensor: Tensor) -> Tensor:
        """`tensor` of the authors' `key` in our shape."""
        return (self.backbone if self.head.own_key(key) is None else self.head).own_tensor(key, tensor)

    def describe_widths(self, weights: dict[str, Tensor]) -> str:
        """Which sizes `weights` (our keys) look like, for the message when they do not fit; heads of a kind known."""
        stages = {key.removeprefix("backbone."): tensor for key, tensor in weights.items()}
        sizes = self.head.describe_sizes(weights)
        return self.backbone.describe_widths(stages) + (f" with a head of {sizes}" if sizes else "")


def keys_of(config: SegmenterConfig) -> SegmenterKeys | None:
    """The key maps for networks of `config`; None if there is none for one of its parts."""
    backbone, head = BACKBONES.get(type(config.backbone)), HEADS.get(type(config.head))
    return None if backbone is None or head is None else SegmenterKeys(backbone, head)


def untold(config: SegmenterConfig) -> dict[str, str]:
    """Options on which depends what weights of such a network compute and that no tensor shows; their usual values."""
    names = keys_of(config)
    return {} if names is None else names.head.UNTOLD

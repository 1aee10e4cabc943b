"""Networks of the papers, up to and including their classifiers."""

from spikeformers.backbones.features import FeatureInfo
from spikeformers.backbones.meta_spikeformer import MetaSpikeFormer, MetaSpikeFormerConfig

__all__ = ["FeatureInfo", "MetaSpikeFormer", "MetaSpikeFormerConfig"]

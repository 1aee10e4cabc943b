"""Networks of the papers, up to and including their classifiers."""

from spikeformers.backbones.meta_spikeformer import MetaSpikeFormer, MetaSpikeFormerConfig
from spikeformers.backbones.qsd_transformer import QSDTransformer, QSDTransformerConfig
from spikeformers.backbones.spikformer import ANN_TWIN, Spikformer, SpikformerConfig
from spikeformers.layers.features import FeatureInfo

__all__ = [
    "ANN_TWIN",
    "FeatureInfo",
    "MetaSpikeFormer",
    "MetaSpikeFormerConfig",
    "QSDTransformer",
    "QSDTransformerConfig",
    "Spikformer",
    "SpikformerConfig",
]

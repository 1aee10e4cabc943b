"""QSD-Transformer: Meta-SpikeFormer with low-bit weights, IE-LIF neurons, Q-SDSA and scaled branches.

Paper: Qiu et al., "Quantized Spike-driven Transformer", ICLR 2025. Eqs. 4-5 weights (quantize/lsq.py), 6 Q-SDSA and 12
MPRF (attention/q_sdsa.py), 9-11 IE-LIF (neurons/integer.py), 13-14 distillation (distill/fgd.py), Table 1 sizes.
Departures from the paper: none in the mathematics; what its text leaves open is as in the authors' code: every layer
has 4-bit weights, first and last included, and branches of transformer blocks are scaled by a learnable 1e-6.
"""

from dataclasses import dataclass

from spikeformers.backbones import meta_spikeformer
from spikeformers.backbones.meta_spikeformer import MetaSpikeFormer, MetaSpikeFormerConfig
from spikeformers.neurons import NeuronBuilder
from spikeformers.quantize import prepare


@dataclass(frozen=True)
class QSDTransformerConfig(MetaSpikeFormerConfig):
    """Sizes and switches of a Meta-SpikeFormer, and `bits` of its weights, 2..8, or 0 for float weights.

    `layer_scale` 1e-6 is for long trainings: until it has grown, blocks of attention do next to nothing. Starting from
    a trained Meta-SpikeFormer, or training for some epochs only, set it to 1.
    `qkv="rep_conv_mprf"` adds a rectification that starts centred to the norm that already stands in its place.
    """

    neuron: str | NeuronBuilder = "ie_lif"
    attention: str = "q_sdsa"
    layer_scale: float = 1e-6
    bits: int = 4

    def build(self) -> "QSDTransformer":
        return QSDTransformer(self)


class QSDTransformer(MetaSpikeFormer):
    """Images [B, C, H, W] or clips [T, B, C, H, W] -> logits [B, num_classes]; see MetaSpikeFormer."""

    def __init__(self, config: QSDTransformerConfig) -> None:
        super().__init__(config)
        if config.bits:
            prepare(self, bits=config.bits)


ANN_TWIN = meta_spikeformer.ANN_TWIN | {"bits": 0}
"""Overrides that make any QSD-Transformer its ANN teacher: the same layers in float, GELU and softmax attention."""

SIZES = {  # Table 1; the paper calls them 1.8M, 3.9M and 6.8M, a size at 4 bits, not a count (docs/errata.md)
    "qsd_transformer_t": QSDTransformerConfig(dims=(64, 128, 256, 360)),
    "qsd_transformer_m": QSDTransformerConfig(dims=(96, 192, 384, 480)),
    "qsd_transformer_l": QSDTransformerConfig(dims=(128, 256, 512, 640)),
}

"""Building blocks that more than one network uses; each maps spikes to currents and can be merged for inference."""

from spikeformers.layers.block import LayerScaleBlock, Mixer, TransformerBlock
from spikeformers.layers.conv_bn import ConvBN, NormChain, bn_affine, conv2d_from, merge_conv_bn
from spikeformers.layers.esc import ESC, Pointwise
from spikeformers.layers.features import FeatureInfo
from spikeformers.layers.fused_norm import FusedNorm2d, fuse_norms, separate_norms
from spikeformers.layers.mlp import ChannelConv, ChannelMLP
from spikeformers.layers.pretrained import Pretrained, low_bit_layers
from spikeformers.layers.rep_conv import RepConv
from spikeformers.layers.sep_conv import SepConv
from spikeformers.layers.shortcut import (
    SHORTCUTS,
    IAndShortcut,
    MembraneShortcut,
    ResidualShortcut,
    SpikeElementWiseShortcut,
    VanillaShortcut,
)

__all__ = [
    "ESC",
    "SHORTCUTS",
    "ChannelConv",
    "ChannelMLP",
    "ConvBN",
    "FeatureInfo",
    "FusedNorm2d",
    "IAndShortcut",
    "LayerScaleBlock",
    "MembraneShortcut",
    "Mixer",
    "NormChain",
    "Pointwise",
    "Pretrained",
    "RepConv",
    "ResidualShortcut",
    "SepConv",
    "SpikeElementWiseShortcut",
    "TransformerBlock",
    "VanillaShortcut",
    "bn_affine",
    "conv2d_from",
    "fuse_norms",
    "low_bit_layers",
    "merge_conv_bn",
    "separate_norms",
]

"""Building blocks that more than one network uses; each maps spikes to currents and can be merged for inference."""

from spikeformers.layers.conv_bn import ConvBN, bn_affine, conv2d_from, merge_conv_bn
from spikeformers.layers.mlp import ChannelConv, ChannelMLP
from spikeformers.layers.pretrained import Pretrained
from spikeformers.layers.rep_conv import RepConv
from spikeformers.layers.sep_conv import SepConv
from spikeformers.layers.shortcut import SHORTCUTS, MembraneShortcut, SpikeElementWiseShortcut, VanillaShortcut

__all__ = [
    "SHORTCUTS",
    "ChannelConv",
    "ChannelMLP",
    "ConvBN",
    "MembraneShortcut",
    "Pretrained",
    "RepConv",
    "SepConv",
    "SpikeElementWiseShortcut",
    "VanillaShortcut",
    "bn_affine",
    "conv2d_from",
    "merge_conv_bn",
]

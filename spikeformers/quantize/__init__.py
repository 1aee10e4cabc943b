"""Low-bit weights: LSQ while training, packed integers afterwards, on any model."""

from spikeformers.quantize.convert import ChannelAffine, PackedLayer, Size, convert, fold, pack, size, unpack
from spikeformers.quantize.lsq import LSQLayer, fake_quantize
from spikeformers.quantize.prepare import plain, prepare, quantizable

__all__ = [
    "ChannelAffine",
    "LSQLayer",
    "PackedLayer",
    "Size",
    "convert",
    "fake_quantize",
    "fold",
    "pack",
    "plain",
    "prepare",
    "quantizable",
    "size",
    "unpack",
]

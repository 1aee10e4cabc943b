"""Low-bit weights: LSQ while training, packed integers afterwards, on any model."""

from spikeformers.quantize.bounds import exact_bits
from spikeformers.quantize.convert import ChannelAffine, PackedLayer, Size, convert, fold, pack, size, unpack
from spikeformers.quantize.exact import FixedPointNorm, fixed_point, power_of_two
from spikeformers.quantize.lsq import LSQLayer, fake_quantize
from spikeformers.quantize.prepare import plain, prepare, quantizable

__all__ = [
    "ChannelAffine",
    "FixedPointNorm",
    "LSQLayer",
    "PackedLayer",
    "Size",
    "convert",
    "exact_bits",
    "fake_quantize",
    "fixed_point",
    "fold",
    "pack",
    "plain",
    "power_of_two",
    "prepare",
    "quantizable",
    "size",
    "unpack",
]

"""Sizes of a convolution or linear layer, in whole numbers that a file can hold."""

from dataclasses import asdict, dataclass

from torch import nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A convolution; a linear layer is one with kernel 1 on a single pixel.  Zero padding only."""

    in_channels: int
    out_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Conv2d | nn.Linear) -> "Geometry":
        """The sizes of `layer`."""
        if isinstance(layer, nn.Linear):
            return cls(layer.in_features, layer.out_features)
        pairs = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return cls(layer.in_channels, layer.out_channels, *pairs, layer.groups)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[O, I/groups, kh, kw]."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def moves(self) -> tuple[Pair, Pair, Pair, int]:
        """Stride, padding, dilation and groups, as torch's convolutions take them."""
        return self.stride, self.padding, self.dilation, self.groups

    def describe(self) -> dict:
        """Plain values; `Geometry(**values)` with tuples for lists is this again."""
        return asdict(self)

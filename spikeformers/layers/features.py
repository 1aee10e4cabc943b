"""What a backbone tells a head about its feature maps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureInfo:
    """Names, channels and strides (input pixels per map pixel) of the maps `forward_features` returns, in order."""

    names: tuple[str, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def pyramid(self) -> tuple[int, ...]:
        """Indices of the last map of each stride, fine to coarse: what heads of feature pyramids read."""
        last = {stride: index for index, stride in enumerate(self.strides)}
        return tuple(last[stride] for stride in sorted(last))

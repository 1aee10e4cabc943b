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

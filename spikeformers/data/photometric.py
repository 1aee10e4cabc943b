"""Distortion of the colours of training pictures, which leaves every pixel in its place."""

from dataclasses import dataclass

from torchvision.transforms import v2


class PhotometricDistort(v2.RandomPhotometricDistort):
    """torchvision's, without its permutation of the channels."""

    def make_params(self, flat_inputs: list) -> dict:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


@dataclass(frozen=True)
class Photometric:
    """Settings of the distortion, of which there is none by default; base of the augmentations that have it.

    distort: probability of each of four distortions, changing the brightness, contrast and saturation by up to this
    share and turning the hue by up to this part of the circle.

    Raises ValueError for a value out of range.
    """

    distort: float = 0.0
    brightness: float = 32 / 255
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.1

    def __post_init__(self) -> None:
        for name in ("distort", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"augment.hue must lie between 0 and 0.5, got {self.hue}")

    def distortion(self) -> PhotometricDistort:
        """The transform of pictures uint8 [C,H,W]; uses torch's random numbers only."""
        return PhotometricDistort(
            (1 - self.brightness, 1 + self.brightness),
            (1 - self.contrast, 1 + self.contrast),
            (1 - self.saturation, 1 + self.saturation),
            (-self.hue, self.hue),
            self.distort,
        )

"""Augmentation of clips of event frames, alike on all frames of a clip, from torchvision.

Flip, then one operation out of the six that Spikformer's code for CIFAR10-DVS draws from (SNNAugmentWide, after
TrivialAugment): nothing, shear along x, shift along x or y, rotation, or cutout. Pixels are moved without being mixed:
counts stay counts, and what comes into the picture is 0."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms import v2

STRENGTHS = 15  # of each operation, on either side of none
SHEAR, SHIFT, TURN = 0.3, 5.0, 30.0  # largest: radians, pixels, degrees
CUTOUT = v2.RandomErasing(p=1, scale=(0.001, 0.11), ratio=(1, 1))  # share of the picture's area; a square


@dataclass(frozen=True)
class EventAugment:
    """What happens to training clips; the defaults change nothing.

    flip: probability of a horizontal flip.  wide: probability that one of the six operations is drawn.
    mixup, cutmix, mixing_epochs: as in `Augment`; of all batches a `mixing_share` is mixed.

    Raises ValueError for a value out of range.
    """

    flip: float = 0.0
    wide: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixing_share: float = 1.0
    mixing_epochs: int = 0

    def __post_init__(self) -> None:
        for name in ("flip", "wide", "mixing_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("mixup", "cutmix", "mixing_epochs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augment.{name} must be at least 0, got {getattr(self, name)}")

    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """A random transform of clips [T,C,H,W], or None where clips stay as they are.

        Only torch's random numbers are used: call it inside `seeded(seed, epoch, index, torch_only=True)`.
        """
        steps: list[Callable[[Tensor], Tensor]] = []
        if self.flip:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.wide:
            steps.append(v2.RandomApply([v2.Lambda(wide)], p=self.wide))
        return v2.Compose(steps) if steps else None


def wide(clip: Float[Tensor, "T C H W"]) -> Float[Tensor, "T C H W"]:
    """The clip after one operation of a random strength, both drawn from torch's global generator, all equally likely.

    Source: Zhou et al., "Spikformer", ICLR 2023, the authors' code for CIFAR10-DVS.
    """
    operation = ("identity", "shear_x", "shift_x", "shift_y", "rotate", "cutout")[int(torch.randint(6, ()))]
    strength = int(torch.randint(-STRENGTHS, STRENGTHS + 1, ())) / STRENGTHS
    if operation == "identity":
        return clip
    if operation == "cutout":
        return CUTOUT(clip)
    turn = TURN * strength if operation == "rotate" else 0.0
    shift = int(SHIFT * strength)  # the authors cut off the part of a pixel
    shear = math.degrees(SHEAR * strength) if operation == "shear_x" else 0.0
    moved = [shift if operation == axis else 0 for axis in ("shift_x", "shift_y")]
    return v2.functional.affine(clip, angle=turn, translate=moved, scale=1.0, shear=[shear, 0.0])

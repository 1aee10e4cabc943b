"""Augmentation from torchvision and timm, with randomness that is a function of (seed, epoch, sample index) only.

Order: crop (padded, or resized as for ImageNet), flip, affine, timm policy (RandAugment and kin), normalise, erase.
Crop and flip run on uint8 tensors; affine and policy run on pillow pictures: three times faster at 32 px."""

import hashlib
import random
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment, rand_augment_choices
from torch import Tensor
from torchvision.transforms import v2

from spikeformers.neurons import closest

TIMM_SMALLEST_ASPECT = 3 / 4  # of a random resized crop; the largest is its inverse


@dataclass(frozen=True)
class Augment:
    """What happens to training pictures; the defaults change nothing.

    policy: timm string, e.g. "rand-m9-mstd0.5-inc1"; "" is none.  policy_ops: the only operations that a "rand-..."
    policy draws, e.g. ("Rotate", "Solarize"); () is timm's list.  Names are timm's without "Increasing": "inc1" picks
    that variant.  resized_crop: smallest area fraction of a random resized crop (ImageNet habit: 0.08); 0 is none.
    crop_padding: pixels of zero padding before a random crop.  flip, erase: probabilities.  erase_fill: normal noise
    or zeros, after normalising.  shift: fraction of the side; rotate: degrees; scale: 0.1 means 0.9 to 1.1.
    mixup, cutmix: alpha of the batch-level mixing (see `mixing`), 0 is none.  mixing_epochs: mixing ends after so
    many epochs; 0: it never does.

    Raises ValueError for a value out of range, two kinds of crop at once, or operations that the policy cannot draw.
    """

    policy: str = ""
    policy_ops: tuple[str, ...] = ()
    resized_crop: float = 0.0
    crop_padding: int = 0
    flip: float = 0.0
    erase: float = 0.0
    erase_fill: typing.Literal["noise", "zero"] = "noise"
    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixing_epochs: int = 0

    def __post_init__(self) -> None:
        for name in ("resized_crop", "flip", "erase", "shift", "scale"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"augment.{name} must lie between 0 and 1, got {value}")
        for name in ("crop_padding", "rotate", "mixup", "cutmix", "mixing_epochs"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"augment.{name} must be at least 0, got {value}")
        if self.scale == 1:
            raise ValueError(f"augment.scale must lie below 1, got {self.scale}")
        if self.resized_crop and self.crop_padding:
            raise ValueError(
                f"augment.resized_crop={self.resized_crop} and augment.crop_padding={self.crop_padding} are two ways "
                "to crop: set one of them to 0"
            )
        if self.erase_fill not in ("noise", "zero"):
            raise ValueError(f"augment.erase_fill must be noise or zero, got {self.erase_fill!r}")
        if self.policy_ops:
            self._check_policy_ops()

    def _check_policy_ops(self) -> None:
        kind, *sections = self.policy.split("-")
        if kind != "rand":
            raise ValueError(
                f"augment.policy_ops={self.policy_ops} restricts RandAugment, but augment.policy={self.policy!r}: "
                "set a policy such as 'rand-m9-mstd0.5-inc1' first, or no policy_ops"
            )
        if any(section.startswith("t") for section in sections):
            raise ValueError(
                f"augment.policy={self.policy!r} names a set of operations of its own (its section 't...') beside "
                f"augment.policy_ops={self.policy_ops}: leave one of them out"
            )
        known = rand_augment_choices("", increasing=False)
        for name in self.policy_ops:
            if name not in known:
                raise ValueError(f"augment.policy_ops: timm's RandAugment has no {name!r}; {closest(name, known)}")


def seed_of(*key: int | str) -> int:
    """A 32-bit seed from any key, e.g. (seed, epoch, index); the same on every machine and in every process."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


@contextmanager
def seeded(*key: int | str, torch_only: bool = False) -> Iterator[None]:
    """Seeds python, numpy and torch (CPU) from `key` inside the block and restores their global states after it.

    `torch_only` leaves python and numpy alone: 3 microseconds instead of 100, enough for torchvision's v2 transforms.
    """
    value = seed_of(*key)
    generator = torch.default_generator
    torch_state = generator.get_state()
    if not torch_only:
        python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # Not torch.manual_seed: that would reseed the accelerators too, whose states are not restored here.
        generator.manual_seed(value)
        if not torch_only:
            random.seed(value)
            np.random.seed(value)
        yield
    finally:
        generator.set_state(torch_state)
        if not torch_only:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def to_pil(pixels: Tensor) -> Image.Image:
    """uint8 [C,H,W] with C = 1 or 3 to a pillow picture."""
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())


def to_pixels(picture: Image.Image) -> Tensor:
    """A pillow picture of mode L or RGB to uint8 [C,H,W]."""
    array = torch.from_numpy(np.array(picture))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


class Normalise:
    """uint8 [C,H,W] to float32 (pixels / 255 - mean) / std; one multiplication and one addition."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        spread = torch.tensor(std, dtype=torch.float64)[:, None, None]
        self.factor = (1 / (255 * spread)).float()
        self.offset = (-torch.tensor(mean, dtype=torch.float64)[:, None, None] / spread).float()

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels * self.factor).add_(self.offset)


class TrainTransform:
    """Random transform of one training picture: uint8 [C,S,S], or a pillow picture where `whole` -> float32 [C,S,S].

    `whole`: the original picture is needed, at its own size (random resized crops).
    `torch_only`: only torch's random numbers are used.
    """

    def __init__(
        self, augment: Augment, *, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str
    ) -> None:
        self.whole = augment.resized_crop > 0
        self.torch_only = not (self.whole or augment.policy)
        geometry = _geometry(augment, size)
        self.geometry = geometry
        self.on_picture = _on_picture(augment, size=size, channels=len(mean), interpolation=interpolation)
        self.normalise = Normalise(mean, std)
        self.erase = None
        if augment.erase:
            self.erase = v2.RandomErasing(augment.erase, value="random" if augment.erase_fill == "noise" else 0)
        self.random = bool(geometry or self.on_picture or self.erase)

    def __call__(self, picture: Tensor | Image.Image) -> Tensor:
        for step in self.geometry:
            picture = step(picture)
        if self.on_picture:
            picture = to_pil(picture) if isinstance(picture, Tensor) else picture
            for step in self.on_picture:
                picture = step(picture)
        pixels = picture if isinstance(picture, Tensor) else to_pixels(picture)
        image = self.normalise(pixels)
        return image if self.erase is None else self.erase(image)


def _geometry(augment: Augment, size: int) -> list[Callable]:
    """Steps on a tensor that has its final size."""
    steps: list[Callable] = []
    if augment.crop_padding:
        steps.append(v2.RandomCrop(size, padding=augment.crop_padding))
    if augment.flip and not augment.resized_crop:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    return steps


def _on_picture(augment: Augment, *, size: int, channels: int, interpolation: str) -> list[Callable]:
    """Steps on a pillow picture: resized crop (with its flip), affine, policy."""
    try:
        resized_crop, policy, _ = create_transform(
            size,
            is_training=True,
            separate=True,
            scale=(augment.resized_crop or 1.0, 1.0),
            ratio=(TIMM_SMALLEST_ASPECT, 1 / TIMM_SMALLEST_ASPECT),
            hflip=augment.flip,
            color_jitter=None,
            auto_augment=augment.policy or None,
            interpolation=interpolation,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"augment.policy={augment.policy!r} is not one of timm's, such as 'rand-m9-mstd0.5-inc1': {error}"
        ) from error
    if augment.policy_ops:
        policy = _only(augment.policy_ops, policy.transforms[0])
    steps: list[Callable] = [resized_crop] if augment.resized_crop else []
    if augment.shift or augment.rotate or augment.scale:
        shift = (augment.shift, augment.shift) if augment.shift else None
        scale = (1 - augment.scale, 1 + augment.scale) if augment.scale else None
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(augment.rotate, translate=shift, scale=scale, interpolation=bilinear))
    if augment.policy:
        # timm's operations fill with a colour triple, which a grey picture cannot take.
        steps += [policy] if channels == 3 else [v2.RGB(), policy, v2.Grayscale(1)]
    return steps


def _only(names: Sequence[str], policy: RandAugment) -> RandAugment:
    """`policy` without the operations that `names` leaves out; those that stay are timm's, with all their settings."""
    return RandAugment([op for op in policy.ops if op.name.removesuffix("Increasing") in names], policy.num_layers)


def mixing(augment: Augment, *, num_classes: int, share: float = 1.0) -> Mixup | None:
    """timm's mixup and cutmix of a batch, without label smoothing (which is the loss's), or None when both are off.

    `share`: of batches that are mixed; each is with this probability.

    `mix(images, labels) -> images, soft targets [B,num_classes]` changes its batch in place, wants an even batch and
    draws from numpy's global state: call it inside `seeded(seed, step, rank)` to make it a function of these.
    """
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=share,
        label_smoothing=0.0,
        num_classes=num_classes,
    )


def mixed(mixer: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `mixer` makes of images [B,C,H,W], or of clips [T,B,C,H,W], whose frames are all mixed alike."""
    if images.ndim == 4:
        return mixer(images, labels)
    steps = len(images)
    pictures, target = mixer(images.transpose(0, 1).flatten(1, 2), labels)
    return pictures.unflatten(1, (steps, -1)).transpose(0, 1), target

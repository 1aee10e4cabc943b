"""How a picture becomes a network's input, as a file tells it: a square of its middle, or the whole, framed or padded.

All are data that somebody else may have written, so that every value is of its type and in bounds, or refused.
"""

import math
from dataclasses import dataclass
from typing import Any

LONGEST_SIDE = 2048  # pixels of a square before the crop
LONGEST_FRAME = 4096  # pixels of a whole picture, or of a window
LONGEST_PADDING = 256  # pixels that sides are made a multiple of
USUAL_SIDE = 1024  # pixels of a picture that keeps its size, where its windows are counted
MOST_WINDOWS = 4096  # over a picture: each is a run of the network


@dataclass(frozen=True, kw_only=True)
class Normalised:
    """What all have: pixels in 0..1 less `mean`, over `std`, of each channel.

    `channels`: 1 grey or 3 RGB. `interpolation`: bicubic, bilinear. Raises ValueError for values that cannot be.
    """

    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise ValueError(f"pictures have 1 or 3 channels, got channels={self.channels!r}")
        for name, least in (("mean", -1e6), ("std", 1e-6)):
            values = getattr(self, name)
            numbers = isinstance(values, tuple) and all(type(each) in (int, float) for each in values)
            if not (numbers and len(values) == self.channels and all(least <= each <= 1e6 for each in values)):
                raise ValueError(f"{name} must be a tuple of {self.channels} numbers, {least:g} to 1e6, got {values!r}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be bicubic or bilinear, got {self.interpolation!r}")


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Normalised):
    """Of networks that see one square: short side to `size / crop` pixels, then the centre `size` x `size`.

    Raises ValueError for values that cannot be.
    """

    size: int
    crop: float

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = type(self.size) is int and self.size >= 1
        crop = type(self.crop) in (int, float) and 0 < self.crop <= 1
        if not (whole and crop and self.size <= LONGEST_SIDE * self.crop):
            raise ValueError(
                f"size / crop is at most {LONGEST_SIDE} pixels with a crop above 0 and at most 1, "
                f"got size={self.size!r}, crop={self.crop!r}"
            )

    @property
    def seen(self) -> tuple[int, int] | None:
        """Height and width of what the network is given; None if that depends on the picture."""
        return self.size, self.size


@dataclass(frozen=True, kw_only=True)
class Framing(Normalised):
    """Of networks that see whole pictures, which keep their ratio or are resized to `fixed` = (height, width).

    `short_side`: in pixels, 0 leaves it; `max_side`: the long side is made no longer than this, 0 is no limit.
    `window`, `stride`: height and width of windows that go over the picture, and of their steps; () shows it at once.
    They may be MOST_WINDOWS over `fixed`, or else over a square of `short_side`, `max_side` or USUAL_SIDE.
    Raises ValueError for values that cannot be.
    """

    short_side: int = 0
    max_side: int = 0
    fixed: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("short_side", "max_side"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= LONGEST_FRAME:
                raise ValueError(f"{name} must be 0 to {LONGEST_FRAME} pixels, got {value!r}")
        for name in ("fixed", "window", "stride"):
            value = getattr(self, name)
            sides = isinstance(value, tuple) and all(type(each) is int and 1 <= each <= LONGEST_FRAME for each in value)
            if not (sides and len(value) in (0, 2)):
                raise ValueError(f"{name} must be a height and a width, 1 to {LONGEST_FRAME}, or (), got {value!r}")
        if self.fixed and (self.short_side or self.max_side):
            raise ValueError(
                f"fixed={self.fixed} beside short_side={self.short_side} and max_side={self.max_side} are two ways to "
                "resize: leave one out"
            )
        steps = zip(self.stride, self.window, strict=False)
        if len(self.window) != len(self.stride) or any(step > side for step, side in steps):
            raise ValueError(f"stride={self.stride} does not cover pictures by window={self.window}")
        frame = self.fixed or (self.short_side or self.max_side or USUAL_SIDE,) * 2
        sides = zip(frame, self.window, self.stride, strict=False)
        count = math.prod(1 + math.ceil(max(side - seen, 0) / step) for side, seen, step in sides)
        if count > MOST_WINDOWS:
            raise ValueError(
                f"window={self.window} goes over a picture of {frame} in {count} steps of stride={self.stride}: "
                f"at most {MOST_WINDOWS}, so take larger steps or windows"
            )

    @property
    def seen(self) -> tuple[int, int] | None:
        """Height and width of what the network is given; None if that depends on the picture.

        A picture smaller than a window is given as it is.
        """
        if self.window and self.fixed:
            return min(self.window[0], self.fixed[0]), min(self.window[1], self.fixed[1])
        return self.window or self.fixed or None


@dataclass(frozen=True, kw_only=True)
class Letterbox(Normalised):
    """Of networks that find boxes: whole pictures, as large as fit into `window` = (height, width) in their ratio.

    They lie at the top left. `turning` False: all are padded to the window; True: it turns where a picture stands, and
    none is padded for it. Then both sides are padded to a multiple of `padded_to`; padding is 0, the mean colour.
    Raises ValueError for values that cannot be.
    """

    window: tuple[int, ...]
    turning: bool = False
    padded_to: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = isinstance(self.window, tuple) and all(type(e) is int and 1 <= e <= LONGEST_FRAME for e in self.window)
        if not (sides and len(self.window) == 2):
            raise ValueError(f"window must be a height and a width, 1 to {LONGEST_FRAME}, got {self.window!r}")
        if type(self.turning) is not bool:
            raise ValueError(f"turning must be True or False, got {self.turning!r}")
        if type(self.padded_to) is not int or not 1 <= self.padded_to <= LONGEST_PADDING:
            raise ValueError(f"padded_to must be 1 to {LONGEST_PADDING} pixels, got {self.padded_to!r}")

    @property
    def seen(self) -> tuple[int, int] | None:
        """Height and width of what the network is given; None if that depends on the picture."""
        return None if self.turning else self.padded(*self.window)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """What the network is given of a picture that has been made this large."""
        least = (1, 1) if self.turning else self.window
        return tuple(
            -(-max(side, room) // self.padded_to) * self.padded_to
            for side, room in zip((height, width), least, strict=True)
        )


Pictures = Preprocessing | Framing | Letterbox


def told_by(stored: dict[str, Any]) -> Pictures:
    """What the plain values of a header tell; raises ValueError or TypeError if that is none of them."""
    kind = Preprocessing if "size" in stored else Letterbox if "turning" in stored else Framing
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})

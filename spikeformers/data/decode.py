"""Reading one picture file: decoded whole, so that a truncated one is noticed, and turned into grey or RGB openly.

Harmless conversions are made: palette, black-and-white, CMYK and YCbCr to the model's kind; transparency is laid over
white; grey to RGB by repeating; RGB to grey by luma.  Deeper pictures (16 bit, float) and others are refused."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

MODES = {1: "L", 3: "RGB"}
_TRANSPARENT = {"LA", "La", "PA", "RGBA", "RGBa"}
_HARMLESS = {"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"} | _TRANSPARENT


class Stored(Protocol):
    """An encoded file somewhere: a `Path`, or a member of an archive."""

    def read_bytes(self) -> bytes: ...


class UnreadableError(ValueError):
    """Something that cannot be read or does not suit the model; the message is one line and names the file."""

    def __init__(self, message: str) -> None:
        # A worker process of a DataLoader wraps the message in its traceback: keep our line, which is the last.
        kind = type(self)
        super().__init__(message.strip().rsplit("\n", 1)[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: "))


class UnreadablePictureError(UnreadableError):
    """A picture that cannot be read or does not suit the model."""


class UnreadableRecordingError(UnreadableError):
    """A recording of events that cannot be read or does not suit the model."""


def decode(source: Stored | bytes | np.ndarray, *, name: str, channels: int) -> Image.Image:
    """The picture at a path, in bytes or in uint8 pixels, wholly decoded, in mode L (`channels` = 1) or RGB (3).

    Raises UnreadablePictureError (a ValueError) with `name` if the file is missing, is no picture, is truncated, or has
    channels that cannot be converted without loss of meaning.
    """
    if isinstance(source, np.ndarray):
        return _convert(Image.fromarray(source), name=name, channels=channels)
    return _convert(opened(source, name=name), name=name, channels=channels)


def opened(source: Stored | bytes, *, name: str) -> Image.Image:
    """The picture wholly decoded, in the mode of its file.  Raises UnreadablePictureError naming it."""
    with _errors_named(name):
        picture = Image.open(io.BytesIO(source if isinstance(source, bytes) else source.read_bytes()))
        picture.load()
        return picture


def height_width(source: Stored, *, name: str) -> tuple[int, int]:
    """The size of a picture from its header alone.  Raises UnreadablePictureError naming it."""
    with _errors_named(name), Image.open(source if isinstance(source, Path) else io.BytesIO(source.read_bytes())) as it:
        return it.height, it.width


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadablePictureError(f"cannot read image {name}: not a picture format that pillow knows") from error
    except Exception as error:  # pillow's decoders raise OSError, SyntaxError, struct.error, IndexError and more
        reason = getattr(error, "strerror", None) or str(error).replace("\n", " ") or type(error).__name__
        raise UnreadablePictureError(f"cannot read image {name}: {reason}") from error


def _convert(picture: Image.Image, *, name: str, channels: int) -> Image.Image:
    wanted = MODES[channels]
    if picture.mode == wanted and "transparency" not in picture.info:
        return picture
    if picture.mode not in _HARMLESS:
        bands = len(picture.getbands())
        raise UnreadablePictureError(
            f"image {name} has {bands} channel{'s' * (bands > 1)} of mode {picture.mode}, the model wants {channels} "
            f"of 8 bits ({wanted}): convert the file to 8-bit grey or RGB"
        )
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(wanted)

"""Small sets of pictures and recordings made on the spot."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def save_picture(path: Path, *, value: int, side: int = 20, mode: str = "RGB") -> Path:
    """A picture of one grey level with a darker left half, so that a flip shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side), value, dtype=np.uint8)
    pixels[:, : side // 2] //= 2
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def draw() -> Callable[..., Path]:
    """draw(path, value=200, side=20, mode="RGB") saves a picture and returns its path."""
    return save_picture


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder("train", "test", per_class=3) writes ROOT/SPLIT/{cat,dog}/*.png and returns ROOT; no split: ROOT/CLASS."""

    def build(*splits: str, per_class: int = 4, side: int = 20) -> Path:
        for split in splits or (".",):
            for rank, name in enumerate(("cat", "dog")):
                for i in range(per_class):
                    save_picture(tmp_path / split / name / f"{i:02d}.png", value=40 + 100 * rank + 10 * i, side=side)
        return tmp_path

    return build


def save_labelled(image: Path, mask: Path, labels: np.ndarray, *, palette: bool = False) -> None:
    """A picture whose red tells the label of each pixel (20 x label, ignored ones 255), and its mask as it is given."""
    pixels = np.zeros((*labels.shape, 3), dtype=np.uint8)
    pixels[..., 0] = np.minimum(20 * labels.astype(int), 255)
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image)
    picture = Image.fromarray(labels.astype(np.uint8))
    if palette:
        picture.putpalette([255 - i // 3 for i in range(768)])  # colours that are not the indices
    picture.save(mask)


@pytest.fixture
def draw_labelled() -> Callable[..., None]:
    """draw_labelled(image, mask, labels, palette=False) saves a picture and its mask."""
    return save_labelled


@pytest.fixture
def mask_folder(tmp_path: Path) -> Path:
    """A maskfolder with classes sky, tree, car: eight training and three test pictures of 24 x 32, in blocks of 8."""
    (tmp_path / "classes.txt").write_text("sky\ntree 0 128 0\ncar\n")
    random = np.random.RandomState(0)
    for split, count in (("train", 8), ("val", 3)):
        for i in range(count):
            labels = random.choice([0, 1, 2, 255], (3, 4)).repeat(8, 0).repeat(8, 1)
            top = tmp_path / split
            save_labelled(top / "images" / f"{i:02d}.png", top / "masks" / f"{i:02d}.png", labels)
    return tmp_path


def save_events(path: Path, times: list[int]) -> Path:
    """A recording in the format of its name with events at these microseconds, in one row from column 0 on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = np.arange(len(times))
    x, y, p, t = number % 30, np.full(len(times), 3), number % 2, np.array(times, dtype=np.int64)
    if path.suffix == ".bin":  # N-MNIST
        words = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], axis=1)
        path.write_bytes(words.astype(np.uint8).tobytes())
    elif path.suffix == ".npz":
        np.savez(path, x=x, y=y, p=p, t=t)
    elif path.name.startswith("user"):  # AEDAT 3.1: one packet of polarity events
        heading = struct.pack("<hhiiiiii", 1, 0, 8, 4, 0, *[len(times)] * 3)
        words = np.stack([x << 17 | y << 2 | p << 1 | 1, t], axis=1).astype("<u4")
        path.write_bytes(b"#!AER-DAT3.1\r\n#!END-HEADER\r\n" + heading + words.tobytes())
    else:  # AEDAT 2.0 of a DVS128
        words = np.stack([y << 8 | x << 1 | p, t], axis=1).astype(">u4")
        path.write_bytes(b"#!AER-DAT2.0\r\n" + words.tobytes())
    return path


@pytest.fixture
def record() -> Callable[[Path, list[int]], Path]:
    """record(path, times) saves a recording, in the format that the name asks for, and returns its path."""
    return save_events


@pytest.fixture
def event_folder(tmp_path: Path) -> Path:
    """An eventfolder with classes left and right: six training and four test recordings of 34 x 34 (N-MNIST's .bin).

    Event number n of recording i comes at 100 n + i microseconds; right ones have twice as many events.
    """
    for split, count in (("train", 3), ("test", 2)):
        for rank, name in enumerate(("left", "right")):
            for i in range(count):
                times = [100 * n + i for n in range(40 * (rank + 1))]
                save_events(tmp_path / split / name / f"{i}.bin", times)
    return tmp_path

"""Small picture sets made on the spot."""

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

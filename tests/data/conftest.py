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

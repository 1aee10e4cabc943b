"""A trained segmentation network on single picture files: their labels, and the picture that shows them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spikeformers.data.augment import to_pixels
from spikeformers.data.decode import decode
from spikeformers.data.segmentation import read_picture_for
from spikeformers.train.checkpoint import read_json
from spikeformers.train.recipe import from_json
from spikeformers.train.saved import published_palette, read_trained, run_of
from spikeformers.train.segmentation import windows_of
from spikeformers.train.segmentation_evaluate import scores_of
from spikeformers.train.segmentation_pictures import overlay, shares_of, with_legend

SHOWN = 0.001  # share of the pixels from which on a class is in the legend


@dataclass(frozen=True)
class Picture:
    """A picture as its file has it, uint8 [3,H,W], and as the network takes it, float32 [C,h,w]."""

    pixels: Tensor
    input: Tensor


class PixelPredictor:
    """The network of a run or of a saved model. Raises ValueError where there is none."""

    def __init__(self, source: str) -> None:
        self.model, self.spec, self.classes = read_trained(source)
        run = run_of(Path(source))
        self.windows = windows_of(from_json(read_json(run / "recipe.json"))) if run else None
        palette = read_json(run / "summary.json")["colours"] if run else self._published_colours()
        self.colours = torch.as_tensor(palette, dtype=torch.uint8)

    def _published_colours(self) -> np.ndarray:
        return published_palette(self.spec, count=len(self.classes))[1]

    def read(self, path: Path) -> Picture:
        """Raises ValueError naming the file."""
        pixels = to_pixels(decode(path, name=str(path), channels=3))
        return Picture(pixels, read_picture_for(self.spec, path)[0])

    @torch.no_grad()
    def labels(self, picture: Picture) -> Tensor:
        """The class of each pixel of the file, int64 [H,W]."""
        size = tuple(picture.pixels.shape[1:])
        return scores_of(self.model, picture.input[None], size=size, windows=self.windows)[0].argmax(0)

    def picture(self, picture: Picture, labels: Tensor) -> Image.Image:
        """The file under the colours of its classes, with a legend of those present."""
        entries = [
            (f"{self.classes[index]}  {100 * share:.1f} %", self.colours[index])
            for index, share in shares_of(labels)
            if share >= SHOWN
        ]
        return with_legend(overlay(picture.pixels, labels, colours=self.colours), entries)

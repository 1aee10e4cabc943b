"""A trained segmentation network on single picture files: their labels, and the picture that shows them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spikeformers.data.augment import to_pixels
from spikeformers.data.decode import decode
from spikeformers.deploy import Artifact, Framing
from spikeformers.train.checkpoint import read_json
from spikeformers.train.recipe import from_json
from spikeformers.train.saved import (
    framing_of,
    palette_of_file,
    published_palette,
    read_picture,
    read_trained,
    run_of,
)
from spikeformers.train.segmentation import windows_of
from spikeformers.train.segmentation_evaluate import Windows, scores_of
from spikeformers.train.segmentation_pictures import overlay, shares_of, with_legend

SHOWN = 0.001  # share of the pixels from which on a class is in the legend


@dataclass(frozen=True)
class Picture:
    """A picture as its file has it, uint8 [3,H,W], and as the network takes it, float32 [C,h,w]."""

    pixels: Tensor
    input: Tensor


@dataclass(frozen=True)
class PixelPredictor:
    """A network, or a file of `export`, with `semantic`; what it is given, and its classes with colours uint8 [N,3]."""

    model: nn.Module | Artifact
    framing: Framing
    classes: tuple[str, ...]
    colours: Tensor

    def read(self, path: Path) -> Picture:
        """Raises ValueError naming the file."""
        pixels = to_pixels(decode(path, name=str(path), channels=3))
        return Picture(pixels, read_picture(path, self.framing))

    @torch.no_grad()
    def labels(self, picture: Picture) -> Tensor:
        """The class of each pixel of the file, int64 [H,W]."""
        size, told = tuple(picture.pixels.shape[1:]), self.framing
        windows = Windows(told.window, told.stride) if told.window else None
        return scores_of(self.model, picture.input[None], size=size, windows=windows)[0].argmax(0)

    def picture(self, picture: Picture, labels: Tensor) -> Image.Image:
        """The file under the colours of its classes, with a legend of those present."""
        entries = [
            (f"{self.classes[index]}  {100 * share:.1f} %", self.colours[index])
            for index, share in shares_of(labels)
            if share >= SHOWN
        ]
        return with_legend(overlay(picture.pixels, labels, colours=self.colours), entries)


def trained_predictor(source: str) -> PixelPredictor:
    """Of a run, or of a saved model, whose colours are those of its paper's data. Raises ValueError where none is."""
    model, spec, classes = read_trained(source)
    if run := run_of(Path(source)):
        windows = windows_of(from_json(read_json(run / "recipe.json")))
        palette = read_json(run / "summary.json")["colours"]
    else:
        windows, palette = None, published_palette(spec, count=len(classes))[1]
    return PixelPredictor(model, framing_of(spec, windows=windows), classes, torch.as_tensor(palette).byte())


def file_predictor(file: Artifact, *, name: str) -> PixelPredictor:
    """Of a file called `name`. Raises ValueError for one that does not say how to prepare whole pictures."""
    if not isinstance(file.preprocessing, Framing):
        raise ValueError(
            f"{name} gives classes to pixels and does not say how to frame whole pictures: save it with "
            "preprocessing=spikeformers.deploy.Framing(...), or run it by spikeformers.deploy.load in Python"
        )
    return PixelPredictor(file, file.preprocessing, *palette_of_file(file))

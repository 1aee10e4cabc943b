"""A trained detector on single picture files: what it finds, and the picture that shows it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spikeformers.data.augment import to_pil
from spikeformers.data.detection import DetectionData, read_picture_to_detect
from spikeformers.data.segmentation_sources import default_colours
from spikeformers.deploy import Artifact, Letterbox
from spikeformers.heads.detections import CERTAIN, Detections, certain
from spikeformers.train.checkpoint import read_json
from spikeformers.train.detection_evaluate import in_file
from spikeformers.train.detection_pictures import marked
from spikeformers.train.saved import palette_of_file, run_of


@dataclass(frozen=True)
class SeenPicture:
    """A picture as its file has it, uint8 [C,H,W], and as a detector takes it: float32 [C,h,w], with its size in there,
    int64 [2]."""

    pixels: Tensor
    input: Tensor
    size: Tensor


@dataclass(frozen=True)
class BoxPredictor:
    """A detector, or a file of `export`; how it is given pictures, and its classes with colours uint8 [N,3]."""

    model: nn.Module | Artifact
    letterbox: Letterbox
    classes: tuple[str, ...]
    colours: Tensor

    def read(self, path: Path) -> SeenPicture:
        """Raises ValueError naming the file."""
        image, size, pixels = read_picture_to_detect(self.letterbox, path)
        return SeenPicture(pixels, image, torch.tensor(size))

    @torch.no_grad()
    def found(self, picture: SeenPicture, *, threshold: float = CERTAIN) -> Detections:
        """What has a score of `threshold` or more, in pixels of the file, with masks bool [N,H,W] if it draws some."""
        found = self.model.detect(self.model(picture.input[None]), picture.size[None])[0]
        original = torch.tensor(picture.pixels.shape[1:])
        return in_file(certain(found, threshold=threshold), size=picture.size, original=original)

    def picture(self, picture: SeenPicture, found: Detections) -> Image.Image:
        """The file under what was found."""
        return to_pil(marked(picture.pixels, found, classes=self.classes, colours=self.colours))


def box_predictor(model: nn.Module, spec: DetectionData, *, classes: tuple[str, ...], source: str) -> BoxPredictor:
    """Of a run or a saved model, `source`; the colours are those of its report."""
    run = run_of(Path(source))
    colours = read_json(run / "summary.json")["colours"] if run else default_colours(len(classes))
    return BoxPredictor(model, spec.letterbox, classes, torch.as_tensor(colours).byte())


def file_box_predictor(file: Artifact, *, name: str) -> BoxPredictor:
    """Of a file called `name`. Raises ValueError for one that does not say how to pad whole pictures."""
    if not isinstance(file.preprocessing, Letterbox):
        raise ValueError(
            f"{name} finds boxes and does not say how to fit whole pictures: save it with "
            "preprocessing=spikeformers.deploy.Letterbox(...), or run it by spikeformers.deploy.load in Python"
        )
    return BoxPredictor(file, file.preprocessing, *palette_of_file(file))

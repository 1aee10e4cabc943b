"""What a detection looks like: boxes with their classes and scores, and masks, over the pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.font_manager
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from spikeformers.data.augment import to_pil
from spikeformers.data.detection import DetectionSplit
from spikeformers.heads.detections import Detections, certain
from spikeformers.train.detection_evaluate import in_file
from spikeformers.train.evaluate import drawn
from spikeformers.train.segmentation_pictures import enlarged, page_factor, page_wide, save_picture

SAMPLES = "detections.png"  # in a run's folder
_SHOWN = 6  # test pictures
_OPACITY = 0.45
_LINE = 200  # a box's line is this part of the picture's shorter side
_TEXT = 32  # its label's letters are this part


def marked(
    picture: Tensor, found: Detections, *, classes: Sequence[str], colours: Tensor, scores: bool = True
) -> Tensor:
    """A picture uint8 [C,H,W] under what was found in it, in its own pixels; uint8 [3,H,W].

    Masks are bool [N,H,W], colours uint8 [classes, 3].  `scores`: write them behind the names.
    Pictures narrower than a page are enlarged by a whole factor, so that labels leave something to be seen.
    """
    factor = page_factor(picture)
    page = enlarged(picture.expand(3, -1, -1), factor)
    if not len(found.labels):
        return page
    hues = [tuple(colours[label].tolist()) for label in found.labels.tolist()]
    if found.masks is not None:
        page = draw_segmentation_masks(page, enlarged(found.masks, factor), alpha=_OPACITY, colors=hues)
    side = min(page.shape[1:])
    names = [classes[label] for label in found.labels.tolist()]
    if scores:
        names = [f"{name} {score:.2f}" for name, score in zip(names, found.scores.tolist(), strict=True)]
    return draw_bounding_boxes(
        page,
        (factor * found.boxes).round(),
        labels=names,
        colors=hues,
        width=max(2, side // _LINE),
        font=matplotlib.font_manager.findfont("DejaVu Sans"),  # comes with matplotlib
        font_size=max(10, side // _TEXT),
        label_colors=["white" if sum(hue) < 3 * 128 else "black" for hue in hues],
        fill_labels=True,
    )


@torch.no_grad()
def found_in(model: nn.Module, split: DetectionSplit, index: int) -> Detections:
    """What `model` finds in one picture of a test split, in pixels of its file."""
    images, (target,) = split.collate([split[index]])
    found = model.detect(model(images), target["size"][None])[0]
    return in_file(found, size=target["size"], original=target["original"])


def truth_of(split: DetectionSplit, index: int) -> Detections:
    """What the annotations say of one picture, as boxes that are certain."""
    objects, size = split.truth(index), split.original_size(index)
    boxes = box_convert(torch.from_numpy(objects.boxes), "xywh", "xyxy")
    masks = None if objects.masks is None else torch.from_numpy(objects.dense_masks(*size)).bool()
    return Detections(boxes, torch.ones(len(boxes)), torch.from_numpy(objects.labels), masks)


def draw_samples(model: nn.Module, split: DetectionSplit, path: Path) -> None:
    """Write rows of truth and of what was found in some test pictures to a PNG file."""
    told = {"classes": split.classes, "colours": torch.as_tensor(split.colours)}
    tiles = []
    for index in drawn(len(split), _SHOWN):
        picture = split.picture(index)
        tiles.append(page_wide(marked(picture, truth_of(split, index), **told, scores=False)))
        tiles.append(page_wide(marked(picture, certain(found_in(model, split, index)), **told)))
    height = max(tile.shape[1] for tile in tiles)
    tiles = [F.pad(tile, (0, 0, 0, height - tile.shape[1]), value=255) for tile in tiles]
    save_picture(to_pil(make_grid(tiles, nrow=4, padding=4, pad_value=255)), path)

"""What a segmentation looks like: classes laid over pictures, masks of queries, points that attention samples.

Paper: Spike2Former, Fig. 3 (mean mask of each query over a test split) and Fig. 2 (sampling points).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.utils import draw_segmentation_masks, make_grid

from spikeformers.attention import SDDA
from spikeformers.data.augment import to_pil
from spikeformers.data.segmentation import SegmentationSplit
from spikeformers.data.segmentation_augment import IGNORE
from spikeformers.heads.masks import MaskClassification
from spikeformers.train.evaluate import batches_of, drawn
from spikeformers.train.segmentation_evaluate import Windows, scores_of

SAMPLES, QUERIES, SAMPLING = "segmentation.png", "queries.png", "sampling.png"  # in a run's folder
_SHOWN = 4  # test pictures
PAGE = 320  # pixels of a shown picture
_AVERAGED = 64  # test pictures behind the mean masks
_QUERY_SIDE = 64  # pixels of a mean mask
_OPACITY = 0.5
_LINE, _COLUMN, _LETTER = 18, 170, 12  # pixels of an entry of a legend, and of its letters
_ROOMY = 640  # pixels of a picture from which on its legend grows with it
_TITLES = ("picture", "labels", "prediction")  # of the columns of SAMPLES


def overlay(picture: Tensor, labels: Tensor, *, colours: Tensor) -> Tensor:
    """A picture uint8 [C,H,W] under the colours uint8 [N,3] of its labels [H,W], uint8 [3,H,W]; 255 stays bare."""
    picture = picture.expand(3, -1, -1).contiguous()
    present = [label for label in labels.unique().tolist() if label != IGNORE]
    if not present:
        return picture
    masks = torch.stack([labels == label for label in present])
    return draw_segmentation_masks(picture, masks, alpha=_OPACITY, colors=[tuple(colours[i].tolist()) for i in present])


def shares_of(labels: Tensor) -> list[tuple[int, float]]:
    """The classes in a map of labels with their share of its pixels, largest first."""
    found, counts = labels.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [(int(found[i]), int(counts[i]) / labels.numel()) for i in order]


def page_factor(picture: Tensor) -> int:
    """How many times a picture [C,H,W] must be enlarged to be as wide as a page; high ones stay within four pages."""
    height, width = picture.shape[1:]
    return max(1, min(-(-PAGE // width), 4 * PAGE // height))


def enlarged(pixels: Tensor, factor: int) -> Tensor:
    """[C,H,W] with every pixel `factor` times in either direction."""
    return pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def with_legend(picture: Tensor, entries: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """A picture uint8 [3,H,W] above a strip that names what its colours are, in letters that suit its width.

    Pictures narrower than a page are enlarged by a whole factor.
    """
    picture = enlarged(picture, page_factor(picture))
    height, width = picture.shape[1:]
    line, column, letter, gap = _scaled(_LINE, _COLUMN, _LETTER, 4, width=width)
    columns = width // column
    page = Image.new("RGB", (width, height + -(-len(entries) // columns) * line + 2 * gap), "white")
    page.paste(to_pil(picture), (0, 0))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=letter)
    for index, (name, colour) in enumerate(entries):
        left, top = index % columns * column + gap, height + index // columns * line + gap
        draw.rectangle((left, top, left + letter, top + letter), fill=tuple(colour.tolist()), outline="grey")
        draw.text((left + letter + gap, top + letter / 2), name, fill="black", font=font, anchor="lm")
    return page


def with_titles(page: Image.Image, titles: Sequence[str]) -> Image.Image:
    """A page of equal columns below a strip with the title of each."""
    line, letter = _scaled(_LINE, _LETTER, width=page.width)
    titled = Image.new("RGB", (page.width, page.height + line), "white")
    titled.paste(page, (0, line))
    draw, font = ImageDraw.Draw(titled), ImageFont.load_default(size=letter)
    for index, title in enumerate(titles):
        middle = (index + 0.5) * page.width / len(titles)
        draw.text((middle, line / 2), title, fill="black", font=font, anchor="mm")
    return titled


def _scaled(*pixels: int, width: int) -> list[int]:
    """Sizes of letters and lines on a page of this width."""
    return [round(max(1.0, width / _ROOMY) * each) for each in pixels]


def numbered(page: Image.Image, *, count: int, columns: int, side: int) -> Image.Image:
    """A page of `count` square tiles, `side` pixels from one to the next, with the number of each in its corner."""
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=_LETTER)
    for index in range(count):
        place = index % columns * side + 5, index // columns * side + 3
        draw.text(place, str(index), fill="white", font=font, stroke_width=1, stroke_fill="black")
    return page


@torch.no_grad()
def draw_samples(model: nn.Module, split: SegmentationSplit, path: Path, *, windows: Windows | None = None) -> None:
    """Write rows of picture, truth and prediction of some test pictures to a PNG file, with the classes in them."""
    colours, tiles, shown = torch.as_tensor(split.colours), [], set()
    for index in drawn(len(split), _SHOWN):
        picture, truth = split.picture(index), split.mask(index)
        scores = scores_of(model, split[index][0][None], size=tuple(truth.shape), windows=windows)
        for labels in (None, truth, scores[0].argmax(0)):
            tile = picture.expand(3, -1, -1) if labels is None else overlay(picture, labels, colours=colours)
            tiles.append(page_wide(tile))
            shown |= set() if labels is None else set(labels.unique().tolist()) - {IGNORE}
    height = max(tile.shape[1] for tile in tiles)
    tiles = [F.pad(tile, (0, 0, 0, height - tile.shape[1]), value=255) for tile in tiles]
    grid = make_grid(tiles, nrow=len(_TITLES), padding=4, pad_value=255)
    entries = [(split.classes[label], colours[label]) for label in sorted(shown)]
    save_picture(with_titles(with_legend(grid, entries), _TITLES), path)


def page_wide(picture: Tensor, *, width: int = PAGE) -> Tensor:
    """uint8 [3,H,W] at the `width` of a page, its ratio kept; small pictures are enlarged without smoothing."""
    height = max(1, round(picture.shape[1] * width / picture.shape[2]))
    mode = {"mode": "nearest"} if picture.shape[2] < width else {"mode": "bilinear", "antialias": True}
    return F.interpolate(picture[None].float(), (height, width), **mode)[0].round().byte()


@torch.no_grad()
def draw_queries(model: nn.Module, split: Dataset, path: Path) -> bool:
    """Write the mean mask of each query over test pictures to a PNG file, with its number; False without queries."""
    total, count = 0, 0
    for images, _ in batches_of(split, batch_size=1, images=_AVERAGED):
        output = model(images)
        if not isinstance(output, MaskClassification):
            return False
        masks = F.interpolate(output.mask_logits, (_QUERY_SIDE, _QUERY_SIDE), mode="bilinear").sigmoid()
        total, count = total + masks.sum(0), count + 1
    means = (total / count).unsqueeze(1)
    low, high = means.amin((2, 3), keepdim=True), means.amax((2, 3), keepdim=True)  # each by its own contrast
    shown = ((means - low) / (high - low).clamp(min=1e-6) * 255).round().byte()
    page = to_pil(make_grid(shown, nrow=10, padding=2, pad_value=255))
    save_picture(numbered(page, count=len(shown), columns=10, side=_QUERY_SIDE + 2), path)
    return True


def placed(points: Tensor, *, stride: int, seen: tuple[int, int], page: tuple[int, int]) -> Tensor:
    """Points (x, y) [..., 2] of a map, 0 the middle of its first cell, in pixels of a page that shows the picture.

    The last cells of a map may reach beyond the picture that the network has `seen`, which `stride` need not divide.
    """
    return (points + 0.5) * stride * torch.tensor([page[1] / seen[1], page[0] / seen[0]])


@torch.no_grad()
def draw_sampling(model: nn.Module, split: SegmentationSplit, path: Path) -> bool:
    """Write where the last deformable attention samples for the middle pixel of a test picture to a PNG file.

    False for a network without deformable attention.
    """
    attentions = [module for module in model.modules() if isinstance(module, SDDA)]
    if not attentions:
        return False
    index = drawn(len(split), 1)[0]
    image = split[index][0]
    inputs: list[Tensor] = []
    handle = attentions[-1].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        model(image[None])
    finally:
        handle.remove()
    points = attentions[-1].sampling_points(inputs[0])[0]
    height, width = cells = tuple(points.shape[-2:])
    chosen = points[..., height // 2, width // 2].flatten(0, 1)
    picture = page_wide(split.picture(index).expand(3, -1, -1), width=2 * PAGE)
    seen = tuple(image.shape[-2:])
    stride = next(each for each in model.feature_info.strides if (-(-seen[0] // each), -(-seen[1] // each)) == cells)
    place = partial(placed, stride=stride, seen=seen, page=tuple(picture.shape[-2:]))
    page = to_pil(picture)
    draw = ImageDraw.Draw(page)
    for x, y in place(chosen).tolist():
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="yellow", outline="black")
    x, y = place(torch.tensor([width // 2, height // 2])).tolist()
    draw.rectangle((x - 7, y - 7, x + 7, y + 7), outline="red", width=3)
    save_picture(page, path)
    return True


def save_picture(page: Image.Image, path: Path) -> None:
    partial = path.with_name(f".tmp-{path.name}")
    page.save(partial, format="PNG")
    partial.replace(path)

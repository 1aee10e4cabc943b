"""What a segmentation is worth: IoU of every class, from scores of whole pictures or of sliding windows.

A class has IoU = right pixels / pixels that it or its prediction covers; mIoU is the mean over classes that either one
covers anywhere in the split. Pixels labelled 255 count nowhere.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics.functional.classification import multiclass_confusion_matrix

from spikeformers.data.segmentation_augment import IGNORE
from spikeformers.train.evaluate import batches_of, drawn, evaluating

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class SegmentationResult:
    """Result over a split: `confusion` int64 [C,C], pixels by true (row) and predicted (column) class."""

    confusion: Tensor

    @cached_property
    def ious(self) -> Tensor:
        """IoU of every class, float64 [C]; NaN for one that neither truth nor prediction knows."""
        right, union = self.confusion.diag(), self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diag()
        return right.double() / union

    @property
    def miou(self) -> float:
        return float(self.ious.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        return int(self.confusion.diag().sum()) / int(self.confusion.sum())

    @property
    def mean_accuracy(self) -> float:
        """Share of right pixels of a class, averaged over the classes that the truth holds."""
        return float((self.confusion.diag().double() / self.confusion.sum(1)).nanmean())

    def by_class(self, names: Sequence[str]) -> dict[str, float | None]:
        """IoU of every class by its name; None where there is none."""
        return {name: None if iou != iou else iou for name, iou in zip(names, self.ious.tolist(), strict=True)}

    @property
    def score(self) -> float:
        """What the best epoch has most of."""
        return self.miou

    def metrics(self) -> dict[str, float]:
        """What the log of an epoch keeps."""
        return {
            "test_miou": self.miou,
            "test_pixel_accuracy": self.pixel_accuracy,
            "test_mean_accuracy": self.mean_accuracy,
        }


@dataclass(frozen=True)
class Windows:
    """Sliding windows of the size `crop`, `stride` apart; the last ones are moved back into the picture."""

    crop: Size
    stride: Size

    def over(self, size: Size) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of every window in a picture of this size."""
        for top in _starts(size[0], self.crop[0], self.stride[0]):
            for left in _starts(size[1], self.crop[1], self.stride[1]):
                yield slice(top, min(top + self.crop[0], size[0])), slice(left, min(left + self.crop[1], size[1]))


def _starts(length: int, crop: int, stride: int) -> list[int]:
    last = max(length - crop, 0)
    return sorted({*range(0, last, stride), last})


def scores_of(
    model: nn.Module, images: Tensor, *, size: Size, windows: Windows | None = None, run: Callable | None = None
) -> Tensor:
    """Scores [B,C,*size] of images [B,C,H,W]: of the whole picture, or averaged over `windows`.

    Scores (logits of Semantic FPN, sums over the queries of Spike2Former) are made at the size that the network saw,
    and these are averaged and resized, as in the papers' code. `run`: what computes the output of `model` instead of
    itself, such as its integer engine.
    """
    run, whole = run or model, tuple(images.shape[-2:])
    if windows is None:
        found = model.semantic(run(images), whole)
    else:
        found = count = images.new_zeros(1, 1, *whole)
        for rows, columns in windows.over(whole):
            part = images[..., rows, columns]
            here = model.semantic(run(part), tuple(part.shape[-2:]))
            around = (columns.start, whole[1] - columns.stop, rows.start, whole[0] - rows.stop)
            found, count = found + F.pad(here, around), count + F.pad(torch.ones_like(here[:1, :1]), around)
        found = found / count
    return found if whole == size else F.interpolate(found, size, mode="bilinear", align_corners=False)


@torch.no_grad()
def evaluate_segmentation(
    model: nn.Module,
    loader: Iterable,
    *,
    windows: Windows | None = None,
    accelerator: Accelerator | None = None,
    run: Callable | None = None,
) -> SegmentationResult:
    """Test `model` on batches (images [B,C,h,w], labels int64 [B,H,W]), in its own precision, without autocast.

    `run`: what computes its output instead of itself, such as its integer engine.
    With an `accelerator` and a loader that it prepared, every process tests its share and gets the whole result.
    Leaves the model in the mode it was in. Raises ValueError for images or scores that are not finite.
    """
    first = next(model.parameters())
    confusion = None
    with evaluating(model):
        for number, (images, labels) in enumerate(loader):
            images = images.to(first.device, first.dtype)
            scores = scores_of(model, images, size=tuple(labels.shape[-2:]), windows=windows, run=run)
            # Spikes hide what is not finite. One matrix a picture, since pictures may differ in size and those that
            # only fill the last batch of several processes are dropped.
            whole = torch.isfinite(images).flatten(1).all(1) & torch.isfinite(scores).flatten(1).all(1)
            found = _matrices(scores.argmax(1).cpu(), labels.cpu(), num_classes=scores.shape[1]).to(first.device)
            if accelerator is not None:
                found, whole = accelerator.gather_for_metrics((found, whole))
            if not whole.all():
                raise ValueError(f"test batch {number} gives values that are not finite; check images and weights")
            confusion = found.sum(0).cpu() + (0 if confusion is None else confusion)
    if confusion is None or not confusion.any():
        raise ValueError("there is nothing to test on: the test split is empty, or all its pixels are ignored")
    return SegmentationResult(confusion)


def _matrices(predicted: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """The confusion of each picture, int64 [B,C,C]."""
    count = {"num_classes": num_classes, "ignore_index": IGNORE}
    pairs = zip(predicted, labels, strict=True)
    return torch.stack([multiclass_confusion_matrix(guess, label, **count) for guess, label in pairs])


@torch.no_grad()
def pixel_agreement(
    model: nn.Module, engine: Callable, split: Dataset, *, images: int, windows: Windows | None = None
) -> dict:
    """Test a network's integer `engine` against it on `images` pictures of `split` chosen by `drawn` (0: all).

    Gives "same" of "total" pixels with the same class.
    """
    same, total = 0, 0
    for image, _ in batches_of(split, batch_size=1, images=images):
        seen = {"size": tuple(image.shape[-2:]), "windows": windows}
        own, other = (scores_of(model, image, **seen, run=run).argmax(1) for run in (model, engine))
        same, total = same + int((own == other).sum()), total + own.numel()
    return {"same": same, "total": total, "images": len(drawn(len(split), images))}


def balanced_weights(masks: Iterable[Tensor], *, num_classes: int) -> Tensor:
    """A weight for each class, float32 [C]: the median frequency of all classes over its own; 1 where it never occurs.

    The frequency of a class is its share of the labelled pixels of those masks [H,W] that it occurs in.
    Source: Eigen & Fergus, ICCV 2015, Sec. 6.3.2.
    """
    pixels, around = torch.zeros(2, num_classes, dtype=torch.float64)
    for mask in masks:
        counts = torch.bincount(mask[mask != IGNORE].flatten().long(), minlength=num_classes)
        pixels += counts
        around += torch.where(counts > 0, counts.sum(), 0)
    frequency = pixels / around
    return torch.nan_to_num(frequency.nanquantile(0.5) / frequency, nan=1.0).float()

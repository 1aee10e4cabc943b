"""What a network gives, whatever its form: one tensor of logits, or tuples of named tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, SequenceKey, tree_flatten_with_path

from spikeformers.heads.detections import certain, matched
from spikeformers.heads.mask_rcnn import RegionOutput

LOGITS = "logits"
"""Name of the tensor of a network that gives only one."""


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of what a network gave, by the names of their fields ("output0", where they have none).

    Sizes that stand beside them are left out. Raises ValueError for anything else but tensors in tuples, and for none.
    """
    leaves = [(path, leaf) for path, leaf in tree_flatten_with_path(output)[0] if not isinstance(leaf, int | None)]
    strange = [type(leaf).__name__ for _, leaf in leaves if not isinstance(leaf, Tensor)]
    if strange or not leaves:
        raise ValueError(f"a network must give tensors, alone or in tuples; this one gives {(strange or ['none'])[0]}")
    return {"_".join(map(_name, path)) or LOGITS: leaf for path, leaf in leaves}


def _name(key: Any) -> str:
    match key:
        case GetAttrKey(name):
            return name
        case SequenceKey(index):
            return f"output{index}"
    return str(key).strip("[]'.")


class Equal(NamedTuple):
    """Predictions of each image that two outputs have in common, and all that there are; int64 [B]."""

    equal: Tensor
    total: Tensor

    @property
    def everywhere(self) -> Tensor:
        """Which images have all predictions in common; bool [B]."""
        return self.equal == self.total


def equal_predictions(model: nn.Module, output: Any, other: Any, size: tuple[int, int]) -> Equal:
    """What two outputs of `model` for the same images, or of forms of it, predict alike.

    A prediction is the class of an image; where `model` segments, of a pixel at `size` = (H, W); where it detects, a
    detection that either is `certain` of: alike are two of one class and SAME_BOX, which count as one.
    """
    if hasattr(model, "detect"):
        pairs = zip(*([certain(found) for found in model.detect(each)] for each in (output, other)), strict=True)
        counts = [(matched(one, another), len(one.labels) + len(another.labels)) for one, another in pairs]
        return Equal(*torch.tensor([(equal, total - equal) for equal, total in counts]).unbind(1))
    own, found = (_classes(model, each, size) for each in (output, other))
    alike = (own == found).view(len(own), -1)
    return Equal(alike.sum(1).cpu(), torch.full((len(alike),), alike.shape[1]))


def _classes(model: nn.Module, output: Any, size: tuple[int, int]) -> Tensor:
    scores = model.semantic(output, size) if hasattr(model, "semantic") else next(iter(named_outputs(output).values()))
    return scores.argmax(1)


def of_images(output: Any) -> Any:
    """The part of an output that tells of whole images: of two stages the first; the second tells of its regions."""
    return output.dense if isinstance(output, RegionOutput) else output


def largest_difference(output: Any, other: Any) -> float:
    """The largest difference between two outputs of one form, so far as they tell of whole images."""
    pairs = zip(*(named_outputs(of_images(each)).values() for each in (output, other)), strict=True)
    return max(float((one - another).abs().max()) for one, another in pairs)


def same_outputs(output: Any, other: Any) -> bool:
    """True if every number is the same."""
    pairs = zip(named_outputs(output).values(), named_outputs(other).values(), strict=True)
    return all(torch.equal(one, another) for one, another in pairs)

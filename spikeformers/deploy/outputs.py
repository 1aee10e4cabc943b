"""What a network gives, whatever its form: one tensor of logits, or tuples of named tensors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, SequenceKey, tree_flatten_with_path

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


def predictions(model: nn.Module, output: Any, size: tuple[int, int]) -> Tensor:
    """The class of each image [B], or, where `model` segments, of each pixel [B, H, W] at `size` = (H, W)."""
    scores = model.semantic(output, size) if hasattr(model, "semantic") else next(iter(named_outputs(output).values()))
    return scores.argmax(1)


def largest_difference(output: Any, other: Any) -> float:
    """The largest difference between two outputs of one form."""
    pairs = zip(named_outputs(output).values(), named_outputs(other).values(), strict=True)
    return max(float((one - another).abs().max()) for one, another in pairs)


def same_outputs(output: Any, other: Any) -> bool:
    """True if every number is the same."""
    pairs = zip(named_outputs(output).values(), named_outputs(other).values(), strict=True)
    return all(torch.equal(one, another) for one, another in pairs)

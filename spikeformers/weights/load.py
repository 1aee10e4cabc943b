"""Putting foreign weights into a model: strict, and clear about what does not fit."""

from torch import Tensor, nn


def load_strict(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` under the model's own keys; every key must be there with its shape, nothing else.

    Raises ValueError that names the first keys missing, unexpected or of another shape; the model is then unchanged.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    extra = [key for key in weights if key not in own]
    if missing or extra:
        parts = [
            f"{len(keys)} {what} ({_few(keys)})" for what, keys in (("missing", missing), ("unexpected", extra)) if keys
        ]
        raise ValueError(f"weights do not fit {type(model).__name__}: {'; '.join(parts)}")
    wrong = [
        f"{key} is {tuple(weights[key].shape)}, needs {tuple(own[key].shape)}"
        for key in own
        if weights[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"weights have other widths than {type(model).__name__}: {_few(wrong)}")
    model.load_state_dict(weights)


def _few(names: list[str]) -> str:
    """The first three of `names`, and how many more."""
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")

"""What the authors' segmentation files look like, made from networks of ours: nobody's trained weights are needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikeformers.heads import Segmenter
from spikeformers.weights.segmenter import keys_of

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="session")
def listed(pytestconfig) -> Callable[[str], Shapes]:
    """Keys and shapes of a state_dict of the authors', from a list in tests/parity."""

    def shapes(name: str) -> Shapes:
        found = {}
        for line in Path(pytestconfig.rootpath / "tests" / "parity" / name).read_text().splitlines():
            layer, tensors = line.split("\t")
            for tensor, shape in (each.split("=") for each in tensors.split()):
                found[f"{layer}.{tensor}"] = () if shape == "scalar" else tuple(map(int, shape.split("x")))
        return found

    return shapes


def randomised(model: Segmenter) -> Segmenter:
    """`model` with no two tensors alike."""
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape).add(0.5) if tensor.is_floating_point() else torch.randint(9, ()))
    return model


def as_their_file(model: Segmenter, keys: Shapes) -> dict[str, Tensor]:
    """The tensors of `model` by the authors' `keys`, with as many axes as there; other networks' keys are left out."""
    state, names = model.state_dict(), keys_of(model.config)
    ours = {key: state.get(names.own_key(key.removeprefix("backbone."))) for key in keys}
    return {
        key: tensor.reshape(tensor.shape[: len(keys[key])]).clone()
        for key, tensor in ours.items()
        if tensor is not None
    }

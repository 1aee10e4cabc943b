"""Shared fixtures; installs the shape checker (jaxtyping + beartype) before any module of the package is imported."""

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook(
    ["spikeformers.neurons", "spikeformers.layers", "spikeformers.attention", "spikeformers.backbones"],
    "beartype.beartype",
)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state and leaves one thread setting for all."""
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images and recordings (never part of the project); tests that use it skip without it."""
    default = Path(__file__).parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("SPIKEFORMERS_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set SPIKEFORMERS_DATA to its folder")
    return folder

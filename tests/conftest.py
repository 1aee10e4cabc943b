"""Shared fixtures; installs the shape checker (jaxtyping + beartype) before any module of the package is imported."""

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

# neurons.surrogate and quantize.lsq are left out: the compiler cannot trace autograd functions through the checker's
# wrappers.
CHECKED = (
    *("neurons.integer", "neurons.lif", "neurons.neuron", "neurons.steps", "layers", "attention", "backbones"),
    *("quantize.convert", "quantize.prepare"),
)
jaxtyping.install_import_hook([f"spikeformers.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, on one thread: tensors this small gain nothing from more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """For tests that compile: the shape checker's wrappers switched off, since the compiler would trace them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()  # graphs of earlier tests count towards the limit of recompilations
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images and recordings (never part of the project); tests that use it skip without it."""
    default = Path(__file__).parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("SPIKEFORMERS_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set SPIKEFORMERS_DATA to its folder")
    return folder

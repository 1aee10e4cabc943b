"""Saving a model as a folder: config.json says how to build it, model.safetensors holds its weights."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from spikeformers.layers.version import __version__

FORMAT = "spikeformers/1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Origin:
    """How the catalogue built a model: its name there and what was overridden."""

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)


class Pretrained(nn.Module):
    """Base of models that the catalogue builds and that save themselves."""

    origin: Origin | None = None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `folder`/config.json and model.safetensors; all of it or nothing. Returns the folder.

        Raises ValueError if the model did not come from create_model or was given a builder that JSON cannot name,
        and OSError if the disk is full; an earlier folder of that name is then left as it was.
        """
        if self.origin is None:
            raise ValueError("only models built by create_model can be saved: config.json names them by the catalogue")
        config = {
            "format": FORMAT,
            "name": self.origin.name,
            "overrides": self.origin.overrides,
            "steps": self.steps,
            "quantize": None,
            "version": __version__,
        }
        try:
            text = json.dumps(config, indent=2)
        except TypeError as error:
            raise ValueError(f"an override cannot be written to JSON; pass it by its name: {error}") from error
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
            save_file(weights, staging / WEIGHTS)
            (staging / CONFIG).write_text(text + "\n", encoding="utf-8")
            replace_folder(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target


def replace_folder(staging: Path, target: Path) -> None:
    """Put the finished folder `staging` in the place of `target`, which may exist."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        os.replace(target, old / "old")
        os.replace(staging, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(staging, target)

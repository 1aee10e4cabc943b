"""Saving a model as a folder: config.json says how to build it, model.safetensors holds its weights."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
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
    quantization: dict[str, Any] | None = None  # what quantize.prepare was told; it and `convert` write it

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `folder`/config.json and model.safetensors, replacing those there; returns the folder.

        Raises ValueError if the model did not come from create_model, was given a builder that JSON cannot name, or has
        other low-bit layers than `quantize.prepare` gave it, and OSError if the disk is full; what the folder held
        before is then left as it was.
        """
        if self.origin is None:
            raise ValueError("only models built by create_model can be saved: config.json names them by the catalogue")
        quantize = self._described_quantization()
        config = {
            "format": FORMAT,
            "name": self.origin.name,
            "overrides": self.origin.overrides,
            "steps": self.steps,
            "quantize": quantize,
            "version": __version__,
        }
        try:
            text = json.dumps(config, indent=2)
        except TypeError as error:
            raise ValueError(f"an override cannot be written to JSON; pass it by its name: {error}") from error
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_files(Path(folder), {WEIGHTS: safetensors.torch.save(weights), CONFIG: text.encode() + b"\n"})
        return Path(folder)

    def _described_quantization(self) -> dict[str, Any] | None:
        """What `quantization` says for config.json. Raises ValueError if the layers are no longer as it says."""
        told = dict(self.quantization or {})
        known, found = told.pop("layers", {}), low_bit_layers(self)
        if changed := [name for name in known | found if known.get(name) != found.get(name)]:
            raise ValueError(
                f"the low-bit layers are not those that quantize.prepare made (first: {changed[0]}), so config.json "
                "cannot describe them: call prepare on the whole model again, with a pattern for what differs"
            )
        return told or None


def low_bit_layers(model: nn.Module) -> dict[str, int]:
    """Bits of every layer of `model` with low-bit weights, by its name."""
    return {name: each.bits for name, each in model.named_modules() if hasattr(each, "bits") and hasattr(each, "alpha")}


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write the files of `contents` (name -> bytes) into `folder`; other files in it stay.

    Every file is complete under a temporary name before the first one takes its place.  Raises OSError (full disk,
    no permission) with earlier files as they were, and without the folder if it was not there before.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staged = {folder / name: folder / f".tmp-{os.getpid()}-{name}" for name in contents}
    try:
        for temporary, content in zip(staged.values(), contents.values(), strict=True):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for target, temporary in staged.items():
            temporary.replace(target)
    except OSError:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
        if new:
            folder.rmdir()
        raise

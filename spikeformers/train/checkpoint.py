"""Checkpoints that a crash cannot spoil: written under a hidden name, forced to disk, then renamed in one step.

`ROOT/epoch-0003/` holds `model.safetensors`, `training.pt` (tensors only, read with `weights_only`) and `state.json`;
under FSDP every process has a file of tensors of its own instead (sharded.py).
A folder with that name is complete by construction; hidden folders are leftovers of a crash and are swept away.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

WEIGHTS = "model.safetensors"
_HIDDEN = ".tmp-"


def save(root: Path, name: str, *, model: dict, training: dict, state: dict) -> Path:
    """Write a checkpoint `root/name` and return its folder.

    `model` is a state dict, `training` nested dicts of tensors and plain values (optimiser, averaged weights), `state`
    a JSON object. Raises OSError (full disk, no permission) and leaves earlier checkpoints as they were.
    """
    weights = {key: value.detach().contiguous().clone() for key, value in model.items()}
    with written(root, name) as hidden:
        _write(hidden / WEIGHTS, safetensors.torch.save(weights))
        write_rest(hidden, training=training, state=state)
    return root / name


@contextlib.contextmanager
def written(root: Path, name: str) -> Iterator[Path]:
    """A hidden folder to write into; where the block ends, it becomes the checkpoint `root/name` in one step.

    Raises OSError, naming the last good checkpoint, where the block does; then nothing of it stays.
    """
    root.mkdir(parents=True, exist_ok=True)
    hidden = root / f"{_HIDDEN}{name}-{os.getpid()}"
    final = root / name
    try:
        hidden.mkdir(exist_ok=True)
        yield hidden
        _sync_folder(hidden)
        if final.exists():
            remove(final)
        hidden.rename(final)
        _sync_folder(root)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        kept = newest(root)
        rest = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
        raise OSError(error.errno, f"cannot save the checkpoint {final}: {error.strerror}; {rest}") from error


def write_rest(folder: Path, *, training: dict, state: dict) -> None:
    """All of a checkpoint but its weights. Raises OSError."""
    # Serialised in memory first: then only plain writes can fail, and they say why (a torch archive would not).
    packed = io.BytesIO()
    torch.save(training, packed)
    _write(folder / "training.pt", packed.getbuffer())
    _write(folder / "state.json", json.dumps(state).encode())


def write_json(path: Path, content: object) -> None:
    """Replace a small JSON file in one step: readers see the old or the new text, never a part."""
    hidden = path.with_name(f"{_HIDDEN}{path.name}-{os.getpid()}")
    try:
        _write(hidden, json.dumps(content, indent=1).encode())
        hidden.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            hidden.unlink()
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises ValueError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}: is {path.parent} the folder of a run?") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def load(folder: Path) -> tuple[dict, dict, dict]:
    """The `(model, training, state)` that `save` was given, tensors on the CPU. Raises ValueError if damaged."""
    with damage_named(folder):
        model = safetensors.torch.load_file(folder / WEIGHTS)
    return model, *load_rest(folder)


def load_rest(folder: Path) -> tuple[dict, dict]:
    """The `(training, state)` that `write_rest` was given. Raises ValueError if damaged."""
    with damage_named(folder):
        training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
        return training, json.loads((folder / "state.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Turns what reading a damaged checkpoint raises into a ValueError that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"the checkpoint {folder} is damaged ({error}); delete it to go on from an earlier one"
        ) from error


def complete(root: Path) -> list[Path]:
    """All complete checkpoints under `root`, oldest first by the step that they were taken at."""
    if not root.is_dir():
        return []
    found = [each for each in root.iterdir() if each.is_dir() and not each.name.startswith(".")]
    return sorted(each for each in found if (each / "state.json").is_file())


def newest(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, or None."""
    found = complete(root)
    return found[-1] if found else None


def name_of(epoch: int, step: int) -> str:
    """Folder name after `epoch` finished epochs and `step` optimiser steps of the next; names sort in time."""
    return f"epoch-{epoch:04d}" + (f"-step-{step:06d}" if step else "")


def point(root: Path, pointer: str, folder: Path) -> None:
    """Let `root/POINTER.json` (best or last) name a checkpoint folder."""
    write_json(root / f"{pointer}.json", {"folder": folder.name})


def pointed(root: Path, pointer: str) -> Path | None:
    """The folder that `root/POINTER.json` names, or None if it names none that is there."""
    path = root / f"{pointer}.json"
    if not path.is_file():
        return None
    folder = root / json.loads(path.read_text(encoding="utf-8"))["folder"]
    return folder if folder.is_dir() else None


def prune(root: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the one that `best.json` names; `keep` = 0 keeps all."""
    best = pointed(root, "best")
    for folder in complete(root)[:-keep] if keep else []:
        if folder != best:
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint; it vanishes from sight first, so that a crash cannot leave half of it in view."""
    hidden = folder.with_name(f"{_HIDDEN}old-{folder.name}-{os.getpid()}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what a crash left behind. Call it before training starts, from one process only."""
    for leftover in root.glob(f"{_HIDDEN}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink()


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Force a folder's entries to disk; without it a power cut can undo a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

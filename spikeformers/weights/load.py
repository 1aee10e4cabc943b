"""Putting weights into a model: the authors' checkpoints, saved models, runs. Strict, safe, clear about the rest."""

import argparse
import json
import pickle
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spikeformers.backbones import MetaSpikeFormer, Spikformer
from spikeformers.layers.pretrained import CONFIG, WEIGHTS
from spikeformers.weights import meta_spikeformer, spikformer

KEY_MAPS: dict[type[nn.Module], ModuleType] = {MetaSpikeFormer: meta_spikeformer, Spikformer: spikformer}
WRAPPERS = ("module.", "model.", "backbone.")  # DistributedDataParallel, mmengine, mmseg and mmdet
ENCODER, DECODER = "encoder.", "decoder."  # a masked autoencoder: the network that it pre-trains, and the rest
OTHER_NETWORKS = ("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.")


@dataclass(frozen=True)
class LoadReport:
    """What loading did: how many tensors went in, what the file had beyond the model, what the model kept as it was."""

    loaded: int
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()  # arguments that the source was built with and this model was not

    def __str__(self) -> str:
        text = f"loaded {self.loaded} tensors"
        if self.dropped:
            text += f"; dropped from the file: {few(self.dropped)}"
        if self.kept:
            text += f"; not in the file, left as initialised: {few(self.kept)}"
        if self.differs:
            text += f"; built otherwise than the source: {', '.join(self.differs)}"
        return text


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a .safetensors file or a torch pickle, without ever running code from the file.

    Unwraps {"model": ...} and {"state_dict": ...}.  Raises ValueError if the file is damaged, holds no tensors, or is a
    pickle that needs more than tensors, plain containers and argparse.Namespace.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such checkpoint file: {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch remarks on old pickle protocols; errors are told below
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wish = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {wish[1]}, which may run code" if wish else "it is damaged, or no file of tensors"
        raise ValueError(
            f"{path} refused: {why}. Only tensors and plain containers are read; ask its author for a safetensors file"
        ) from error
    except Exception as error:  # damaged pickles raise nearly anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or no checkpoint: {first}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not weights:
        raise ValueError(f"{path} holds no named tensors")
    return weights


def load_official(model: nn.Module, state_dict: dict[str, Tensor]) -> LoadReport:
    """Load the authors' `state_dict` (classification, or with mmseg/mmdet prefixes) into `model`, in place.

    Strict: every tensor of the network must be there, and every tensor of the file must be known. Tensors that the
    authors' network builds and never uses are dropped. Only classifiers may differ: a distillation head that the model
    lacks is dropped too, heads that a segmentation or detection file lacks keep their values, and the report says so.
    Raises ValueError otherwise, and the model is then unchanged.
    """
    names = KEY_MAPS.get(type(model))
    if names is None:
        raise ValueError(f"no checkpoint layout is known for {type(model).__name__}")
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    own: dict[str, Tensor] = {}
    dropped: list[str] = []
    unknown: list[str] = []
    for key, tensor in state_dict.items():
        bare = _unwrapped(key)
        name = names.own_key(bare)
        if name is not None:
            own[name] = names.own_tensor(bare, tensor)
        else:
            foreign = bare.startswith(OTHER_NETWORKS) or names.UNUSED.fullmatch(bare)
            (dropped if foreign else unknown).append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors in the file are not of {type(model).__name__}: {few(unknown)}")
    kept = [key for key in model.state_dict() if key not in own and _is_head(key)]
    return _load(model, own, kept=kept, dropped=dropped, describe=names.describe_widths)


def load_strict(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` under the model's own keys; every key must be there with its shape, nothing else.

    Raises ValueError that names the first keys missing, unexpected or of another shape; the model is then unchanged.
    """
    _check_fit(model, weights)
    model.load_state_dict(weights)


def load_backbone(model: nn.Module, source: str | Path) -> LoadReport:
    """Start `model` from `source`: a run, a folder of `save_pretrained`, or a checkpoint file (ours or the authors').

    Every weight of the source must arrive but for its classifier, which stays out if it has other classes, and for
    tensors that the authors' network never uses. What the source lacks is new: Xavier weights, zero biases, anything
    else (a threshold, a norm) as it was built.
    Raises ValueError if a weight of the source has no place or another shape; the model is then unchanged.
    """
    path = Path(source)
    if path.is_dir():
        path = _weights_in(path)
    weights = read_checkpoint(path)
    names = KEY_MAPS.get(type(model))
    dropped: list[str] = []
    if all(key.startswith((ENCODER, DECODER)) for key in weights):  # a pre-training that is still going
        dropped = [key for key in weights if key.startswith(DECODER)]
        weights = {key.removeprefix(ENCODER): value for key, value in weights.items() if key not in dropped}
    if names is not None and not set(weights) & set(model.state_dict()) - {"head.weight", "head.bias"}:
        dropped = [key for key in weights if names.UNUSED.fullmatch(_unwrapped(key))]
        used = {key: tensor for key, tensor in weights.items() if key not in dropped}
        weights = {names.own_key(_unwrapped(k)) or k: names.own_tensor(_unwrapped(k), v) for k, v in used.items()}
    own = model.state_dict()
    for key in [key for key in weights if _is_head(key) and (key not in own or weights[key].shape != own[key].shape)]:
        del weights[key]
    describe = names.describe_widths if names is not None else None
    kept = [key for key in own if key not in weights]
    if len(kept) == len(own):
        raise ValueError(f"{path} holds no weight of a {type(model).__name__}: {few(list(weights) or ['nothing'])}")
    report = _load(model, weights, kept=kept, dropped=dropped, describe=describe)
    report = replace(report, differs=_differences(model, path.parent / CONFIG))
    for key, parameter in model.named_parameters():
        if key in report.kept and parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        elif key in report.kept and key.endswith("bias"):
            nn.init.zeros_(parameter)
    return report


def _differences(model: nn.Module, stored: Path) -> tuple[str, ...]:
    """Arguments in a saved model's config.json that `model` has otherwise, though all its weights may fit."""
    if not stored.is_file():
        return ()
    overrides = json.loads(stored.read_text(encoding="utf-8"))["overrides"]
    free = ("steps", "num_classes", "distillation")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}
    own = {name: getattr(model.config, name, None) for name in values if name not in free}
    return tuple(f"{name}={own[name]}, there {values[name]}" for name in own if own[name] != values[name])


def _weights_in(folder: Path) -> Path:
    """The weight file of a run (its final model, else its last checkpoint) or of a saved model."""
    candidates = [folder / WEIGHTS, folder / "model" / WEIGHTS]
    pointer = folder / "checkpoints" / "last.json"
    if pointer.is_file():
        candidates.append(folder / "checkpoints" / json.loads(pointer.read_text())["folder"] / WEIGHTS)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(f"{folder} is neither a run nor a saved model: no {WEIGHTS} in it")


def _unwrapped(key: str) -> str:
    """`key` without the prefixes that training frameworks put in front."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in WRAPPERS:
            if key.startswith(prefix):
                key, stripped = key.removeprefix(prefix), True
    return key


def _is_head(key: str) -> bool:
    return key.split(".")[0] in ("head", "head_kd")


def _load(model: nn.Module, own: dict[str, Tensor], *, kept: list[str], dropped: list[str], describe) -> LoadReport:
    """Load `own` (our keys) beside what is `kept`; classifiers that the model lacks are dropped."""
    expected = model.state_dict()
    extra_heads = [key for key in own if key not in expected and _is_head(key)]
    complete = {key: expected[key] for key in kept} | {k: v for k, v in own.items() if k not in extra_heads}
    _check_fit(model, complete, describe)
    model.load_state_dict(complete)
    return LoadReport(len(complete) - len(kept), (*dropped, *extra_heads), tuple(kept))


def _check_fit(model: nn.Module, weights: dict[str, Tensor], describe=None) -> None:
    """Raises ValueError unless `weights` has exactly the keys and shapes of the model."""
    own = model.state_dict()
    missing, extra = [key for key in own if key not in weights], [key for key in weights if key not in own]
    wrong = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    problems = [
        f"{len(keys)} {what} ({few(keys)})" for what, keys in (("missing", missing), ("unexpected", extra)) if keys
    ]
    if wrong:
        shapes = [f"{key} is {tuple(weights[key].shape)}, needs {tuple(own[key].shape)}" for key in wrong]
        problems.append(f"{len(wrong)} of another shape ({few(shapes)})")
    if problems:
        looks = f"; the file looks like {describe(weights)}" if describe is not None else ""
        raise ValueError(f"weights do not fit this {type(model).__name__}: {'; '.join(problems)}{looks}")


def few(names: list[str] | tuple[str, ...]) -> str:
    """The first three of `names`, and how many more."""
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")

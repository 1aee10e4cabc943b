"""Putting weights into a model: the authors' checkpoints, saved models, runs. Strict, safe, clear about the rest."""

import argparse
import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spikeformers.backbones import MetaSpikeFormer
from spikeformers.layers.pretrained import WEIGHTS
from spikeformers.weights import meta_spikeformer

KEY_MAPS: dict[type[nn.Module], ModuleType] = {MetaSpikeFormer: meta_spikeformer}
WRAPPERS = ("module.", "model.", "backbone.")  # DistributedDataParallel, mmengine, mmseg and mmdet
OTHER_NETWORKS = ("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.")


@dataclass(frozen=True)
class LoadReport:
    """What loading did: how many tensors went in, what the file had beyond the model, what the model kept as it was."""

    loaded: int
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"loaded {self.loaded} tensors"
        if self.dropped:
            text += f"; dropped from the file: {few(self.dropped)}"
        if self.kept:
            text += f"; not in the file, left as initialised: {few(self.kept)}"
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
        raise ValueError(
            f"{path} refused: it is damaged, or it wants to run code when read ({str(error).splitlines()[0]}). "
            "Only tensors and plain containers are read; ask its author for a state_dict or safetensors file"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0]}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not weights:
        raise ValueError(f"{path} holds no named tensors")
    return weights


def load_official(model: nn.Module, state_dict: dict[str, Tensor]) -> LoadReport:
    """Load the authors' `state_dict` (classification, or with mmseg/mmdet prefixes) into `model`, in place.

    Strict: every tensor of the network must be there, and every tensor of the file must be known. Only classifiers may
    differ: a distillation head that the model lacks is dropped, heads that a segmentation or detection file lacks keep
    their values, and the report says so.  Raises ValueError otherwise, and the model is then unchanged.
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
            (dropped if key.startswith(OTHER_NETWORKS) else unknown).append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors in the file are not of {type(model).__name__}: {few(unknown)}")
    return _load(model, own, dropped=dropped, describe=names.describe_widths)


def load_strict(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` under the model's own keys; every key must be there with its shape, nothing else.

    Raises ValueError that names the first keys missing, unexpected or of another shape; the model is then unchanged.
    """
    _check_fit(model, weights, weights)
    model.load_state_dict(weights)


def load_backbone(model: nn.Module, source: str | Path) -> LoadReport:
    """Start `model` from `source`: a run, a folder of `save_pretrained`, or a checkpoint file (ours or the authors').

    Every weight of the backbone must arrive. Classifiers of another number of classes, and layers the source lacks, are
    new: Xavier weights, zero biases.  Raises ValueError if anything else differs; the model is then unchanged.
    """
    path = Path(source)
    if path.is_dir():
        path = _weights_in(path)
    weights = read_checkpoint(path)
    names = KEY_MAPS.get(type(model))
    if names is not None and not set(weights) & set(model.state_dict()) - {"head.weight", "head.bias"}:
        weights = {names.own_key(_unwrapped(k)) or k: names.own_tensor(_unwrapped(k), v) for k, v in weights.items()}
    own = model.state_dict()
    for key in [key for key in weights if _is_head(key) and (key not in own or weights[key].shape != own[key].shape)]:
        del weights[key]
    describe = names.describe_widths if names is not None else None
    report = _load(model, weights, dropped=[], describe=describe)
    for key in report.kept:
        parameter = model.get_parameter(key)
        (nn.init.xavier_uniform_ if parameter.ndim > 1 else nn.init.zeros_)(parameter)
    return report


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


def _load(model: nn.Module, own: dict[str, Tensor], *, dropped: list[str], describe) -> LoadReport:
    """Load `own` (our keys) with classifiers optional; widths that differ are described by `describe`."""
    expected = model.state_dict()
    extra_heads = [key for key in own if key not in expected and _is_head(key)]
    kept = [key for key in expected if key not in own and _is_head(key)]
    fitting = {key: tensor for key, tensor in own.items() if key not in extra_heads}
    _check_fit(model, fitting, {**fitting, **{key: expected[key] for key in kept}}, describe)
    model.load_state_dict({**{key: expected[key] for key in kept}, **fitting})
    return LoadReport(len(fitting), (*dropped, *extra_heads), tuple(kept))


def _check_fit(model: nn.Module, weights: dict[str, Tensor], complete: dict[str, Tensor], describe=None) -> None:
    """Raises ValueError unless `complete` has exactly the keys and shapes of the model."""
    own = model.state_dict()
    missing, extra = [key for key in own if key not in complete], [key for key in complete if key not in own]
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

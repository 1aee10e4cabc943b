"""Putting weights into a model: the authors' checkpoints, saved models, runs. Strict, safe, clear about the rest."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spikeformers.backbones import MetaSpikeFormer, QSDTransformer, Spikformer
from spikeformers.heads.composite import Composite
from spikeformers.layers import LayerScaleBlock
from spikeformers.layers.pretrained import CONFIG, WEIGHTS
from spikeformers.quantize import LSQLayer
from spikeformers.quantize.lsq import DERIVED
from spikeformers.weights import meta_spikeformer, qsd_transformer, spikformer
from spikeformers.weights.segmenter import SegmenterKeys, StageKeys, keys_of

KeyMap = ModuleType | StageKeys

KEY_MAPS: dict[type[nn.Module], ModuleType] = {
    MetaSpikeFormer: meta_spikeformer,
    QSDTransformer: qsd_transformer,
    Spikformer: spikformer,
}
WRAPPERS = ("module.", "model.", "backbone.")  # DistributedDataParallel, mmengine, mmseg and mmdet
ENCODER, DECODER = "encoder.", "decoder."  # a masked autoencoder: the network that it pre-trains, and the rest
OTHER_NETWORKS = ("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.")
FRAMEWORKS = {"decode_head.": "mmsegmentation", "roi_head.": "mmdetection", "bbox_head.": "mmdetection"}
# What mmengine writes beside the tensors, a log: stood in for, so that its code is neither needed nor run.
LOGGED = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)
STEPS = tuple(f".{name}" for name in DERIVED)
LOW_BIT = (*STEPS, ".packed")  # a source with such tensors has low-bit weights


@dataclass(frozen=True)
class LoadReport:
    """What loading did: how many tensors went in, what the file had beyond the model, what the model kept as it was."""

    loaded: int
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()  # step sizes that the file lacks or never set, from the weights that went in
    unscaled: tuple[str, ...] = ()  # scales of branches: 1, since the file is of a network without
    differs: tuple[str, ...] = ()  # arguments that the source was built with and this model was not
    framework: str = ""  # that wrote the file, where its keys show it
    assumed: tuple[str, ...] = ()  # arguments that no tensor shows, as this model was built

    def __str__(self) -> str:
        text = f"loaded {self.loaded} tensors"
        if self.framework:
            text += f" of a file of {self.framework}"
        if self.dropped:
            text += f"; dropped from the file: {few(self.dropped)}"
        if self.kept:
            text += f"; not in the file, left as initialised: {few(self.kept)}"
        if self.computed:
            text += f"; step sizes not in the file, computed from its weights: {few(self.computed)}"
        if self.unscaled:
            text += f"; branches not scaled in the file, scales set to 1: {few(self.unscaled)}"
        if self.differs:
            text += f"; built otherwise than the source: {', '.join(self.differs)}"
        if self.assumed:
            text += f"; the file does not tell {', '.join(self.assumed)}: so this model was built"
        return text


class _Unread:
    """Stands for an object of a pickle that holds no tensors of a network."""

    def __init__(self, *content: object) -> None:
        """Whatever it was built from is forgotten."""

    def __setstate__(self, state: object) -> None:
        """And so is what it held."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a .safetensors file or a torch pickle, without ever running code from the file.

    Unwraps {"model": ...} and {"state_dict": ...}.  Raises ValueError if the file is damaged, holds no tensors, or is a
    pickle that needs more than tensors, plain containers, argparse.Namespace and mmengine's log, which is not read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such checkpoint file: {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            known = [argparse.Namespace, *((_Unread, name) for name in LOGGED)]
            with torch.serialization.safe_globals(known), warnings.catch_warnings():
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
    authors' network builds and never uses are dropped. Classifiers may differ: a distillation head that the model
    lacks is dropped too, heads that a segmentation or detection file lacks keep their values. A file of the float
    network may start a quantised one: step sizes are computed, scales of branches 1. The report says all that, and
    what the file cannot tell of how the model is to be built (of Spike2Former: levels, alpha, layout).
    Raises ValueError otherwise, and the model is then unchanged.
    """
    names = _names_of(model)
    if names is None:
        raise ValueError(f"no checkpoint layout is known for {type(model).__name__}")
    if isinstance(model, Composite) and not isinstance(names, SegmenterKeys):
        raise ValueError(
            f"no checkpoint layout is known for the head of this {type(model).__name__}, a "
            f"{type(model.head).__name__}: start its backbone from the file with load_backbone, or train with "
            "init.backbone=FILE"
        )
    for key in ("model", "state_dict"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    own, dropped, unknown = _translated(names, state_dict)
    own = _steps_of_other_bits_left_out(model, own)
    if isinstance(names, SegmenterKeys):
        _check_segments(own, unknown, names=names)
        foreign, kept = [], []
    else:
        foreign = [key for key in unknown if _unwrapped(key).startswith(OTHER_NETWORKS)]
        kept = [key for key in model.state_dict() if key not in own and _is_head(key)]
    unknown = [key for key in unknown if key not in foreign]
    if unknown:
        hint = _low_bit_hint(unknown)
        raise ValueError(f"{len(unknown)} tensors in the file are not of {type(model).__name__}: {few(unknown)}{hint}")
    report = _load(model, own, kept=kept, dropped=[*dropped, *foreign], describe=names.describe_widths)
    return replace(report, framework=_framework(state_dict), assumed=_assumed(model, names))


def _check_segments(own: dict[str, Tensor], unknown: list[str], *, names: SegmenterKeys) -> None:
    """Raises ValueError if an authors' file, `own` by our names, has not the head of the segmenter that it is for."""
    strange = [key for key in unknown if _unwrapped(key).startswith(OTHER_NETWORKS)]
    if strange:
        raise ValueError(
            f"{len(strange)} tensors in the file are unknown: {few(strange)}; what is read: {names.head.LAYOUT}"
        )
    if not any(_is_head(key) for key in own):
        raise ValueError(
            "the file has no segmentation head (no neck, no decode_head): it holds a backbone only. Start a segmenter "
            "from it with load_backbone, or train with init.backbone=FILE"
        )


def _assumed(model: nn.Module, names: KeyMap) -> tuple[str, ...]:
    """What the options are, here, that no tensor of the authors' file shows."""
    if not isinstance(names, SegmenterKeys):
        return ()
    configs = (model.config, model.config.head)
    return tuple(
        f"{name}={next(getattr(config, name) for config in configs if hasattr(config, name))!r}"
        for name in names.head.UNTOLD
    )


def _framework(keys: Iterable[str]) -> str:
    """What wrote a file with such `keys`, as far as they show."""
    bare = [key.removeprefix("module.") for key in keys]
    found = [name for prefix, name in FRAMEWORKS.items() if any(key.startswith(prefix) for key in bare)]
    found += ["DistributedDataParallel"] if bare != list(keys) else []
    return " and ".join(dict.fromkeys(found))


def _names_of(model: nn.Module) -> KeyMap | None:
    """The authors' keys for networks such as `model`."""
    return keys_of(model.config) if isinstance(model, Composite) else KEY_MAPS.get(type(model))


def load_strict(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load `weights` under the model's own keys; every key must be there with its shape, nothing else.

    Only step sizes may be left out, those of a layer together: they are computed from its weights.
    Raises ValueError that names the first keys missing, unexpected or of another shape; the model is then unchanged.
    """
    _check_fit(model, weights)
    model.load_state_dict(weights)


def load_backbone(
    model: nn.Module, source: str | Path, *, options: Callable[[str], Mapping[str, Any]] | None = None
) -> LoadReport:
    """Start `model` from `source`: a run, a folder of `save_pretrained`, or a checkpoint file (ours or the authors').

    Every weight of the source must arrive but for its classifier, which stays out if it has other classes, and for
    tensors that the authors' network never uses. What the source lacks is new: Xavier weights, zero biases, anything
    else (a threshold, a norm) as it was built. Step sizes are computed from the weights where the source has none or is
    known to have been quantised otherwise; scales of branches that the source did not scale are 1.
    A segmenter or detector takes the stages of a classifier, or another segmenter or detector (ours, or the stages of
    the authors' and the heads of their segmenters); what that lacks of its head is left as built, and a head of another
    kind stays out.
    `options`: what a name of the catalogue stands for (zoo.options_of), so that the report compares all that the source
    was built with; else it only compares what the source overrode.
    Raises ValueError if a weight of the source has no place or another shape; the model is then unchanged.
    """
    path = Path(source)
    if path.is_dir():
        path = _weights_in(path)
    weights = read_checkpoint(path)
    names = _names_of(model)
    dropped: list[str] = []
    if all(key.startswith((ENCODER, DECODER)) for key in weights):  # a pre-training that is still going
        dropped = [key for key in weights if key.startswith(DECODER)]
        weights = {key.removeprefix(ENCODER): value for key, value in weights.items() if key not in dropped}
    own = model.state_dict()
    composite = isinstance(model, Composite)
    if composite and not any(key in own for key in weights):
        weights, dropped = _for_composite(model, weights, names=names)
    elif composite and not any(key in own and _is_head(key) for key in weights):  # with a head of another kind
        dropped = [*filter(_is_head, weights)]
        weights = {key: value for key, value in weights.items() if not _is_head(key)}
    elif names is not None and not any(key in own and not _is_head(key) for key in weights):
        translated, dropped, unknown = _translated(names, weights)
        weights = _steps_of_other_bits_left_out(model, translated) | {key: weights[key] for key in unknown}
    stored = _stored_config(path.parent)
    if _quantized_otherwise(model, stored):
        weights = {key: value for key, value in weights.items() if not key.endswith(STEPS)}
    # A classifier comes whole or not at all: one step size for all classes would fit any number of them. Of the head of
    # a segmenter or detector that is one layer.
    place = _module if composite else _top
    other = {place(key) for key in weights if _is_head(key) and key in own and weights[key].shape != own[key].shape}
    weights = {key: value for key, value in weights.items() if place(key) not in other}
    kept = [key for key in own if key not in weights]
    if len(kept) == len(own):
        raise ValueError(f"{path} holds no weight of a {type(model).__name__}: {few(list(weights) or ['nothing'])}")
    describe = names.describe_widths if names is not None else None
    report = _load(model, weights, kept=kept, dropped=dropped, describe=describe)
    _initialise(model, {key for key in report.kept if not (composite and _is_head(key))})
    return replace(report, differs=_differences(model, stored, options=options))


def _for_composite(
    model: Composite, file: dict[str, Tensor], *, names: StageKeys | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Our names for the tensors of a classifier (either's) or of the authors' segmenter or detector; keys of no use."""
    stages = model.backbone.state_dict()
    if any(key in stages for key in file):
        return {f"backbone.{key}": file[key] for key in file if not _is_head(key)}, [*filter(_is_head, file)]
    if names is None:
        return file, []
    translated, dropped, unknown = _translated(names, file)
    useless = [key for key in unknown if _is_head(_unwrapped(key)) or _unwrapped(key).startswith(OTHER_NETWORKS)]
    rest = {key: file[key] for key in unknown if key not in useless}
    return _steps_of_other_bits_left_out(model, translated) | rest, [*dropped, *useless]


def _translated(names: KeyMap, file: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Tensors of the authors' `file` by our names; keys of no use, step sizes never set first; keys unknown."""
    dropped = qsd_transformer.unset_steps(file)
    own: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key in [key for key in file if key not in set(dropped)]:
        bare = _unwrapped(key)
        name = names.own_key(bare)
        if name is not None:
            own[name] = names.own_tensor(bare, file[key])
        else:
            (dropped if names.UNUSED.fullmatch(bare) else unknown).append(key)
    return own, dropped, unknown


def _steps_of_other_bits_left_out(model: nn.Module, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors without step sizes of layers that have other bits here: those are computed."""
    other = {
        f"{name}.{qsd_transformer.STEP}"
        for name, layer in model.named_modules()
        if isinstance(layer, LSQLayer) and layer.bits != qsd_transformer.BITS
    }
    return {key: tensor for key, tensor in own.items() if key not in other}


def _initialise(model: nn.Module, new: set[str]) -> None:
    """Xavier weights and zero biases for the parameters `new`, and the step sizes of such weights."""
    for key, parameter in model.named_parameters():
        if key in new and parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        elif key in new and key.endswith("bias"):
            nn.init.zeros_(parameter)
    for name, layer in model.named_modules():
        if isinstance(layer, LSQLayer) and f"{name}.weight" in new:
            layer.reset_step()


def _stored_config(folder: Path) -> dict[str, Any]:
    """What a saved model's config.json says; nothing where there is none."""
    path = folder / CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _quantized_otherwise(model: nn.Module, stored: dict[str, Any]) -> bool:
    """Whether the step sizes of a saved model are of other bits or another kind than those of `model`."""
    theirs, own = stored.get("quantize"), getattr(model, "quantization", None)
    return bool(theirs and own) and any(theirs.get(field) != own[field] for field in ("bits", "per_channel", "offset"))


def _differences(
    model: nn.Module, stored: dict[str, Any], *, options: Callable[[str], Mapping[str, Any]] | None
) -> tuple[str, ...]:
    """Arguments that a saved model was built with and `model` has otherwise, though all its weights may fit."""
    free = ("steps", "num_classes", "distillation", "bits")
    built = {} if options is None or "name" not in stored else options(stored["name"])
    overrides = stored.get("overrides", {})
    values = {**built} | {name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()}
    configs = [model.config]
    if isinstance(model, Composite):  # a classifier has all options in one config
        configs += [model.backbone.config, model.config.head]
    own = {
        name: next(getattr(config, name) for config in configs if hasattr(config, name))
        for name in values
        if name not in free and any(hasattr(config, name) for config in configs)
    }
    found = tuple(f"{name}={own[name]}, there {values[name]}" for name in own if own[name] != values[name])
    if _quantized_otherwise(model, stored):
        found += (f"quantized={model.quantization}, there {stored['quantize']}",)
    return found


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


def _top(key: str) -> str:
    return key.split(".")[0]


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _is_head(key: str) -> bool:
    return _top(key) in ("head", "head_kd")


def _low_bit_hint(keys: list[str]) -> str:
    """What to do if a source's `keys` have no place because its weights have few bits; else nothing."""
    if not any(key.endswith(LOW_BIT) for key in keys):
        return ""
    return (
        "; the source has low-bit weights, which have no place in this model: load it into a model of its own kind, "
        "make that float (quantize.plain), save it and start from there, or quantise this one alike (quantize.prepare)"
    )


def _absent_steps(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Step sizes that loading `weights` computes (quantize.lsq): of layers whose weight is there without any."""
    absent: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, LSQLayer) and f"{name}.weight" in weights:
            steps = [f"{name}.{part}" for part in DERIVED if getattr(layer, part) is not None]
            absent += [] if any(step in weights for step in steps) else steps
    return absent


def _unscaled(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scales of the branches in `weights`, a network without such scales: its branches were scaled by 1."""
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, LayerScaleBlock)}
    scales = {
        f"{name}.{branch}": getattr(block, f"{branch}_scale")
        for name, block in blocks.items()
        for branch in ("attn", "mlp")
    }
    if any(f"{branch}_scale" in weights for branch in scales):
        return {}
    return {
        f"{branch}_scale": torch.ones_like(scale)
        for branch, scale in scales.items()
        if any(key.startswith(f"{branch}.") for key in weights)
    }


def _load(model: nn.Module, own: dict[str, Tensor], *, kept: list[str], dropped: list[str], describe) -> LoadReport:
    """Load `own` (our keys) beside what is `kept`; classifiers that the model lacks are dropped."""
    expected = model.state_dict()
    heads = {_top(key) for key in expected}
    extra_heads = [key for key in own if _is_head(key) and _top(key) not in heads]
    own = {key: tensor for key, tensor in own.items() if key not in extra_heads}
    scales = _unscaled(model, own)
    computed = _absent_steps(model, own)
    kept = [key for key in kept if key not in computed and key not in scales]
    complete = {key: expected[key] for key in kept} | scales | own
    _check_fit(model, complete, looks=f"; the file looks like {describe(own)}" if describe is not None else "")
    model.load_state_dict(complete)
    return LoadReport(len(own), (*dropped, *extra_heads), tuple(kept), tuple(computed), tuple(scales))


def _check_fit(model: nn.Module, weights: dict[str, Tensor], *, looks: str = "") -> None:
    """Raises ValueError unless `weights` has exactly the keys and shapes of the model, but for step sizes.

    `looks`: what to add to the complaint.
    """
    own = model.state_dict()
    computed = set(_absent_steps(model, weights))
    missing = [key for key in own if key not in weights and key not in computed]
    extra = [key for key in weights if key not in own]
    wrong = [key for key in own if key in weights and weights[key].shape != own[key].shape]
    problems = [
        f"{len(keys)} {what} ({few(keys)})" for what, keys in (("missing", missing), ("unexpected", extra)) if keys
    ]
    if wrong:
        shapes = [f"{key} is {tuple(weights[key].shape)}, needs {tuple(own[key].shape)}" for key in wrong]
        problems.append(f"{len(wrong)} of another shape ({few(shapes)})")
    if problems:
        hint = _low_bit_hint(extra)
        raise ValueError(f"weights do not fit this {type(model).__name__}: {'; '.join(problems)}{looks}{hint}")


def few(names: list[str] | tuple[str, ...]) -> str:
    """The first three of `names`, and how many more."""
    return ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")

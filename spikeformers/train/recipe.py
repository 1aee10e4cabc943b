"""A recipe says everything about a training run: frozen dataclasses, changed by `override`, stored as JSON.

Every leaf is a number, a truth value, a text, a tuple or a small dict, so that `--set optim.lr=1e-3` reaches all of it.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field

from spikeformers.data.images import ImageData
from spikeformers.data.splits import Data, kind_of


@dataclass(frozen=True)
class ModelChoice:
    """What `create_model` is asked for; an empty tuple keeps the named model's own value."""

    name: str = "meta_spikeformer_15m"
    neuron: str = "lif"
    levels: int = 4  # D of the integer neurons; a LIF emits 0 or 1 whatever this says
    steps: int = 1
    dims: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    options: dict[str, object] = field(default_factory=dict)  # any other argument of the model's builder

    def overrides(self) -> dict[str, object]:
        """Keyword arguments for `create_model`, without those that keep the named model's own value."""
        chosen = {"neuron": self.neuron, "levels": self.levels, "steps": self.steps}
        sizes = {"dims": self.dims, "strides": self.strides, "blocks": self.blocks}
        return chosen | {name: value for name, value in sizes.items() if value} | self.options


@dataclass(frozen=True)
class Optim:
    """Optimiser (any name of timm: adamw, lamb, lambc, ...) and the learning rate over the run."""

    name: str = "adamw"
    lr: float = 1e-3
    lr_batch: int = 0  # lr is for this many images a step and scales with the real number; 0: lr is used as it is
    schedule: typing.Literal["cosine", "poly"] = "cosine"  # down to min_lr: half a cosine, or (what is left) ** power
    power: float = 1.0  # of poly; 1: a straight line
    min_lr: float = 1e-6
    warmup_epochs: float = 0.0  # linear from warmup_lr; then the schedule
    warmup_lr: float = 0.0  # like min_lr not scaled by lr_batch
    cooldown_epochs: float = 0.0  # the last of all epochs, at min_lr; the cosine ends where they begin
    per_epoch: bool = False  # one rate an epoch, on a cosine that began with epoch 0 (timm 0.5.4); else one a step
    layer_decay: float = 1.0  # each layer below the classifier learns at this times the rate of the one above; 1: none
    rates: dict[str, object] = field(default_factory=dict)  # part of the network ("backbone") -> factor of its rate
    weight_decay: float = 0.05
    decay_1d: bool = False  # weight decay on biases and other 1-D parameters too
    undecayed: tuple[str, ...] = ()  # parameters without weight decay whatever their shape, by a part of their name
    clip_grad: float = 0.0  # largest global gradient norm; 0: no clipping


@dataclass(frozen=True)
class Init:
    """Where the weights start: empty for random, else a run folder, a saved model or a checkpoint file."""

    backbone: str = ""
    balance: bool = False  # attention scales that are new and learnable from the first images (attention/balance.py)


@dataclass(frozen=True)
class Distill:
    """DeiT-style distillation from a timm network through a second head; no teacher, no distillation."""

    teacher: str = ""
    weights: str = "pretrained"  # "pretrained" (timm downloads them), a local file, or "random" (for tests)
    kind: typing.Literal["hard", "soft"] = "hard"
    alpha: float = 0.5  # weight of the teacher's part of the loss
    temperature: float = 1.0  # of the soft kind


@dataclass(frozen=True)
class FineGrained:
    """Fine-grained distillation of q, k and v from an ANN (QSD-Transformer, Eq. 13); no teacher, no distillation."""

    teacher: str = ""  # a run or saved model of the ANN twin, or a caformer of timm, whose `weights` say where from
    weights: str = "pretrained"  # as in distill
    rule: typing.Literal["same", "caformer"] = "same"  # which layer of the teacher teaches which
    weight: float = 2.0  # lambda of Eq. 14
    norm: typing.Literal["frobenius", "rows"] = "frobenius"  # of the similarity matrices
    reduction: typing.Literal["sum", "mean"] = "sum"  # over layers, heads and q, k, v
    activation: typing.Literal["none", "gelu", "relu"] = "none"  # on the teacher's q, k, v before they are compared


@dataclass(frozen=True)
class Quantize:
    """Low-bit weights by LSQ, from the first step on; 0: as the network is built, in float unless it is quantised."""

    bits: int = 0  # of every layer that `layers` does not name
    layers: dict[str, object] = field(default_factory=dict)  # kind ("attention", "first", ...) or name -> bits
    per_channel: bool = True  # a step size for each output channel, else one a layer
    offset: bool = False  # a learned one as well (LSQ+)
    exact_integer: bool = False  # everything else in fixed point: equal in float32, float64 and integers

    def chosen(self) -> int | dict[str, int | None] | None:
        """What `quantize.prepare` is told as `bits`; None: nothing. Raises ValueError for exactness without bits."""
        if self.exact_integer and not (self.bits or self.layers):
            raise ValueError("quantize.exact_integer needs few bits in every layer: set quantize.bits to 2 to 8")
        if not self.layers:
            return self.bits or None
        named = {name: bits or None for name, bits in self.layers.items()}
        return named | ({"*": self.bits} if self.bits else {})

    def options(self) -> dict[str, bool]:
        """The other arguments of `quantize.prepare`."""
        return {"per_channel": self.per_channel, "offset": self.offset, "exact": self.exact_integer}


@dataclass(frozen=True)
class Speed:
    """How a training step is computed, not what: less time or memory, other rounding (docs/guides/speed.md)."""

    fused_qkv: bool = False  # projections of one input to q, k and v as one layer
    fused_norms: bool = False  # LIF (on GPUs any neuron) takes the batch norm in front, whose output is then not kept
    fused_optimizer: bool = False  # one pass over all parameters, where torch has it: adamw, adam, sgd
    recompute: bool = False  # keep inputs of residual branches only, and run these again in backward
    compile: bool = False  # torch.compile as one graph, on GPUs with CUDA graphs; minutes before the second step


@dataclass(frozen=True)
class Pretrain:
    """Masked pre-training, without labels or classifier. A ratio of 0: no pre-training but classification."""

    mask_ratio: float = 0.0  # share of patches hidden from the encoder
    decoder_dim: int = 256  # of the ANN that draws them, which is dropped afterwards
    decoder_depth: int = 4
    decoder_heads: int = 4
    normalise_target: bool = True  # each patch by its own mean and deviation; else pixels as they are


@dataclass(frozen=True)
class Segmentation:
    """Weights of classes in the loss of a segmentation, and how a picture is tested. Sizes are height and width."""

    class_weights: float = 0.0  # each class by (median frequency / its own) to this power; 0: all alike, 1: balanced
    test: typing.Literal["whole", "slide"] = "whole"  # slide: windows, whose scores are averaged where they overlap
    crop: tuple[int, ...] = ()  # of a window; empty: data.size, on which the network was trained
    stride: tuple[int, ...] = ()  # from a window to the next; empty: two thirds of it

    def __post_init__(self):
        if not 0 <= self.class_weights <= 1:
            raise ValueError(
                f"segmentation.class_weights must lie between 0 (all alike) and 1 (balanced), got {self.class_weights}"
            )
        for name in ("crop", "stride"):
            value = getattr(self, name)
            if value and (len(value) != 2 or min(value) < 1):
                raise ValueError(f"segmentation.{name} must be a height and a width of at least 1, got {value}")


@dataclass(frozen=True)
class Saving:
    """Checkpoints: one after each epoch, and every `every_steps` optimiser steps within an epoch (0: none)."""

    every_steps: int = 0
    keep: int = 2  # newest ones that stay besides the best; 0: all


@dataclass(frozen=True)
class Testing:
    """How often and on how much the test split is read. The last epoch always reads all of it."""

    every: int = 1  # epochs
    images: int = 0  # of the test split, drawn once, before the last epoch; 0: all
    energy_images: int = 64  # for the energy account at the end
    integer_images: int = 0  # for the comparison with the integer engine at the end; 0: all


@dataclass(frozen=True)
class Recipe:
    """A whole training run. `seed`, the data and these values determine the result on given hardware."""

    name: str
    data: Data
    model: ModelChoice = ModelChoice()
    optim: Optim = Optim()
    init: Init = Init()
    distill: Distill = Distill()
    fgd: FineGrained = FineGrained()
    quantize: Quantize = Quantize()
    pretrain: Pretrain = Pretrain()
    segmentation: Segmentation = Segmentation()
    speed: Speed = Speed()
    saving: Saving = Saving()
    testing: Testing = Testing()
    epochs: int = 10
    batch_size: int = 64  # images in one forward pass of one process
    accumulate: int = 1  # forward passes whose gradients are averaged into one optimiser step
    label_smoothing: float = 0.0
    ema_decay: float = 0.0  # of the averaged copy that is tested and saved; 0: no averaging
    seed: int = 0
    precision: typing.Literal["float32", "bfloat16", "float64"] = "float32"  # bfloat16: autocast in training only
    channels_last: bool = True
    sync_bn: bool = False  # batch norm over all processes instead of each its own
    threads: int = 0  # of torch on a CPU, whatever OMP_NUM_THREADS says; 0: torch's choice, which heeds it
    workers: int = 0  # processes that read images; 0: read in the training process

    def __post_init__(self):
        for path, least in _LEAST.items():
            value = self
            for part in path.split("."):
                value = getattr(value, part)
            if value < least:
                raise ValueError(f"{path} must be at least {least}, got {value}")
        for path, value in (("ema_decay", self.ema_decay), ("label_smoothing", self.label_smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"{path} must be at least 0 and below 1, got {value}")
        if not 0 <= self.pretrain.mask_ratio < 1:
            raise ValueError(f"pretrain.mask_ratio must be at least 0 and below 1, got {self.pretrain.mask_ratio}")
        if not 0 < self.optim.layer_decay <= 1:
            raise ValueError(
                f"optim.layer_decay must be above 0 and at most 1 (no decay), got {self.optim.layer_decay}"
            )
        for part, factor in self.optim.rates.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise ValueError(f"optim.rates.{part} must be a factor above 0, such as 0.1, got {factor!r}")
        if self.optim.power <= 0 or (self.optim.schedule != "poly" and self.optim.power != 1):
            raise ValueError(f"optim.power must be above 0, and is of optim.schedule=poly, got {self.optim.power}")
        if self.optim.cooldown_epochs >= self.epochs:
            raise ValueError(
                f"optim.cooldown_epochs must be below epochs, got {self.optim.cooldown_epochs} of {self.epochs}: "
                "lower it, before epochs if you lower both"
            )
        if not 0 <= self.distill.alpha <= 1:
            raise ValueError(f"distill.alpha must lie between 0 and 1, got {self.distill.alpha}")


_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "seed": 0,
    "threads": 0,
    "workers": 0,
    "model.levels": 1,
    "model.steps": 1,
    "optim.lr": 0,
    "optim.min_lr": 0,
    "optim.lr_batch": 0,
    "optim.warmup_epochs": 0,
    "optim.warmup_lr": 0,
    "optim.cooldown_epochs": 0,
    "optim.weight_decay": 0,
    "optim.clip_grad": 0,
    "fgd.weight": 0,
    "quantize.bits": 0,
    "pretrain.decoder_dim": 1,
    "pretrain.decoder_depth": 0,
    "pretrain.decoder_heads": 1,
    "saving.every_steps": 0,
    "saving.keep": 0,
    "testing.every": 1,
    "testing.images": 0,
    "testing.energy_images": 1,
    "testing.integer_images": 0,
}


def refuse_others(recipe: Recipe, task: str) -> None:
    """Raises ValueError for settings of a dense `task` ("segmentation", "detection") that it has no use for."""
    values = {
        "label_smoothing": recipe.label_smoothing,
        "distill.teacher": recipe.distill.teacher,
        "fgd.teacher": recipe.fgd.teacher,
        "pretrain.mask_ratio": recipe.pretrain.mask_ratio,
    }
    if used := next((name for name, value in values.items() if value), ""):
        raise ValueError(f"{used}={values[used]} is of no use in {task}: leave it out")
    if task != "segmentation":
        refuse_segmentation(recipe, task)


def refuse_segmentation(recipe: Recipe, task: str) -> None:
    """Raises ValueError for settings of segmentation in a recipe of another `task`."""
    for name, value in dataclasses.asdict(recipe.segmentation).items():
        if value != getattr(Segmentation(), name):
            raise ValueError(f"segmentation.{name}={value} is of no use in {task}: leave it out")


def refuse_clips(recipe: Recipe) -> None:
    """Raises ValueError for settings that work on pictures only, in a recipe of event clips."""
    for name, value in (
        ("pretrain.mask_ratio", recipe.pretrain.mask_ratio),
        ("distill.teacher", recipe.distill.teacher),
        ("fgd.teacher", recipe.fgd.teacher),
    ):
        if value:
            raise ValueError(f"{name}={value} works on pictures, and {recipe.data.source} gives clips: leave it out")


_USUAL_NAMES = {  # last word of a path, as other programs have it -> what to say
    "learning_rate": "closest: optim.lr",
    "num_epochs": "closest: epochs",
    "batch": "closest: batch_size",
    "num_workers": "closest: workers",
    "num_classes": "classes come with the data: its folders or lists, of a maskfolder classes.txt or data.classes",
}


def override(recipe: Recipe, path: str, text: str) -> Recipe:
    """`recipe` with the field at the dotted `path` (for example "optim.lr") set to what `text` says.

    Raises ValueError for an unknown field (closest names listed), a group without a field, or a wrong type.
    """
    return _override(recipe, path.split("."), text, path, leaf_paths(recipe))


def leaf_paths(group: object, *, prefix: str = "") -> list[str]:
    """Dotted paths of every field that `override` can set in a recipe or a part of one."""
    paths = []
    for each in dataclasses.fields(group):
        value = getattr(group, each.name)
        if dataclasses.is_dataclass(value):
            paths += leaf_paths(value, prefix=f"{prefix}{each.name}.")
        else:
            paths.append(prefix + each.name)
    return paths


def _override(group, parts: list[str], text: str, path: str, known: list[str]):
    name, rest = parts[0], parts[1:]
    kinds = typing.get_type_hints(type(group))
    if name not in {each.name for each in dataclasses.fields(group)}:
        # `epochs` for `optim.epochs` or the other way round is the usual slip, so the last word counts too
        same_word = [known_path for known_path in known if known_path.split(".")[-1] == parts[-1]]
        close = same_word or difflib.get_close_matches(path, known, n=3, cutoff=0.4)
        said = _USUAL_NAMES.get(parts[-1], f"closest: {', '.join(close or known)}")
        raise ValueError(f"unknown recipe field {path!r}; {said}")
    value = getattr(group, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            inside = ", ".join(each for each in known if each.startswith(path + "."))
            raise ValueError(f"{path} is a group of fields; set one of {inside}")
        new = _override(value, rest, text, path, known)
    elif isinstance(value, dict) and rest:
        new = value | {".".join(rest): literal(text)}
    elif rest:
        raise ValueError(
            f"recipe field {path!r} does not exist: {'.'.join(path.split('.')[: -len(rest)])} has no parts"
        )
    else:
        new = _convert(_read(text, kinds[name]), kinds[name], path)
    return dataclasses.replace(group, **{name: new})


def literal(text: str) -> object:
    """What `text` spells: a Python literal, `true`/`false`, or else the text itself."""
    lower = text.strip().lower()
    if lower in ("true", "false"):
        return lower == "true"
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def _read(text: str, kind: object) -> object:
    """The value that `text` spells if a `kind` is wanted; `_convert` says whether it fits."""
    if kind is str or typing.get_origin(kind) is typing.Literal:
        return text
    if typing.get_origin(kind) is tuple:
        return [literal(part.strip()) for part in text.strip("()[] ").split(",") if part.strip()]
    return literal(text)


def _convert(value: object, kind: object, path: str) -> object:
    """`value` as a `kind`; raises ValueError naming field, value and type where it does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal and value in arguments:
        return value
    if origin is typing.Literal:
        raise ValueError(f"{path} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple and isinstance(value, list | tuple):
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) == len(value):
            return tuple(_convert(each, one, path) for each, one in zip(value, inner, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {str(key): tuple(each) if isinstance(each, list) else each for key, each in value.items()}
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:  # exactly: True is not the number 1 here
        return value
    if origin is tuple and Ellipsis not in arguments:
        example = ",".join(("48", "64", "96")[: len(arguments)])
        raise ValueError(f"{path} takes {len(arguments)} numbers, such as {path}={example}, got {value!r}")
    wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    raise ValueError(f"{path} must be of type {wanted}, got {value!r}")


def to_json(recipe: Recipe) -> dict[str, object]:
    """Plain dicts, lists and values that `json` can write."""
    return dataclasses.asdict(recipe)


def from_json(stored: dict[str, object]) -> Recipe:
    """The recipe that `to_json` stored; absent fields take their defaults. Raises ValueError where it does not fit."""
    return _build(Recipe, stored, "")


def _build(group: type, stored: object, prefix: str):
    if not isinstance(stored, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'a recipe'} must be a group of fields, got {stored!r}")
    kinds = typing.get_type_hints(group)
    unknown = stored.keys() - {each.name for each in dataclasses.fields(group)}
    if unknown:
        close = difflib.get_close_matches(min(unknown), list(kinds), n=3, cutoff=0.4) or list(kinds)
        raise ValueError(f"unknown recipe field {prefix}{min(unknown)}; closest: {', '.join(close)}")
    values = {}
    for name, value in stored.items():
        kind = kinds[name]
        if isinstance(kind, types.UnionType) and isinstance(value, dict):
            kind = kind_of(str(value.get("source", ImageData.source)))
        nested = dataclasses.is_dataclass(kind)
        values[name] = _build(kind, value, f"{prefix}{name}.") if nested else _convert(value, kind, prefix + name)
    try:
        return group(**values)
    except TypeError as error:  # a required field is absent
        raise ValueError(f"the recipe is not complete: {error}") from None


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Every field in which two recipes differ, as "path: old -> new"."""
    found = []
    for path in sorted(set(leaf_paths(old)) | set(leaf_paths(new))):
        before, after = old, new
        for part in path.split("."):  # data of two kinds have different fields
            before, after = getattr(before, part, "absent"), getattr(after, part, "absent")
        if before != after:
            found.append(f"{path}: {before} -> {after}")
    return found

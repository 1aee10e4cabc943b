"""THE catalogue: every model by name, and the functions that build, list and load them."""

import dataclasses
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from spikeformers.backbones import meta_spikeformer, qsd_transformer, spikformer
from spikeformers.heads import (
    DetectorConfig,
    MaskRCNNConfig,
    SegmenterConfig,
    SemanticFPNConfig,
    Spike2FormerConfig,
    YOLOConfig,
)
from spikeformers.layers.pretrained import CONFIG, FORMAT, WEIGHTS, Origin
from spikeformers.neurons import closest, set_steps
from spikeformers.quantize import convert, fold, plain, prepare
from spikeformers.weights import load_official, load_strict, read_checkpoint, untold


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue: the config a name stands for, and where it comes from."""

    config: Any  # a frozen dataclass with build()
    stem: str
    paper: str
    data: str = (
        "imagenet"  # what the paper trains it on: imagenet, cifar10, events, ade20k, cityscapes, voc, coco, coco_square
    )
    image_size: int = 224  # pixels a side there


META_SPIKEFORMER = "Spike-driven Transformer V2: Meta Spiking Neural Network Architecture (ICLR 2024)"
SPIKE2FORMER = "Spike2Former: Efficient Spiking Transformer for High-performance Image Segmentation (AAAI 2025)"
QSD_TRANSFORMER = "Quantized Spike-driven Transformer (ICLR 2025)"

SPIKFORMER = {
    "v1": "Spikformer: When Spiking Neural Network Meets Transformer (ICLR 2023)",
    "v2": "Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket (2024)",
}


def _seen_by(spikformer_name: str) -> tuple[str, int]:
    """Data and image size of a Spikformer."""
    kinds = {"spikformer_cifar": ("cifar10", 32), "spikformer_dvs": ("events", 128)}
    return next((seen for prefix, seen in kinds.items() if spikformer_name.startswith(prefix)), ("imagenet", 224))


CATALOGUE: dict[str, Entry] = {
    name: Entry(config, "meta_spikeformer", META_SPIKEFORMER) for name, config in meta_spikeformer.SIZES.items()
}
CATALOGUE |= {name: Entry(config, "qsd_transformer", QSD_TRANSFORMER) for name, config in qsd_transformer.SIZES.items()}
CATALOGUE |= {
    name: Entry(config, "spikformer", SPIKFORMER["v2" if config.stem == "scs" else "v1"], *_seen_by(name))
    for name, config in spikformer.SIZES.items()
}


def _fpn(backbone: str, head: SemanticFPNConfig, data: str, **shared: Any) -> SegmenterConfig:
    """Semantic FPN on a backbone of the catalogue."""
    return SegmenterConfig(CATALOGUE[backbone].config, head, num_classes=SEGMENTATION_CLASSES[data], **shared)


def _spike2former(data: str, **sizes: int) -> SegmenterConfig:
    """Spike2Former on the smallest Meta-SpikeFormer, with its attention scaled by head width."""
    backbone = dataclasses.replace(meta_spikeformer.SIZES["meta_spikeformer_15m"], attention="sdsa3_width")
    return SegmenterConfig(backbone, Spike2FormerConfig(**sizes), num_classes=SEGMENTATION_CLASSES[data])


SEGMENTATION_CLASSES = {"ade20k": 150, "cityscapes": 19, "voc": 21}
# 58.9 M with the 55M backbone is a neck of 256 channels before a head of 128; the code has 256 for both (61.5 M).
for _data in ("ade20k", "voc"):
    for _size, _neck in (("15m", 128), ("55m", 256)):
        _config = _fpn(f"meta_spikeformer_{_size}", SemanticFPNConfig(neck_dim=_neck), _data, neuron="lif", steps=4)
        CATALOGUE[f"meta_spikeformer_{_size}_fpn_{_data}"] = Entry(
            _config, "meta_spikeformer", META_SPIKEFORMER, _data, 512
        )
for _size in ("t", "m"):
    _config = _fpn(
        f"qsd_transformer_{_size}",
        SemanticFPNConfig(neck="batch_norm"),
        "ade20k",
        neuron="ie_lif",
        head_neuron="ni_lif",
        bits=4,
    )
    CATALOGUE[f"qsd_transformer_{_size}_fpn_ade20k"] = Entry(_config, "qsd_transformer", QSD_TRANSFORMER, "ade20k", 512)


for _data, _sizes in (("ade20k", {}), ("cityscapes", {"encoder_hidden": 2048}), ("voc", {})):
    CATALOGUE[f"spike2former_{_data}"] = Entry(_spike2former(_data, **_sizes), "spike2former", SPIKE2FORMER, _data, 512)


def _detector(backbone: str, head: Any, **shared: Any) -> DetectorConfig:
    """A detection head on a backbone of the catalogue."""
    return DetectorConfig(CATALOGUE[backbone].config, head, **shared)


_config = _detector("meta_spikeformer_15m", YOLOConfig(), neuron="lif", steps=4)
CATALOGUE["meta_spikeformer_15m_yolo"] = Entry(_config, "meta_spikeformer", META_SPIKEFORMER, "coco_square", 640)
for _size in ("15m", "55m"):
    _config = _detector(f"meta_spikeformer_{_size}", MaskRCNNConfig(), neuron="lif")
    CATALOGUE[f"meta_spikeformer_{_size}_mask_rcnn"] = Entry(_config, "meta_spikeformer", META_SPIKEFORMER, "coco", 800)
for _size in ("t", "m"):
    _config = _detector(f"qsd_transformer_{_size}", MaskRCNNConfig(), neuron="ie_lif", bits=4)
    CATALOGUE[f"qsd_transformer_{_size}_mask_rcnn"] = Entry(_config, "qsd_transformer", QSD_TRANSFORMER, "coco", 800)


def list_models(pattern: str = "*") -> list[str]:
    """Names in the catalogue that match the shell `pattern`, sorted."""
    return sorted(fnmatch.filter(CATALOGUE, pattern))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build the model `name` with random weights; `overrides` replace fields of its config.

    Example: create_model("meta_spikeformer_15m", num_classes=10, neuron="i_lif", levels=4).
    Raises ValueError for an unknown name or field (the closest ones are listed) or a value the model refuses.
    """
    if name not in CATALOGUE:
        raise ValueError(f"unknown model {name!r}; {closest(name, CATALOGUE)}")
    config = CATALOGUE[name].config
    values = _fitting(name, config, overrides)
    model = _replaced(config, values).build()
    model.origin = Origin(name, values)
    return model


def options_of(name: str) -> dict[str, Any]:
    """Every option of the model `name`, with its value in the catalogue. Raises ValueError for an unknown name."""
    if name not in CATALOGUE:
        raise ValueError(f"unknown model {name!r}; {closest(name, CATALOGUE)}")
    return _options(CATALOGUE[name].config)


def _options(config: Any) -> dict[str, Any]:
    """Every option of a config with its default: those of its parts (backbone, head) too, which its own go before."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    parts = {name: value for name, value in fields.items() if dataclasses.is_dataclass(value)}
    inside = {name: value for part in parts.values() for name, value in _options(part).items()}
    return inside | {name: value for name, value in fields.items() if name not in parts}


def _replaced(config: Any, values: dict[str, Any]) -> Any:
    """`config` with these options changed, each where it stands."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own = {name: value for name, value in values.items() if name in fields}
    rest = {name: value for name, value in values.items() if name not in fields}
    for name, part in fields.items():
        if dataclasses.is_dataclass(part):
            own[name] = _replaced(part, {option: rest[option] for option in rest.keys() & _options(part).keys()})
    return dataclasses.replace(config, **own)


def _fitting(name: str, config: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides` as the config holds them: JSON and command lines bring lists for tuples and 4 for 4.0.

    Raises ValueError unless every value is of the type that the config has there (or a builder, for a choice).
    """
    known, values = _options(config), {}
    for field, value in overrides.items():
        if field not in known:
            raise ValueError(f"{name} has no option {field!r}; {closest(field, known)}")
        default = known[field]
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if type(value) is int and type(default) is float else value
        if isinstance(default, tuple):
            fits = isinstance(value, tuple) and all(type(entry) is type(default[0]) for entry in value)
            wanted = f"a tuple of {type(default[0]).__name__}"
        else:
            fits = type(value) is type(default) or (isinstance(default, str) and callable(value))
            wanted = type(default).__name__
        if not fits:
            raise ValueError(f"{name}: option {field} must be {wanted}, such as {default!r}, got {value!r}")
        values[field] = value
    return values


def import_checkpoint(path: str | Path, *, name: str, out: str | Path, overrides: dict[str, Any]) -> str:
    """Read the authors' checkpoint `path` into the model `name` and save it to the folder `out`; says what it dropped.

    A second classifier in the file (distillation) is kept if `overrides` ask for it.  Raises ValueError, with `out` not
    touched, if the file is unsafe, damaged or of another network, or cannot tell what `overrides` do not either.
    """
    weights = read_checkpoint(path)
    segments = name in CATALOGUE and isinstance(CATALOGUE[name].config, SegmenterConfig)
    if segments:
        _check_told(name, overrides)
    classes = _classes_in(weights, segments=segments)
    if classes is not None and "num_classes" not in overrides:
        overrides = {"num_classes": classes, **overrides}
    model = create_model(name, **overrides)
    if segments and model.quantization and any(key.endswith(".alpha") for key in weights):
        prepare(model, bits={"backbone.*": model.config.bits})  # the authors' heads have float weights
    report = load_official(model, weights)
    folder = model.save_pretrained(out)
    return f"{report}; saved to {folder}"


def _check_told(name: str, overrides: dict[str, Any]) -> None:
    """Raises ValueError unless `overrides` hold what no checkpoint of the segmenter `name` tells."""
    told = untold(CATALOGUE[name].config)
    if missing := [option for option in told if option not in overrides]:
        reasons = "; ".join(f"{option}: {told[option]}" for option in missing)
        raise ValueError(
            f"{name}: a checkpoint does not tell {', '.join(missing)}, and the result depends on it: say it "
            f"({reasons}). Of the authors' 1x4 files, for example: --set levels=4 alpha=4.0 layout=released"
        )


def _classes_in(weights: dict[str, Tensor], *, segments: bool) -> int | None:
    """How many classes the authors' checkpoint tells apart, of images or of pixels; None if it has no such layer."""
    less = {"decode_head.conv_seg.weight": 0, "decode_head.cls_embed.weight": 1} if segments else {"head.weight": 0}
    found = {key.removeprefix("module."): tensor.shape[0] for key, tensor in weights.items() if key.endswith(".weight")}
    return next((found[key] - less[key] for key in less if key in found), None)


def from_pretrained(source: str | Path) -> nn.Module:
    """The model that `save_pretrained` wrote to the folder `source`, in eval mode, or one of that form on the hub.

    `source` is a folder, or a Hugging Face repository id such as "user/model" (downloaded; no code of it is run).
    Raises ValueError if it is no such folder or its weights do not fit what config.json says.
    """
    folder = Path(source)
    if not folder.is_dir() and (folder.parent / "recipe.json").is_file():
        raise ValueError(f"{folder} is gone from the run {folder.parent}: put it back, or train it again")
    if not folder.is_dir():
        folder = _download(str(source))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        meant = f"; did you mean {folder / 'model'}?" if (folder / "model" / CONFIG).is_file() else ""
        raise ValueError(f"{source} is not a saved model: it needs {CONFIG} and {WEIGHTS}{meant}") from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{source} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        raise ValueError(f"{folder / CONFIG} has format {found!r}; this version reads {FORMAT!r}")
    name, overrides, steps = (config.get(key) for key in ("name", "overrides", "steps"))
    if not (isinstance(name, str) and isinstance(overrides, dict) and isinstance(steps, int)):
        raise ValueError(f"{folder / CONFIG} is damaged: it needs a name, overrides and steps")
    model = create_model(name, **overrides)
    _requantize(model, config.get("quantize"), where=folder / CONFIG)
    load_strict(model, weights)
    set_steps(model, steps)
    return model.eval()


def _requantize(model: nn.Module, stored: dict[str, Any] | None, *, where: Path) -> None:
    """Bring `model`, as the catalogue builds it, to the quantisation that config.json names."""
    if stored is None:
        plain(model)
        return
    try:
        options = {name: stored[name] for name in ("bits", "per_channel", "offset")}
        prepare(model, **options, exact=stored.get("exact", False))  # named only where it is so
        if stored["converted"]:
            convert(model)
        if stored["folded"]:
            fold(model)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: its quantisation cannot be repeated ({error})") from error


def _download(repository: str) -> Path:
    """Local folder of the hub repository `repository`."""
    if repository.count("/") != 1 or repository.startswith((".", "/")):
        raise ValueError(f"no such folder: {repository} (a hub repository would be named user/model)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"no such folder, and the hub gave no model {repository!r}: {error}") from error

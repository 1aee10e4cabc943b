"""THE catalogue: every model by name, and the functions that build, list and load them."""

import dataclasses
import fnmatch
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from spikeformers.backbones import meta_spikeformer, qsd_transformer, spikformer
from spikeformers.layers.pretrained import CONFIG, FORMAT, WEIGHTS, Origin
from spikeformers.neurons import closest, set_steps
from spikeformers.quantize import convert, fold, plain, prepare
from spikeformers.weights import load_official, load_strict, read_checkpoint


@dataclass(frozen=True)
class Entry:
    """One row of the catalogue: the config a name stands for, and where it comes from."""

    config: Any  # a frozen dataclass with build()
    stem: str
    paper: str
    data: str = "imagenet"  # what the paper trains it on: "imagenet", "cifar10" or "events"
    image_size: int = 224  # pixels a side there


META_SPIKEFORMER = "Spike-driven Transformer V2: Meta Spiking Neural Network Architecture (ICLR 2024)"
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
    # JSON and command lines bring lists where configs hold tuples.
    values = {field: tuple(value) if isinstance(value, list) else value for field, value in overrides.items()}
    _check_types(name, config, values)
    model = dataclasses.replace(config, **values).build()
    model.origin = Origin(name, values)
    return model


def _check_types(name: str, config: Any, values: dict[str, Any]) -> None:
    """Raises ValueError unless every value is of the type that the config has there (or a builder, for a choice)."""
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for field, value in values.items():
        if field not in known:
            raise ValueError(f"{name} has no option {field!r}; {closest(field, known)}")
        default = known[field]
        if isinstance(default, tuple):
            fits = isinstance(value, tuple) and all(type(entry) is type(default[0]) for entry in value)
            wanted = f"a tuple of {type(default[0]).__name__}"
        else:
            fits = type(value) is type(default) or (isinstance(default, str) and callable(value))
            wanted = type(default).__name__
        if not fits:
            raise ValueError(f"{name}: option {field} must be {wanted}, such as {default!r}, got {value!r}")


def import_checkpoint(path: str | Path, *, name: str, out: str | Path, overrides: dict[str, Any]) -> str:
    """Read the authors' checkpoint `path` into the model `name` and save it to the folder `out`; says what it dropped.

    A second classifier in the file (distillation) is kept if `overrides` ask for it.  Raises ValueError, with `out` not
    touched, if the file is unsafe, damaged or of another network.
    """
    weights = read_checkpoint(path)
    heads = [tensor.shape[0] for key, tensor in weights.items() if key.removeprefix("module.") == "head.weight"]
    if heads and "num_classes" not in overrides:
        overrides = {"num_classes": heads[0], **overrides}
    model = create_model(name, **overrides)
    report = load_official(model, weights)
    folder = model.save_pretrained(out)
    return f"{report}; saved to {folder}"


def from_pretrained(source: str | Path) -> nn.Module:
    """The model that `save_pretrained` wrote to the folder `source`, in eval mode, or one of that form on the hub.

    `source` is a folder, or a Hugging Face repository id such as "user/model" (downloaded; no code of it is run).
    Raises ValueError if it is no such folder or its weights do not fit what config.json says.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(str(source))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise ValueError(f"{source} is not a saved model: it needs {CONFIG} and {WEIGHTS}") from error
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

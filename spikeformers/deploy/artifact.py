"""One file that is a whole model: integer engine, how to prepare pictures, class names, colours, and a card; no code.

`container.py` is the bytes. Loading builds the network from a closed table of configs, without memory, lets the engine
take the places that its description names, and only then, if every tensor is of the size and type it must be, reads
the tensors. Checksums tell damage, not forgery: who rewrites a file can rewrite them. A forged file may give other
predictions, but runs no code and takes no more memory than its own size allows; publish the SHA-256 of the whole file.
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikeformers.backbones.meta_spikeformer import MetaSpikeFormerConfig
from spikeformers.backbones.qsd_transformer import QSDTransformerConfig
from spikeformers.backbones.spikformer import SpikformerConfig
from spikeformers.deploy import container
from spikeformers.deploy.container import Content
from spikeformers.deploy.outputs import same_outputs
from spikeformers.deploy.pictures import Letterbox, Pictures, told_by
from spikeformers.deploy.runtime import BACKENDS, IntegerModel
from spikeformers.heads import (
    Detections,
    DetectorConfig,
    MaskRCNNConfig,
    SegmenterConfig,
    SemanticFPNConfig,
    Spike2FormerConfig,
    YOLOConfig,
)
from spikeformers.layers.pretrained import write_files
from spikeformers.layers.version import __version__

BACKBONES = {
    "meta_spikeformer": MetaSpikeFormerConfig,
    "qsd_transformer": QSDTransformerConfig,
    "spikformer": SpikformerConfig,
}
NETWORKS = BACKBONES | {"segmenter": SegmenterConfig, "detector": DetectorConfig}
HEADS = {
    "semantic_fpn": SemanticFPNConfig,
    "spike2former": Spike2FormerConfig,
    "yolo": YOLOConfig,
    "mask_rcnn": MaskRCNNConfig,
}
PARTS = {"backbone": BACKBONES, "head": HEADS}
"""Configs that stand in fields of a config, by name of the field."""
MOST = {  # of whole numbers in a config, or its tuples; a file may not ask for more
    "dims": 2**14,
    "dim": 2**14,
    "blocks": 64,
    "depth": 128,
    "num_classes": 2**20,
    "in_channels": 2**10,
    "steps": 2**10,
    "heads": 2**10,
    "levels": 255,
    "mlp_ratio": 64,
    "scale": 1e6,
    "layer_scale": 1e6,
    "patch_size": 256,
    **dict.fromkeys(("neck_dim", "fpn_dim", "encoder_hidden", "decoder_hidden", "queries"), 2**14),
    **dict.fromkeys(("groups", "decoder_heads"), 2**10),
    **dict.fromkeys(("region_dim", "fc_dim", "anchors", "anchor_sizes", "regions", "samples", "candidates"), 2**14),
    **dict.fromkeys(("box_weight", "objectness_weight", "class_weight"), 2**14),
    "limit": 2**10,  # each may have a mask as large as the picture
}
MOST_OTHERS = 64  # of those that MOST does not name
MOST_PAINTED = 2**28  # pixels of all masks of a picture, each a float; 100 of 800 x 1344 are less than half
MOST_ENTRIES = 64  # of a tuple in a config
PAIRS = ("kernel", "stride", "padding", "dilation")
WHOLE = ("in_channels", "out_channels", "groups", "bits", "max_count", "levels")
ENGINE_TYPES = dict.fromkeys(WHOLE, int) | {"unit": float, "scale": float, "fused": bool}
"""What `IntegerModel.describe` tells of modules by these names; torch would take True for 1, or fail when it runs."""
LARGEST_NUMBER = 2**24  # of all these, or its negative
LONGEST_NAME, LONGEST_TEXT = 60, 1000  # characters, of names in a config and of others
SIZE = (128, 128)  # of the random picture that a new file is tried with, where nothing says how large pictures are
HEADER = {"version", "network", "engine", "preprocessing", "labels", "card"}
OPTIONAL = {"colours"}  # of a header; files of classifiers have none


@dataclass(frozen=True)
class ModelCard:
    """What somebody who gets the file should know; None or "": not known.

    `accuracy`, 0..1: right answers of the engine (classes of images, or of pixels) over `images` test images of `data`;
    `miou`: of one that gives classes to pixels; `map`, `ap50`: of one that finds boxes, `mask_map` of its masks, if it
    draws some. Energies: mJ an image, of the spiking network and of the same one as an ANN, by `energy_convention`.
    `source`: what it was trained by. `license`: of the weights.
    Raises ValueError for texts that cannot be printed, or numbers out of range.
    """

    model: str = ""
    accuracy: float | None = None
    miou: float | None = None
    map: float | None = None
    ap50: float | None = None
    mask_map: float | None = None
    images: int | None = None
    data: str = ""
    energy_mj: float | None = None
    ann_energy_mj: float | None = None
    energy_convention: str = ""
    source: str = ""
    license: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "data", "energy_convention", "source", "license"):
            _check_text(f"card.{name}", getattr(self, name))
        scores = dict.fromkeys(("accuracy", "miou", "map", "ap50", "mask_map"), 1)
        limits = scores | {"energy_mj": math.inf, "ann_energy_mj": math.inf}
        for name, most in limits.items():
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0 <= value <= most and math.isfinite(value)):
                raise ValueError(f"card.{name} must be a number from 0 to {most}, or None, got {value!r}")
        if self.images is not None and not (type(self.images) is int and self.images >= 1):
            raise ValueError(f"card.images must be a whole number, at least 1, or None, got {self.images!r}")
        if not isinstance(self.versions, dict):
            raise ValueError(f"card.versions must be a dict of texts, got {self.versions!r}")
        for each in (*self.versions, *self.versions.values()):
            _check_text("card.versions", each)


@dataclass(frozen=True)
class Artifact:
    """What `load` gives: the engine and what a file says about it.

    `labels`: one for each class; `colours`: red, green and blue of each, 0..255; None: not known.
    `openvino`: the same engine in OpenVINO, if `load` was asked for it; calls then go there.
    """

    engine: IntegerModel
    preprocessing: Pictures | None
    labels: tuple[str, ...] | None
    card: ModelCard
    colours: tuple[tuple[int, int, int], ...] | None = None
    openvino: nn.Module | None = None

    @property
    def segments(self) -> bool:
        """Whether it gives a class to each pixel, and not to each picture."""
        return isinstance(self.engine.config, SegmenterConfig)

    @property
    def detects(self) -> bool:
        """Whether it gives boxes with classes."""
        return isinstance(self.engine.config, DetectorConfig)

    def __call__(self, images: Tensor) -> Any:
        """Images [B, C, H, W] or clip [T, B, C, H, W] -> what the engine gives, float32; logits of a classifier."""
        return (self.openvino or self.engine)(images)

    def semantic(self, output: Any, size: tuple[int, int]) -> Float[Tensor, "B L H W"]:
        """Scores of every pixel at `size` = (H, W), of what a call gave; see `IntegerModel.semantic`."""
        return self.engine.semantic(output, size)

    def detect(self, output: Any, sizes: Tensor | None = None) -> list[Detections]:
        """What was found in each image, of what a call gave; see `IntegerModel.detect`."""
        return self.engine.detect(output, sizes)


def save(
    engine: IntegerModel,
    path: str | Path,
    *,
    preprocessing: Pictures | None = None,
    labels: Sequence[str] | None = None,
    colours: Sequence[Sequence[int]] | None = None,
    card: ModelCard | None = None,
) -> Path:
    """Write `engine` to the one file `path`, in one step, replacing what is there; returns the path.

    Before that the bytes are loaded again and must give the same for a random picture, bit by bit.
    Raises ValueError for anything but an engine of the torch backend, if its network is none of the catalogue, was
    changed by hand, or its config holds a builder that no file can name, and for labels, colours (red, green, blue of
    each class, 0..255) or a preprocessing that do not fit; OSError if the disk is full. Nothing is written then.
    """
    network = _describe_network(engine)
    header = {
        "version": __version__,
        "network": network,
        "engine": engine.describe(),
        "preprocessing": None if preprocessing is None else dataclasses.asdict(preprocessing),
        "labels": None if labels is None else list(labels),
        "card": dataclasses.asdict(card or ModelCard()),
    }
    if colours is not None:
        header["colours"] = [list(each) for each in colours]
    _read_about(header, _read_network(network))  # what the caller got wrong is told in plain words first
    content = container.encode(header, engine.state_dict())
    _check_same(engine, content, size=(preprocessing and preprocessing.seen) or SIZE)
    path = Path(path)
    write_files(path.parent, {path.name: content})
    return path


def load(path: str | Path, *, backend: str = "torch") -> Artifact:
    """The model in the file `path`, ready to run on the CPU; its logits are those of the engine that was saved.

    `backend` "openvino" runs it there, on pictures of the size that the file tells.
    Raises ValueError if there is no such file, it is no artifact, was damaged or cut, or is of a newer version, and for
    an unknown backend or one that needs a size of pictures where the file tells none.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    artifact = _read(Path(path))
    if backend == "torch":
        return artifact
    size = artifact.preprocessing and artifact.preprocessing.seen
    if size is None:
        raise ValueError(
            f"{path} does not tell one size of pictures, so load it for torch and use "
            "sf.deploy.OpenVINOModel(loaded.engine, images)"
        )
    from spikeformers.deploy.openvino import OpenVINOModel

    picture = torch.zeros(1, artifact.preprocessing.channels, *size)
    return dataclasses.replace(artifact, openvino=OpenVINOModel(artifact.engine, picture))


def _read(path: Path) -> Artifact:
    """The model in the file `path`; see `load`."""
    content = container.read(path)
    try:
        return _assemble(content)
    except Exception as error:  # asked to build nonsense, torch raises RuntimeError, TypeError, IndexError and more
        version = str(content.header.get("version"))[:20]
        other = "" if version == __version__ else f" (written by spikeformers {version!r}, this is {__version__})"
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is damaged: {reason}{other}") from error


def _assemble(content: Content) -> Artifact:
    """Build what `content` describes. May raise anything if that is nonsense."""
    if not HEADER <= content.header.keys() <= HEADER | OPTIONAL:
        raise ValueError(f"its header must have {', '.join(sorted(HEADER))}")
    config = _read_network(content.header["network"])
    about = _read_about(content.header, config)
    description = content.header["engine"]
    _check_modules(description["modules"])
    with torch.device("meta"):  # tensors without memory, whatever sizes they claim
        network = _without_bits(config).build()
        engine = IntegerModel.rebuild(copy.deepcopy(network), description, config=config)
    wanted = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in engine.state_dict().items()}
    found = {name: (stored.dtype, stored.shape) for name, stored in content.table.items()}
    if wrong := [name for name in wanted | found if wanted.get(name) != found.get(name)]:
        told = " but ".join(_what(each.get(wrong[0]), where) for each, where in ((wanted, "wanted"), (found, "there")))
        raise ValueError(f"its tensors are not those of its network; first: {wrong[0][:80]!r}, {told}")
    _check_geometry(engine)
    engine = IntegerModel.rebuild(network, description, config=config)
    engine.load_state_dict({name: content.tensor(name) for name in content.table}, strict=True, assign=True)
    return Artifact(engine.eval(), **about)


def _without_bits(config: Any) -> Any:
    """The config of the same network with float weights: the engine brings its own."""
    return dataclasses.replace(config, bits=0) if hasattr(config, "bits") else config


def _check_modules(told: Any, name: str = "") -> None:
    """Raises ValueError for a number in a description of modules that is of another type, or out of range."""
    if name in PAIRS:
        if not (isinstance(told, list) and len(told) == 2 and all(_fits(each, int) for each in told)):
            raise ValueError(f"{name} of its engine must be two whole numbers, got {str(told)[:60]!r}")
    elif name in ENGINE_TYPES:
        if not _fits(told, ENGINE_TYPES[name]):
            raise ValueError(f"{name} of its engine must be {ENGINE_TYPES[name].__name__}, got {str(told)[:60]!r}")
    elif isinstance(told, dict | list):
        for key, each in told.items() if isinstance(told, dict) else ((name, each) for each in told):
            _check_modules(each, key)


def _fits(value: Any, kind: type) -> bool:
    return type(value) is kind and abs(value) <= LARGEST_NUMBER


def _check_geometry(engine: IntegerModel) -> None:
    """Raises ValueError for convolutions that no network has: such could make huge maps of small weights."""
    for name, module in engine.net.named_modules():
        if (sizes := getattr(module, "geometry", None)) is not None:
            pairs = zip(sizes.kernel, sizes.stride, sizes.padding, sizes.dilation, strict=True)
            if not all(0 <= p < k and 1 <= s <= MOST_OTHERS and 1 <= d <= MOST_OTHERS for k, s, p, d in pairs):
                raise ValueError(f"{name[:80]!r} is no convolution of a network: {sizes}")


def _what(tensor: tuple[torch.dtype, tuple[int, ...]] | None, where: str) -> str:
    return f"none is {where}" if tensor is None else f"{tensor[0]} {list(tensor[1])} is {where}"


def _describe_network(engine: IntegerModel) -> dict[str, Any]:
    """Stem and fields of the config that `engine`'s network was built from."""
    if not isinstance(engine, IntegerModel):
        raise ValueError(f"an artifact holds what sf.deploy.integer(model, images) gives, not {type(engine).__name__}")
    config = engine.config
    if type(config) not in NETWORKS.values():
        raise ValueError(
            f"an artifact holds networks of the catalogue, not {type(engine.net).__name__}: build it by create_model, "
            "or export it as ONNX"
        )
    # Engines follow set_steps; configs do not.
    return _describe_config(dataclasses.replace(config, steps=engine.net.steps), NETWORKS)


def _describe_config(config: Any, known: dict[str, type]) -> dict[str, Any]:
    """Stem, which `known` tells, and fields of `config`. Raises ValueError for one that no file can hold."""
    stem = next((stem for stem, kind in known.items() if type(config) is kind), None)
    if stem is None:
        raise ValueError(
            f"{type(config).__name__} is no part that a file can name (those are {', '.join(known)}): export the "
            "network as ONNX"
        )
    values = {}
    for name, value in ((each.name, getattr(config, each.name)) for each in dataclasses.fields(config)):
        if name in PARTS:
            value = _describe_config(value, PARTS[name])
        elif callable(value):
            raise ValueError(
                f"{name} of this network is a builder ({value!r}), which no file can hold: use one of the names that "
                f"{type(config).__name__} knows, or export the network as ONNX"
            )
        values[name] = list(value) if isinstance(value, tuple) else value
    return {"stem": stem, "config": values}


def _read_network(network: Any, known: dict[str, type] = NETWORKS) -> Any:
    """The config that `_describe_config` described, every value of its type and in bounds."""
    if not (isinstance(network, dict) and isinstance(network.get("config"), dict)):
        raise ValueError("its header describes no network")
    values, kind = network["config"], known.get(str(network.get("stem")))
    if kind is None:
        raise ValueError(f"it holds an unknown network, {str(network.get('stem'))[:60]!r}")
    defaults = {each.name: each.default for each in dataclasses.fields(kind)}
    if wrong := sorted(values.keys() ^ defaults.keys()):
        raise ValueError(f"its config of {network['stem']} lacks or adds {wrong[0][:60]!r}")
    parts = {name: _read_network(values[name], PARTS[name]) for name in defaults if name in PARTS}
    rest = {name: _checked(name, values[name], defaults[name]) for name in defaults if name not in PARTS}
    return kind(**parts, **rest)


def _checked(name: str, value: Any, default: Any) -> Any:
    """A value of a config, lists as tuples. Raises ValueError if not of the type of `default`, or out of range."""
    if isinstance(default, tuple):
        if not isinstance(value, list) or len(value) > MOST_ENTRIES:
            raise ValueError(f"{name} of its config must be a list of at most {MOST_ENTRIES} values")
        return tuple(_checked(name, each, default[0]) for each in value)
    if type(value) is not type(default):
        raise ValueError(f"{name} of its config must be {type(default).__name__}, got {str(value)[:60]!r}")
    most = MOST.get(name, MOST_OTHERS)
    if isinstance(value, str) and len(value) > LONGEST_NAME:
        raise ValueError(f"{name} of its config must be a name, got {len(value)} characters")
    if type(value) in (int, float) and not 0 <= value <= most:
        raise ValueError(f"{name} of its config must lie between 0 and {most}, got {value}")
    return value


def _read_about(header: dict[str, Any], config: Any) -> dict[str, Any]:
    """Preprocessing, labels, colours and card of `header`, which must fit the network of `config`."""
    preprocessing, labels, colours = header["preprocessing"], header["labels"], header.get("colours")
    if preprocessing is not None:
        preprocessing = told_by(preprocessing)
        if preprocessing.channels != config.in_channels:
            raise ValueError(f"pictures of {preprocessing.channels} channels for a network of {config.in_channels}")
        painted = getattr(config, "head", None)
        if isinstance(preprocessing, Letterbox) and isinstance(painted, MaskRCNNConfig):
            pixels = painted.limit * math.prod(preprocessing.padded(*preprocessing.window))
            if pixels > MOST_PAINTED:
                raise ValueError(
                    f"limit={painted.limit} masks of window={preprocessing.window} are {pixels:,} pixels, and "
                    f"{MOST_PAINTED:,} are the most: lower one of them"
                )
    if labels is not None:
        if not isinstance(labels, list) or len(labels) != config.num_classes:
            raise ValueError(f"labels must be a list of {config.num_classes} names, one for each class")
        for label in labels:
            _check_text("a label", label)
        labels = tuple(labels)
    if colours is not None:
        if not isinstance(colours, list) or len(colours) != config.num_classes or not all(map(_is_colour, colours)):
            raise ValueError(
                f"colours must be a list of {config.num_classes} triples of whole numbers, 0 to 255, one for each class"
            )
        colours = tuple(map(tuple, colours))
    card = ModelCard(**header["card"])
    return {"preprocessing": preprocessing, "labels": labels, "colours": colours, "card": card}


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(e) is int and 0 <= e <= 255 for e in value)


def _check_text(name: str, text: Any) -> None:
    """Raises ValueError unless `text` is a short line that a terminal can show (escape sequences could do more)."""
    if not (isinstance(text, str) and len(text) <= LONGEST_TEXT and text.isprintable()):
        raise ValueError(
            f"{name} must be a line of at most {LONGEST_TEXT} printable characters, got {str(text)[:60]!r}"
        )


@torch.no_grad()
def _check_same(engine: IntegerModel, content: bytes, *, size: tuple[int, int]) -> None:
    """Raises ValueError if the file that `content` would be gives other logits than `engine`."""
    view = memoryview(bytearray(content))
    preamble, rest = bytes(view[: container.PREAMBLE]), view[container.PREAMBLE :]
    again = _assemble(container.parse(preamble, rest, name="the new file"))
    picture = torch.randn(1, engine.config.in_channels, *size, generator=torch.Generator().manual_seed(0))
    if not same_outputs(again(picture), copy.deepcopy(engine).cpu()(picture)):
        raise ValueError(
            "this network is no longer what its config says (were layers or attributes changed by hand?), so a file "
            "would predict otherwise: put the change into the config, or export the network as ONNX"
        )

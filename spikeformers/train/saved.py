"""Finished runs and saved models, read back for testing, prediction and measuring."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from spikeformers.data.augment import Normalise, to_pixels
from spikeformers.data.decode import decode
from spikeformers.data.detection import DetectionData, read_picture_to_detect
from spikeformers.data.images import ImageData, fit, statistics
from spikeformers.data.segmentation import SegmentationData
from spikeformers.data.segmentation_augment import Frame, resize_picture
from spikeformers.data.segmentation_sources import default_colours, published_classes
from spikeformers.data.splits import Data, kind_of
from spikeformers.deploy import Artifact, Framing, Letterbox, Preprocessing
from spikeformers.train.checkpoint import read_json
from spikeformers.train.recipe import Recipe, from_json
from spikeformers.train.segmentation_evaluate import Windows
from spikeformers.train.summary import PretrainSummary, pretrains, read_summary
from spikeformers.zoo import CATALOGUE, from_pretrained, list_models

PACKED = "packed"  # folder of a run with its network in packed weights, beside `model`
PICTURES = {  # how the papers' networks see a picture
    "imagenet": {"source": "imagefolder", "size": 224, "eval_crop": 0.875},
    "cifar10": {"source": "cifar10", "size": 32},
    "ade20k": {"source": "ade20k", "short_side": 512, "max_side": 2048},
    "voc": {"source": "voc2012", "short_side": 512, "max_side": 2048},
    "cityscapes": {"source": "cityscapes", "short_side": 1024, "max_side": 2048},
    "coco": {"source": "coco", "size": (800, 1333), "fit": "sides"},
    "coco_square": {"source": "coco", "size": (640, 640)},
}


def read_run(run: Path) -> tuple[nn.Module, Recipe, tuple[str, ...]]:
    """Final model, recipe and class names of a finished run. Raises ValueError for anything else."""
    if not run.exists():
        raise ValueError(f"{run} is not a run: there is no such folder (a run is the folder that `train` writes)")
    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} is not a run: it has no recipe.json (a run is the folder that `train` writes)")
    if not (run / "summary.json").is_file():
        stored = read_json(run / "recipe.json")
        command = "pretrain ..." if pretrains(stored) else "train ..."
        if stored.get("quantize", {}).get("bits") and stored["init"]["backbone"]:
            command = f"quantize {stored['init']['backbone']}"
        raise ValueError(
            f"{run} is not finished, so it has no final model: continue it with `{command} --resume --out {run}`"
        )
    summary = read_summary(run)
    if isinstance(summary, PretrainSummary):
        raise ValueError(
            f"{run} is a pre-training, whose classifier learnt nothing: finetune it first, by a training recipe of "
            f"the same network and --set init.backbone={run}"
        )
    recipe, model = from_json(summary.recipe), from_pretrained(run / "model")
    if recipe.channels_last:  # as in training: another layout rounds differently
        model.to(memory_format=torch.channels_last)
    return model, recipe, tuple(summary.classes)


def stored_recipe(run: Path, *, name: str) -> Recipe | None:
    """The recipe that `run`, or the first of its seeds, was started with; None if `run` holds none yet.

    So resuming needs no setting again. Raises ValueError if it is not the recipe called `name`.
    """
    found = next((each for each in (run, *sorted(run.glob("seed-*"))) if (each / "recipe.json").is_file()), None)
    if found is None:
        return None
    recipe = from_json(read_json(found / "recipe.json"))
    if recipe.name != name:
        raise ValueError(f"{run} is a run of {recipe.name}, not of {name}; resume it as {recipe.name}")
    return recipe


def read_classifier(run: Path) -> tuple[nn.Module, Recipe, tuple[str, ...]]:
    """As `read_run`, for what only works on classes of whole pictures. Raises ValueError for other runs."""
    model, recipe, classes = read_run(run)
    if not isinstance(recipe.data, ImageData):
        raise ValueError(
            f"{run} is of {recipe.data.source}, and this is for classifiers of pictures. Few bits: train it again with "
            f"quantize.bits and init.backbone={run}"
        )
    return model, recipe, classes


def run_of(folder: Path) -> Path | None:
    """The run that `folder` is, or whose `model/` or `packed/` it is."""
    places = (folder, folder.parent) if folder.name in ("model", PACKED) else (folder,)
    return next((place for place in places if (place / "recipe.json").is_file()), None)


def read_trained(source: str) -> tuple[nn.Module, Data, tuple[str, ...]]:
    """Model, how to read images for it, and class names of a run or of a saved model.

    A saved model without a run has neither: its images are read as its paper does, and its classes are those of the
    paper's data (ImageNet's for a classifier) if they are as many, else numbers. Raises ValueError where there is no
    such folder or no weights in it, and for a network that takes events.
    """
    folder = Path(source)
    if run := run_of(folder):
        model, recipe, classes = read_run(run)
        return (from_pretrained(folder) if folder.name == PACKED else model), recipe.data, classes
    if source in list_models():
        raise ValueError(f"{source} names a model without weights: give the folder of a run or of a saved model")
    if not folder.is_dir():
        raise ValueError(f"no such folder: {source}, nor file (wanted: a run, a saved model, or a file of `export`)")
    model = from_pretrained(folder)
    data = CATALOGUE[model.origin.name].data
    if data not in PICTURES:
        raise ValueError(f"{source} is a {model.origin.name}, which takes clips of {data}, not pictures")
    spec = kind_of(PICTURES[data]["source"])(**PICTURES[data], in_channels=model.config.in_channels)
    if isinstance(spec, DetectionData):
        return model, spec, coco_names(model.config.num_classes)
    if isinstance(spec, SegmentationData):
        return model, spec, published_palette(spec, count=model.config.num_classes)[0]
    return model, spec, class_labels(model.config.num_classes)


def preprocessing_of(spec: ImageData) -> Preprocessing:
    """How `spec` makes a picture the model's input, as an artifact holds it."""
    return Preprocessing(size=spec.size, crop=spec.eval_crop, **_normalising(spec))


def framing_of(spec: SegmentationData, *, windows: Windows | None) -> Framing:
    """How `spec` makes a picture the input of a network that sees all of it, at once or through `windows`."""
    window, stride = (windows.crop, windows.stride) if windows else ((), ())
    sides = {"short_side": spec.short_side, "max_side": spec.max_side, "fixed": tuple(spec.test_size)}
    return Framing(**sides, window=window, stride=stride, **_normalising(spec))


def _normalising(spec: Data) -> dict[str, object]:
    mean, std = statistics(spec)
    return {"channels": spec.in_channels, "mean": mean, "std": std, "interpolation": spec.interpolation}


def read_picture(path: Path, preprocessing: Preprocessing | Framing | Letterbox) -> Tensor:
    """One picture file as the model of an artifact wants it, float32 [C,h,w]. Raises ValueError naming the file.

    The same numbers as `read_image` or `read_picture_for` gives for the data that `preprocessing` was made of, and
    those of `read_picture_to_detect`, which also tells where in there the picture lies.
    """
    if isinstance(preprocessing, Letterbox):
        return read_picture_to_detect(preprocessing, path)[0]
    picture = decode(path, name=str(path), channels=preprocessing.channels)
    pixels = _FITTED[type(preprocessing)](picture, preprocessing)
    return Normalise(preprocessing.mean, preprocessing.std)(pixels)


def _cropped(picture: Image.Image, told: Preprocessing) -> Tensor:
    sizes = {"size": told.size, "eval_crop": told.crop, "in_channels": told.channels}
    return to_pixels(fit(picture, spec=ImageData(**sizes, interpolation=told.interpolation)))


def _framed(picture: Image.Image, told: Framing) -> Tensor:
    pixels = to_pixels(picture)
    size = Frame(told.short_side, told.max_side, told.fixed).size(*pixels.shape[-2:])
    return resize_picture(pixels, size, interpolation=told.interpolation)


_FITTED = {Preprocessing: _cropped, Framing: _framed}


def class_labels(count: int) -> tuple[str, ...]:
    """ImageNet's descriptions for 1000 classes, else numbers."""
    if count != 1000:
        return tuple(map(str, range(count)))
    described = ImageNetInfo()
    return tuple(described.index_to_description(index) for index in range(count))


def palette_of_file(file: Artifact) -> tuple[tuple[str, ...], Tensor]:
    """Names and colours uint8 [N,3] of the classes of a file; numbers and other hues where it has none."""
    count = file.engine.config.num_classes
    colours = default_colours(count) if file.colours is None else file.colours
    return file.labels or tuple(map(str, range(count))), torch.as_tensor(colours).byte()


def coco_names(count: int) -> tuple[str, ...]:
    """COCO's names for 80 classes, else numbers."""
    listed = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    names = tuple(name for name in listed if name not in ("__background__", "N/A"))
    return names if len(names) == count else tuple(map(str, range(count)))


def published_palette(spec: SegmentationData, *, count: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and colours uint8 [N,3] of a public set's classes if there are `count`, else numbers and other hues."""
    names, colours = published_classes(spec.source)
    return (names, colours) if len(names) == count else (tuple(map(str, range(count))), default_colours(count))

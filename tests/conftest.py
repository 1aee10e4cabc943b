"""Shared fixtures; installs the shape checker (jaxtyping + beartype) before any module of the package is imported."""

import json
import os
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

# neurons.surrogate and quantize.lsq are left out: the compiler cannot trace autograd functions through the checker's
# wrappers.
CHECKED = (
    *("neurons.integer", "neurons.lif", "neurons.neuron", "neurons.steps", "layers", "attention", "backbones", "heads"),
    *("quantize.convert", "quantize.prepare"),
)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read while kernels are defined: on a CPU they are interpreted
jaxtyping.install_import_hook([f"spikeformers.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, on one thread: tensors this small gain nothing from more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """For tests that compile: the shape checker's wrappers switched off, since the compiler would trace them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.compiler.reset()  # graphs of earlier tests count towards the limit of recompilations
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images and recordings (never part of the project); tests that use it skip without it."""
    default = Path(__file__).parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("SPIKEFORMERS_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data: set SPIKEFORMERS_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def painted(tmp_path_factory) -> Path:
    """A maskfolder: a red square and a blue band on grey noise, and a corner that counts nowhere; 6 for training, 4 of
    two sizes for testing."""
    root = tmp_path_factory.mktemp("painted")
    (root / "classes.txt").write_text("ground 128 128 128\nsquare 220 20 20\nband 20 20 220\n")
    random = np.random.RandomState(0)
    for split, count in (("train", 6), ("val", 4)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(count):
            height, width = (32, 48) if split == "val" and index % 2 else (32, 32)
            mask = np.zeros((height, width), dtype=np.uint8)
            top, left = random.randint(2, 14, size=2)
            mask[24:29] = 2
            mask[top : top + 12, left : left + 12] = 1
            colours = np.array([(128, 128, 128), (220, 20, 20), (20, 20, 220)])[mask]
            pixels = np.clip(colours + random.randint(-20, 20, size=colours.shape), 0, 255).astype(np.uint8)
            mask[:3, :3] = 255
            Image.fromarray(pixels).save(root / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def draw_coco():
    """draw_coco(ROOT, split="train", pictures=[[([x, y, width, height], category), ...], ...], size=(24, 32)).

    Writes ROOT/SPLIT/0.png, ... and ROOT/annotations/instances_SPLIT.json with categories 3 "dog" and 7 "cat", and
    returns the json.  Black pictures whose objects are whole rectangles of red 100 (dog) or 200 (cat), with polygons.
    """

    def build(root: Path, *, split: str, pictures: list, size: tuple[int, int] = (24, 32)) -> dict:
        categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
        content: dict = {"categories": categories, "images": [], "annotations": []}
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        for number, objects in enumerate(pictures):
            pixels = np.zeros((*size, 3), dtype=np.uint8)
            for (x, y, width, height), category in objects:
                pixels[int(y) : int(y + height), int(x) : int(x + width), 0] = {3: 100, 7: 200}[category]
                content["annotations"].append(
                    {
                        **{"id": len(content["annotations"]) + 1, "image_id": 10 + number, "category_id": category},
                        **{"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0},
                        "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
                    }
                )
            Image.fromarray(pixels).save(root / split / f"{number}.png")
            named = {"id": 10 + number, "file_name": f"{number}.png"}
            content["images"].append(named | {"height": size[0], "width": size[1]})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return content

    return build


@pytest.fixture
def coco_folder(tmp_path, draw_coco) -> Path:
    """Six training pictures of 24 x 32 with one to three objects, and three test pictures with two, none and three."""
    random = np.random.RandomState(0)

    def objects(count: int) -> list:
        corners = [(10 * i + int(random.randint(3)), int(random.randint(12))) for i in range(count)]
        return [([x, y, 7, 11], int(random.choice([3, 7]))) for x, y in corners]

    draw_coco(tmp_path, split="train", pictures=[objects(1 + i % 3) for i in range(6)])
    draw_coco(tmp_path, split="test", pictures=[objects(2), [], objects(3)])
    return tmp_path


SEGMENTERS = {
    "fpn_lif": ("meta_spikeformer_15m_fpn_voc", {"neck_dim": 8, "fpn_dim": 8, "steps": 2}),
    "fpn": (
        "meta_spikeformer_15m_fpn_voc",
        {"neck_dim": 8, "fpn_dim": 8, "neck": "batch_norm", "neuron": "ni_lif", "steps": 1},
    ),
    "qsd_fpn": ("qsd_transformer_t_fpn_ade20k", {"neck_dim": 8, "fpn_dim": 8, "layer_scale": 1.0}),
    "spike2former": (
        "spike2former_voc",
        {
            **{"dim": 8, "queries": 5, "encoder_layers": 1, "encoder_hidden": 16, "groups": 2},
            **{"decoder_layers": 2, "decoder_heads": 2, "decoder_hidden": 16},
        },
    ),
}
SEGMENTERS["released"] = ("spike2former_voc", SEGMENTERS["spike2former"][1] | {"layout": "released"})


DETECTORS = {
    "yolo": ("meta_spikeformer_15m_yolo", {"dim": 8, "anchors": (16.0,) * 18, "score_threshold": 0.0}),
    "mask_rcnn": (
        "meta_spikeformer_15m_mask_rcnn",
        {"region_dim": 8, "fc_dim": 8, "norm": "batch_norm", "regions": 6, "score_threshold": 0.0, "limit": 4},
    ),
    "qsd_mask_rcnn": (
        "qsd_transformer_t_mask_rcnn",
        {"region_dim": 8, "fc_dim": 8, "regions": 6, "score_threshold": 0.0, "limit": 4, "layer_scale": 1.0},
    ),
}


def small_dense(name: str, sizes: dict, overrides: dict) -> nn.Module:
    """A small network with a head, in eval mode, looking trained enough that every part fires."""
    from spikeformers import create_model

    backbone = {"dims": (8, 8, 8, 16), "blocks": (1, 0, 0, 1, 0), "num_classes": 4}
    model = create_model(name, **(backbone | sizes | overrides))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 1.5)
            nn.init.uniform_(module.weight, 0.5, 2)
            multiplied = any(f"_attn.{operand}." in name for operand in "qkv")
            nn.init.normal_(module.bias, 2.5 if multiplied else 0.3, 0.5)
        elif isinstance(module, nn.Conv2d) and not module.weight.any():  # offsets and weights of sampling
            nn.init.normal_(module.weight, 0, 0.3)
    for name, parameter in model.named_parameters():
        if name.endswith(("esc_scale", "attn_scale", "mlp_scale")):
            nn.init.uniform_(parameter, 0.3, 1)
    return model.eval()


@pytest.fixture(scope="session")
def segmenter():
    """Builds a small network of each kind that segments; call with a kind and overrides."""
    return lambda kind, **overrides: small_dense(*SEGMENTERS[kind], overrides)


@pytest.fixture(scope="session")
def detector():
    """Builds a small network of each kind that detects; call with a kind and overrides."""
    return lambda kind, **overrides: small_dense(*DETECTORS[kind], overrides)

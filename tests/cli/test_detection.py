"""A detector from a person's side: train, eval, predict with a picture of boxes, refuse."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from spikeformers import cli, create_model, recipes
from spikeformers.data.detection import DetectionData
from spikeformers.data.splits import load_split
from spikeformers.deploy import Letterbox, Preprocessing, integer, load, save
from spikeformers.heads.detections import CERTAIN
from spikeformers.train import exporting
from spikeformers.train.detection_evaluate import evaluate_detection
from spikeformers.train.detection_prediction import box_predictor, file_box_predictor
from spikeformers.train.evaluate import batches_of
from spikeformers.train.recipe import ModelChoice, Optim, Recipe, from_json
from spikeformers.train.saved import coco_names, read_trained
from spikeformers.train.summary import read_summary
from spikeformers.zoo import from_pretrained

YOLO = {"heads": 2, "dim": 8, "anchors": (8.0,) * 18}


@pytest.fixture(scope="module")
def run(said_by, draw_coco, tmp_path_factory):
    """A finished run of a network that finds something, though it is not certain, and what `train` printed."""
    root = tmp_path_factory.mktemp("coco")
    objects = [[([2, 3, 7, 11], 3)], [([12, 6, 9, 9], 7)]]
    for split in ("train", "test"):
        draw_coco(root, split=split, pictures=objects)
    recipe = Recipe(
        name="finding",
        data=DetectionData(root=str(root), size=(32, 32)),
        model=ModelChoice(
            name="meta_spikeformer_15m_yolo", neuron="i_lif", dims=(8, 8, 8, 8), blocks=(1, 0, 0, 1, 0), options=YOLO
        ),
        optim=Optim(lr=3e-3, clip_grad=5.0),
        threads=1,
        batch_size=2,
        epochs=40,
    )
    folder = tmp_path_factory.mktemp("runs") / "finding"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "finding", lambda: recipe)
        few = ["testing.every=40", "testing.energy_images=1", "testing.integer_images=1"]
        code, out, err = said_by("train", "finding", "--out", folder, "--set", *few)
    assert code == 0, err
    return folder, out


@pytest.fixture
def photo(tmp_path):
    pixels = np.zeros((24, 32, 3), dtype=np.uint8)
    pixels[3:14, 2:9, 0] = 100  # the dog of the training pictures
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_train_prints_precision_beside_the_best_fixed_boxes(run):
    folder, out = run
    for part in ("mAP", "AP50, AP75", "Best fixed boxes", "Integer engine", "AP50 by class"):
        assert part in out
    assert (folder / "detections.png").is_file()


def test_eval_finds_the_precision_of_training_again(said_by, run):
    folder, out = run
    code, found, err = said_by("eval", folder)
    assert code == 0, err
    trained = next(line for line in out.splitlines() if "AP50, AP75" in line).split()[2]
    assert trained.rstrip(",") in found.replace(",", " ").split()
    assert "dog" in found


def test_predict_names_boxes_and_draws_them(said_by, run, photo, tmp_path):
    folder, _ = run
    code, out, err = said_by("predict", folder, photo, "--out", tmp_path, "--score", 0.01)
    assert code == 0, err
    assert "mJ" in out
    assert "dog  from (" in out
    drawn = np.asarray(Image.open(tmp_path / "photo_overlay.png"))
    assert drawn.shape == (240, 320, 3)  # enlarged ten times to the width of a page
    assert not np.array_equal(drawn[::10, ::10], np.asarray(Image.open(photo)))


def test_a_saved_detector_without_its_run_knows_cocos_classes(said_by, photo, tmp_path):
    create_model("meta_spikeformer_15m_yolo", dims=(8, 8, 8, 8), dim=8, steps=1).save_pretrained(tmp_path / "model")
    _, spec, classes = read_trained(str(tmp_path / "model"))
    assert (spec.size, len(classes), classes[0], classes[79]) == ((640, 640), 80, "person", "toothbrush")
    assert coco_names(2) == ("0", "1")
    code, out, err = said_by("predict", tmp_path / "model", photo, "--out", tmp_path)
    assert code == 0, err
    assert "nothing with a score of 0.3 or more" in out


def test_a_score_is_a_share(refused, photo):
    """Said before a model is looked for."""
    assert "--score must lie between 0 and 1, got 30.0" in refused("predict", "no_such_run", photo, "--score", "30")


def test_the_usual_score_is_that_of_the_report(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    assert f"least score of boxes to show, 0 to 1 (default: {CERTAIN})" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def exported(said_by, run, tmp_path_factory):
    """A copy of the run with its exported file, and what `export` printed."""
    folder = tmp_path_factory.mktemp("exported") / "finding"
    shutil.copytree(run[0], folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "REPEATS", 1)
        code, out, err = said_by("export", folder, "--to", "spk", "--license", "CC0")
    assert code == 0, err
    return folder, out


def facts_of(out: str) -> dict[str, str]:
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines()[1:])


def test_a_run_becomes_one_file_and_what_that_keeps_is_told_by_boxes(exported):
    folder, out = exported
    told, summary, file = facts_of(out), read_summary(folder), load(folder / "model.spk")
    scores = ["mAP", "AP50"]
    assert list(told) == ["Size", "Counts equal", "Images with a flip", *scores, "Latency", "Energy", "SHA-256"]
    data = from_json(summary.recipe).data
    split, model = load_split(data, "test"), from_pretrained(folder / "model")
    loader = batches_of(split, batch_size=1)
    before, after = (evaluate_detection(model, loader, num_classes=2, run=run) for run in (None, file.engine))
    for name, iou in (("mAP", None), ("AP50", 0.5)):
        pair = (
            f"{100 * found.boxes.mean(iou=iou):.2f} % {when}" for found, when in ((before, "before"), (after, "after"))
        )
        assert told[name] == f"{', '.join(pair)}, of 2 test images"
    found = file.engine.compare(model.double(), loader)
    assert told["Images with a flip"].startswith(f"{len(found.flipped)} of 2; ")
    assert (file.labels, file.colours) == (tuple(summary.classes), tuple(map(tuple, summary.colours)))
    assert file.preprocessing == data.letterbox
    card = file.card
    assert (card.map, card.ap50, card.mask_map) == (after.boxes.mean(), after.boxes.mean(iou=0.5), None)
    assert (card.accuracy, card.miou, card.images, card.license) == (None, None, 2, "CC0")


def test_predict_by_the_file_alone_finds_what_its_engine_finds(said_by, exported, photo, tmp_path):
    shutil.copy(exported[0] / "model.spk", tmp_path / "alone.spk")
    code, out, err = said_by("predict", tmp_path / "alone.spk", photo, "--out", tmp_path, "--score", 0.01)
    assert code == 0, err
    first, name, *boxes, written = out.splitlines()
    assert re.fullmatch(r"By its card \S+ mJ a picture on average \(\S+ mJ as an ANN, meta_spikeformer\)", first)
    assert (name, written) == (f"{photo}:", f"  written: {tmp_path / 'photo_overlay.png'}")
    model, spec, classes = read_trained(str(exported[0]))
    own = box_predictor(model, spec, classes=classes, source=str(exported[0]))
    file = load(tmp_path / "alone.spk")
    predictor = file_box_predictor(file, name="alone.spk")
    picture = predictor.read(photo)
    assert torch.equal(picture.input, own.read(photo).input)
    assert torch.equal(predictor.colours, own.colours)
    found = predictor.found(picture, threshold=0.01)
    assert len(boxes) == len(found.labels) > 0
    assert boxes[0].split()[1] == predictor.classes[found.labels[0]]
    with Image.open(tmp_path / "photo_overlay.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(predictor.picture(picture, found)))
    code, out, err = said_by("predict", tmp_path / "alone.spk", photo, "--out", tmp_path, "--score", 1)
    assert "nothing with a score of 1.0 or more" in out


def test_a_file_that_tells_no_names_draws_numbers_and_one_that_tells_no_letterbox_is_refused(
    refused, run, photo, tmp_path
):
    engine = integer(from_pretrained(run[0] / "model").eval(), torch.zeros(1, 3, 32, 32))
    numbers = {"channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    file = save(engine, tmp_path / "bare.spk", preprocessing=Letterbox(window=(32, 32), turning=True, **numbers))
    predictor = file_box_predictor(load(file), name="bare.spk")
    assert predictor.classes == ("0", "1")
    assert len({tuple(colour.tolist()) for colour in predictor.colours}) == 2
    assert predictor.read(photo).input.shape == (3, 32, 32)
    save(engine, file, preprocessing=Preprocessing(size=32, crop=1.0, **numbers))
    assert "does not say how to fit whole pictures" in refused("predict", file, photo)
    save(engine, file)
    assert "does not say how to prepare pictures" in refused("predict", file, photo)


def test_other_test_images_than_the_run_was_tested_on_are_noticed(refused, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"images": 3}))
    assert "was tested on 3 images, and coco has 2 now" in refused("export", folder, "--to", "spk")
    (folder / "summary.json").write_text(json.dumps(summary | {"classes": ["cat", "cow"]}))
    assert "was tested on 2 classes (cat, cow, ...)" in refused("export", folder, "--to", "spk")


def test_a_detector_goes_as_nir_but_for_what_nir_cannot_say(said_by, exported, tmp_path):
    pytest.importorskip("nir")
    code, out, err = said_by("export", exported[0], "--to", "nir", "--out", tmp_path / "nir")
    assert code == 0, err
    assert "head.neck (interpolate)" in out
    assert "Not in the file" not in out


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_detector_is_compared_in_onnxruntime(said_by, exported, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(exporting, "REPEATS", 1)
    code, out, err = said_by("export", exported[0], "--to", "onnx", "--out", tmp_path / "model.onnx")
    assert code == 0, err
    told = facts_of(out)
    assert told["In onnxruntime"].startswith("2 images: ")
    assert float(told["In onnxruntime"].split()[-1]) < 1e-4  # float layers
    assert "Not in the file" not in told


def test_a_detector_is_not_quantized_as_a_classifier(refused, run):
    folder, _ = run
    assert "this is for classifiers" in refused("quantize", str(folder))

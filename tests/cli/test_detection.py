"""A detector from a person's side: train, eval, predict with a picture of boxes, refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

from spikeformers import cli, create_model, recipes
from spikeformers.data.detection import DetectionData
from spikeformers.deploy import integer, load, save
from spikeformers.train.detection_pictures import CERTAIN
from spikeformers.train.recipe import ModelChoice, Optim, Recipe
from spikeformers.train.saved import coco_names, read_trained
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
    assert drawn.shape == (24, 32, 3)
    assert not np.array_equal(drawn, np.asarray(Image.open(photo)))


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


def test_a_file_of_a_detector_says_how_to_run_it(refused, run, photo, tmp_path):
    model = from_pretrained(run[0] / "model").eval()
    path = save(integer(model, torch.zeros(1, 3, 32, 32)), tmp_path / "detector.spk")
    assert load(path).detects
    assert "run the file by spikeformers.deploy.load and .detect in Python" in refused("predict", path, photo)


def test_a_detector_is_not_quantized_as_a_classifier(refused, run):
    folder, _ = run
    assert "this is for classifiers" in refused("quantize", str(folder))

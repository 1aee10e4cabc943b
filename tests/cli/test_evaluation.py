"""`eval`, `predict` and `report` on a finished run, a saved model, and a run that is going."""

import json
import re
import shutil
from pathlib import Path

import pytest

from spikeformers import create_model
from spikeformers.data.augment import to_pil
from spikeformers.data.images import ImageData, load_split


@pytest.fixture
def digit(tmp_path) -> Path:
    """Test image 3 as a file."""
    spec = ImageData(source="digits", size=16, in_channels=1)
    to_pil(load_split(spec, "test").picture(3)).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def test_a_terminal_gets_a_table(said_by, trained, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "│" in said_by("eval", trained[0])[1]


def test_eval_finds_the_accuracy_of_training_again(said_by, trained):
    run, _ = trained
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    assert f"{100 * accuracy:.2f} % of 24 images" in said_by("eval", run)[1]


def test_predict_gives_five_classes_and_energy(said_by, trained, digit):
    code, out, _ = said_by("predict", trained[0], digit, digit)
    first, *likely = out.splitlines()[:6]
    shares = [float(line.split()[0]) for line in likely]
    assert code == 0
    assert re.match(rf"{re.escape(str(digit))}: \S+ mJ \(\S+ mJ as an ANN, meta_spikeformer\)", first)
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.03  # five roundings
    predicted = json.loads((trained[0] / "summary.json").read_text())["predictions"][3]
    assert likely[0].split()[2] == str(predicted)
    assert len(out.splitlines()) == 12


def test_predict_reads_a_saved_model_as_its_run_does_or_says_how(said_by, trained, digit, tmp_path):
    assert said_by("predict", trained[0] / "model", digit) == said_by("predict", trained[0], digit)
    shutil.copytree(trained[0] / "model", tmp_path / "alone")
    code, out, err = said_by("predict", tmp_path / "alone", digit)
    assert code == 0, err
    assert out.startswith(
        f"{tmp_path / 'alone'}: no recipe beside it, so images are read at 224x224 as its paper does\n"
    )
    assert out.count(" %  ") == 5


def test_an_unreadable_image_is_named(said_by, refused, trained, digit):
    broken = digit.with_name("broken.png")
    broken.write_bytes(digit.read_bytes()[:60])
    code, out, err = said_by("predict", trained[0], digit, broken)
    assert (code, out) == (2, "")  # nothing of the good image either: no half answer
    assert "broken.png" in err
    assert "gone.png" in refused("predict", trained[0], digit.with_name("gone.png"))


def test_a_folder_among_the_files_is_refused_with_the_cure(refused, trained, digit):
    said = refused("predict", trained[0], digit, digit.parent)
    assert f"{digit.parent} is a folder: name the files in it, such as {digit.parent}/*.png" in said


def test_report_prints_where_it_lies(said_by, trained):
    assert said_by("report", trained[0])[1] == f"{trained[0] / 'report.html'}\n"


def test_an_unfinished_run_is_reported_but_not_tested(said_by, refused, trained, tmp_path):
    for name in ("recipe.json", "log.jsonl"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    assert "not finished" in refused("eval", tmp_path)
    assert said_by("report", tmp_path)[0] == 0


def test_a_saved_cifar_network_reads_pictures_at_32_pixels_and_an_event_network_none(said_by, refused, digit, tmp_path):
    cifar = create_model("spikformer_cifar_4_384", dim=16, depth=1, heads=2, steps=1)
    cifar.save_pretrained(tmp_path / "cifar")
    code, out, err = said_by("predict", tmp_path / "cifar", digit)
    assert code == 0, err
    assert "read at 32x32 as its paper does" in out
    create_model("spikformer_dvs_2_256", dim=16, depth=1, heads=2, steps=1).save_pretrained(tmp_path / "events")
    assert "takes clips of events, not pictures" in refused("predict", tmp_path / "events", digit)


def test_a_score_of_boxes_is_refused_where_none_are_found(said_by, refused, trained, digit, tmp_path):
    message = "--score is for networks that find boxes"
    assert message in refused("predict", trained[0], digit, "--score", "0.5")
    code, _, err = said_by("export", trained[0], "--to", "spk", "--images", "4", "--out", tmp_path / "model.spk")
    assert code == 0, err
    assert message in refused("predict", tmp_path / "model.spk", digit, "--score", "0.5")
    create_model("meta_spikeformer_15m_fpn_voc", dims=(8, 8, 8, 8), steps=1).save_pretrained(tmp_path / "pixels")
    assert message in refused("predict", tmp_path / "pixels", digit, "--score", "0.5")

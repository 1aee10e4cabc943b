"""A segmentation network from a person's side: train, resume, eval, predict with an overlay, report, and refusals."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from spikeformers import create_model, recipes
from spikeformers.data.segmentation import SegmentationData
from spikeformers.train.recipe import ModelChoice, Optim, Recipe

SMALL = ["epochs=2", "batch_size=2", "optim.rates.head=2", "testing.energy_images=2", "testing.integer_images=2"]


@pytest.fixture(scope="module")
def painting(painted):
    """The recipe `painting`, among the others."""
    recipe = Recipe(
        name="painting",
        data=SegmentationData(source="maskfolder", root=str(painted), size=(32, 32)),
        model=ModelChoice(
            name="meta_spikeformer_15m_fpn_ade20k",
            neuron="ni_lif",
            dims=(8, 8, 8, 8),
            blocks=(1, 1, 1, 1, 1),
            options={"heads": 2, "neck_dim": 8, "fpn_dim": 8},
        ),
        optim=Optim(lr=5e-3, schedule="poly"),
        threads=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.RECIPES, "painting", lambda: recipe)
        yield "painting"


@pytest.fixture(scope="module")
def run(said_by, painting, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what `train` printed."""
    folder = tmp_path_factory.mktemp("runs") / "painting"
    code, out, err = said_by("train", painting, "--out", folder, "--set", *SMALL)
    assert code == 0, err
    return folder, out


@pytest.fixture
def street(painted, tmp_path) -> Path:
    """A test picture as a file of its own."""
    shutil.copy(painted / "val" / "images" / "1.png", tmp_path / "street.png")
    return tmp_path / "street.png"


def test_train_prints_miou_and_leaves_pictures(run):
    folder, out = run
    assert re.search(r"test mIoU +\d+\.\d\d%", out)
    assert re.search(r"mIoU +\d+\.\d\d % at the last epoch \(best \d+\.\d\d %\)", out)
    assert re.search(r"IoU by class +(\w+ \d+\.\d %(, )?){3}\n", out)
    assert re.search(r"Integer engine +same class for .* of 2 test images", out)
    for name in ("report.html", "segmentation.png", "model/model.safetensors", "summary.json"):
        assert (folder / name).is_file()
    assert not (folder / "queries.png").exists()  # Semantic FPN has no queries


def test_resuming_a_finished_run_reads_it(said_by, run, painting):
    code, out, err = said_by("train", painting, "--resume", "--out", run[0])
    assert code == 0, err
    assert out.splitlines()[-3:] == run[1].splitlines()[-3:]


def test_eval_finds_the_miou_of_training_again(said_by, run):
    code, out, err = said_by("eval", run[0])
    assert code == 0, err
    summary = json.loads((run[0] / "summary.json").read_text())
    assert f"{100 * summary['miou']:.2f} % of 4 images" in out
    assert re.search(rf"ground +{100 * summary['per_class_iou']['ground']:.2f} %", out)


def test_predict_draws_an_overlay_and_prints_shares_and_energy(said_by, run, street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = said_by("predict", run[0], street)
    assert code == 0, err
    first, *shares, written = out.splitlines()
    assert re.match(rf"{re.escape(str(street))}: \S+ mJ \(\S+ mJ as an ANN, meta_spikeformer\)", first)
    assert sum(float(line.split()[0]) for line in shares) == pytest.approx(100, abs=0.02)  # of at most three roundings
    assert {line.split()[2] for line in shares} <= {"ground", "square", "band"}
    assert written.strip() == "written: street_overlay.png"
    with Image.open(tmp_path / "street_overlay.png") as drawn:
        assert drawn.height > 32  # a legend below
        assert drawn.width >= 48
    before = street.read_bytes()
    assert said_by("predict", run[0] / "model", street, "--out", tmp_path)[0] == 0
    assert street.read_bytes() == before


def test_a_saved_network_without_its_run_knows_the_classes_of_its_papers_data(said_by, street, tmp_path):
    sizes = {"dims": (8, 8, 8, 8), "blocks": (1, 1, 1, 1, 1), "heads": 2, "neck_dim": 8, "fpn_dim": 8, "steps": 1}
    for classes, known in ((21, True), (3, False)):
        model = create_model("meta_spikeformer_15m_fpn_voc", num_classes=classes, **sizes)
        model.save_pretrained(tmp_path / f"alone{classes}")
        code, out, err = said_by("predict", tmp_path / f"alone{classes}", street, "--out", tmp_path)
        assert code == 0, err
        assert ("background" in out) == known


def test_predict_never_replaces_an_input(refused, run, street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twin = street.with_name("street_overlay.png")
    shutil.copy(street, twin)
    assert "street_overlay.png would replace an input" in refused("predict", run[0], street, twin)
    (tmp_path / "other").mkdir()
    shutil.copy(street, tmp_path / "other" / "street.png")
    twin.unlink()
    assert "or another overlay" in refused("predict", run[0], street, tmp_path / "other" / "street.png")
    assert "there is none called" in refused("predict", run[0], street, "--out", tmp_path / "gone")
    assert not list(tmp_path.glob("*_overlay.png"))


def test_report_shows_classes_pictures_and_curves(said_by, run):
    assert said_by("report", run[0])[1] == f"{run[0] / 'report.html'}\n"
    page = (run[0] / "report.html").read_text()
    for part in ('id="drawn"', 'id="classes"', "mIoU, %", "square", "in per cent of the pixels of the row", "Firing"):
        assert part in page
    assert page.count('class="drawn"') == 1
    assert "Undefined" not in page


def test_what_is_for_classifiers_refuses_a_segmentation(refused, run, said_by, street):
    for command in (("quantize",), ("export", "--to", "spk")):
        assert "gives classes to pixels" in refused(*command, run[0])
    code, out, err = said_by("energy", run[0], "--images", 2)
    assert code == 0, err
    assert "head" in out


def test_a_classifier_takes_no_out(refused, trained, street):
    assert "--out is for pictures with the classes of pixels" in refused("predict", trained[0], street, "--out", ".")

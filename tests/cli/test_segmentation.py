"""A segmentation network from a person's side: train, resume, eval, predict with an overlay, report, export, refuse."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikeformers import create_model, from_pretrained, recipes
from spikeformers.data.segmentation import SegmentationData, read_picture_for
from spikeformers.data.splits import load_split
from spikeformers.deploy import Framing, Preprocessing, integer, load, save
from spikeformers.train import exporting
from spikeformers.train.evaluate import batches_of
from spikeformers.train.exportable import in_share
from spikeformers.train.prediction import file_predictor, trained_predictor
from spikeformers.train.recipe import ModelChoice, Optim, Recipe
from spikeformers.train.saved import framing_of, read_picture
from spikeformers.train.segmentation_evaluate import Windows, evaluate_segmentation, scores_of
from spikeformers.train.summary import read_summary

SMALL = ["epochs=2", "batch_size=2", "optim.rates.head=2", "testing.energy_images=2", "testing.integer_images=2"]
FRAME = Framing(short_side=32, channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
WINDOWS = Windows((16, 24), (16, 24))
SLIDING = {"segmentation": {"test": "slide", "crop": WINDOWS.crop, "stride": WINDOWS.stride}}


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
    assert "street.png is a file: choose another name" in refused("predict", run[0], street, "--out", street)
    assert not list(tmp_path.glob("*_overlay.png"))


def test_the_folder_of_overlays_is_made_once_all_pictures_are_read(said_by, refused, run, street, tmp_path):
    folder = tmp_path / "new" / "overlays"
    assert "gone.png" in refused("predict", run[0], street, tmp_path / "gone.png", "--out", folder)
    assert not (tmp_path / "new").exists()
    code, _, err = said_by("predict", run[0], street, "--out", folder)
    assert code == 0, err
    assert [each.name for each in folder.iterdir()] == ["street_overlay.png"]


def test_report_shows_classes_pictures_and_curves(said_by, run):
    assert said_by("report", run[0])[1] == f"{run[0] / 'report.html'}\n"
    page = (run[0] / "report.html").read_text()
    for part in ('id="drawn"', 'id="classes"', "mIoU, %", "square", "in per cent of the pixels of the row", "Firing"):
        assert part in page
    assert page.count('class="drawn"') == 1
    assert "Undefined" not in page


def test_what_is_for_classifiers_refuses_a_segmentation(refused, run, said_by, street):
    assert "this is for classifiers of pictures" in refused("quantize", run[0])
    code, out, err = said_by("energy", run[0], "--images", 2)
    assert code == 0, err
    assert "head" in out


def facts_of(out: str) -> dict[str, str]:
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines() if line.startswith("  "))


def copy_of(run: Path, folder: Path, **groups: dict) -> Path:
    """A copy of `run` in `folder`, as if it had been tested with other settings, by group as in recipe.json."""
    folder = shutil.copytree(run, folder / "run")
    for name, place in (("recipe.json", None), ("summary.json", "recipe")):
        stored = json.loads((folder / name).read_text())
        recipe = stored[place] if place else stored
        for group, settings in groups.items():
            recipe[group] |= settings
        (folder / name).write_text(json.dumps(stored))
    return folder


@pytest.fixture
def copied(run, tmp_path, monkeypatch):
    """Call with groups of settings to change."""
    monkeypatch.setattr(exporting, "REPEATS", 1)
    return lambda **groups: copy_of(run[0], tmp_path, **groups)


@pytest.fixture(scope="module", params=["whole", "windows"])
def exported(request, said_by, run, tmp_path_factory) -> tuple[Path, str, Windows | None]:
    """A run with its model.spk, what the command printed, and the windows it tests with."""
    groups, windows = (SLIDING, WINDOWS) if request.param == "windows" else ({}, None)
    folder = copy_of(run[0], tmp_path_factory.mktemp("exported"), **groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "REPEATS", 1)
        code, out, err = said_by("export", folder, "--to", "spk", "--images", 2, "--license", "CC0")
    assert code == 0, err
    return folder, out, windows


def test_a_run_becomes_one_file_and_what_that_keeps_is_told_by_pixels(exported, painted):
    folder, out, windows = exported
    told, summary, file = facts_of(out), read_summary(folder), load(folder / "model.spk")
    flip = "Windows with a flip" if windows else "Images with a flip"
    assert list(told) == ["Size", "Counts equal", flip, "mIoU", "Pixel accuracy", "Latency", "Energy", "SHA-256"]
    split = load_split(SegmentationData(source="maskfolder", root=str(painted), size=(32, 32)), "test")
    model, loader = from_pretrained(folder / "model"), batches_of(split, batch_size=1, images=2)
    before, after = (evaluate_segmentation(model, loader, windows=windows, run=run) for run in (None, file.engine))
    for name, score in (("mIoU", "miou"), ("Pixel accuracy", "pixel_accuracy")):
        both = (f"{100 * getattr(found, score):.2f} % {when}" for found, when in ((before, "before"), (after, "after")))
        assert told[name] == f"{', '.join(both)}, of 2 test images"
    given = [images for images, _ in loader]
    if windows:
        given = [images[..., rows, columns] for images in given for rows, columns in windows.over(images.shape[-2:])]
    found = file.engine.compare(model.double(), given)
    same = f"same class for {in_share(found.equal)} of the pixels"
    assert told[flip] == f"{len(found.flipped)} of {len(given)}; {same}"
    assert (file.labels, file.colours) == (tuple(summary.classes), tuple(map(tuple, summary.colours)))
    assert file.preprocessing == framing_of(split.spec, windows=windows)
    card = file.card
    assert (card.miou, card.accuracy, card.images, card.license) == (after.miou, after.pixel_accuracy, 2, "CC0")


def test_predict_by_the_file_alone_paints_what_its_engine_says(said_by, exported, street, tmp_path):
    folder, _, windows = exported
    shutil.copy(folder / "model.spk", tmp_path / "alone.spk")
    code, out, err = said_by("predict", tmp_path / "alone.spk", street, "--out", tmp_path)
    assert code == 0, err
    first, name, *shares, written = out.splitlines()
    assert re.fullmatch(r"By its card \S+ mJ a picture on average \(\S+ mJ as an ANN, meta_spikeformer\)", first)
    assert (name, written) == (f"{street}:", f"  written: {tmp_path / 'street_overlay.png'}")
    predictor, engine = trained_predictor(str(folder)), load(tmp_path / "alone.spk").engine
    picture = predictor.read(street)
    seen = {"size": tuple(picture.pixels.shape[1:]), "windows": windows}
    labels = scores_of(predictor.model, picture.input[None], **seen, run=engine)[0].argmax(0)
    assert {line.split()[2] for line in shares} == {predictor.classes[each] for each in labels.unique()}
    with Image.open(tmp_path / "street_overlay.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(predictor.picture(picture, labels)))


def test_a_file_frames_pictures_as_its_run_does(street):
    for sizes in ({}, {"short_side": 24, "max_side": 30}, {"test_size": (20, 28), "in_channels": 1}):
        for interpolation in ("bilinear", "bicubic"):
            spec = SegmentationData(source="camvid", interpolation=interpolation, **sizes)
            framing = framing_of(spec, windows=None)
            assert torch.equal(read_picture(street, framing), read_picture_for(spec, street)[0])


def test_a_file_that_tells_no_names_paints_numbers_and_one_that_tells_no_frame_is_refused(
    segmenter, refused, street, tmp_path
):
    file = save(integer(segmenter("fpn"), torch.randn(1, 3, 32, 32)), tmp_path / "bare.spk", preprocessing=FRAME)
    predictor = file_predictor(load(file), name="bare.spk")
    assert predictor.classes == ("0", "1", "2", "3")
    assert len({tuple(colour.tolist()) for colour in predictor.colours}) == 4
    square = Preprocessing(size=32, crop=1.0, channels=3, mean=FRAME.mean, std=FRAME.std)
    save(load(file).engine, file, preprocessing=square)
    assert "does not say how to frame whole pictures" in refused("predict", file, street)


def test_pictures_of_several_sizes_have_no_graph_of_one_size(refused, copied):
    folder = copied()
    before = sorted(folder.rglob("*"))
    for words, what in (("--to onnx", "an ONNX file"), ("--to spk --backend openvino", "--backend openvino")):
        told = refused("export", folder, *words.split())
        assert f"{what} takes images of one size, and the test images of" in told
        assert "give 2, from 32 x 32 to 32 x 48: train with data.test_size" in told
    assert sorted(folder.rglob("*")) == before


def test_other_classes_than_the_run_was_tested_on_are_noticed(refused, copied):
    folder = copied(data={"classes": ["ground", "square", "line"]})
    assert "was tested on 3 classes (ground, square, band, ...), and maskfolder has 3 now" in refused(
        "export", folder, "--to", "spk"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_onnx_is_written_and_compared_by_pixels(said_by, copied):
    pytest.importorskip("onnxruntime")
    folder = copied(data={"test_size": (32, 32)})
    code, out, err = said_by("export", folder, "--to", "onnx", "--images", 2)
    assert code == 0, err
    told = facts_of(out)["In onnxruntime"]
    assert re.fullmatch(r"2 images: same class for .+ of the pixels as in the engine, logits within \S+", told)
    assert (folder / "model.onnx").is_file()


def test_parts_of_it_are_written_as_nir(said_by, copied):
    pytest.importorskip("nir")
    folder = copied()
    code, out, err = said_by("export", folder, "--to", "nir")
    assert code == 0, err
    assert "\nleft out: head.neck (interpolate)" in out
    assert "dropout" not in out  # the identity here
    assert list((folder / "nir").glob("*_head.*.nir"))


def test_a_classifier_takes_no_out(refused, trained, street):
    assert "--out is for pictures of where something is" in refused("predict", trained[0], street, "--out", ".")

"""`export` and `predict` by its file: what is written, what is said of it, and what is refused."""

import dataclasses
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from spikeformers import create_model, from_pretrained
from spikeformers.data.augment import to_pil
from spikeformers.data.images import load_split, read_image
from spikeformers.deploy import load
from spikeformers.quantize import convert, prepare
from spikeformers.train import exportable, exporting
from spikeformers.train.recipe import from_json
from spikeformers.train.saved import preprocessing_of, read_picture
from spikeformers.train.summary import read_summary

FACTS = ["Size", "Counts equal", "Images with a flip", "Accuracy", "Latency", "Energy", "SHA-256"]


@pytest.fixture(scope="module")
def exported(said_by, trained, tmp_path_factory):
    """The tiny run with its model.spk, and what the command printed."""
    run = shutil.copytree(trained[0], tmp_path_factory.mktemp("exported") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "REPEATS", 1)
        code, out, err = said_by("export", run, "--to", "spk", "--images", 20, "--license", "CC0")
    assert code == 0, err
    return run, out


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the tiny run, to write into."""
    return shutil.copytree(trained[0], tmp_path / "run")


@pytest.fixture
def digit(trained, tmp_path):
    """Test image 3 as a file."""
    spec = from_json(read_summary(trained[0]).recipe).data
    to_pil(load_split(spec, "test").picture(3)).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def facts_of(out: str) -> dict[str, str]:
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines() if line.startswith("  "))


def test_a_run_becomes_one_file_and_what_that_keeps_is_told(exported):
    run, out = exported
    assert out.startswith(f"{run}: written {run / 'model.spk'}\n")
    told, summary = facts_of(out), read_summary(run)
    assert list(told) == FACTS
    model, loaded = from_pretrained(run / "model"), load(run / "model.spk")
    split = load_split(from_json(summary.recipe).data, "test")
    chosen = exporting.drawn(len(split), 20)
    images = torch.stack([split[index][0] for index in chosen])
    found = loaded.engine.compare(model.double(), images)
    assert told["Images with a flip"] == f"{len(found.flipped)} of 20; same prediction for {found.same}"
    after = float((loaded(images).argmax(1) == torch.as_tensor(split.labels)[chosen]).double().mean())
    before = float((torch.tensor(summary.predictions)[chosen] == torch.as_tensor(split.labels)[chosen]).double().mean())
    assert told["Accuracy"] == f"{100 * before:.2f} % before, {100 * after:.2f} % after, of 20 test images"
    assert re.fullmatch(r"\S+ ms before, \S+ ms after \(median of 1, 1 thread, torch\)", told["Latency"])
    assert loaded.labels == tuple(summary.classes)
    assert loaded.preprocessing == preprocessing_of(split.spec)
    card = loaded.card
    assert (card.accuracy, card.images, card.license, card.data) == (after, 20, "CC0", "digits")
    assert (card.energy_mj, card.versions) == (summary.energy_mj, summary.versions)
    assert str(run) not in repr(card)


def test_packed_weights_are_taken_as_they_are_without_a_flip(said_by, run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "REPEATS", 1)
    convert(prepare(from_pretrained(run / "model"), bits=4)).save_pretrained(run / "packed")
    code, out, err = said_by("export", run, "--to", "spk", "--out", tmp_path / "low.spk", "--images", 8)
    assert code == 0, err
    told = facts_of(out)
    assert told["Counts equal"] == "all of the float64 network's"
    assert told["Images with a flip"] == "0 of 8; same prediction for 8"
    weights = [each for each in load(tmp_path / "low.spk").engine.report().layers if each.spike_fed]
    assert {each.bits for each in weights} == {4}


def test_an_exact_network_is_timed_as_it_is():
    sizes = {"dims": (8, 16, 24, 32), "blocks": (0, 0, 0, 1, 0), "layer_scale": 0.0}
    model = prepare(create_model("qsd_transformer_t", **sizes), bits=4, exact=True).eval()
    subject = SimpleNamespace(model=model, image=lambda: torch.zeros(1, 3, 32, 32))
    assert "ms before" in exporting.latency_fact(subject, model, backend="torch")[1]


def test_a_file_runs_in_openvino_where_asked(exported):
    pytest.importorskip("openvino")
    torch_file, other = load(exported[0] / "model.spk"), load(exported[0] / "model.spk", backend="openvino")
    picture = torch.rand(2, 1, torch_file.preprocessing.size, torch_file.preprocessing.size)
    torch.testing.assert_close(other(picture), torch_file(picture), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="backend must be one of torch, openvino, got 'tensorrt'"):
        load(exported[0] / "model.spk", backend="tensorrt")


def test_inside_a_run_the_file_to_write_must_be_named(exported, refused):
    assert "lies in a run, whose own exported file this would replace" in refused(
        "export", exported[0] / "model", "--to", "spk"
    )


def test_predict_takes_the_file_alone_and_says_the_energy_of_its_card(said_by, refused, exported, digit):
    shutil.copy(exported[0] / "model.spk", digit.with_name("alone.spk"))
    code, out, err = said_by("predict", digit.with_name("alone.spk"), digit, digit)
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 13
    assert re.fullmatch(r"By its card \S+ mJ a picture on average \(\S+ mJ as an ANN, \S+\)", lines[0])
    assert lines[1] == f"{digit}:"
    assert lines[1:7] == lines[7:]
    model = load(digit.with_name("alone.spk"))
    likely = model(read_picture(digit, model.preprocessing)[None])[0].argmax()
    assert lines[2].split()[2] == model.labels[likely]
    assert "gone.png" in refused("predict", digit.with_name("alone.spk"), digit, digit.with_name("gone.png"))
    assert "--out is for pictures" in refused("predict", digit.with_name("alone.spk"), digit, "--out", ".")


def test_a_file_reads_pictures_as_its_run_does(trained, digit):
    spec = from_json(read_summary(trained[0]).recipe).data
    for changed in (spec, dataclasses.replace(spec, size=12, eval_crop=0.8, in_channels=3, interpolation="bilinear")):
        assert torch.equal(read_picture(digit, preprocessing_of(changed)), read_image(digit, spec=changed))


def test_predict_refuses_other_files_and_damaged_ones(refused, exported, digit):
    assert f"{digit} is not a spikeformers artifact" in refused("predict", digit, digit)
    file = digit.with_name("broken.spk")
    file.write_bytes((exported[0] / "model.spk").read_bytes()[:-1])
    assert f"{file} is damaged" in refused("predict", file, digit)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--to spk --out model.onnx", "--out must end in .spk for --to spk, got model.onnx"),
        ("--to spk --images 0", "--images must be at least 1, got 0"),
        ("--to tflite", "spk"),
        ("--to nir --license CC0", "--license goes with --to spk"),
        ("--to nir --backend openvino", "--backend goes with --to spk"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(refused, run, words, told):
    before = sorted(run.rglob("*"))
    assert told in refused("export", run, *words.split())
    assert sorted(run.rglob("*")) == before


def test_what_is_no_finished_spiking_run_is_refused_with_the_reason(refused, run, tmp_path):
    assert "nowhere is not a run" in refused("export", "nowhere", "--to", "spk")
    shutil.copytree(run / "model", tmp_path / "alone")
    assert "is a saved model without its run, whose test images" in refused("export", tmp_path / "alone", "--to", "spk")
    create_model("spikformer_dvs_2_256", dim=16, depth=1, heads=2, steps=1).save_pretrained(tmp_path / "events")
    assert "without its run, whose test clips" in refused("export", tmp_path / "events", "--to", "spk")
    ann = {"neuron": "gelu", "attention": "softmax", "dims": (8, 8, 8, 8), "heads": 2}
    create_model("meta_spikeformer_15m", **ann).save_pretrained(run / "model")
    assert "is an ANN: nothing in it spikes" in refused("export", run, "--to", "spk")
    (run / "summary.json").unlink()
    assert "is not finished" in refused("export", run, "--to", "spk")


@pytest.mark.parametrize(
    ("equal", "told"), [(1.0, "all"), (1 - 1.2e-7, "all but 1.2e-5 %"), (1 - 1e-3, "99.900 %"), (0.5, "50.000 %")]
)
def test_less_than_all_is_never_rounded_to_all(equal, told):
    assert exportable.in_share(equal) == told


def test_runs_of_another_kind_are_refused_with_what_to_do_instead(refused, run, monkeypatch):
    monkeypatch.setattr(exportable, "EXPORTABLES", {})
    assert "classes neither to images nor to pixels" in refused("export", run, "--to", "spk")


def test_test_images_that_went_missing_are_noticed(refused, run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"predictions": summary["predictions"][1:]}))
    assert "was tested on 23 images, and digits has 24 now" in refused("export", run, "--to", "spk")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["integer", "qdq"])
@pytest.mark.usefixtures("unchecked")
def test_onnx_is_written_and_compared(said_by, run, monkeypatch, form):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(exporting, "REPEATS", 1)
    code, out, err = said_by("export", run, "--to", "onnx", "--form", form, "--images", 8)
    assert code == 0, err
    told = facts_of(out)
    assert told["In onnxruntime"].startswith("8 images: same prediction for 8 as in the engine, logits within ")
    assert told["Latency"].endswith("(median of 1, 1 thread, onnxruntime)")
    assert (run / "model.onnx").is_file()


def test_nir_is_written_and_told(said_by, run, tmp_path):
    pytest.importorskip("nir")
    code, out, err = said_by("export", run, "--to", "nir", "--out", tmp_path / "parts")
    assert code == 0, err
    assert "\nleft out: stage3.block0.attn" in out
    told = facts_of(out[out.index("written ") :])
    assert re.fullmatch(r"\d+, with [\d.]+ % of the multiply-accumulates", told["Parts"])
    assert list((tmp_path / "parts").glob("*.nir"))
    before = sorted(each.name for each in (tmp_path / "parts").iterdir())
    code, _, err = said_by("export", run, "--to", "nir", "--out", tmp_path / "parts")
    assert code == 2
    assert "is not empty" in err
    assert sorted(each.name for each in (tmp_path / "parts").iterdir()) == before


def test_an_extra_that_is_missing_is_named(refused, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    assert 'pip install "spikeformers[nir]"' in refused("export", run, "--to", "nir")

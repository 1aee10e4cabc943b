"""A network of event clips from a person's side: train, eval, predict, and a stream with its early exit."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from spikeformers.cli.clips import ends_of
from spikeformers.data.event_clips import EventData, clip_of
from spikeformers.data.events import Events
from spikeformers.data.splits import load_split
from spikeformers.deploy import integer, load
from spikeformers.zoo import from_pretrained

FEW = ["data.train_limit=20", "data.test_limit=12", "data.steps=3", "epochs=1", "batch_size=10", "threads=1"]
FEW += ["testing.energy_images=4", "testing.integer_images=4", "model.options.dim=16", "model.options.heads=2"]


@pytest.fixture(scope="module")
def run(said_by, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    code, _, err = said_by("train", "digits_dvs", "--out", folder, "--set", *FEW)
    assert code == 0, err
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    events = load_split(EventData(test_limit=1), "test").recording(0)
    path = tmp_path_factory.mktemp("recordings") / "seven.npz"
    np.savez(path, x=events.x, y=events.y, p=events.p, t=events.t)
    return path


def test_predict_tells_the_classes_of_a_recording_and_its_energy(said_by, run, recording):
    code, out, err = said_by("predict", run, recording)
    assert code == 0, err
    assert re.search(r"seven\.npz: [\d,]+ events in 0\.\d+ s, 3 steps", out)
    assert "mJ (" in out
    assert out.count(" %  ") == 5


def likeliest(out: str) -> list[str]:
    return re.findall(r"[\d.]+ %  \w+", out)


def of_folder(run, place, *, sensor):
    """The run as if it had been trained on an eventfolder, whose files told `sensor`."""
    shutil.copytree(run, place)
    for name in ("recipe.json", "summary.json"):
        stored = json.loads((place / name).read_text())
        recipe = stored.get("recipe", stored)
        recipe["data"] |= {"source": "eventfolder", "root": "gone", "sensor": []}
        if name == "summary.json":
            stored["sensor"] = sensor
        (place / name).write_text(json.dumps(stored))
    return place


def test_a_recording_that_does_not_reach_the_corner_is_seen_on_the_sensor_of_the_training(said_by, run, tmp_path):
    assert json.loads((run / "summary.json").read_text())["sensor"] == [32, 32]
    events = load_split(EventData(test_limit=1), "test").recording(0)
    events = events[(events.x < 20) & (events.y < 13)]
    np.savez(tmp_path / "part.npz", x=events.x, y=events.y, p=events.p, t=events.t)
    clip = clip_of(events, spec=EventData(steps=3))[:, None]
    with torch.no_grad():
        share, index = from_pretrained(run / "model")(clip)[0].softmax(-1).topk(5)
    expected = [f"{100 * each:.2f} %  {label}" for each, label in zip(share.tolist(), index.tolist(), strict=True)]
    for each in (run, of_folder(run, tmp_path / "other", sensor=[32, 32])):
        code, out, err = said_by("predict", each, tmp_path / "part.npz")
        assert code == 0, err
        assert likeliest(out) == expected


def test_a_recording_of_another_sensor_is_refused(refused, run, recording, tmp_path):
    (tmp_path / "dvs128.aedat").write_bytes(b"#!AER-DAT2.0\r\n" + bytes(8))
    for each in (run, of_folder(run, tmp_path / "other", sensor=[32, 32])):
        complaint = refused("predict", each, recording, tmp_path / "dvs128.aedat")
        assert "dvs128.aedat: its sensor has 128 x 128 pixels" in complaint
        assert "wanted are recordings of 32 x 32" in complaint
    several = of_folder(run, tmp_path / "several", sensor=None)
    assert "it tells no sensor: train with data.sensor" in refused("predict", several, recording)


def test_a_recording_that_needs_a_missing_package_is_refused_with_the_cure(refused, run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "1.h5").write_bytes(b"1")
    assert 'this file needs h5py: pip install "spikeformers[events]"' in refused("predict", run, tmp_path / "1.h5")


def test_a_stream_says_after_each_step_what_it_is_and_ends_where_the_whole_clip_does(said_by, run, recording):
    _, whole, _ = said_by("predict", run, recording)
    code, out, err = said_by("predict", run, recording, "--stream")
    assert code == 0, err
    steps = re.findall(r"step +(\d), +([\d.]+) s +([\d.]+ %  \w+)  \([\d.]+ ms\)", out)
    assert [int(number) for number, _, _ in steps] == [1, 2, 3]
    times = [float(time) for _, time, _ in steps]
    assert times == sorted(times)
    assert steps[-1][2] in whole
    assert "decided after 3 of 3 steps" in out
    spent = [re.search(r"([\d.]+ mJ)", text)[1] for text in (whole, out)]
    assert spent[0] == spent[1]


def test_a_stream_that_is_never_as_sure_as_asked_says_so(said_by, run, recording):
    code, out, err = said_by("predict", run, recording, "--stream", "--confidence", 1)
    assert code == 0, err
    assert "never reached 100 %, not even after 3 of 3 steps, " in out
    assert "decided" not in out


@pytest.mark.parametrize(
    ("choice", "ends"),
    [
        ({"split": "count"}, [0.002, 0.005, 0.009]),  # 3, 3 and 4 of ten events
        ({"split": "time"}, [0.003, 0.006, 0.009]),
        ({"representation": "voxel_grid"}, [0.0045, 0.009, 0.009]),  # a point reaches to the next
    ],
)
def test_a_step_ends_when_the_last_event_that_it_shows_has_come(choice, ends):
    t = np.arange(10) * 1000
    zeros = np.zeros(10, dtype=np.int16)
    events = Events(zeros, zeros, zeros, t, (2, 2))
    assert ends_of(events, EventData(steps=3, **choice)) == pytest.approx(ends)


def test_a_stream_ends_as_soon_as_it_is_sure_and_costs_less(said_by, run, recording):
    _, whole, _ = said_by("predict", run, recording)
    code, out, err = said_by("predict", run, recording, "--stream", "--confidence", 0.01)
    assert code == 0, err
    assert "decided after 1 of 3 steps" in out
    spent = [float(re.search(r"([\d.]+) mJ", text)[1]) for text in (whole, out)]
    assert spent[1] < spent[0]


def test_eval_energy_audit_and_report_take_runs_of_clips(said_by, run):
    for command in (("eval", run), ("energy", run, "--images", 4), ("audit", run, "--images", 2), ("report", run)):
        code, out, err = said_by(*command)
        assert code == 0, err
        assert out


@pytest.mark.parametrize("kind", ["spk", "onnx", "nir"])
def test_export_counts_clips_and_keeps_their_classes(said_by, run, tmp_path, kind):
    target = tmp_path / ("nir" if kind == "nir" else f"model.{kind}")
    code, out, err = said_by("export", run, "--to", kind, "--out", target, "--images", 10)
    assert code == 0, err
    if kind == "nir":
        assert "% of the multiply-accumulates" in out
        return
    assert "of 10; same prediction for" in out
    assert "of 10 test clips" in out
    assert "mJ a clip" in out
    assert kind == "spk" or "10 clips: same prediction for 10 as in the engine" in out
    if kind == "spk":
        clip = load_split(EventData(steps=3, test_limit=1), "test")[0][0][:, None]
        file = load(target)
        assert file.labels == tuple("0123456789")
        assert torch.equal(file(clip), integer(from_pretrained(run / "model"), clip)(clip))


def test_a_file_of_clips_is_run_from_python_and_export_says_so(refused, said_by, run, recording, tmp_path):
    _, out, _ = said_by("export", run, "--to", "spk", "--out", tmp_path / "model.spk", "--images", 4)
    assert "in Python, spikeformers.deploy.load(FILE)(clips) with clips [T, B, C, H, W]; `predict` takes the run" in out
    assert "it takes clips" in refused("predict", tmp_path / "model.spk", recording)


def test_what_has_no_steps_is_not_streamed(refused, run, recording, tmp_path):
    assert "--confidence ends a stream early: add --stream" in refused("predict", run, recording, "--confidence", 0.9)
    assert "--confidence must lie above 0" in refused("predict", run, recording, "--stream", "--confidence", 1.5)
    (tmp_path / "model.spk").write_bytes(b"")
    assert "--stream is for runs on recordings" in refused("predict", tmp_path / "model.spk", recording, "--stream")
    assert "--score" in refused("predict", run, recording, "--score", 0.5)
    assert "--out" in refused("predict", run, recording, "--out", tmp_path)


def test_a_file_that_is_no_recording_is_refused_before_anything_is_said(refused, run, recording, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    said = refused("predict", run, recording, tmp_path / "photo.png")
    assert f"photo.png is no recording: {run} looks at recordings of events, files that end in .bin, " in said
    assert "rename" not in said

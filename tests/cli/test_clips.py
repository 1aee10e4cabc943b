"""A network of event clips from a person's side: train, eval, predict, and a stream with its early exit."""

import re

import numpy as np
import pytest
import torch

from spikeformers.data.event_clips import EventData
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
    assert kind == "spk" or "10 clips: same prediction for 10 as in the engine" in out
    if kind == "spk":
        clip = load_split(EventData(steps=3, test_limit=1), "test")[0][0][:, None]
        file = load(target)
        assert file.labels == tuple("0123456789")
        assert torch.equal(file(clip), integer(from_pretrained(run / "model"), clip)(clip))


def test_a_file_of_clips_is_run_from_python(refused, said_by, run, recording, tmp_path):
    said_by("export", run, "--to", "spk", "--out", tmp_path / "model.spk", "--images", 4)
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
    assert "photo.png" in refused("predict", run, recording, tmp_path / "photo.png")

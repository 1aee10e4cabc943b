"""`train` from a person's side: what it prints, what it writes, and how it is interrupted and resumed."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import spikeformers.train.loop

LABELS = ("Test accuracy", "Firing rate", "Spikes per image", "Energy per image", "as an ANN", "Parameters")


def test_train_prints_the_results_in_aligned_lines(trained):
    run, out = trained
    lines = out[out.index("digits: ") :].splitlines()
    assert all(any(label in line for line in lines) for label in LABELS)
    assert "convention meta_spikeformer" in out
    assert re.search(r"Integer engine +same prediction for (all )?\d+", out)
    assert lines[-1].split() == ["Report", str(run / "report.html")]
    columns = {re.match(r" +\S.*?  +", line).end() for line in lines[1:]}
    assert len(columns) == 1
    assert "\x1b" not in out


def test_train_leaves_a_whole_run(trained):
    run, _ = trained
    for name in ("recipe.json", "log.jsonl", "summary.json", "report.html", "model/config.json"):
        assert (run / name).is_file()
    assert "could not be read" not in (run / "report.html").read_text()


def test_a_run_is_never_overwritten(refused, tiny, trained):
    before = (trained[0] / "summary.json").read_bytes()
    assert "--resume" in refused("train", "digits", "--out", trained[0], "--set", *tiny)
    assert (trained[0] / "summary.json").read_bytes() == before


def test_resuming_a_finished_run_reads_it(said_by, tiny, trained):
    code, out, _ = said_by("train", "digits", "--resume", "--out", trained[0], "--set", *tiny)
    assert code == 0
    assert out == trained[1][trained[1].index("digits: ") :]


def test_seeds_give_mean_and_deviation(said_by, refused, tiny, tmp_path):
    code, out, err = said_by("train", "digits", "--seeds", "0,1", "--out", tmp_path / "both", "--set", *tiny)
    assert code == 0, err
    assert re.search(r"mean ± sd of seeds 0, 1\n  Test accuracy +[\d.]+ ± [\d.e-]+ %", out)
    assert (tmp_path / "both" / "seed-1" / "report.html").is_file()
    assert "--seeds" in refused("train", "digits", "--resume", "--out", tmp_path / "both")
    assert said_by("train", "digits", "--resume", "--seeds", "0,1", "--out", tmp_path / "both")[0] == 0


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten pictures in two classes, one of them cut off."""
    for index in range(10):
        path = tmp_path / "photos" / ("dark", "light")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20, 24), 20 + 60 * (index % 2)).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:200])
    return tmp_path / "photos"


def test_training_on_a_folder_names_the_broken_image_or_skips_it(said_by, refused, tiny, folder, tmp_path):
    command = ["train", "digits", "--out", tmp_path / "run", "--set", *tiny, "data.train_limit=0", "data.test_limit=0"]
    command += ["data.source=imagefolder", f"data.root={folder}", "data.in_channels=3", "batch_size=2"]
    assert f"{folder}/light/9.png" in refused(*command)
    assert not (tmp_path / "run").exists()
    code, out, err = said_by(*command, "data.skip_unreadable=true")
    assert code == 0, err
    assert "images skipped because they cannot be read or used: 1; first: " in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["classes"] == ["dark", "light"]


def test_weights_of_other_widths_are_refused(refused, tiny, trained, tmp_path):
    command = ["train", "digits", "--out", tmp_path / "run", "--set", *tiny, "model.dims=8,8,8,16"]
    assert "8, 8, 8, 8" in refused(*command, f"init.backbone={trained[0]}")
    assert not (tmp_path / "run").exists()


def test_interrupting_tells_how_to_resume(said_by, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("stopped and saved")

    monkeypatch.setattr(spikeformers.train.loop, "train", interrupted)
    run = tmp_path / "my run"
    run.mkdir()
    (run / "recipe.json").touch()
    code, _, err = said_by("train", "digits", "--out", run, "--set", "epochs=2")
    assert code == 130
    assert f"stopped and saved; resume with: spikeformers train digits --resume --out '{run}' --set epochs=2" in err


def test_interrupted_before_anything_is_written_there_is_nothing_to_resume(said_by, monkeypatch, tmp_path):
    def interrupted(*_, run: Path, **__):
        assert run.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(spikeformers.train.loop, "train", interrupted)
    monkeypatch.chdir(tmp_path)
    code, _, err = said_by("train", "digits")
    assert (code, err) == (130, "\nspikeformers: interrupted\n")
    assert not any(tmp_path.iterdir())

"""The command line as a whole: help, exit codes, and mistakes told in one line."""

import contextlib
import errno
import io
import subprocess
import sys

import pytest

import spikeformers.train.loop
from spikeformers import cli


@pytest.mark.parametrize("words", ["list", "train", "eval", "predict", "energy", "report", "weights import"])
def test_help_of_every_command_has_an_example(words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as leaving:
        cli.main([*words.split(), "--help"])
    assert leaving.value.code == 0
    assert f"\n  spikeformers {words}" in out.getvalue().split("examples:")[1]


def test_alone_it_prints_help(said_by):
    code, out, _ = said_by()
    assert code == 0
    assert all(f"\n    {name} " in out for name in (*cli.COMMANDS, "weights"))
    assert "spikeformers weights import" in said_by("weights")[1]


def test_help_needs_no_torch():
    code = "import sys; from spikeformers import cli; cli.main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("nothing", "invalid choice: 'nothing'"),
        ("train", "required: recipe"),
        ("train digit", "digits"),
        ("train digits --set epoch=3", "epochs"),
        ("train digits --set optim.learning_rate=3", "optim."),
        ("train digits --set epochs=many", "epochs must be of type int, got 'many'"),
        ("train digits --set epochs=0", "epochs must be at least 1"),
        ("train --set epochs=3 digits", "required: recipe; what follows --set belongs to it"),
        ("train digits --set epochs", "--set takes a.b=c, got 'epochs'"),
        ("train digits --set model.name=meta_spikeformer_16m", "meta_spikeformer_15m"),
        ("train digits --set model.neuron=i_life", "i_lif"),
        ("train digits --set data.source=imagefolder data.root=nowhere", "nowhere"),
        ("pretrain digits_mae --set data.source=digits_dvs", "another kind than its digits: choose one of digits, "),
        ("train digits_dvs --set data.source=digits", "or a recipe for digits (`spikeformers list`)"),
        ("train digits --set data.source=digts", "unknown data.source 'digts'; closest: digits"),
        ("train digits --set data.source=imagefolder", "data.root"),
        ("train digits --seeds 0,x", "0,1,2"),
        ("train digits --seeds 1,1", "twice"),
        ("train digits --threads two", "--threads must be int, got two"),
        ("train digits --resume --out nowhere", "nothing to resume"),
        ("train digits --set init.backbone=nowhere.pth", "nowhere.pth"),
        ("eval nowhere", "nowhere is not a run"),
        ("predict nowhere x.png", "no such folder: nowhere"),
        ("predict meta_spikeformer_15m x.png", "without weights"),
        ("energy meta_spikeformer_16m", "meta_spikeformer_15m"),
        ("energy runs/nowhere", "no such folder: runs/nowhere"),
        ("energy meta_spikeformer_15m --images -1", "--images must be at least 1, got -1"),
        ("energy meta_spikeformer_15m --images 0", "--images must be at least 1, got 0"),
        ("report nowhere", "nowhere"),
        ("weights import nowhere.pth --model meta_spikeformer_15m --out out", "nowhere.pth"),
        ("weights import nowhere.pth --out out", "required: model"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(refused, words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert told in refused(*words.split())
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_first_does_what_is_no_training(said_by, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert said_by("eval", "nowhere") == (0, "", "RANK=1: the first process does `eval`\n")
    monkeypatch.setenv("RANK", "0")
    assert "nowhere is not a run" in said_by("eval", "nowhere")[2]


def test_a_full_disk_is_told_in_one_line(refused, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/model.safetensors")

    monkeypatch.setattr(spikeformers.train.loop, "train", full)
    assert refused("train", "digits", "--out", tmp_path / "x").endswith("model.safetensors: No space left on device\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(spikeformers.train.loop, "train", broken)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["train", "digits", "--out", str(tmp_path / "x")])

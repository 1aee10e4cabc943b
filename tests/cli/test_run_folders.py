"""Run folders: numbered, claimed, resumed."""

from pathlib import Path

import pytest

from spikeformers.cli.parsers import build_parser
from spikeformers.cli.run_folders import run_folder


def test_runs_are_numbered_and_resume_takes_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    top, _ = build_parser()

    def folder(*more: str) -> str:
        return str(run_folder("digits", top.parse_args(["train", "digits", *more]).train))

    with pytest.raises(ValueError, match="nothing to resume"):
        folder("--resume")
    assert folder() == "runs/digits"
    assert (folder("--resume"), folder("--out", "here")) == ("runs/digits", "here")
    assert folder() == "runs/digits-2"  # the first is taken as soon as it is chosen: another training may start now
    assert (folder("--resume"), folder()) == ("runs/digits-2", "runs/digits-3")
    assert not Path("here").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--out"):
        folder()

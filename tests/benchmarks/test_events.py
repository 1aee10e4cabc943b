"""The script that times representations and readers: its files hold what it says, and a wrong reader is not timed."""

import importlib.util
import json
import sys
from types import ModuleType

import pytest


@pytest.fixture
def script(pytestconfig) -> ModuleType:
    for module in ("h5py", "lz4", "zstandard"):
        pytest.importorskip(module)
    spec = importlib.util.spec_from_file_location("events", pytestconfig.rootpath / "benchmarks" / "events.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_representation_and_reader_is_timed(script, monkeypatch, tmp_path):
    given = [
        "--events",
        "20000",
        "--short",
        "100",
        "--steps",
        "2",
        "--repeats",
        "1",
        "--json",
        str(tmp_path / "1.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["events.py", *given])
    script.main()
    result = json.loads((tmp_path / "1.json").read_text())
    assert [row["name"] for row in result["readers"]] == list(script.FORMATS)
    assert [row["name"] for row in result["representations"]] == [*script.REPRESENTATIONS] * 2
    sizes = {row["name"]: row["bytes_per_event"] for row in result["readers"]}
    assert (sizes[".bin (N-MNIST)"], round(sizes["Prophesee .dat"])) == (5, 8)
    assert sizes["AEDAT 4.0, LZ4"] < sizes["AEDAT 4.0, plain"]


def test_a_reader_that_gives_other_events_is_not_timed(script, monkeypatch):
    monkeypatch.setattr(script, "read_events", lambda path, size: script.recording(99))
    options = script.arguments(["--events", "100", "--short", "100", "--repeats", "1"])
    with pytest.raises(ValueError, match="says nothing"):
        script.readers(options)

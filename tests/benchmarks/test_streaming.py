"""The script that times steps of a stream writes a row for each network."""

import importlib.util
import json
import sys


def test_every_way_of_a_network_is_timed(pytestconfig, monkeypatch, tmp_path, capsys):
    path = pytestconfig.rootpath / "benchmarks" / "streaming.py"
    spec = importlib.util.spec_from_file_location("streaming", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "NETWORKS", {"tiny": (16, 2, {"dim": 16, "depth": 1, "heads": 2, "patch_size": 4})})
    monkeypatch.setattr(sys, "argv", ["streaming.py", "--repeats", "1", "--json", str(tmp_path / "1.json")])
    script.main()
    (row,) = json.loads((tmp_path / "1.json").read_text())["rows"]
    assert row["steps"] == 2
    assert all(row[f"{way}, ms a step"] > 0 for way in ("stream", "stream, integer engine", "whole clip"))
    assert "tiny" in capsys.readouterr().out

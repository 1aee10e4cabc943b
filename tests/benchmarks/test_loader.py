"""The script that times the loader writes a row for every stage, number of workers and way of holding pictures."""

import importlib.util
import json
import sys


def test_every_stage_is_timed_on_drawn_pictures(pytestconfig, monkeypatch, tmp_path, capsys):
    path = pytestconfig.rootpath / "benchmarks" / "loader.py"
    spec = importlib.util.spec_from_file_location("loader", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = ["--images", "8", "--batch-size", "4", "--repeats", "1", "--workers", "1", "--data", ""]
    monkeypatch.setattr(sys, "argv", ["loader.py", *small, "--json", str(tmp_path / "1.json")])
    script.main()
    rows = json.loads((tmp_path / "1.json").read_text())["rows"]
    assert {row["pictures"] for row in rows} == {"cifar", "224"}
    assert [row["what"] for row in rows if row["pictures"] == "cifar"] == [
        *("none", "+ crop and flip", "+ RandAugment", "+ erasing", "all", "all, streamed")
    ]
    assert all(row["images_per_s"] > 0 and row["files"] == "drawn" for row in rows)
    assert "streamed" in capsys.readouterr().out

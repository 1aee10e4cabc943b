"""The scripts of whole training steps: rows of every side and form, and memory over steps. They need spikingjelly."""

import json
import sys

import pytest

SMALL = {"dims": (8, 16, 32, 40), "steps": 2, "neuron": "lif"}


@pytest.fixture(autouse=True)
def jelly():
    pytest.importorskip("spikingjelly.activation_based", reason="needs the extra `bench`")


def test_every_side_has_its_forms_next_to_one_reference(noting, monkeypatch, tmp_path, capsys):
    script = noting("train_speed", None)
    monkeypatch.setattr(script, "CASES", [script.Case("meta_spikeformer_15m", SMALL, 32, 2, 2)])
    target = tmp_path / "1.json"
    forms = ["plain", "channels_last", "+ recompute"]
    options = ["--cases", "0", "--repeats", "1", "--threads", "1", "--json", str(target), "--forms", *forms]
    monkeypatch.setattr(sys, "argv", ["train_speed.py", *options])
    script.main()
    rows = {(row["side"], row["form"]): row for row in json.loads(target.read_text())["rows"]}
    assert rows.keys() == {("ours", form) for form in forms} | {
        (side, form) for side in ("ANN twin", "spikingjelly") for form in forms[:2]
    }
    assert rows["ours", "channels_last"]["ratio"] == 1
    assert rows["ours", "+ recompute"]["kept_mib"] < rows["ours", "channels_last"]["kept_mib"] / 2
    assert all(row["backward_ms"] > 0 for row in rows.values())
    assert "share of spikingjelly" in capsys.readouterr().out


def test_a_form_that_is_none_is_refused_with_those_there_are(noting, monkeypatch, capsys):
    script = noting("train_speed", None)
    monkeypatch.setattr(sys, "argv", ["train_speed.py", "--forms", "recompute"])
    with pytest.raises(SystemExit):
        script.main()
    assert "invalid choice: 'recompute'" in (said := capsys.readouterr().err)
    assert "'+ recompute'" in said


def test_memory_over_steps_is_drawn_from_processes_of_their_own(noting, monkeypatch, tmp_path, capsys):
    script = noting("memory", None)
    asked = []

    def point(form, steps):
        asked.append((form, steps))
        return {"form": form, "steps": steps, "mib": 10.0 * steps, "seconds": 1.0}

    monkeypatch.setattr(script, "in_a_process", point)
    monkeypatch.setattr(sys, "argv", ["memory.py", "--steps", "1", "4", "--plot", str(tmp_path / "1.png")])
    script.main()
    assert asked == [(form, steps) for steps in (1, 4) for form in script.FORMS]
    assert (tmp_path / "1.png").stat().st_size > 1000
    assert "40 MiB, 1.00 s" in capsys.readouterr().out


def test_a_switch_that_a_network_refuses_is_a_row_that_says_so(noting):
    script = noting("train_speed", None)
    overrides = {"dims": (8, 16, 32, 40), "steps": 1, "attention": "identity"}
    case = script.Case("qsd_transformer_t", overrides, 32, 2, 2)
    rows = []
    script.run_case(case, device=script.torch.device("cpu"), repeats=1, forms=["+ fused_qkv"], keep=rows.append)
    said = {(row["side"], row["form"]): row for row in rows}
    assert "no attention of QSDTransformer has projections" in said["ours", "+ fused_qkv"]["refused"]
    assert {side for side, _ in said} == {"ours", "ANN twin"}  # spikingjelly has no IE-LIF

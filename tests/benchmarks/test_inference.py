"""The script that times ways of running one network: what it runs, compares and works out, on tiny networks."""

import functools
import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch

from spikeformers.energy import record

TINY = "dims=(8, 8, 8, 8) heads=2 num_classes=5 blocks=(1, 0, 0, 1, 0)"


@pytest.fixture
def script(pytestconfig, monkeypatch) -> ModuleType:
    """The script, whose processes are calls, on peaks of a small convolution."""
    path = pytestconfig.rootpath / "benchmarks" / "inference.py"
    spec = importlib.util.spec_from_file_location("inference", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "inference", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "apart", lambda job: json.loads(json.dumps(module.WORK[job["what"]](job))))
    monkeypatch.setattr(module, "peaks", functools.partial(module.peaks, channels=32, pixels=8))
    return module


def options_of(script: ModuleType, *given: str):
    sizes = TINY.replace(", ", ",").split()
    return script.arguments(["--override", *sizes, "--sizes", "16", "--threads", "1", *given])


def test_every_row_runs_the_same_network_and_a_missing_package_skips_only_its_own(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    rows = ["eager", "fake_quant", "integer", "onnxruntime"]
    options = options_of(script, "--batches", "2", "--repeats", "3", "--checked", "2", "--rows", *rows)
    (case,) = script.measured(options, 16)
    found = {row["row"]: row for row in case["rows"]}
    assert list(found) == rows[:3]
    assert "not installed" in case["skipped"]["onnxruntime"]
    for name in rows[:3]:  # so few neurons that no current lies within float32's rounding of a threshold
        assert found[name]["largest_error"] < 1e-6, name
        assert found[name]["flipped"] == found[name]["different"] == 0, name
        assert found[name]["compared"] == 2, name
    assert all(row["ms"] > 0 and len(row["all_ms"]) == 3 for row in found.values())
    assert all(value > 0 for value in case["peak_gops"].values())
    assert 0 < case["macs"]["spike_fed"] < case["macs"]["all"]
    printed = capsys.readouterr().out
    assert "integer engine, torch" in printed
    assert "0 of 2" in printed


def test_ratios_compare_calls_of_the_same_turn(script):
    rows = {"eager": [10.0, 20.0, 60.0], "integer": [5.0, 5.0, 20.0]}
    same = {"median_error": 0.0, "largest_error": 0.0, "flipped": 0, "different": 0, "compared": 8}
    found = {"threads": 1, "batch": 2, "size": 32, "rows": {row: {"ms": ms, **same} for row, ms in rows.items()}}
    eager, integer = script.table(found, {"integer": 3.0}, macs=1e9)
    assert eager["faster_than"] == {"eager": 1.0}
    assert integer["faster_than"] == {"eager": 3.0}  # of 2, 4 and 3
    assert (eager["ms"], integer["ms"]) == (20.0, 5.0)
    assert integer["gops"] == 800.0  # 2 operations x 1e9 x 2 images in 5 ms
    assert (eager["peak_mib"], integer["peak_mib"]) == (None, 3.0)


def test_rows_take_turns_and_every_timed_call_follows_an_untimed_one_of_its_own(script):
    called = []
    runs = {name: lambda images, name=name: called.append(name) for name in "abc"}
    times = script.timed(runs, torch.zeros(1), 3)
    assert "".join(called) == "aabbcc" + "ccbbaa" + "aabbcc"
    assert [len(each) for each in times.values()] == [3, 3, 3]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("meta_spikeformer_15m", {"dims": (8, 8, 8, 8), "heads": 2, "num_classes": 5, "blocks": (1, 0, 0, 1, 0)}),
        ("spikformer_v2_8_384", {"dim": 16, "depth": 1, "heads": 2, "num_classes": 5, "patch_size": 4}),
        ("qsd_transformer_t", {"dims": (8, 8, 8, 8), "heads": 2, "num_classes": 5, "blocks": (1, 0, 0, 1, 0)}),
    ],
)
def test_neurons_of_any_network_of_the_catalogue_fire_on_the_images(script, name, sizes):
    model = script.network(name, sizes, 32)
    assert not model.training
    with record(model) as spikes, torch.no_grad():
        model(script.pictures(4, 32, seed=2))
    silent = [neuron for neuron, counts in spikes.items() if not counts.any()]
    assert len(silent) <= 0.2 * len(spikes), silent


def test_values_of_overrides_are_literals_or_text(script):
    options = script.arguments(["--override", "dims=(8, 16, 24, 32)", "neuron=i_lif", "layer_scale=0.5"])
    assert dict(options.override) == {"dims": (8, 16, 24, 32), "neuron": "i_lif", "layer_scale": 0.5}

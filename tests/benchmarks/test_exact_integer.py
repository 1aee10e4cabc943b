"""The script that compares networks with and without exactness: its rows differ in nothing else."""

from types import SimpleNamespace

import torch

from spikeformers.quantize import prepare
from spikeformers.train.quantization import prepared
from spikeformers.train.recipe import differences
from spikeformers.zoo import create_model


def test_rows_differ_in_exactness_alone_and_the_exact_network_can_be_built(noting, monkeypatch, tmp_path):
    script = noting("exact_integer", lambda recipe: SimpleNamespace(accuracy=0.5))
    monkeypatch.setattr(script, "compared", lambda run, recipe: {"float64": {"images": 1, "flips": 2, "logits": 0.25}})
    rows = script.cifar10(tmp_path, 100)
    assert [row["ours"] for row in rows] == [{"accuracy": 50.0, "flips, float64": 1, "logits, float64": 0.25}] * 2
    plain, exact = script.asked["plain"], script.asked["exact"]
    assert differences(plain, exact) == ["quantize.exact_integer: False -> True"]
    for recipe, wanted in ((plain, False), (exact, True)):
        network = create_model(recipe.model.name, **recipe.model.overrides())
        assert bool(prepared(network, recipe.quantize).quantization.get("exact")) is wanted


def test_flips_are_counted_by_image_and_differences_by_logit(noting):
    script = noting("exact_integer", lambda recipe: SimpleNamespace(accuracy=0.5))
    model = prepare(create_model("qsd_transformer_t", dims=(8, 16, 24, 32), blocks=(1, 0, 0, 0, 0), num_classes=3))
    _, counts = script.outcome(model.eval(), torch.randn(3, 3, 32, 32))
    others = {name: each.clone() for name, each in counts.items()}
    others["head_neuron"][1] += 1
    assert script.flipped(counts, others) == {"images": 1, "flips": 32}
    assert script.flipped(counts, counts) == {"images": 0, "flips": 0}
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    others = torch.tensor([[0.0, 1.25], [2.0, 2.5]], dtype=torch.float64)
    assert script.differing(logits, others) == {"predictions": 1, "logits": 2.5}

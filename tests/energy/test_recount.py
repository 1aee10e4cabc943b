"""Reports against counts by others: hooks of our own, torch's and spikingjelly's counters, and the unrolled network."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import spikeformers as sf
from spikeformers.deploy import unroll
from spikeformers.energy import CONVENTIONS, measure
from spikeformers.neurons import LIF, Neuron

PJ = 1e-9  # mJ
PYRAMID = {"dims": (8, 8, 8, 16), "blocks": (1, 0, 0, 1, 0), "strides": (2, 2, 1, 1, 1), "heads": 4}
NETWORKS = {
    "lif": ("meta_spikeformer_15m", PYRAMID | {"steps": 2}),
    "i_lif": ("meta_spikeformer_15m", PYRAMID | {"neuron": "i_lif", "levels": 4}),
    "qsd": ("qsd_transformer_t", PYRAMID | {"layer_scale": 1.0}),
    "spikformer": ("spikformer_cifar_4_256", {"dim": 16, "depth": 1, "heads": 2, "steps": 2}),
    "spikformer_v2": ("spikformer_v2_8_384", {"dim": 32, "depth": 1, "heads": 16, "patch_size": 8, "steps": 2}),
}


def build(kind: str) -> nn.Module:
    """A small network in float64 whose neurons fire."""
    name, sizes = NETWORKS[kind]
    model = sf.create_model(name, num_classes=5, **sizes).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 1.0)
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    return model.eval()


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, float | None]]:
    """Mean count of the input of every layer, None if that is not whole counts from 0 up."""
    seen, units = {}, [1.0]

    def look(name: str):
        def hook(_, inputs: tuple) -> None:
            counts = inputs[0] / units[-1]
            whole = bool(((counts - counts.round()).abs() < 1e-9).all()) and bool((counts >= 0).all())
            seen[name] = counts.mean().item() if whole else None

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_pre_hook(look(name)))
        elif isinstance(module, Neuron):
            handles.append(module.register_forward_hook(lambda neuron, *_: units.append(neuron.unit)))
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_a_recount_by_other_means_equals_the_report(kind):
    model, images = build(kind), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with watched(model) as seen, sf.record(model) as spikes, FlopCounterMode(display=False) as flops:
        model(images)
    counted = {name: sum(each.values()) / 2 for name, each in flops.get_flop_counts().items()}
    found = {name.partition(".")[2] or name: macs for name, macs in counted.items()}
    if kind.startswith("spikformer"):
        seen["head"] = None  # it reads averages, which so few tokens may round to whole numbers
    total = fired = 0.0
    for name, rate in seen.items():
        total += found[name] * (4.6 if rate is None else 0.9 * rate)
        fired += rate is not None and rate > 0
    for name in [name.removesuffix(".q") for name in spikes if name.endswith(".q")]:
        matrices = found[name] - sum(found[layer] for layer in seen if layer.startswith(f"{name}."))
        q, k, v = (spikes[f"{name}.{key}"].double().mean().item() for key in "qkv")
        total += 0.9 * matrices / 2 * (min(k, v) + q)
    report = measure(model, images, convention="as_executed")
    assert fired > 4
    assert report.total_mj == pytest.approx(PJ * total / 2, rel=1e-9)
    assert 2 * sum(layer.macs * layer.steps for layer in report.layers) == pytest.approx(found["Global"], rel=1e-12)


@pytest.mark.parametrize("kind", ["i_lif", "qsd"])
@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_the_unrolled_network_makes_the_operations_of_the_integer_one(kind, convention):
    model, images = build(kind), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted, got = (measure(each, images, convention=convention) for each in (model, unroll(model)))
    assert [layer.name for layer in got.layers] == [layer.name for layer in wanted.layers]
    for one, other in zip(wanted.layers, got.layers, strict=True):
        assert (other.macs, other.steps, other.mac_operations) == (one.macs, one.steps, one.mac_operations), one.name
        assert other.sops == pytest.approx(one.sops, rel=1e-12), one.name
    assert got.image_mj == pytest.approx(wanted.image_mj, rel=1e-12)


def test_spikingjelly_counts_the_same_additions_where_no_border_cuts_a_kernel():
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter", reason="needs the extra `bench`")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        LIF(steps=2),
        nn.Conv2d(8, 16, 2, stride=2, bias=False),
        LIF(steps=2, threshold=0.2),
        nn.Conv2d(16, 16, 1, bias=False),
        LIF(steps=2, threshold=0.1),
        nn.Flatten(),
        nn.Linear(16 * 64, 5, bias=False),
    ).eval()
    images = 8 * torch.randn(2 * 3, 3, 16, 16)
    counter = counters.SynOpCounter()
    with torch.no_grad(), counters.DispatchCounterMode([counter]):
        model(images)
    report = measure(model, images, convention="as_executed")
    additions = [layer.sops for layer in report.layers]
    assert min(additions[1:]) > 0
    assert 3 * sum(additions) == pytest.approx(counter.get_total(), rel=1e-12)

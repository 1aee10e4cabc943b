"""Spikformer's account: its published numbers, its attentions' products, IAND against SEW, and the ANN twin."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

from spikeformers.attention import (
    SSA,
    VSA,
    IdentityMap,
    LeakyReLUMap,
    LearnableScaleSSA,
    ReLUMap,
    SoftmaxAttention,
    VSAFloatV,
)
from spikeformers.backbones import ANN_TWIN
from spikeformers.energy import CONVENTIONS, measure, record, trace
from spikeformers.energy.ops import Operation
from spikeformers.neurons import ILIF, LIF
from spikeformers.zoo import create_model

PJ = 1e-9  # mJ


@cache
def operations_of(name: str, steps: int, *, pixels: int = 224, **overrides) -> tuple[Operation, ...]:
    """The operations of one image, without computing anything."""
    with torch.device("meta"):
        model = create_model(name, steps=steps, **overrides).eval()
        return trace(model, torch.empty(1, model.config.in_channels, pixels, pixels)).operations


def at_rate(operations: tuple[Operation, ...], rate: float) -> list[Operation]:
    """Every layer and every product that spikes feed, fed at `rate`."""

    def given(operation: Operation) -> Operation:
        rates = None if operation.rates is None else torch.tensor([rate], dtype=torch.float64)
        return dataclasses.replace(operation, rates=rates, parts=tuple(given(part) for part in operation.parts))

    return [given(operation) for operation in operations]


def additions_and_energy(convention: str, name: str, steps: int, giga_additions: float) -> tuple[float, float]:
    """(MACs, mJ) of a network whose spikes make as many additions as its paper says, at one rate everywhere."""
    convention, operations = CONVENTIONS[convention], operations_of(name, steps)
    silent, busy = (
        sum(float(charge.sops) for charge in convention.charge(at_rate(operations, rate))) for rate in (0.0, 1.0)
    )
    rate = (giga_additions * 1e9 - silent) / (busy - silent)
    assert 0.05 < rate < 0.5, "no firing rate of a spiking network gives what the paper counted"
    charges = convention.charge(at_rate(operations, rate))
    assert sum(float(charge.sops) for charge in charges) == pytest.approx(giga_additions * 1e9, rel=1e-12)
    return sum(charge.mac_operations for charge in charges), sum(float(charge.mj) for charge in charges)


TABLE_2 = [  # network, T, OPs (G), Power (mJ)
    ("spikformer_8_384", 4, 6.63, 5.967),
    ("spikformer_6_512", 4, 8.21, 7.389),
    ("spikformer_8_512", 4, 10.95, 9.855),
    ("spikformer_10_512", 4, 13.67, 12.303),
    ("spikformer_8_768", 4, 22.22, 19.998),
    ("spikformer_v2_8_384", 1, 1.92, 1.728),
    ("spikformer_v2_8_384", 4, 5.21, 4.689),  # the paper's row says 8-512, with the parameters of 8-384
    ("spikformer_v2_8_512", 1, 3.15, 2.835),
    ("spikformer_v2_8_512", 4, 10.40, 9.360),
]


@pytest.mark.parametrize(("name", "steps", "additions", "millijoules"), TABLE_2)
def test_power_of_table_2_is_its_additions_and_nothing_else(name, steps, additions, millijoules):
    macs, energy = additions_and_energy("spikformer_v2", name, steps, additions)
    assert macs == 0
    assert energy == pytest.approx(millijoules, rel=1e-12)  # the tables' three digits are exact products


@pytest.mark.parametrize(
    ("name", "additions", "macs", "millijoules"),
    [
        ("spikformer_8_512", 11.09, 0.3468, 11.58),  # ICLR 2023
        ("spikformer_8_768", 12.54, 0.5202, 13.68),  # Spikingformer in Table 2, whose first convolution is the same
    ],
)
def test_the_first_convolution_makes_the_energies_of_2023(name, additions, macs, millijoules):
    counted, energy = additions_and_energy("spikformer_v1", name, 4, additions)
    assert counted / 1e9 == pytest.approx(macs, abs=5e-5)
    assert energy == pytest.approx(millijoules, abs=5e-3)


def test_the_first_convolution_of_spikformer_8_512_is_86_7_million_macs():
    first, *rest = operations_of("spikformer_8_512", 4)
    assert (first.macs, first.steps, first.rates) == (224 * 224 * 3 * 64 * 9, 4, None)
    assert round(first.macs / 1e6, 1) == 86.7
    assert [operation.name for operation in rest if operation.rates is None] == ["head"]


@pytest.mark.parametrize(
    ("name", "stem", "blocks"),
    [
        ("spikformer_v2_8_384", 8.50, 2.77),
        ("spikformer_v2_8_512", 15.12, 4.93),
        ("spikformer_v2_12_512", 15.12, 7.40),
        ("spikformer_v2_12_768", 34.00, 16.65),
        ("spikformer_v2_16_768", 34.00, 22.20),
    ],
)
def test_dense_macs_of_v2_are_those_of_its_layout(name, stem, blocks):
    layers = [operation for operation in operations_of(name, 1) if operation.kind != "attention"]
    for stage, giga in (("stem", stem), ("blocks", blocks)):
        found = sum(operation.macs for operation in layers if operation.name.startswith(stage))
        assert found / 1e9 == pytest.approx(giga, abs=5e-3), stage


def test_products_of_ssa_are_those_of_the_authors_tool():
    # T h N d^2 (min(fr_k, fr_v) + fr_q), integer spikes by their mean count
    attention = SSA(16, neuron=lambda threshold=1.0: ILIF(threshold=0.1 * threshold, steps=2), heads=4)
    model, images = nn.Sequential(ILIF(steps=2), attention), torch.rand(2 * 1, 16, 6, 6) * 4
    report = measure(model, images, convention="spikformer_v2")
    with record(model.eval()) as spikes, torch.no_grad():
        model(images)
    q, k, v = (spikes[f"1.{key}"].double().mean().item() for key in "qkv")
    products = [layer for layer in report.layers if layer.kind == "attention"]
    assert [layer.name for layer in products] == ["1.k^T v", "1.q (k^T v)"]
    assert q > 0
    assert sum(layer.sops for layer in products) == pytest.approx(2 * 4 * 36 * 4**2 * (min(k, v) + q), rel=1e-12)


def test_a_learnable_scale_is_counted_as_ssa():
    plain, learnt = (
        trace(nn.Sequential(LIF(), kind(16, neuron=LIF, heads=4)).eval(), torch.rand(1, 16, 4, 4)).operations
        for kind in (SSA, LearnableScaleSSA)
    )
    assert [(o.name, o.kind, o.macs, len(o.parts)) for o in plain] == [
        (o.name, o.kind, o.macs, len(o.parts)) for o in learnt
    ]
    assert "1.products" in [operation.name for operation in learnt]


@pytest.mark.parametrize("size", [1, 6])  # tokens below and above the width of a head: the map comes first all the same
@pytest.mark.parametrize("kind", [IdentityMap, ReLUMap, LeakyReLUMap, VSA, VSAFloatV, SoftmaxAttention])
@pytest.mark.parametrize("convention", ["as_executed", "spikformer_v2"])
def test_a_map_of_real_numbers_is_multiplied_and_spikes_v_are_added(kind, size, convention):
    attention = kind(16, neuron=lambda threshold=1.0: LIF(threshold=0.1), heads=4)
    model, images = nn.Sequential(LIF(), attention), torch.rand(2, 16, size, size) * 4
    report = measure(model, images, convention=convention)
    layers = {layer.name: layer for layer in report.layers}
    *_, before, first, second, proj = report.layers
    macs = size**4 * 16  # N x N x D over all heads
    assert [layer.name for layer in (before, first, second, proj)] == [
        "1.v_conv.conv",
        "1.q k^T",
        "1.map v",
        "1.proj.conv",
    ]
    assert (first.macs, first.counted, first.rate, first.sops) == (macs, macs, None, 0)
    assert first.mj == pytest.approx(4.6 * PJ * macs, rel=1e-12)
    if kind in (VSAFloatV, SoftmaxAttention):
        assert (second.rate, second.mac_operations, second.sops) == (None, macs, 0)
    else:
        with record(model.eval()) as spikes, torch.no_grad():
            model(images)
        rate = spikes["1.v"].double().mean().item()
        assert (second.counted, second.mac_operations, second.rate) == (macs, 0, pytest.approx(rate, rel=1e-12))
        assert second.mj == pytest.approx(0.9 * PJ * macs * rate, rel=1e-12)
    assert (proj.rate is None) == (kind is SoftmaxAttention)
    assert layers["1.q_conv.conv"].rate is not None
    assert first.dense_macs + second.dense_macs == 2 * macs


@pytest.mark.parametrize("attention", ["identity", "relu", "leaky_relu", "vsa"])
def test_table_1_counts_two_operations_to_a_mac(attention):
    operations = operations_of("spikformer_cifar_4_384", 1, pixels=32, attention=attention)
    products = [operation for operation in operations if operation.kind == "attention_map"]
    assert len(products) == 4
    for product in products:
        assert product.macs == 2 * 64**2 * 384
        assert round(2 * product.macs / 1e6, 1) == 6.3  # M operations
        assert round(2 * product.macs * 4.6e-6) == 29  # uJ


def small(stem: str = "scs", **overrides) -> nn.Module:
    """A small Spikformer in float64 whose neurons do fire."""
    sizes = {"dim": 32, "depth": 2, "heads": 4, "num_classes": 5, "steps": 2, "patch_size": 8, "stem": stem}
    model = create_model("spikformer_v2_8_384", **(sizes | overrides)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 1.5)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("stem", ["sps", "scs"])
@pytest.mark.parametrize("shortcut", ["iand", "sew"])
def test_spikes_feed_every_layer_but_the_first_and_the_classifier(stem, shortcut):
    model, seen = small(stem, shortcut=shortcut), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].double()}))
    report = measure(model, torch.randn(3, 3, 32, 32, dtype=torch.float64), convention="spikformer_v2")
    first, *layers, head = report.layers
    assert (first.rate, head.rate, head.name) == (None, None, "head")
    assert all(layer.rate is not None for layer in layers)
    rates = {layer.name: layer.rate for layer in layers}
    for name in rates.keys() & seen.keys():
        assert rates[name] == pytest.approx(seen[name].mean().item(), rel=1e-12), name
        assert rates[name] > 0
        if shortcut == "iand":
            assert seen[name].unique().tolist() == [0, 1], name
    streams = [rate for name, rate in rates.items() if name.endswith("q_conv.conv")]
    assert len(streams) == 2
    if shortcut == "iand":
        assert max(rates.values()) <= 1
    else:
        assert max(streams) > 1  # counts, not the share of non-zeros


def test_the_classifier_costs_what_the_convention_says():
    model, images = small(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for name, picojoules in (("as_executed", 4.6), ("spikformer_v1", 0.9), ("spikformer_v2", 0.9)):
        head = measure(model, images, convention=name).layers[-1]
        assert (head.name, head.counted, head.steps, head.rate) == ("head", 32 * 5, 1, None)
        assert head.mj == pytest.approx(picojoules * PJ * 32 * 5, rel=1e-12)
        assert ("Classifier" in CONVENTIONS[name].describe()) == (picojoules == 0.9)


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_an_ann_twin_is_multiply_accumulates_everywhere_and_fires_nothing(convention):
    twin = create_model("spikformer_cifar_4_384", dim=32, depth=2, heads=4, **ANN_TWIN)
    report = measure(twin, torch.randn(3, 3, 32, 32), convention=convention)
    assert (report.images, report.steps, report.firing_rate, report.spikes_per_image) == (3, 1, 0, 0)
    layers = [layer for layer in report.layers if layer.kind in ("conv", "linear", "attention", "attention_map")]
    products = 1 if CONVENTIONS[convention].attention == "table1" else 2
    assert len(layers) == 5 + 2 * (3 + products + 1 + 2) + 1
    factor = {"free": 0, "table1": 2}.get(CONVENTIONS[convention].attention, 1)
    for layer in layers:
        weighted = layer.kind in ("conv", "linear")
        maps = 0 if weighted or products == 2 else 3 * 4 * 64**2  # scale and softmax of four heads
        counted = layer.macs if weighted else factor * (layer.macs + maps)
        assert (layer.rate, layer.sops, layer.mac_operations) == (None, 0, counted)
    assert all(layer.rate is None and layer.mj == pytest.approx(layer.ann_mj, rel=1e-15) for layer in report.layers)
    assert report.total_mj == pytest.approx(report.ann_mj, rel=1e-12)
    assert report.sd_mj == pytest.approx(0, abs=1e-15)  # a sum of equal energies, divided
    assert "(1.0 times as much)" in report.table()


def test_the_twin_has_the_convolutions_and_the_classifier_of_its_spikformer():
    twin = operations_of("spikformer_cifar_4_384", pixels=32, **ANN_TWIN)
    spiking = operations_of("spikformer_cifar_4_384", 4, pixels=32)
    for one, other in zip(twin, spiking, strict=True):
        assert (one.name, one.steps, one.rates) == (other.name, 1, None)
        if other.kind != "attention":
            assert one.macs == other.macs


def test_a_twin_with_spiking_attention_costs_what_the_spiking_network_costs_as_an_ann():
    sizes = {"dims": (8, 16, 16, 24), "strides": (1, 2, 2, 2, 1), "blocks": (1, 0, 0, 1, 1), "num_classes": 3}
    images = torch.rand(2, 3, 16, 16)
    for convention in ("meta_spikeformer", "as_executed", "factored"):
        spiking, twin = (
            measure(create_model("meta_spikeformer_15m", **sizes, neuron=neuron), images, convention=convention)
            for neuron in ("lif", "gelu")
        )
        assert twin.total_mj == pytest.approx(spiking.ann_mj, rel=1e-12)


def test_a_twin_over_several_steps_runs_as_often():
    one, four = (
        measure(small(**(ANN_TWIN | {"steps": steps})), torch.randn(2, 3, 32, 32, dtype=torch.float64))
        for steps in (1, 4)
    )
    assert (one.steps, four.steps, four.images) == (1, 4, 2)
    *layers, head = zip(one.layers, four.layers, strict=True)
    assert all(b.mac_operations == 4 * a.mac_operations and b.macs == a.macs for a, b in layers)
    assert head[0].mac_operations == head[1].mac_operations  # it reads the mean over time
    assert four.ann_mj == one.ann_mj

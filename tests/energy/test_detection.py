"""What networks that detect cost: every layer of their heads, however often it is called, and regions as they come."""

import math

import pytest
import torch
from torch import nn

from spikeformers.deploy import unroll
from spikeformers.energy import measure
from spikeformers.neurons import Neuron, set_steps

PJ = 1e-9  # mJ


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


@torch.no_grad()
def recounted(model: nn.Module, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of every layer of the head, over the whole pass: calls, multiply-accumulates, and additions for its spikes."""
    found: dict[str, dict[str, float]] = {}
    unit = next(module.unit for module in model.modules() if isinstance(module, Neuron))

    def count(name: str, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
        macs = output.numel() * layer.weight[0].numel()
        counts = x / unit
        assert torch.equal(counts, counts.round())
        entry = found.setdefault(name, {"calls": 0, "macs": 0, "additions": 0.0})
        entry["calls"] += 1
        entry["macs"] += macs
        entry["additions"] += macs * float(counts.mean()) if x.numel() else 0.0

    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: count(name, m, args[0], out))
        for name, module in model.named_modules()
        if name.startswith("head.") and isinstance(module, nn.Conv2d | nn.Linear)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return found


def assert_counts_all(model: nn.Module, images: torch.Tensor, *, steps: int) -> None:
    wanted, report = recounted(model, images), measure(model, images, convention="as_executed")
    layers = {layer.name: layer for layer in report.layers if layer.name.startswith("head.")}
    assert layers.keys() == wanted.keys()
    for name, layer in layers.items():
        passes = len(images) * steps
        assert layer.steps == steps, name
        assert layer.macs * passes == pytest.approx(wanted[name]["macs"], rel=1e-12), name
        assert layer.sops * len(images) == pytest.approx(wanted[name]["additions"], rel=1e-9), name
        assert layer.mac_operations == 0, name
        assert layer.mj == pytest.approx(0.9 * PJ * wanted[name]["additions"] / len(images), rel=1e-9), name
        assert layer.ann_mj == pytest.approx(4.6 * PJ * wanted[name]["macs"] / passes, rel=1e-9), name
    assert math.fsum(report.image_mj) == pytest.approx(len(images) * math.fsum(each.mj for each in report.layers))


@pytest.mark.parametrize(
    ("kind", "neuron", "steps"),
    [("yolo", "i_lif", 1), ("yolo", "lif", 3), ("mask_rcnn", "i_lif", 1), ("mask_rcnn", "lif", 2)],
)
@pytest.mark.parametrize("images", [1, 2])
def test_every_layer_of_the_head_adds_at_the_rate_of_its_spikes(detector, pictures, kind, neuron, steps, images):
    model = detector(kind, neuron=neuron, steps=steps).double()
    assert_counts_all(model, pictures[:images], steps=steps)


def test_a_layer_that_all_levels_share_is_counted_once_for_each(detector, pictures):
    model = detector("mask_rcnn", neuron="i_lif", steps=1).double()
    shared = "head.proposals.head.conv.0"
    assert recounted(model, pictures)[shared]["calls"] == 5
    report = measure(model, pictures)
    (layer,) = (each for each in report.layers if each.name == shared)
    sides = [16, 8, 4, 4, 2]  # of 64 pixels, at strides 4, 8, 16, 16 and 32
    assert layer.macs == 8 * 8 * 9 * sum(side**2 for side in sides)


@pytest.mark.parametrize("neuron", ["i_lif", "lif"])
def test_the_second_stage_costs_in_proportion_to_its_regions(detector, pictures, neuron):
    costs = {}
    for regions in (2, 3, 6):
        model = set_steps(detector("mask_rcnn", neuron=neuron, regions=regions, nms_threshold=1.0).double(), 2)
        model.head.proposals.nms_thresh = 1.0  # as many regions as may be
        layers = {layer.name: layer for layer in measure(model, pictures[:1]).layers}
        costs[regions] = layers["head.boxes.fc1"]
    for regions, layer in costs.items():
        assert layer.macs == regions * 7 * 7 * 8 * 8
        assert layer.ann_mj == pytest.approx(4.6 * PJ * layer.macs)


@pytest.mark.parametrize("counts", [(1, 2), (1, 3), (0, 3), (0, 0)])
def test_images_with_other_numbers_of_regions_share_the_cost(detector, pictures, counts, monkeypatch):
    model = detector("mask_rcnn", neuron="lif", steps=2).double()
    boxes = torch.tensor([[0.0, 0, 40, 40], [8, 8, 60, 30], [2, 2, 20, 60]]).double()
    monkeypatch.setattr(model.head.proposals, "regions", lambda *_: [boxes[:count] for count in counts])
    assert_counts_all(model, pictures, steps=2)


@pytest.mark.parametrize("images", [1, 2])
def test_a_second_stage_without_any_box_to_paint_costs_nothing(detector, pictures, images):
    model = detector("mask_rcnn", neuron="lif", steps=2, score_threshold=1.0).double()
    report = measure(model, pictures[:images])
    masks = [layer for layer in report.layers if layer.name.startswith("head.masks.")]
    assert len(masks) > 4
    assert {(layer.macs, layer.mj, layer.ann_mj) for layer in masks} == {(0, 0, 0)}
    assert 0 < report.total_mj < math.inf
    assert 0 < report.firing_rate < 1


@pytest.mark.parametrize("kind", ["yolo", "mask_rcnn", "qsd_mask_rcnn"])
def test_binary_spikes_cost_what_counts_cost(detector, pictures, kind):
    model = detector(kind).double()
    wanted, got = measure(model, pictures), measure(unroll(model), pictures)
    assert got.total_mj == pytest.approx(wanted.total_mj, rel=1e-12)
    assert got.firing_rate == pytest.approx(wanted.firing_rate, rel=1e-12)

"""What runs beside the layers, by hand: arithmetic and words of neurons, norms, taps, masks, averages and shortcuts."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from spikeformers.attention import SDDA
from spikeformers.energy import CONVENTIONS, Layer, measure, record
from spikeformers.layers import Pointwise
from spikeformers.neurons import ILIF, LIF, NILIF
from spikeformers.quantize import prepare

PJ = 1e-9  # mJ


def beside(model: nn.Module, images: torch.Tensor, *, memory: bool = False) -> dict[str, Layer]:
    """What `honest` charges beside the layers (`memory`: what it moves), by name."""
    report = measure(model, images, convention="honest_sram" if memory else "honest")
    layers = {layer.name for layer in measure(model, images, convention="as_executed").layers}
    return {
        layer.name: layer for layer in report.layers if layer.name not in layers and (layer.kind == "memory") == memory
    }


class Made(nn.Module):
    """A layer, a neuron `a` on its output, and what `make` does with the two maps."""

    def __init__(self, make, *, neuron: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.a, self.make = nn.Conv2d(1, 2, 1), neuron or ILIF(), make

    def forward(self, x):
        x = self.conv(x)
        return self.make(x, self.a(x))


@pytest.mark.parametrize(
    ("neuron", "macs", "additions"),  # of an element and step
    [
        (LIF(steps=1), 0, 1),
        (LIF(steps=4), 1, 2),
        (ILIF(levels=4), 0, 4),
        (NILIF(levels=8), 0, 8),
    ],
)
def test_a_neuron_compares_once_a_level_and_leaks_where_its_membrane_lives_on(neuron, macs, additions):
    steps, model = neuron.steps, Made(lambda _, spikes: spikes, neuron=neuron)
    (layer,) = beside(model, torch.randn(steps * 2, 1, 4, 4)).values()
    elements = steps * 2 * 16
    assert (layer.name, layer.kind, layer.steps) == ("a.neuron", "neuron", steps)
    assert (layer.mac_operations, layer.sops) == (macs * elements, additions * elements)
    assert layer.mj == pytest.approx(PJ * elements * (4.6 * macs + 0.9 * additions), rel=1e-12)
    assert layer.ann_mj == 0  # an activation is a look-up


ELEMENTS = 2 * 16  # of the map of 4 x 4


@pytest.mark.parametrize(
    ("make", "kind", "macs", "additions"),  # of an image; a string where the rate of the spikes comes in
    [
        (lambda x, _: F.layer_norm(x, (4, 4)), "norm", 3 * ELEMENTS, 0),
        (lambda x, _: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "taps", 4 * 4 * ELEMENTS, 0),
        (lambda _, s: F.interpolate(s, scale_factor=2.0, mode="bilinear"), "taps", 0, "16 rate"),
        (lambda x, s: x * s, "mask", 0, "1 rate"),
        (lambda x, _: x * x.flip(2), "product", ELEMENTS, 0),
        (lambda x, _: x * (x > 0), "mask", 0, ELEMENTS),
        (lambda x, _: x.flatten(1).softmax(-1), "softmax", ELEMENTS, ELEMENTS),
        (lambda x, _: F.avg_pool2d(x, 2), "average", 0, ELEMENTS),
        (lambda _, s: s.mean((2, 3)), "average", 0, "1 rate"),
        (lambda x, _: F.max_pool2d(x, 2), "maximum", 0, ELEMENTS),
        (lambda _, s: F.max_pool2d(s, 2), "maximum", 0, "1 rate"),
        (lambda x, _: x + x.flip(2), "sum", 0, ELEMENTS),
        (lambda _, s: s + s.flip(2), "sum", 0, "1 rate"),
        (lambda x, s: x + s, "sum", 0, "1 rate"),
        (lambda x, _: x.sum(1), "sum", 0, ELEMENTS),
    ],
)
def test_arithmetic_beside_the_layers_by_hand(make, kind, macs, additions):
    model, images = Made(make), 3 * torch.randn(3, 1, 4, 4)
    found = {layer.kind: layer for layer in beside(model, images).values() if layer.kind != "neuron"}
    with record(model) as spikes, torch.no_grad():
        model(images)
    rate = spikes["a"].double().mean().item()
    assert rate > 0
    if isinstance(additions, str):
        additions = int(additions.split()[0]) * ELEMENTS * rate
    assert list(found) == [kind]
    assert found[kind].name == kind
    assert (found[kind].mac_operations, found[kind].sops) == pytest.approx((macs, additions), rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, _: x + 1,
        lambda x, _: 2 * x,
        lambda x, _: x.flatten(1),
        lambda x, _: torch.cat((x, x)),
        lambda x, _: F.gelu(x),
        lambda x, _: F.interpolate(x, scale_factor=2.0),
    ],
)
def test_constants_moves_and_activations_are_free(make):
    assert [layer.kind for layer in beside(Made(make), torch.randn(2, 1, 4, 4)).values()] == ["neuron"]


def test_a_batch_norm_folds_into_the_layer_in_front_and_costs_elsewhere():
    images = torch.randn(2, 1, 4, 4)
    folds = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), ILIF()).eval()
    stays = nn.Sequential(nn.Conv2d(1, 2, 1), ILIF(), nn.AvgPool2d(2), nn.BatchNorm2d(2)).eval()
    assert list(beside(folds, images)) == ["2.neuron"]
    assert beside(stays, images)["3.norm"].mac_operations == 2 * 4


def test_taps_of_deformable_attention_are_charged_and_its_weighted_sum_only_once():
    attention = SDDA(4, neuron=lambda: NILIF(levels=4), groups=2, proj=Pointwise).eval()
    images = 4 * torch.rand(2, 4, 6, 6)
    found = beside(attention, images)
    assert found["taps"].mac_operations == 4 * 9 * 4 * 36
    assert not {"mask", "product", "sum"} & found.keys()
    assert "weighted" in {layer.name for layer in measure(attention, images, convention="honest").layers}


def test_words_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1),  # reads an image
        LIF(steps=3),
        nn.Conv2d(2, 4, 1, bias=False),  # reads spikes
        nn.Conv2d(4, 4, 1, bias=False),  # reads real numbers
        ILIF(levels=4, steps=3),
        nn.Conv2d(4, 8, 1, bias=False),
    )
    words = {name: layer.words / 3 for name, layer in beside(model, torch.rand(3, 1, 4, 4), memory=True).items()}
    assert words == {
        "0.memory": 2 + 2 + 16,  # weights, biases, pixels
        "1.memory": 2 * 16 / 32 + 2 * 2 * 16,  # spikes, and the membrane read and written
        "2.memory": 8 + 2 * 16 / 32,
        "3.memory": 16 + 4 * 16 * 2,  # written and read
        "4.memory": 4 * 16 * 3 / 32,  # counts up to 4 take three bits, and no membrane lives on
        "5.memory": 32 + 4 * 16 * 3 / 32,
    }
    report = measure(model, torch.rand(3, 1, 4, 4), convention="honest_dram")
    ann = {layer.name: layer.ann_mj / (650 * PJ) for layer in report.layers if layer.kind == "memory"}
    assert ann == pytest.approx(
        {
            "0.memory": 2 + 2 + 16,
            "1.memory": 2 * 16,
            "2.memory": 8 + 2 * 16,
            "3.memory": 16 + 4 * 16 * 2,
            "4.memory": 4 * 16,
            "5.memory": 32 + 4 * 16,
        }
    )


def test_weights_of_four_bits_are_an_eighth_of_the_words():
    model = prepare(nn.Sequential(ILIF(), nn.Conv2d(16, 16, 1, bias=False), ILIF(), nn.Linear(4, 4)), bits=4)
    words = {name: layer.words for name, layer in beside(model, torch.rand(1, 16, 4, 4), memory=True).items()}
    assert words["1.memory"] == 256 / 8 + 256 * 3 / 32
    assert words["3.memory"] == 16 / 8 + 4 + 256 * 3 / 32


def test_what_several_layers_read_is_written_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.q, self.k = (nn.Conv2d(2, 2, 1, bias=False) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            return self.q(x) @ self.k(x)

    words = {name: layer.words for name, layer in beside(Twice(), torch.rand(1, 2, 4, 4), memory=True).items()}
    assert words == {"stem.memory": 4 + 32, "q.memory": 4 + 64, "k.memory": 4 + 32, "memory": 2 * 64}


@pytest.mark.parametrize("convention", ["honest", "honest_sram"])
@pytest.mark.parametrize("kind", ["fpn_lif", "qsd_fpn", "spike2former"])
def test_a_batch_costs_what_its_images_cost_one_by_one(segmenter, kind, convention):
    model, images = segmenter(kind).double(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    together = measure(model, images, convention=convention)
    apart = measure(model, DataLoader(TensorDataset(images), batch_size=1), convention=convention)
    assert apart.image_mj == pytest.approx(together.image_mj, rel=1e-9)
    assert apart.ann_mj == pytest.approx(together.ann_mj, rel=1e-9)


@pytest.mark.parametrize("kind", ["fpn_lif", "spike2former"])
def test_layers_cost_what_they_cost_without_the_rest_to_the_last_bit(segmenter, kind):
    model, images = segmenter(kind), torch.randn(2, 3, 32, 32)
    plain, honest = (measure(model, images, convention=name) for name in ("as_executed", "honest_dram"))
    assert honest.layers[: len(plain.layers)] == plain.layers
    assert honest.total_mj > 1.2 * plain.total_mj
    assert honest.firing_rate == plain.firing_rate


def test_spike2formers_taps_and_embeddings_are_what_its_convention_leaves_out(segmenter):
    model, images = segmenter("spike2former"), torch.randn(2, 3, 32, 32)
    kinds = {layer.kind for layer in measure(model, images, convention="honest").layers}
    assert {"taps", "sum", "neuron", "product"} <= kinds
    assert not kinds & {"memory"}
    assert math.isfinite(measure(model, images, convention="honest_dram").total_mj)
    assert {"taps", "sum", "neuron"}.isdisjoint(
        layer.kind for layer in measure(model, images, convention="spike2former").layers
    )


@pytest.mark.parametrize("convention", [name for name in CONVENTIONS if "honest" in name])
def test_a_silent_network_still_updates_its_neurons(convention):
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), LIF(steps=2), nn.Conv2d(1, 1, 1))
    report = measure(model, torch.zeros(2, 1, 2, 2), convention=convention)
    layers = {layer.name: layer for layer in report.layers}
    assert layers["2"].mj == 0
    assert layers["1.neuron"].mj == pytest.approx(PJ * 8 * (4.6 + 2 * 0.9))

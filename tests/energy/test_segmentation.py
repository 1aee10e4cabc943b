"""What networks that segment compute: layers as the papers count them, and the products that tools overlook."""

import math

import pytest
import torch
from torch import nn

from spikeformers import create_model
from spikeformers.attention import SDDA, SpikingQuerySDDA
from spikeformers.deploy import unroll
from spikeformers.energy import CONVENTIONS, Operation, measure, record, trace
from spikeformers.layers import Pointwise
from spikeformers.neurons import NILIF, set_steps

PJ = 1e-9  # mJ


def flat(operations: tuple[Operation, ...]) -> list[Operation]:
    """Every operation as executed."""
    return [part for operation in operations for part in operation.parts or (operation,)]


@pytest.fixture(scope="module")
def published() -> dict[str, list[Operation]]:
    """Operations of Spike2Former on 512 x 512 pixels, by kind, without memory for any number."""
    with torch.device("meta"):
        found = trace(create_model("spike2former_ade20k").eval(), torch.zeros(1, 3, 512, 512)).operations
    kinds: dict[str, list[Operation]] = {}
    for operation in found:
        weightless = operation.kind in ("attention", "deformable", "product")
        kinds.setdefault(operation.kind if weightless else "layers", []).append(operation)
    return kinds


def test_layers_of_spike2former_are_those_that_its_authors_tool_counts(published):
    layers = flat(tuple(published["layers"]))
    macs = math.fsum(layer.macs for layer in layers)
    backbone = math.fsum(layer.macs for layer in layers if layer.name.startswith("backbone."))
    embedding = math.fsum(layer.macs for layer in layers if layer.name.startswith("head.embedding."))
    assert backbone / 1e9 == pytest.approx(33.65, abs=0.005)
    # The authors' code embeds the queries of all seven states of the decoder; only the last ones are used.
    assert (macs + 6 * embedding) / 1e9 == pytest.approx(55.56, abs=0.005)


def test_products_without_weights_are_counted_beside_them(published):
    def giga(kind: str, name: str = "") -> float:
        return math.fsum(o.macs for o in flat(tuple(published[kind])) if name in o.name) / 1e9

    pixels = 32 * 32
    assert giga("deformable") == pytest.approx(6 * 9 * 256 * pixels / 1e9)
    assert giga("product", "head.product") == pytest.approx(100 * 256 * 256 * 256 / 1e9)
    assert giga("product", "self_attn") == pytest.approx(6 * 2 * 100 * 32 * 256 / 1e9)
    memories = 2 * (1 + 4 + 16) * pixels  # each level is read twice
    assert giga("product", "cross_attn") == pytest.approx((memories * 32 * 256 + 6 * 100 * 32 * 256) / 1e9)
    assert giga("attention") == pytest.approx(0.167, abs=0.0005)


def test_masks_and_attention_add_at_the_rate_of_their_spikes(segmenter):
    model, images = segmenter("spike2former").double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with record(model) as spikes:
        model(images)
    rates = {name: counts.double().flatten(1).mean(1) for name, counts in spikes.items()}
    found = {operation.name: operation for operation in flat(trace(model, images).operations)}
    masks = found["head.product1"]
    assert masks.macs == 5 * 8 * 16 * 16
    torch.testing.assert_close(masks.rates, rates["head.embedding.mask_spikes.neuron"])
    cross = "head.decoder.layers.1.cross_attn"
    first, second = found[f"{cross}.product1"], found[f"{cross}.product2"]
    assert (first.macs, second.macs) == (16 * 4 * 8, 5 * 4 * 8)  # keys and values: 4 x 4 pixels, queries: 5
    torch.testing.assert_close(first.rates, torch.minimum(rates[f"{cross}.k.spikes"], rates[f"{cross}.v.spikes"]))
    torch.testing.assert_close(second.rates, rates[f"{cross}.q.spikes"])
    report = measure(model, images)
    charged = {layer.name: layer for layer in report.layers}
    assert charged["head.product1"].mj == pytest.approx(0.9 * PJ * float(masks.macs * masks.rates.mean()))


@pytest.mark.parametrize(("kind", "adds"), [(SDDA, True), (SpikingQuerySDDA, False)])
def test_sampled_values_are_added_where_the_weight_is_spikes_and_multiplied_where_it_is_not(kind, adds):
    attention = kind(4, neuron=lambda: NILIF(levels=4), groups=2, proj=Pointwise).eval()
    nn.init.normal_(attention.attn_conv.conv.weight)
    nn.init.ones_(attention.attn_conv.bn.bias)
    found = {operation.kind: operation for operation in trace(attention, 4 * torch.rand(2, 4, 6, 6)).operations}
    (weighted,) = found["deformable"].parts
    assert weighted.macs == 9 * 4 * 36
    assert (weighted.rates is not None) == adds
    (charge,) = (each for each in CONVENTIONS["meta_spikeformer"].charge([found["conv"], found["deformable"]])[1:])
    assert bool(charge.mac_operations) != adds
    assert bool(torch.as_tensor(charge.sops).any()) == adds


def test_the_papers_convention_charges_layers_alone_and_shows_the_rest(segmenter):
    model, images = segmenter("spike2former"), torch.randn(2, 3, 32, 32)
    ours, papers = (measure(model, images, convention=name) for name in ("as_executed", "spike2former"))
    left_out = {layer.name for layer in papers.layers if not layer.counted}
    assert "head.product1" in left_out
    assert left_out == {layer.name for layer in ours.layers if layer.kind in ("attention", "deformable", "product")}
    assert {layer.name for layer in papers.layers} == {layer.name for layer in ours.layers}
    assert all(layer.mj == layer.ann_mj == 0 for layer in papers.layers if layer.name in left_out)
    assert papers.total_mj < ours.total_mj
    assert "Attention: not counted" in papers.table()


@pytest.mark.parametrize("kind", ["fpn_lif", "fpn", "qsd_fpn", "spike2former", "released"])
def test_binary_spikes_cost_what_counts_cost(segmenter, kind):
    model, images = segmenter(kind).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted, got = measure(model, images), measure(unroll(model), images)
    assert got.image_mj == pytest.approx(wanted.image_mj, rel=1e-12)
    assert got.firing_rate == pytest.approx(wanted.firing_rate, rel=1e-12)


def test_a_head_behind_the_mean_over_time_is_charged_for_one_step(segmenter):
    model, images = set_steps(segmenter("fpn_lif").double(), 4), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    report = measure(model, images)
    assert {layer.steps for layer in report.layers if layer.name.startswith("head.")} == {1}
    assert {layer.steps for layer in report.layers if layer.name.startswith("backbone.")} == {4}
    with record(model) as spikes:
        model(images)
    last = report.layers[-1]
    rate = float(spikes["head.classifier.neuron"].double().mean())  # dropout in between
    assert last.name == "head.classifier.classify"
    assert last.mj == pytest.approx(0.9 * PJ * 8 * 4 * 16 * 16 * rate)
    assert report.spikes_per_image == pytest.approx(sum(float(each.sum()) for each in spikes.values()) / 2)

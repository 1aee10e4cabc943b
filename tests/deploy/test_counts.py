"""Integer layers: hand-worked numbers, the fast path against the readable one, ties, copies and fallbacks."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers.deploy import counts as engine
from spikeformers.deploy.counts import CountNeuron, IntegerConv, IntegerLinear, quantize_weight
from spikeformers.deploy.floats import FloatConv
from spikeformers.neurons import IELIF, ILIF, LIF, NILIF

GEOMETRIES = [  # channels in, out, kernel, stride, groups
    (13, 24, 1, 1, 1),
    (20, 40, 1, 2, 1),
    (32, 19, 3, 1, 1),
    (37, 64, 3, 2, 1),
    (48, 48, 7, 1, 48),
    (16, 32, 3, 1, 16),
    (3, 5, 7, 2, 1),
    (24, 48, 3, 1, 4),
]
needs_primitive = pytest.mark.skipif(not engine.primitive_agrees(), reason="no oneDNN integer convolution on this CPU")


def conv(inside: int, out: int, kernel: int, stride: int = 1, groups: int = 1, *, dyadic: bool = False) -> nn.Conv2d:
    layer = nn.Conv2d(inside, out, kernel, stride, kernel // 2, groups=groups)
    if dyadic:  # then scale and bias are dyadic numbers and sums meet ties
        layer.weight.data.copy_(torch.randint(-126, 127, layer.weight.shape) / 64)
        layer.weight.data[:, 0, 0, 0] = 127 / 64
        layer.bias.data.copy_(torch.randint(-8, 9, (out,)) / 4)
    return layer.requires_grad_(False)


def some_counts(batch: int, channels: int, size: int = 9, largest: int = 4) -> torch.Tensor:
    return torch.randint(0, largest + 1, (batch, channels, size, size), dtype=torch.uint8)


def test_weights_are_rounded_to_127_steps_of_the_largest_of_their_channel():
    weight, step = quantize_weight(torch.tensor([[2.54, -1.27, 0.014], [0.0, 0.0, 0.0]]))
    assert weight.tolist() == [[127, -64, 1], [0, 0, 0]]  # 1.27 / 0.02 = 63.5 goes to even
    torch.testing.assert_close(step, torch.tensor([0.02, 1.0]))


def test_a_fused_layer_fires_as_worked_by_hand():
    layer = nn.Conv2d(2, 1, 1)
    layer.weight.data.copy_(torch.tensor([127.0, -64.0]).view(1, 2, 1, 1) / 128)
    layer.bias.data.fill_(0.25)
    counts = torch.tensor([[0, 0], [1, 1], [3, 1], [4, 0], [0, 4]], dtype=torch.uint8).view(5, 2, 1, 1)
    # 0.25 -> 0;  127/128 - 0.5 + 0.25 = 0.742 -> 1;  3 * 127/128 - 0.25 = 2.73 -> 3;  4.22 -> 4 (clipped);  -1.75 -> 0
    for fast in (True, False):
        fired = IntegerConv.of(layer, unit=1.0, max_count=4, neuron=ILIF(levels=4), fast=fast)(counts)
        assert fired.dtype == torch.uint8
        assert fired.flatten().tolist() == [0, 1, 3, 4, 0]


@needs_primitive
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dyadic", [False, True])
@pytest.mark.parametrize("neuron", [None, ILIF(levels=4), IELIF(levels=4), NILIF(levels=7, threshold=0.5)])
def test_the_primitive_equals_the_readable_path_bit_for_bit(geometry, dyadic, neuron):
    layer = IntegerConv.of(conv(*geometry, dyadic=dyadic), unit=0.25, max_count=4, neuron=neuron)
    for batch, size in ((1, 9), (3, 14)):
        counts = some_counts(batch, geometry[0], size)
        assert layer.runs_fast(counts)
        assert torch.equal(layer(counts), layer.readable(counts))


@needs_primitive
@pytest.mark.parametrize("neuron", [ILIF(levels=4), IELIF(levels=4), NILIF(levels=3), ILIF(levels=4, threshold=0.5)])
def test_an_integer_layer_equals_convolution_and_neuron_where_weights_are_integers_already(neuron):
    plain = conv(16, 24, 3, dyadic=True)  # every product and sum is a dyadic number: float32 is exact
    counts = some_counts(2, 16)
    wanted = neuron.counts(neuron(plain(counts * 0.25)))
    fused = IntegerConv.of(plain, unit=0.25, max_count=4, neuron=neuron)
    assert torch.equal(fused(counts), wanted)
    currents = IntegerConv.of(plain, unit=0.25, max_count=4)(counts)
    assert torch.equal(CountNeuron(neuron, fused=False, dtype=None)(currents), wanted)


@pytest.mark.parametrize("dyadic", [False, True])
@pytest.mark.parametrize("neuron", [ILIF(levels=4), IELIF(levels=4), IELIF(levels=3), NILIF(levels=7, threshold=0.5)])
def test_thresholds_give_the_counts_of_the_float64_network_for_every_sum_there_is(dyadic, neuron):
    plain = conv(3, 5, 1, dyadic=dyadic).double()
    plain.weight.data[2] = 0  # a channel that always gives the same count
    plain.weight.data[3].neg_()
    layer = IntegerConv.of(plain, unit=0.5, max_count=2, neuron=neuron)
    _, step = quantize_weight(plain.weight)
    for channel in range(5):
        reach = int(layer.reach[channel])
        sums = torch.arange(-reach, reach + 1)
        currents = sums.double() * 0.5 * step[channel] + plain.bias[channel]
        wanted = neuron.counts(neuron(currents))
        reached = (sums[:, None] >= layer.thresholds[channel]).sum(1)
        assert torch.equal(wanted.long(), reached)
        if layer.emits:
            assert torch.equal(wanted.float(), layer._rounded(sums.expand(5, -1), layer.bias)[channel])


def test_negative_step_sizes_turn_the_thresholds_around():
    packed = sf.quantize.convert(sf.quantize.prepare(conv(6, 4, 1).double(), bits=4))
    packed.absorb(torch.tensor([1.0, -1.0, 0.0, -0.5]).double(), torch.full((4,), 0.3).double())
    counts, neuron = some_counts(2, 6), IELIF(levels=4)
    wanted = neuron.counts(neuron(packed(counts.double() * 0.25)))
    assert wanted.unique().numel() > 2
    for fast in (True, False):
        layer = IntegerConv.of(packed, unit=0.25, max_count=4, neuron=neuron, fast=fast)
        assert layer.sign.tolist() == [1, -1, 1, -1]
        assert torch.equal(layer(counts), wanted)


def test_half_up_ties_are_met_by_a_nudged_bias_and_by_comparing_sums_where_none_will_do(monkeypatch):
    plain, counts = conv(8, 8, 3, dyadic=True), some_counts(4, 8)
    layer = IntegerConv.of(plain, unit=0.25, max_count=4, neuron=IELIF(levels=4))
    assert layer.emits
    exact = IntegerConv.of(plain, unit=0.25, max_count=4, neuron=ILIF(levels=4, threshold=0.25))
    assert not torch.equal(layer.bias, exact.bias)
    monkeypatch.setattr(engine, "NUDGES", ())
    stubborn = IntegerConv.of(plain, unit=0.25, max_count=4, neuron=IELIF(levels=4))
    assert not stubborn.emits
    assert torch.equal(stubborn(counts), layer(counts))
    assert torch.equal(stubborn(counts), layer.readable(counts))


def test_packed_integers_are_taken_as_they_are_and_other_weights_are_rounded():
    prepared = sf.quantize.prepare(conv(6, 4, 1), bits=3)
    layer = IntegerConv.of(sf.quantize.convert(copy.deepcopy(prepared)), unit=0.25, max_count=4)
    assert torch.equal(layer.weight, prepared.integers())
    assert layer.bits == 3
    assert IntegerConv.of(sf.quantize.plain(prepared), unit=0.25, max_count=4).bits == 8


def test_counts_that_could_saturate_pairs_of_products_take_the_readable_path():
    assert IntegerConv.of(conv(4, 4, 1), unit=1.0, max_count=129).fast  # 2 * 129 * 127 = 32766
    assert not IntegerConv.of(conv(4, 4, 1), unit=1.0, max_count=130).fast


@needs_primitive
def test_the_primitive_agrees_on_a_cpu_without_vnni():
    code = (
        "import torch; from spikeformers.deploy.counts import *; torch.manual_seed(0);"
        "c = torch.nn.Conv2d(64, 64, 3, padding=1);"
        "n = IntegerConv.of(c, unit=1., max_count=129, neuron=ILIF(levels=4));"
        "n.weight.fill_(127); x = torch.full((1, 64, 9, 9), 129, dtype=torch.uint8);"
        "print(primitive_agrees() and torch.equal(n(x), n.readable(x)))"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


def test_without_the_primitive_the_readable_path_is_taken_and_said_once(monkeypatch, caplog):
    def absent(self, counts):
        raise NotImplementedError("no such operator")

    layer, counts = IntegerConv.of(conv(8, 8, 3), unit=1.0, max_count=4, neuron=ILIF(levels=4)), some_counts(2, 8)
    wanted = layer(counts)
    monkeypatch.setattr(IntegerConv, "primitive", absent)
    engine.primitive_agrees.cache_clear()
    try:
        assert torch.equal(layer(counts), wanted)
        assert torch.equal(layer(counts), wanted)
        assert len(caplog.records) == 1
        monkeypatch.setattr(IntegerConv, "primitive", lambda self, counts: self.readable(counts) + 1)
        engine.primitive_agrees.cache_clear()
        assert torch.equal(layer(counts), wanted)
        assert "differs" in caplog.records[-1].message
    finally:
        engine.primitive_agrees.cache_clear()


def test_copies_keep_numbers_and_drop_packed_weights():
    layer, counts = IntegerConv.of(conv(8, 8, 3), unit=1.0, max_count=4, neuron=ILIF(levels=4)), some_counts(2, 8)
    wanted = layer(counts)
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stored, weights_only=False)):
        assert not twin.prepared
        assert torch.equal(twin(counts), wanted)
    assert set(layer.state_dict()) == {"weight", "scale", "bias", "thresholds"}


def test_loaded_weights_replace_packed_ones():
    first, second = (IntegerConv.of(conv(8, 8, 3), unit=1.0, max_count=4) for _ in range(2))
    counts = some_counts(2, 8)
    assert not torch.equal(first(counts), second(counts))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(counts), second(counts))


def test_few_packed_copies_are_kept_however_many_shapes_come():
    layer = IntegerConv.of(conv(8, 8, 3), unit=1.0, max_count=4)
    for size in range(5, 15):
        layer(some_counts(1, 8, size))
    assert len(layer.prepared) <= engine.PREPARED_SHAPES


def test_spikes_that_arrive_as_floats_are_counted_first():
    layer, counts = IntegerConv.of(conv(8, 8, 3), unit=1 / 3, max_count=3), some_counts(2, 8, largest=3)
    assert torch.equal(layer(counts / 3), layer(counts))


def test_a_linear_layer_on_counts_equals_nn_linear_for_integer_weights():
    plain = nn.Linear(16, 10)
    plain.weight.data.copy_(torch.randint(-126, 127, (10, 16)) / 64)
    plain.weight.data[:, 0] = 127 / 64
    plain.bias.data.copy_(torch.randint(-8, 9, (10,)) / 4)
    layer = IntegerLinear.of(plain, unit=1.0, max_count=4)
    for shape in ((3, 16), (2, 5, 16)):
        counts = torch.randint(0, 5, shape, dtype=torch.uint8)
        assert torch.equal(layer(counts), plain(counts.float()))


@pytest.mark.parametrize("neuron", [LIF(steps=2), ILIF(), IELIF(), NILIF(levels=3), ILIF(steps=2, decay=0.5)])
def test_a_count_neuron_emits_the_counts_of_its_neuron(neuron):
    x = 4 * torch.randn(6, 5, 3, 3)
    wanted = neuron.counts(neuron(x))
    bare = CountNeuron(neuron, fused=False, dtype=None)
    assert bare(x).dtype == torch.uint8
    assert torch.equal(bare(x), wanted)
    wide = CountNeuron(neuron, fused=False, dtype=torch.float32)
    torch.testing.assert_close(wide(x), neuron(x))
    assert torch.equal(wide.counts(wide(x)), wanted)


def test_a_float_convolution_image_by_image_ignores_the_batch():
    plain = nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
    layer, x = FloatConv.of(plain), torch.randn(7, 16, 20, 20)
    assert torch.equal(layer(x)[3:4], layer(x[3:4]))
    torch.testing.assert_close(layer(x), plain(x))


def test_a_float_convolution_takes_images_one_by_one_where_a_batch_would_round_otherwise(monkeypatch):
    layer, x = FloatConv.of(nn.Conv2d(16, 32, 1).requires_grad_(False)), torch.randn(3, 16, 8, 8)
    wanted = torch.cat([layer(image) for image in x.split(1)])
    laid_out = FloatConv._laid_out

    def otherwise(self, shape):
        run = laid_out(self, shape)
        return run if shape[0] == 1 else lambda x: run(x) * (1 + 1e-6)

    monkeypatch.setattr(FloatConv, "_laid_out", otherwise)
    layer.prepared.clear()
    assert torch.equal(layer(x), wanted)


def test_a_float_layer_keeps_low_bit_weights_as_integers():
    packed = sf.quantize.convert(sf.quantize.prepare(nn.Conv2d(6, 4, 3, groups=2), bits=4)).requires_grad_(False)
    layer, x = FloatConv.of(packed), torch.randn(2, 6, 5, 5)
    assert (layer.weight.dtype, layer.bits) == (torch.int8, 4)
    torch.testing.assert_close(layer(x), packed(x))

"""Networks that segment, in every form in which they leave training: unrolled, audited, as engines and as files."""

import json
import re

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import spikeformers as sf
from spikeformers.attention import SDDA, ReleasedSDDA
from spikeformers.deploy import audit, fuse, integer, unroll
from spikeformers.deploy.container import read
from spikeformers.deploy.counts import CountNeuron
from spikeformers.deploy.outputs import named_outputs
from spikeformers.deploy.unroll import BinarySpikes, summed
from spikeformers.heads import MaskClassification
from spikeformers.layers import Pointwise
from spikeformers.neurons import Neuron, set_steps, streaming

KINDS = ("fpn_lif", "fpn", "qsd_fpn", "spike2former", "released")
FLOAT64 = 1e-12  # sums in another order, of numbers around 1
FLOAT32 = 1e-5  # the same in float32, some layers deep


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64)


def low_bit(model: nn.Module) -> nn.Module:
    """`model` in float64 with weights of 4 bits."""
    return sf.quantize.prepare(model, bits=4).double().eval()


def largest_error(output, other) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(tree_leaves(output), tree_leaves(other), strict=True))


@torch.no_grad()
def assert_unrolled_is_the_same(model: nn.Module, images: torch.Tensor) -> None:
    unrolled = unroll(model)
    with sf.record(model) as wanted:
        expected = model(images)
    with sf.record(unrolled) as got:
        found = unrolled(images)
    assert type(found) is type(expected)
    assert largest_error(found, expected) <= FLOAT64
    assert wanted.keys() == got.keys()
    for name, spikes in got.items():
        neuron = unrolled.get_submodule(name)
        assert spikes.max() <= 1
        assert torch.equal(summed(spikes, levels=neuron.levels, steps=neuron.steps), wanted[name]), name


@pytest.mark.parametrize("levels", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["fpn", "qsd_fpn", "spike2former", "released"])
def test_spikes_over_virtual_steps_add_up_to_the_counts_of_every_neuron(segmenter, pictures, kind, levels):
    assert_unrolled_is_the_same(segmenter(kind, levels=levels).double(), pictures)


@pytest.mark.parametrize(
    "overrides",
    [
        {"steps": 2},
        {"steps": 2, "temporal": True},
        {"sdda_spikes": "query"},
        {"encoder": "vanilla"},
        {"encoder_query": "multi"},
        {"mask_shortcut": "spikes"},
        {"mask_shortcut": "membrane"},
        {"cross_attention_neuron": "i_lif"},
        {"neuron": "ni_lif_const8"},
        {"neuron": "lif", "steps": 2},
    ],
    ids=str,
)
def test_so_they_do_in_every_variant_of_spike2former(segmenter, pictures, overrides):
    assert_unrolled_is_the_same(segmenter("spike2former", **overrides).double(), pictures)


def test_so_they_do_in_lif_networks_whose_head_runs_one_step(segmenter, pictures):
    assert_unrolled_is_the_same(segmenter("fpn_lif", steps=3).double(), pictures)


def test_every_part_of_spike2former_fires_in_these_tests(segmenter, pictures):
    with sf.record(model := segmenter("spike2former").double()) as spikes:
        model(pictures)
    silent = [name for name, counts in spikes.items() if not counts.any()]
    assert [name for name in silent if name.startswith("head.")] == []


@pytest.mark.parametrize("kind", ["spike2former", "released"])
def test_unrolled_no_layer_and_no_product_sees_counts(segmenter, pictures, kind):
    unrolled, given = unroll(segmenter(kind).double()), {}
    embedding = unrolled.head.embedding
    for name in ("classifier", "mask_mlp.conv1", "mask_mlp.conv2", "mask_mlp.conv3", "shortcut.conv.conv"):
        layer = embedding.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
    unrolled(pictures)
    assert all(isinstance(each, BinarySpikes) and each.unit == 1.0 for each in given.values())  # alpha / D
    assert len(given) == 5
    report = audit(unrolled, pictures)
    assert not [row for row in report.rows if row.how == "AC (integer)"]


# The audit.


def test_the_audit_tells_what_of_spike2former_no_spike_drives(segmenter):
    report = audit(segmenter("spike2former"), torch.randn(1, 3, 64, 64))
    rows = {(row.name.removeprefix("head."), row.kind, row.how) for row in report.rows}
    encoder = "pixel_decoder.encoders.0.layer0"
    assert {
        (f"{encoder}.attn", "taps", "MAC"),  # bilinear weights of real values
        (f"{encoder}.attn", "mask", "AC (integer)"),  # attention weights times sampled values
        (f"{encoder}.attn.offset_conv.conv", "conv", "AC (integer)"),
        (f"{encoder}", "scale", "free"),  # its gammas
        ("pixel_decoder.top_down.0", "taps", "MAC"),  # bilinear upsampling
        ("decoder.layers.0.cross_attn", "matmul", "AC (integer)"),
        ("decoder.layers.0.cross_attn", "constant", "free"),  # the scale
        ("", "matmul", "AC (integer)"),  # masks
    } <= {(name.removeprefix("head"), kind, how) for name, kind, how in rows}
    taps = {row.name: row.products for row in report.rows if row.kind == "taps"}
    assert taps[f"head.{encoder}.attn"] == 4 * 8 * 9 * 4 * 4  # taps, channels, points, pixels
    scales = [row for row in report.rows if row.kind == "scale"]
    assert {row.into for row in scales if row.name == f"head.{encoder}"} == {
        f"head.{encoder}.esc.pw2.conv",
        f"head.{encoder}.attn.output_proj.pw2.conv",
        f"head.{encoder}.mlp.mlp.conv2.conv",
    }
    assert report.verdict == "neither"
    assert re.search(r"grid_sample \(taps\)", "\n".join(report.why))


def test_a_gamma_behind_scrambled_channels_merges_into_no_layer(segmenter):
    report = audit(segmenter("released"), torch.randn(1, 3, 64, 64))  # maps of 4 x 4 pixels and 8 channels
    scales = [row for row in report.rows if row.kind == "scale"]
    assert [(row.how, row.into.split(".")[-3:]) for row in scales] == [
        ("free", ["esc", "pw2", "conv"]),
        ("free", ["output_proj", "pw2", "conv"]),
        ("MAC", [""]),
    ]


def test_semantic_fpn_multiplies_where_it_enlarges(segmenter):
    report = audit(segmenter("fpn"), torch.randn(1, 3, 32, 32))
    assert {row.name for row in report.offenders if row.name.startswith("head.")} == {"head.classifier"}
    assert all(row.kind == "taps" for row in report.offenders if row.name.startswith("head."))


# Time.


def test_a_head_after_time_runs_once_whatever_the_steps(segmenter, pictures):
    model = set_steps(segmenter("fpn_lif").double(), 3)
    for network in (model, unroll(model)):
        with sf.record(network) as spikes:
            network(pictures)
        assert {len(counts) for name, counts in spikes.items() if name.startswith("head.")} == {2}
        assert {len(counts) for name, counts in spikes.items() if name.startswith("backbone.")} == {3 * 2}


@pytest.mark.parametrize(
    ("kind", "overrides"), [("fpn_lif", {}), ("spike2former", {"temporal": True}), ("spike2former", {"neuron": "lif"})]
)
@torch.no_grad()
def test_frames_one_by_one_give_what_the_clip_gives(segmenter, kind, overrides):
    model, clip = segmenter(kind, steps=3, **overrides).double(), torch.randn(3, 2, 3, 32, 32, dtype=torch.float64)
    whole = model(clip)
    with streaming(model):
        for frame in clip:
            last = model(frame)
    assert largest_error(last, whole) <= FLOAT64


# The engine.


@pytest.mark.parametrize("kind", KINDS)
def test_given_equal_counts_every_layer_of_the_engine_fires_as_the_network(segmenter, pictures, kind):
    model = low_bit(segmenter(kind))
    engine = integer(model, pictures)
    wrong = engine.compare_layers(model, pictures)
    assert not any(wrong.values())
    assert bool(wrong) == (kind != "fpn_lif")  # membranes are never fused
    found = engine.compare(model, pictures)
    assert set(found.flip_rates) == {name for name, each in model.named_modules() if isinstance(each, Neuron)}
    assert found.total == 2
    assert found.equal > 0.99  # of pixels: float layers may flip a spike


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_is_the_readable_one_for_every_batch_and_size(segmenter, pictures, kind):
    model, images = segmenter(kind), pictures.float()
    fast, readable = integer(model, images), integer(model, images, fast=False)
    whole = fast(images)
    assert type(whole) is (torch.Tensor if "fpn" in kind else MaskClassification)
    assert largest_error(readable(images), whole) == 0
    alone = named_outputs(fast(images[1:]))
    assert all(torch.equal(alone[name], part[1:]) for name, part in named_outputs(whole).items())
    wider = torch.randn(1, 3, 48, 80)
    assert largest_error(fast(wider), integer(model, wider)(wider)) == 0
    assert torch.equal(fast.semantic(whole, (32, 32)), model.semantic(whole, (32, 32)))


def test_attention_of_maps_too_large_for_float32_is_summed_in_float64(segmenter):
    model = segmenter("fpn", levels=80, neuron="i_lif", heads=1)
    small, large = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 96, 96)
    engine = integer(model, small)
    neurons = [each for each in engine.modules() if isinstance(each, CountNeuron) and each.exact_pixels]
    assert [each.exact_pixels for each in neurons] == [2**24 // (8 * 80**3)] * len(neurons)
    assert all(each.wide_dtype(torch.zeros(1, 8, 1, 1)) == torch.float32 for each in neurons)
    assert all(each.wide_dtype(torch.zeros(1, 8, 6, 6)) == torch.float64 for each in neurons)
    assert neurons
    assert largest_error(engine(large), integer(model, large)(large)) == 0


def test_an_engine_of_a_classifier_has_no_pixels_to_classify(small, images):
    engine = integer(small("i_lif"), images)
    with pytest.raises(ValueError, match="MetaSpikeFormer gives classes to images"):
        engine.semantic(engine(images), (32, 32))


def test_agreement_counts_pixels(segmenter, pictures):
    model = segmenter("fpn").double()
    engine = integer(model, pictures)
    logits = model(pictures)
    engine.net.head.classifier.classify.bias[0] += (logits.amax(1) - logits[:, 0]).quantile(0.5)  # half change class
    found = engine.compare(model, pictures)
    own, other = (model.semantic(run(pictures), (32, 32)).argmax(1) for run in (model, engine))
    assert 0 < found.equal < 1
    assert found.equal == pytest.approx(float((own == other).double().mean()))
    assert found.different == (0, 1)
    assert found.same == 0


# Merging.


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_layers_give_the_same(segmenter, pictures, kind):
    model = segmenter(kind).double()
    assert largest_error(fuse(model)(pictures), model(pictures)) <= FLOAT64


# Files.


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_engine(segmenter, pictures, kind, tmp_path):
    engine = integer(segmenter(kind), pictures)
    file = sf.deploy.save(engine, tmp_path / "model.spk", labels=["a", "b", "c", "d"])
    again = sf.deploy.load(file)
    images = torch.randn(2, 3, 48, 32)
    found = again(images)
    assert largest_error(found, engine(images)) == 0
    assert again.semantic(found, (48, 32)).shape == (2, 4, 48, 32)


def test_a_part_that_no_file_can_name_is_refused_and_so_is_a_forged_one(segmenter, pictures, tmp_path):
    model = segmenter("spike2former", sdda_projection=Pointwise)
    with pytest.raises(ValueError, match="sdda_projection of this network is a builder"):
        sf.deploy.save(integer(model, pictures), tmp_path / "model.spk")
    file = sf.deploy.save(integer(segmenter("spike2former"), pictures), tmp_path / "model.spk")
    network = read(file).header["network"]
    assert network["config"]["head"]["stem"] == "spike2former"
    for part, field, value in (("head", "queries", 10**6), ("head", "layout", 3), ("backbone", "dims", [2**20])):
        forged = json.loads(json.dumps(network))
        forged["config"][part]["config"][field] = value
        with pytest.raises(ValueError, match=field):
            sf.deploy.artifact._read_network(forged)
    forged = json.loads(json.dumps(network))
    forged["config"]["head"]["stem"] = "meta_spikeformer"
    with pytest.raises(ValueError, match="unknown network, 'meta_spikeformer'"):
        sf.deploy.artifact._read_network(forged)


def session(graph: bytes, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """All outputs of an ONNX graph in onnxruntime, by name."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    run = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in run.get_outputs()]
    found = run.run(None, {run.get_inputs()[0].name: images.numpy()})
    return {name: torch.from_numpy(each) for name, each in zip(names, found, strict=True)}


SHORT = {"blocks": (0, 0, 0, 1, 0), "decoder_layers": 1}  # an exporter takes its time


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"), [("spike2former", "float"), ("released", "float"), ("spike2former", "integer"), ("fpn", "qdq")]
)
@torch.no_grad()
def test_an_onnx_file_gives_the_same_by_the_same_names(segmenter, unchecked, pictures, kind, form):
    pytest.importorskip("onnxscript")
    from spikeformers.deploy.onnx import onnx_graph

    model, images = low_bit(segmenter(kind, **({} if kind == "fpn" else SHORT))).float(), pictures.float()
    model = model if form == "float" else integer(model, images)
    graph = onnx_graph(model, images, form=form).SerializeToString()
    for given in (images[:1], torch.cat((images, images[:1].flip(-1)))):  # the batch is free
        found, wanted = session(graph, given), named_outputs(model(given))
        assert list(found) == list(wanted) == (["logits"] if kind == "fpn" else ["class_logits", "mask_logits"])
        for name, expected in wanted.items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("kind", [SDDA, ReleasedSDDA])
@torch.no_grad()
def test_deformable_sampling_runs_from_an_onnx_file(unchecked, kind):
    pytest.importorskip("onnxscript")
    from spikeformers.deploy.onnx import onnx_graph

    attention = kind(4, neuron=lambda: sf.neurons.NILIF(levels=4), groups=2, proj=Pointwise).eval()
    for conv in (attention.offset_conv.conv, attention.attn_conv.conv):
        nn.init.normal_(conv.weight)  # points move, also out of the map
        nn.init.normal_(conv.bias)
    maps = 2 * torch.randn(2, 4, 5, 6)
    expected = attention(maps)
    assert expected.std() > 0.1
    found = session(onnx_graph(attention, maps).SerializeToString(), maps)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32)


class Masks(nn.Module):
    """The smallest network that gives classes and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron, self.conv = sf.neurons.ILIF(), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        pixels = self.conv(self.neuron(x))
        return MaskClassification(pixels.mean((2, 3))[:, None], pixels)


@pytest.mark.parametrize("form", ["float", "integer", "qdq"])
@torch.no_grad()
def test_tensors_of_an_onnx_file_are_called_as_the_fields_that_the_network_gives(unchecked, form):
    pytest.importorskip("onnxscript")
    from spikeformers.deploy.onnx import onnx_graph

    model, images = Masks().eval(), 4 * torch.randn(2, 3, 4, 4)
    model = model if form == "float" else integer(model, images)
    found = session(onnx_graph(model, images, form=form).SerializeToString(), images)
    assert list(found) == ["class_logits", "mask_logits"]
    assert largest_error(tuple(found.values()), tuple(model(images))[:2]) <= FLOAT32


@torch.no_grad()
def test_two_neurons_may_read_one_tensor_of_an_onnx_file(unchecked):
    pytest.importorskip("onnxscript")
    from spikeformers.deploy.onnx import onnx_graph

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = sf.neurons.ILIF(levels=2), sf.neurons.ILIF(levels=3)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            return self.one(y) + self.other(y)

    fork, images = Fork().eval(), 4 * torch.randn(2, 3, 4, 4)
    assert torch.equal(session(onnx_graph(fork, images).SerializeToString(), images)["logits"], fork(images))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), [("fpn", {}), ("spike2former", SHORT)])
def test_in_openvino_the_engine_gives_the_same(segmenter, unchecked, pictures, kind, sizes):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    model, images = low_bit(segmenter(kind, **sizes)), pictures.float()
    engine, other = (integer(model, images, backend=backend) for backend in ("torch", "openvino"))
    found = other(images)
    assert type(found) is type(engine(images))
    assert largest_error(found, engine(images)) <= FLOAT32
    assert other.compare(model, pictures).equal > 0.99

"""ONNX files: equal to the network in float64, to the engine in every bit, readable without this project."""

from pathlib import Path

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers.deploy import integer
from spikeformers.deploy.counts import CountNeuron
from spikeformers.deploy.floats import PerImage
from spikeformers.deploy.onnx import TWINS, export_onnx, onnx_graph
from spikeformers.deploy.rounding import Rounding
from spikeformers.deploy.runtime import KINDS
from spikeformers.neurons import LIF

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("unchecked")  # the exporter would trace the checker's wrappers


def run(file: str | Path | bytes, images: torch.Tensor) -> torch.Tensor:
    """First output of an ONNX graph in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def trained(name: str, images: torch.Tensor, **options) -> nn.Module:
    """A network of the catalogue whose batch norms have seen `images`, so that its neurons fire."""
    model = sf.create_model(name, num_classes=5, **options).to(images.dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)
            module.momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("meta_spikeformer_15m", {"dims": (4, 8, 8, 8), "blocks": (1, 0, 0, 1, 0), "neuron": "i_lif"}, (3, 3, 16, 16)),
        ("qsd_transformer_t", {"dims": (4, 8, 8, 8), "blocks": (0, 0, 0, 1, 0), "layer_scale": 1.0}, (3, 3, 16, 16)),
        ("spikformer_cifar_2_384", {"dim": 16, "depth": 1, "heads": 2, "steps": 2}, (2, 3, 3, 8, 8)),
        ("spikformer_v2_8_384", {"dim": 16, "depth": 1, "heads": 2, "steps": 2, "patch_size": 4}, (3, 3, 8, 8)),
    ],
)
def test_in_float64_the_file_is_the_network(name, options, shape, tmp_path):
    images = torch.randn(shape, dtype=torch.float64)
    model = trained(name, images, **options)
    with torch.no_grad():
        expected = model(images)
    assert expected.std() > 0
    graph = onnx.load(export_onnx(model, images, tmp_path / "model.onnx"))
    # onnxruntime has no float64 convolution, so onnx's own evaluator runs it; it sums in another order.
    found = onnx.reference.ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_an_exact_network_is_every_bit_the_same_in_every_form():
    images = torch.randn(3, 3, 16, 16)
    options = {"dims": (4, 8, 8, 8), "blocks": (0, 0, 0, 1, 0), "neuron": "ie_lif", "num_classes": 5}
    model = sf.quantize.prepare(sf.create_model("meta_spikeformer_15m", **options), bits=4, exact=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)
    for _ in range(20):
        model(images)
    with torch.no_grad():
        expected = model.eval()(images)
    assert expected.std() > 0
    engine = integer(model, images)
    for each, form in ((model, "float"), (engine, "integer"), (engine, "qdq")):
        assert torch.equal(run(onnx_graph(each, images, form=form).SerializeToString(), images), expected)


def test_the_integer_form_gives_the_engines_logits_in_every_bit(dyadic, dyadic_images):
    model = dyadic()
    engine = integer(model, dyadic_images(1))
    file = onnx_graph(engine, dyadic_images(1)).SerializeToString()
    for batch in (1, 5):
        images = dyadic_images(batch)
        wanted = engine(images)
        assert wanted.std() > 0
        assert torch.equal(run(file, images), wanted)


def test_a_layer_whose_epilogue_misses_a_threshold_compares_sums(dyadic, dyadic_images):
    engine = integer(dyadic(), dyadic_images(1))
    fused = [module for module in engine.net.modules() if getattr(module, "thresholds", None) is not None]
    for layer in fused:
        layer.bias.add_(10)  # an epilogue with this bias would fire always
        layer._emits = False
    images = dyadic_images(3)
    assert len(fused) == 2
    assert torch.equal(run(onnx_graph(engine, images).SerializeToString(), images), engine(images))


@pytest.fixture(scope="module")
def qdq(tmp_path_factory, dyadic, dyadic_images) -> tuple[nn.Module, Path]:
    """An engine, and its file in the form qdq."""
    torch.manual_seed(0)
    images = dyadic_images(1)
    engine = integer(dyadic(), images)
    return engine, export_onnx(engine, images, tmp_path_factory.mktemp("onnx") / "new" / "engine.onnx", form="qdq")


def test_the_qdq_form_gives_the_same_bits_in_onnxruntime(qdq, dyadic_images):
    engine, path = qdq
    images = dyadic_images(4)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    assert torch.equal(run(path, images), engine(images))


def test_a_file_of_floats_gives_the_networks_logits(dyadic, dyadic_images):
    model, images = dyadic(), dyadic_images(3)
    with torch.no_grad():
        expected = model(images)
    # Behind the second layer weights are any numbers: sums differ by rounding, and no spike flips.
    found = run(onnx_graph(model, images).SerializeToString(), images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_file_says_what_it_is_and_nothing_of_the_machine_that_wrote_it(qdq):
    _, path = qdq
    graph = onnx.load(path)
    told = {entry.key: entry.value for entry in graph.metadata_props}
    assert told == {"model": "Sequential", "steps": "1", "form": "qdq", "spikeformers": sf.__version__}
    assert [each.name for each in graph.graph.input] == ["images"]
    assert [each.name for each in graph.graph.output] == ["logits"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {"0", "2", "4", "10", "12"} <= {node.name for node in graph.graph.node}
    assert str(Path(sf.__file__).parent).encode() not in path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()


def test_every_kind_of_layer_of_an_engine_has_its_twin():
    plain_torch = {Rounding}
    for twins in TWINS.values():
        assert set(twins) >= {*KINDS.values(), CountNeuron, PerImage} - plain_torch


def test_what_cannot_be_exported_is_refused_and_earlier_files_stay(tmp_path, dyadic, dyadic_images):
    path, images = tmp_path / "model.onnx", dyadic_images(1)
    path.write_text("earlier")
    model = dyadic()
    with pytest.raises(ValueError, match=r"got 'integer'; for \"integer\" export sf\.deploy\.integer"):
        export_onnx(model, images, path, form="integer")
    with pytest.raises(ValueError, match="integer, qdq, got 'float'"):
        export_onnx(integer(model, images), images, path, form="float")
    with pytest.raises(ValueError, match=r"expected images .* got shape \(3, 16, 16\)"):
        export_onnx(model, images[0], path)

    class Pair(nn.Sequential):
        def forward(self, x):
            return "logits", super().forward(x)

    with pytest.raises(ValueError, match="this one gives str"):
        export_onnx(Pair(nn.Conv2d(3, 4, 3), LIF()), images, path)

    class Counting(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / len(x)

    with pytest.raises(ValueError, match=r"fixes the batch of its graph: has it len\(x\)"):
        export_onnx(Counting(nn.Conv2d(3, 4, 3), LIF()), images, path)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]

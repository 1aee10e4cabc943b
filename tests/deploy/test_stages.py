"""The first stage of a network of two, to run elsewhere, and what completes it."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import spikeformers as sf
from spikeformers.deploy import completed, export_nir, export_onnx, first_stage, integer
from spikeformers.heads.proposals import Dense


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def equal(output: object, other: object) -> bool:
    pairs = zip(tree_leaves(output), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(("kind", "neuron"), [("mask_rcnn", "i_lif"), ("qsd_mask_rcnn", "ie_lif")])
@torch.no_grad()
def test_both_stages_give_what_the_network_gives(detector, pictures, kind, neuron, engine):
    model = detector(kind, neuron=neuron, steps=1)
    model = integer(model, pictures) if engine else model
    stage = first_stage(model)
    assert isinstance(stage(pictures), Dense)
    assert stage.device == model.device if engine else stage.steps == 1
    found = completed(model, stage)(pictures)
    assert equal(found, model(pictures))
    assert all(len(each.labels) for each in model.detect(found))


def test_the_first_stage_knows_its_steps(detector):
    assert first_stage(detector("mask_rcnn", neuron="lif", steps=3)).steps == 3


def test_the_first_stage_is_in_the_mode_of_its_network_and_can_be_compared(detector, pictures):
    model = detector("mask_rcnn", neuron="i_lif", steps=1).eval()
    assert not first_stage(model).training
    assert first_stage(model.train()).training
    engine = integer(model.eval(), pictures)
    assert first_stage(engine).compare(first_stage(model).double(), pictures).total == 2


def test_a_network_of_one_stage_has_no_first_one(detector, pictures):
    with pytest.raises(ValueError, match="Detector has no second stage: export it as it is"):
        first_stage(detector("yolo"))
    with pytest.raises(ValueError, match="DenseStage has no second stage"):
        first_stage(first_stage(detector("mask_rcnn")))


def test_a_graph_of_two_stages_is_refused_with_the_cure(detector, pictures, tmp_path):
    model = detector("mask_rcnn", neuron="i_lif", steps=1)
    cure = r"give sf\.deploy\.first_stage\(model\), and do the rest in torch"
    for write in (export_onnx, export_nir):
        with pytest.raises(ValueError, match=cure):
            write(model, pictures, tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match=cure):
        integer(model, pictures, backend="openvino")


def test_a_layer_that_runs_on_several_maps_is_shared_out_among_the_parts_of_nir(detector, pictures, tmp_path):
    pytest.importorskip("nir")
    report = export_nir(first_stage(detector("mask_rcnn", neuron="i_lif", steps=1)), pictures, tmp_path / "nir")
    assert 0.99 < report.share <= 1
    shared = [part for part in report.parts if any("proposals.head.conv" in node for node in part.nodes)]
    assert len(shared) > 1
    assert len({part.share for part in shared}) > 1


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_the_first_stage_of_an_engine_runs_from_an_onnx_file(detector, pictures, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = sf.quantize.prepare(detector("mask_rcnn", neuron="i_lif", steps=1), bits=4).eval()
    engine = integer(model, pictures)
    file = export_onnx(first_stage(engine), pictures, tmp_path / "stage.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> Dense:
        objectness, deltas, *maps = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        return Dense(objectness, deltas, tuple(maps))

    found, wanted = run(pictures), engine(pictures).dense
    for one, other in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # float layers
    assert len(engine.detect(completed(engine, run)(pictures))) == 2

"""Networks that detect, in every form in which they leave training: unrolled, audited, as engines and as files."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import spikeformers as sf
from spikeformers.deploy import Letterbox, ModelCard, audit, fuse, integer, unroll
from spikeformers.deploy.artifact import MOST
from spikeformers.deploy.outputs import equal_predictions, named_outputs
from spikeformers.deploy.unroll import summed
from spikeformers.heads import DenseStage, Detections, GridOutput
from spikeformers.neurons import Neuron

FLOAT64 = 1e-10  # sums in another order; boxes are up to 64
FLOAT32 = 1e-4


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def difference(output: object, other: object) -> float:
    """The largest between the tensors of two outputs."""
    pairs = [
        (one, another)
        for one, another in zip(tree_leaves(output), tree_leaves(other), strict=True)
        if isinstance(one, torch.Tensor) and one.numel()
    ]
    return max(float((one.double() - another.double()).abs().max()) for one, another in pairs)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        *(("yolo", {"neuron": "i_lif", "steps": 1, "levels": levels}) for levels in (1, 2, 4, 8)),
        ("yolo", {"neuron": "ie_lif", "steps": 1}),
        ("yolo", {"neuron": "lif", "steps": 2}),
        ("mask_rcnn", {"neuron": "i_lif"}),
        ("mask_rcnn", {"neuron": "lif", "steps": 2}),
        ("qsd_mask_rcnn", {}),
    ],
    ids=str,
)
@torch.no_grad()
def test_spikes_over_virtual_steps_add_up_to_the_counts_of_every_neuron(detector, pictures, kind, overrides):
    model = detector(kind, **overrides).double()
    unrolled = unroll(model)
    with sf.record(model) as wanted:
        expected = model(pictures)
    with sf.record(unrolled) as got:
        found = unrolled(pictures)
    assert difference(found, expected) <= FLOAT64
    assert difference(unrolled.detect(found), model.detect(expected)) <= FLOAT64
    assert wanted.keys() == got.keys()
    assert any(name.startswith("head.") for name in got)
    for name, spikes in got.items():
        neuron = unrolled.get_submodule(name)
        assert spikes.max() <= 1
        assert torch.equal(summed(spikes, levels=neuron.levels, steps=neuron.steps), wanted[name]), name


@pytest.mark.parametrize("kind", ["yolo", "mask_rcnn"])
@torch.no_grad()
def test_merged_layers_give_the_same(detector, pictures, kind):
    model = detector(kind, neuron="i_lif", steps=1).double()
    assert difference(fuse(model)(pictures), model(pictures)) <= FLOAT64


@pytest.mark.parametrize(("kind", "neuron"), [("yolo", "i_lif"), ("mask_rcnn", "i_lif"), ("qsd_mask_rcnn", "ie_lif")])
@torch.no_grad()
def test_given_equal_counts_every_layer_of_the_engine_fires_as_the_network(detector, pictures, kind, neuron):
    model = sf.quantize.prepare(detector(kind, neuron=neuron, steps=1), bits=4).double().eval()
    engine = integer(model, pictures)
    wrong = engine.compare_layers(model, pictures)
    assert wrong
    assert not any(wrong.values())
    assert any(name.startswith("head.") for name in engine.spike_fed)
    found = engine.detect(engine(pictures))
    assert [type(each) for each in found] == [Detections, Detections]


@torch.no_grad()
def test_the_fast_path_is_the_readable_one_for_every_batch_and_size(detector, pictures):
    model, images = detector("yolo", neuron="i_lif", steps=1), pictures.float()
    fast, readable = integer(model, images), integer(model, images, fast=False)
    whole = fast(images)
    assert type(whole) is GridOutput
    assert difference(readable(images), whole) == 0
    alone = fast(images[1:])
    assert all(torch.equal(one, both[1:]) for one, both in zip(alone, whole, strict=True))
    assert difference(fast(torch.ones(1, 3, 96, 64)), integer(model, images[:1])(torch.ones(1, 3, 96, 64))) == 0


@pytest.mark.parametrize(("kind", "neuron", "steps"), [("mask_rcnn", "lif", 2), ("qsd_mask_rcnn", "ie_lif", 1)])
@torch.no_grad()
def test_the_layer_that_all_levels_share_is_an_integer_one(detector, pictures, kind, neuron, steps):
    model = sf.quantize.prepare(detector(kind, neuron=neuron, steps=steps), bits=4).double().eval()
    engine = integer(model, pictures)
    conv, head = engine.net.head.proposals.head.conv[0], "head.proposals.head"
    paths = {layer.name: layer.path for layer in engine.report().layers}
    assert paths[f"{head}.conv.0"] == "int8"
    with sf.record(model) as spikes:
        model(pictures)
    for level, each in enumerate(model.head.proposals.head.level_neurons):
        counts = spikes[f"{head}.level_neurons.{level}"]
        wanted = model.head.proposals.head.conv(counts.double() * each.unit)  # with the norm, which is folded
        assert wanted.abs().max() > 0
        torch.testing.assert_close(conv(counts.byte()).double(), wanted, rtol=1e-6, atol=1e-6)  # the scale is float32
    rates = engine.compare(model, pictures).flip_rates
    assert max(rate for name, rate in rates.items() if name.startswith(head)) < 0.01  # float layers may flip a count


def assured(model: nn.Module) -> nn.Module:
    """`model`, but certain of what it finds."""
    head = model.head
    for layer in [each.conv for each in head.predict] if hasattr(head, "predict") else [head.boxes.classify]:
        layer.bias.data = 3 + torch.randn_like(layer.bias)
    return model


@pytest.mark.parametrize("kind", ["yolo", "mask_rcnn"])
@torch.no_grad()
def test_an_engine_is_compared_by_its_detections(detector, pictures, kind):
    model = sf.quantize.prepare(assured(detector(kind, neuron="i_lif", steps=1)), bits=4).double().eval()
    engine = integer(model, pictures)
    found = engine.compare(model, [pictures, pictures[:1]])
    assert found.total == 3
    assert found.predictions >= 3
    assert found.equal > 0.9  # float layers may flip a count
    assert set(found.flip_rates) == {
        name
        for name, each in model.named_modules()
        if isinstance(each, Neuron) and not name.startswith(("head.boxes.", "head.masks."))
    }
    assert found.largest_error < FLOAT32 or found.flipped
    other = engine.compare(assured(copy.deepcopy(model)), pictures)
    assert other.equal < found.equal
    assert other.different == (0, 1)
    assert max(other.flip_rates.values()) == max(engine.compare(model, pictures).flip_rates.values())


class Finder(nn.Module):
    """A detector that finds what its outputs are."""

    def detect(self, output):
        return output


def test_detections_that_one_side_alone_is_certain_of_are_not_the_same():
    box, labels = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([0, 1])
    both = Detections(box, torch.tensor([0.9, 0.8]), labels)
    one = both._replace(scores=torch.tensor([0.9, 0.2]))
    nothing = both._replace(scores=torch.tensor([0.1, 0.1]))
    equal = equal_predictions(Finder(), [both, one, nothing], [both, both, nothing], (32, 32))
    assert equal.equal.tolist() == [2, 1, 0]
    assert equal.total.tolist() == [2, 2, 0]
    assert equal.everywhere.tolist() == [True, False, True]


@torch.no_grad()
def test_where_neither_finds_anything_all_is_equal(detector, pictures):
    model = detector("yolo", neuron="i_lif", steps=1).double()
    for layer in model.head.predict:
        layer.conv.bias.fill_(-20)
        layer.conv.weight.zero_()
    found = integer(model, pictures).compare(model, pictures)
    assert (found.predictions, found.equal, found.same, found.different) == (0, 1.0, 2, ())


@torch.no_grad()
def test_a_second_stage_that_looks_at_other_regions_is_no_error(detector, pictures):
    model = detector("mask_rcnn", neuron="i_lif", steps=1, regions=7).double()
    engine = integer(model, pictures)
    other = copy.deepcopy(model)
    other.head.proposals.head.objectness.weight.data.neg_()
    other.head.proposals.nms_thresh = 0.1  # fewer regions
    found = engine.compare(other, pictures)
    assert found.largest_error > 0
    assert found.total == 2


def test_an_engine_that_classifies_finds_no_boxes(small, images):
    with pytest.raises(ValueError, match="MetaSpikeFormer finds no boxes"):
        (engine := integer(small("i_lif"), images)).detect(engine(images))


@pytest.mark.parametrize("kind", ["yolo", "mask_rcnn"])
@torch.no_grad()
def test_a_file_holds_the_engine_and_its_boxes(detector, pictures, kind, tmp_path):
    engine = integer(detector(kind, neuron="i_lif", steps=1), pictures)
    again = sf.deploy.load(sf.deploy.save(engine, tmp_path / "model.spk", labels=["a", "b", "c", "d"]))
    images = torch.randn(2, 3, 64, 96)
    found = again(images)
    assert difference(found, engine(images)) == 0
    sizes = torch.tensor([[64, 96], [32, 64]])
    assert difference(again.detect(found, sizes), engine.detect(engine(images), sizes)) == 0


def test_a_file_of_a_detector_holds_no_more_detections_than_memory_has_masks_for(detector, pictures, tmp_path):
    engine = integer(detector("yolo", neuron="i_lif", steps=1, limit=MOST["limit"]), pictures)
    assert MOST["limit"] < 2**12
    assert sf.deploy.load(sf.deploy.save(engine, tmp_path / "model.spk")).detects
    engine.config = dataclasses.replace(
        engine.config, head=dataclasses.replace(engine.config.head, limit=MOST["limit"] + 1)
    )
    with pytest.raises(ValueError, match="limit of its config must lie between 0 and 1024, got 1025"):
        sf.deploy.save(engine, tmp_path / "other.spk")
    assert not (tmp_path / "other.spk").exists()


@pytest.mark.parametrize("turning", [False, True])
def test_a_file_says_how_pictures_are_padded(detector, pictures, turning, tmp_path):
    numbers = {"channels": 3, "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "interpolation": "bilinear"}
    letterbox = Letterbox(window=(40, 60), turning=turning, **numbers)
    engine = integer(detector("yolo", neuron="i_lif", steps=1), pictures)
    card = ModelCard(map=0.4, ap50=0.6, mask_map=0.3)
    file = sf.deploy.load(sf.deploy.save(engine, tmp_path / "model.spk", preprocessing=letterbox, card=card))
    assert (file.preprocessing, file.card) == (letterbox, card)


def test_the_audit_finds_all_layers_of_the_head_driven_by_spikes_and_what_is_not(detector, pictures):
    # Between the stages of Mask R-CNN regions are chosen by scores and pooled between pixels; and the norm of the first
    # stage stands behind the maps of all levels.
    between = {"taps", "norm", "softmax", "product"}
    for kind, products in (("yolo", set()), ("mask_rcnn", between)):
        report = audit(detector(kind, neuron="i_lif", steps=1), pictures[:1].float())
        head = [row for row in report.rows if row.name.startswith("head")]
        layers = [row for row in head if row.kind in ("conv", "linear")]
        assert len(layers) > 10
        assert {row.how for row in layers} == {"AC (integer)"}, kind
        assert {row.kind for row in head if row.how == "MAC"} == products


class First(nn.Module):
    """A stage that gives its result without the maps, which stay on the device that computes them."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dense = self.stage(images)
        return dense.objectness, dense.deltas, *dense.maps


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("yolo", "float"), ("yolo", "integer"), ("mask_rcnn", "float")])
@torch.no_grad()
def test_an_onnx_file_gives_what_no_choice_of_boxes_is_needed_for(detector, unchecked, pictures, kind, form):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from spikeformers.deploy.onnx import onnx_graph

    model, images = detector(kind, neuron="i_lif", steps=1), pictures.float()
    if kind == "mask_rcnn":
        model = First(DenseStage(model.backbone, model.head))
    model = integer(model, images) if form == "integer" else model
    graph = onnx_graph(model, images, form=form).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": images[:1].numpy()})  # the batch is free
    for got, wanted in zip(found, named_outputs(model(images[:1])).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=FLOAT32)


def test_a_file_whose_masks_would_fill_the_memory_is_refused(detector, tmp_path):
    model = detector("mask_rcnn", neuron="i_lif", steps=1, limit=100)
    engine = integer(model, torch.randn(1, 3, 64, 64))
    large = Letterbox(window=(4096, 4096), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(ValueError, match=r"limit=\d+ masks of window=\(4096, 4096\) are [\d,]+ pixels"):
        sf.deploy.save(engine, tmp_path / "model.spk", preprocessing=large)
    assert not any(tmp_path.iterdir())

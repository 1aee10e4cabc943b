"""Few bits in networks that detect: trained a step, packed, and folded they find the same."""

import copy

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers.heads import Detections
from spikeformers.quantize import LSQLayer, PackedLayer, convert, fold, prepare
from spikeformers.quantize.prepare import quantizable

KINDS = ("yolo", "mask_rcnn", "qsd_mask_rcnn")


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64)


def trained(model: nn.Module, images: torch.Tensor, *, bits: int = 4) -> nn.Module:
    """`model` with few bits, one training step on."""
    model = prepare(model, bits=bits).train()
    boxes = torch.tensor([[4.0, 6, 40, 44], [10, 30, 60, 62]])
    masks = torch.zeros(2, *images.shape[2:], dtype=torch.bool)
    masks[:, 8:40, 12:40] = True
    target = {"boxes": boxes, "labels": torch.tensor([0, 3]), "size": torch.tensor(images.shape[2:]), "masks": masks}
    targets = [target | {"crowd": torch.zeros(2, dtype=torch.bool)}] * len(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = torch.stack(list(model.loss(model(images, targets), targets).values())).sum()
    loss.backward()
    untouched = [name for name, each in model.named_parameters() if each.grad is None]
    assert not untouched
    optimizer.step()
    assert loss.isfinite()
    return model.eval()


@torch.no_grad()
def detections(model: nn.Module, images: torch.Tensor) -> list[Detections]:
    found = model.detect(model(images))
    assert all(len(each.labels) for each in found)
    return found


def same(found: list[Detections], wanted: list[Detections]) -> bool:
    return all(
        (one is None) == (other is None) and (one is None or torch.equal(one, other))
        for each, due in zip(found, wanted, strict=True)
        for one, other in zip(each, due, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_trained_with_four_bits_and_packed_it_finds_the_same_bit_by_bit(detector, pictures, kind):
    before = detector(kind)
    model = trained(copy.deepcopy(before), pictures)
    assert not same(detections(model, pictures), detections(before, pictures))
    wanted, packed = detections(model, pictures), convert(copy.deepcopy(model))
    layers = [each for each in packed.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    assert all(isinstance(each, PackedLayer) and each.bits == 4 for each in layers)
    assert same(detections(packed, pictures), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_folded_it_finds_the_same_up_to_rounding(detector, pictures, kind):
    model = trained(detector(kind), pictures).double()
    wanted = detections(model, pictures.double())
    for each, due in zip(detections(fold(convert(copy.deepcopy(model))), pictures.double()), wanted, strict=True):
        torch.testing.assert_close(each.boxes, due.boxes, rtol=0, atol=1e-10)
        torch.testing.assert_close(each.scores, due.scores, rtol=0, atol=1e-12)
        assert torch.equal(each.labels, due.labels)


@pytest.mark.parametrize("kind", ["yolo", "mask_rcnn"])
def test_saved_packed_and_loaded_it_finds_the_same(detector, pictures, kind, tmp_path):
    model = convert(trained(detector(kind), pictures))
    again = sf.from_pretrained(model.save_pretrained(tmp_path / "model")).eval()
    assert same(detections(again, pictures), detections(model, pictures))


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("yolo", {f"head.predict.{grid}.conv" for grid in range(3)}),
        (
            "mask_rcnn",
            {
                *("head.proposals.head.objectness", "head.proposals.head.deltas"),
                *("head.boxes.classify", "head.boxes.deltas", "head.masks.classify"),
            },
        ),
    ],
)
def test_last_layers_are_those_that_give_results(detector, kind, last):
    model = prepare(detector(kind), bits={"last": 8, "first": None, "*": 2})
    bits = {name: getattr(layer, "bits", None) for name, layer, _ in quantizable(model)}
    assert {name for name, width in bits.items() if width == 8} == last
    assert [name for name, width in bits.items() if width is None] == ["backbone.stage1a.down.conv.conv"]


def test_qsd_mask_rcnn_is_born_with_four_bits_everywhere(detector):
    layers = [each for each in detector("qsd_mask_rcnn").modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    assert all(isinstance(each, LSQLayer) and each.bits == 4 for each in layers)

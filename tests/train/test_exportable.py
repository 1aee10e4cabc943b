"""What a finished run is to `export`: here one of two stages that draws masks; others are tested as commands."""

import pytest
import torch

from spikeformers.deploy import load, save
from spikeformers.deploy.agreement import neurons_of_images
from spikeformers.heads import RegionOutput
from spikeformers.heads.proposals import Dense
from spikeformers.train.exportable import ExportableDetector, read_exportable
from spikeformers.train.exporting import card_of, check_one_size, compared, comparison_facts, engine_of, onnx_fact
from spikeformers.train.loop import train


@pytest.fixture
def subject(with_masks, tmp_path) -> ExportableDetector:
    train(with_masks(epochs=1), run=tmp_path / "run")
    return read_exportable(tmp_path / "run")


def test_a_run_of_two_stages_is_compared_by_its_first_one_and_by_boxes_and_masks(subject, tmp_path):
    engine = engine_of(subject)
    found = compared(subject, engine, images=10)
    assert (found.images, found.inputs) == (3, 3)
    assert found.before.keys() == found.after.keys() == {"map", "ap50", "mask_map"}
    names = neurons_of_images(engine, subject.model)
    assert names
    assert not [name for name in names if name.startswith(("head.boxes", "head.masks"))]
    told = dict(comparison_facts(subject, found))
    assert list(told) == ["Counts equal", "Images with a flip", "mAP", "AP50", "mAP of masks"]
    card = card_of(subject, found, license_note="CC0")
    assert (card.map, card.ap50, card.mask_map) == tuple(found.after[name] for name in ("map", "ap50", "mask_map"))
    file = load(save(engine, tmp_path / "model.spk", **subject.about(), card=card))
    assert file.card == card
    assert file.preprocessing == subject.recipe.data.letterbox


@torch.no_grad()
def test_a_graph_of_two_stages_holds_the_first_and_the_engine_completes_it(subject):
    engine = engine_of(subject)
    stage = subject.in_graph(engine)
    assert isinstance(stage(subject.image()), Dense)
    assert "second stage" in subject.missing
    run = subject.completed(engine, stage)
    assert isinstance(run(subject.image()), RegionOutput)
    name, told = onnx_fact(subject, engine, run, images=2)
    assert name == "In onnxruntime"
    assert told.startswith("2 images: ")
    assert told.endswith("as in the engine, logits within 0")
    worse = subject.completed(engine, lambda images: stage(images + 0.5))
    assert not onnx_fact(subject, engine, worse, images=2)[1].endswith("within 0")


def test_pictures_of_several_sizes_have_no_graph_of_one_and_the_cure_is_said(subject, monkeypatch):
    monkeypatch.setattr(ExportableDetector, "inputs", lambda *_: [torch.zeros(1, 3, 32, 64), torch.zeros(1, 3, 64, 32)])
    with pytest.raises(ValueError, match=r"give 3, from 32 x 32 to 64 x 32: train with data\.fit=letterbox, or take"):
        check_one_size(subject, images=2, what="an ONNX file")


def test_agreement_without_any_detection_is_told_as_such(subject):
    assert subject.agreeing(3, 1.0, predictions=0) == "neither finds anything with a score of 0.3 or more"
    assert subject.agreeing(3, 0.5, predictions=8) == "same box and class for 50.000 % of 8 detections"


def test_test_images_without_objects_cannot_say_what_a_file_is_worth(subject, monkeypatch):
    """By chance, of few; the message is that of the test."""
    monkeypatch.setattr("spikeformers.train.evaluate.drawn", lambda *_: [1])  # the picture without any object
    with pytest.raises(ValueError, match="no test picture holds an object"):
        subject.before(1)

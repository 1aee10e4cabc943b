"""Detection as a task: training to a summary and a report, resuming, comparing with the engine, what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from spikeformers.data.splits import load_split
from spikeformers.heads import Detections
from spikeformers.train.detection import ObjectDetection, box_agreement, matched
from spikeformers.train.detection_evaluate import evaluate_detection
from spikeformers.train.detection_pictures import certain, found_in, marked, truth_of
from spikeformers.train.detection_report import precisions
from spikeformers.train.evaluate import batches_of
from spikeformers.train.loop import _Work, train
from spikeformers.train.recipe import Distill, ModelChoice, Pretrain, Segmentation
from spikeformers.train.report import write_report
from spikeformers.train.results import detection_rows
from spikeformers.train.seeds import train_seeds
from spikeformers.train.summary import DetectionSummary, read_summary
from spikeformers.train.tasks import build_task
from spikeformers.zoo import from_pretrained

COLOURS = torch.tensor([[255, 0, 0], [0, 0, 255]], dtype=torch.uint8)


def boxes(*rows: tuple[float, float, float, float], labels: list[int], scores: list[float] | None = None) -> Detections:
    found = scores or [0.9] * len(labels)
    return Detections(torch.tensor(rows).view(-1, 4), torch.tensor(found), torch.tensor(labels, dtype=torch.long))


@pytest.fixture
def with_masks(detecting):
    """The recipe with a small Mask R-CNN instead, which also draws masks."""
    options = {"heads": 2, "region_dim": 8, "fc_dim": 8, "norm": "batch_norm", "regions": 12, "samples": 8}
    model = dataclasses.replace(detecting().model, name="meta_spikeformer_15m_mask_rcnn", options=options)
    data = dataclasses.replace(detecting().data, masks=True)
    return lambda **changes: detecting(name="with_masks", data=data, model=model, **changes)


@pytest.mark.parametrize("kind", ["detecting", "with_masks"])
def test_a_training_ends_in_a_summary_that_its_network_reaches_again(kind, request, tmp_path):
    recipe = request.getfixturevalue(kind)(epochs=1)
    summary = train(recipe, run=tmp_path / "run")
    assert isinstance(summary, DetectionSummary)
    assert summary == read_summary(tmp_path / "run")
    model, split = from_pretrained(tmp_path / "run" / "model"), load_split(recipe.data, "test")
    found = evaluate_detection(model, batches_of(split, batch_size=2))
    # The run tests the network in training's memory layout, whose convolutions may round otherwise.
    assert summary.map == pytest.approx(found.score, abs=1e-3)
    assert (summary.mask_map is not None) == recipe.data.masks
    assert summary.images == 3
    assert summary.energy_mj > 0
    assert any(name.startswith("head.") for name in summary.layers)
    assert summary.floor_ap50 > 0
    rows = dict(detection_rows(summary))
    assert rows["Best fixed boxes"].startswith(f"AP50 {100 * summary.floor_ap50:.2f} %")
    page = write_report(tmp_path / "run").read_text()
    for part in ("Precision and recall", "AP50 of each class", "the best fixed boxes", "Test pictures in pairs"):
        assert part in page


def test_an_interrupted_detection_ends_as_the_uninterrupted_one(detecting, tmp_path, monkeypatch):
    whole = train(detecting(), run=tmp_path / "whole")
    close = _Work.close_epoch

    def stop(self, show, logs):
        close(self, show, logs)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Work, "close_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(detecting(), run=tmp_path / "cut")
    monkeypatch.undo()
    again = train(detecting(), run=tmp_path / "cut", resume=True)
    assert (again.map, again.layers) == (whole.map, whole.layers)
    ours, theirs = (from_pretrained(tmp_path / name / "model").state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_seeds_are_compared_by_map(detecting, tmp_path):
    found = train_seeds(detecting(epochs=1), (0, 1), run=tmp_path / "run")
    assert found.mean == pytest.approx(np.mean([each.map for each in found.summaries]))


def test_detections_match_by_class_and_box_each_once():
    found = boxes((0, 0, 10, 10), (0, 0, 10, 10), (20, 20, 30, 30), labels=[0, 0, 1])
    other = boxes((0, 0, 10, 10.5), (20, 20, 30, 30), labels=[0, 0])
    assert matched(found, found) == 3
    assert matched(found, other) == 1  # the second box meets nothing that is left, the third has another class
    assert matched(found, boxes(labels=[])) == 0


def test_an_engine_that_is_the_network_agrees_in_all(detecting, tmp_path):
    recipe = detecting()
    split = load_split(recipe.data, "test")

    class Finder(torch.nn.Module):
        def forward(self, images):
            return images

        def detect(self, output, sizes):
            return [boxes((1, 1, 9, 9), (2, 2, 9, 30), labels=[0, 1], scores=[0.8, 0.1]) for _ in sizes]

    assert box_agreement(Finder(), Finder(), split, images=2) == {"same": 2, "total": 2, "images": 2}


def test_only_certain_detections_are_drawn_each_in_its_colour():
    found = boxes((4, 4, 20, 20), (30, 4, 44, 20), labels=[0, 1], scores=[0.9, 0.2])
    page = marked(torch.zeros(1, 64, 64, dtype=torch.uint8), certain(found), classes=("a", "b"), colours=COLOURS)
    assert page.shape == (3, 64, 64)
    assert page[:, 12, 4].tolist() == [255, 0, 0]
    assert page[:, 19, 30].tolist() == [0, 0, 0]  # below the first one's label
    bare = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    assert torch.equal(marked(bare, boxes(labels=[]), classes=("a",), colours=COLOURS), bare)


def test_masks_are_drawn_under_their_boxes():
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 40:, 40:] = True
    found = boxes((4, 4, 20, 20), labels=[1])._replace(masks=masks)
    page = marked(torch.zeros(3, 64, 64, dtype=torch.uint8), found, classes=("a", "b"), colours=COLOURS)
    assert page[2, 50, 50] > 60
    assert page[2, 30, 30] == 0


def test_truth_and_what_is_found_are_in_pixels_of_the_file(detecting):
    split = load_split(detecting().data, "test")  # files of 24 x 32 in a frame of 32 x 32
    truth = truth_of(split, 0)
    assert torch.equal(truth.boxes[:, 2:] - truth.boxes[:, :2], torch.tensor([[7.0, 11.0]] * 2, dtype=torch.float64))

    class Whole(torch.nn.Module):
        def forward(self, images):
            return images

        def detect(self, output, sizes):
            height, width = sizes[0].tolist()
            return [boxes((0, 0, width, height), labels=[0])]

    assert found_in(Whole(), split, 0).boxes.tolist() == [[0, 0, 32, 24]]


def test_many_classes_are_drawn_as_their_mean_the_best_and_the_worst():
    names = ("a", "b", "c", "d", "absent")
    curves = {name: [level] * 101 for name, level in zip(names, (0.2, 0.8, 0.4, 0.6, -1.0), strict=True)}
    ap = {name: curve[0] if name != "absent" else None for name, curve in curves.items()}
    drawn = precisions({"curves": curves, "per_class_ap50": ap})
    assert list(drawn) == ["mean of 4 classes", "b", "a"]
    assert drawn["mean of 4 classes"][100] == pytest.approx((100, 50))
    few = {"curves": curves, "per_class_ap50": {"a": 0.2, "b": 0.8, "absent": None}}
    assert list(precisions(few)) == ["b", "a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 0.1}, r"label_smoothing=0\.1 is of no use in detection"),
        ({"distill": Distill(teacher="resnet18")}, r"distill\.teacher=resnet18 is of no use in detection"),
        ({"pretrain": Pretrain(mask_ratio=0.5)}, r"pretrain\.mask_ratio=0\.5 is of no use in detection"),
        ({"segmentation": Segmentation(class_weights=1.0)}, r"segmentation\.class_weights=1\.0 is of no use"),
        ({"model": ModelChoice()}, r"MetaSpikeFormer gives no boxes: choose a model\.name with a detection head"),
    ],
)
def test_what_detection_has_no_use_for_is_refused(detecting, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(detecting(**change), run=tmp_path / "run")


def test_the_task_follows_from_the_data(detecting):
    recipe = detecting()
    task = build_task(recipe, split=load_split(recipe.data, "train"), device=torch.device("cpu"))
    assert isinstance(task, ObjectDetection)


def test_the_page_of_samples_is_a_picture(detecting, tmp_path):
    train(detecting(epochs=1), run=tmp_path / "run")
    with Image.open(tmp_path / "run" / "detections.png") as page:
        assert page.size[0] > 4 * 320

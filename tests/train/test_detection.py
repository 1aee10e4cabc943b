"""Detection as a task: training to a summary and a report, resuming, comparing with the engine, what it refuses."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spikeformers.data.splits import load_split
from spikeformers.heads.detections import Detections, certain
from spikeformers.train import checkpoint, optimise
from spikeformers.train.detection import ObjectDetection, box_agreement
from spikeformers.train.detection_evaluate import evaluate_detection
from spikeformers.train.detection_pictures import found_in, marked, truth_of
from spikeformers.train.detection_prediction import BoxPredictor
from spikeformers.train.detection_report import precisions
from spikeformers.train.evaluate import batches_of
from spikeformers.train.loop import _Work, train
from spikeformers.train.recipe import Distill, ModelChoice, Pretrain, Saving, Segmentation
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


@pytest.mark.parametrize("kind", ["detecting", "with_masks"])
def test_a_training_ends_in_a_summary_that_its_network_reaches_again(kind, request, tmp_path):
    recipe = request.getfixturevalue(kind)(epochs=1)
    summary = train(recipe, run=tmp_path / "run")
    assert isinstance(summary, DetectionSummary)
    assert summary == read_summary(tmp_path / "run")
    model, split = from_pretrained(tmp_path / "run" / "model"), load_split(recipe.data, "test")
    found = evaluate_detection(model, batches_of(split, batch_size=2), num_classes=2)
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


def test_a_detection_interrupted_within_an_epoch_ends_as_the_uninterrupted_one(with_masks, tmp_path, monkeypatch):
    recipe = with_masks(saving=Saving(every_steps=1))
    whole = train(recipe, run=tmp_path / "whole")
    steps = iter([None] * 4)
    real = optimise.gradient_norm

    def failing(*given, **options):
        next(steps)  # StopIteration in the fifth of six steps
        return real(*given, **options)

    monkeypatch.setattr("spikeformers.train.loop.gradient_norm", failing)
    with pytest.raises(StopIteration):
        train(recipe, run=tmp_path / "cut")
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path / "cut" / "checkpoints").name == "epoch-0001-step-000001"
    again = train(recipe, run=tmp_path / "cut", resume=True)
    assert (again.map, again.mask_map, again.layers) == (whole.map, whole.mask_map, whole.layers)
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_test_split_without_its_last_class_has_a_summary_all_the_same(detecting, draw_coco, tmp_path):
    for split, objects in (("train", [([2, 3, 7, 11], 3), ([12, 6, 9, 9], 7)]), ("test", [([2, 3, 7, 11], 3)])):
        draw_coco(tmp_path / "dogs", split=split, pictures=[objects, objects])
    data = dataclasses.replace(detecting().data, root=str(tmp_path / "dogs"))
    options = detecting().model.options | {"score_threshold": 1.0}  # nothing is found
    model = dataclasses.replace(detecting().model, options=options)
    summary = train(detecting(epochs=1, data=data, model=model), run=tmp_path / "run")
    assert summary.classes == ["dog", "cat"]
    assert summary.per_class_ap50 == {"dog": 0.0, "cat": None}
    assert summary.curves["cat"] == [-1.0] * 101


def test_seeds_are_compared_by_map(detecting, tmp_path):
    found = train_seeds(detecting(epochs=1), (0, 1), run=tmp_path / "run")
    assert found.mean == pytest.approx(np.mean([each.map for each in found.summaries]))


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
    assert page.shape == (3, 320, 320)  # as wide as a page: five times
    assert page[:, 60, 20].tolist() == [255, 0, 0]
    assert page[:, 95, 150].tolist() == [0, 0, 0]  # where the other one would be
    bare = torch.full((3, 160, 320), 7, dtype=torch.uint8)
    assert torch.equal(marked(bare, boxes(labels=[]), classes=("a",), colours=COLOURS), bare)


def test_a_narrow_picture_stays_within_four_pages():
    page = marked(torch.zeros(3, 4000, 2, dtype=torch.uint8), boxes(labels=[]), classes=("a",), colours=COLOURS)
    assert page.shape == (3, 4000, 2)


def test_masks_are_drawn_under_their_boxes():
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 40:, 40:] = True
    found = boxes((4, 4, 20, 20), labels=[1])._replace(masks=masks)
    page = marked(torch.zeros(3, 64, 64, dtype=torch.uint8), found, classes=("a", "b"), colours=COLOURS)
    assert page[2, 250, 250] > 60
    assert page[2, 150, 150] == 0


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


def test_pictures_are_padded_for_drawing_and_for_the_engine_as_for_the_test(detecting, tmp_path, monkeypatch):
    """Files of 24 x 32 at 30 x 40 of 30 x 44 pixels, which batches are padded from to 32 x 64."""
    recipe = detecting(epochs=1)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, size=(30, 44)))
    split = load_split(recipe.data, "test")
    ((tested, _),) = batches_of(split, batch_size=3)
    shapes = []

    class Seeing(torch.nn.Module):
        def forward(self, images):
            shapes.append(images.shape[2:])

        def detect(self, output, sizes):
            return [boxes(labels=[]) for _ in sizes]

    def refuse(model, images):
        shapes.append(images.shape[2:])
        raise ValueError("not today")

    monkeypatch.setattr("spikeformers.train.detection.integer", refuse)
    found_in(Seeing(), split, 0)
    told = ObjectDetection(recipe, split=split)._integer_part(Seeing(), recipe, split)
    assert told == {"integer_agreement": None, "integer_refused": "not today"}
    assert shapes == [tested.shape[2:]] * 2 == [(32, 64)] * 2


def test_an_unreadable_picture_is_no_reason_of_the_engine(detecting, monkeypatch):
    recipe = detecting()
    split = load_split(recipe.data, "test")
    task = ObjectDetection(recipe, split=split)

    def unreadable(self, key):
        raise ValueError("0.png is damaged")

    monkeypatch.setattr(type(split), "__getitem__", unreadable)
    with pytest.raises(ValueError, match=r"0\.png is damaged"):
        task._integer_part(torch.nn.Identity(), recipe, split)


def test_many_classes_are_drawn_as_their_mean_the_best_and_the_worst():
    names = ("a", "b", "c", "d", "absent")
    curves = {name: [level] * 101 for name, level in zip(names, (0.2, 0.8, 0.4, 0.6, -1.0), strict=True)}
    ap = {name: curve[0] if name != "absent" else None for name, curve in curves.items()}
    drawn = precisions({"curves": curves, "per_class_ap50": ap})
    assert list(drawn) == ["mean of 4 classes", "b", "a"]
    assert drawn["mean of 4 classes"][100] == pytest.approx((100, 50))
    few = {"curves": curves, "per_class_ap50": {"a": 0.2, "b": 0.8, "absent": None}}
    assert list(precisions(few)) == ["b", "a"]


def test_a_picture_to_look_at_is_decoded_once_for_the_network_and_for_drawing(detecting, monkeypatch):
    spec = detecting().data
    split = load_split(spec, "test")
    predictor = BoxPredictor(torch.nn.Identity(), spec.letterbox, classes=("dog", "cat"), colours=COLOURS)
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *given: opened.append(given) or real(*given))
    seen = predictor.read(Path(split.names[0]))
    assert len(opened) == 1
    assert torch.equal(seen.input, split.collate([split[0]])[0][0])
    assert torch.equal(seen.pixels, split.picture(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 0.1}, r"label_smoothing=0\.1 is of no use in detection"),
        ({"distill": Distill(teacher="resnet18")}, r"distill\.teacher=resnet18 is of no use in detection"),
        ({"pretrain": Pretrain(mask_ratio=0.5)}, r"pretrain\.mask_ratio=0\.5 is of no use in detection"),
        (
            {"segmentation": Segmentation(class_weights=1.0)},
            r"segmentation\.class_weights=1\.0 is of no use in detection",
        ),
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

"""Average precision by hand and as faster-coco-eval gives it for a json; boxes back in the files' pixels; the floor."""

import json

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import nn
from torch.utils.data import DataLoader

from spikeformers.data import DetectionData, load_detection_split
from spikeformers.data.detection_sources import Objects
from spikeformers.heads.detections import Detections
from spikeformers.train import detection_evaluate
from spikeformers.train.detection_evaluate import Found, constant_boxes, evaluate_detection, in_file, score


def objects(boxes: list, labels: list, *, crowd: list | None = None) -> Objects:
    rows = zip(boxes, labels, crowd or [False] * len(boxes), strict=True)
    return Objects.of([(box, label, each, box[2] * box[3], None) for box, label, each in rows], masks=False)


def found(index: int, truth: Objects, boxes: list, scores: list, labels: list) -> Found:
    given = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Found(index, (100, 100), truth, given, np.array(scores), np.array(labels, dtype=np.int64))


class Scripted(nn.Module):
    """A detector that says what it is told, for one batch after the other."""

    def __init__(self, *batches: list[Detections]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.batches = iter(batches)
        self.sizes: list = []

    def forward(self, images):
        assert not self.training
        return images

    def detect(self, output, sizes):
        self.sizes += sizes.tolist()
        return next(self.batches)


def test_average_precision_by_hand():
    """Two objects; detections in the order right, wrong, right: precision 1 up to recall 1/2, then 2/3."""
    truth = objects([[0, 0, 10, 10], [50, 50, 10, 10]], [0, 0])
    boxes = [[0, 0, 10, 10], [20, 20, 10, 10], [50, 50, 10, 10]]
    result = score([found(0, truth, boxes, [0.9, 0.8, 0.7], [0, 0, 0])], num_classes=5)
    by_hand = (51 * 1 + 50 * 2 / 3) / 101  # recalls 0 to 0.5, and 0.51 to 1
    assert result.score == result.boxes.mean() == pytest.approx(by_hand)
    curve = result.boxes.curve(0)
    assert curve[:51].tolist() == [1.0] * 51
    assert curve[51:].tolist() == pytest.approx([2 / 3] * 50)


def test_a_box_counts_up_to_the_iou_it_has():
    """A box of IoU 0.8 is right at the thresholds 0.5 to 0.8, which are 7 of 10."""
    result = score([found(0, objects([[0, 0, 10, 10]], [0]), [[0, 0, 10, 8]], [1.0], [0])], num_classes=5)
    assert result.metrics() == {"test_map": pytest.approx(0.7), "test_ap50": 1.0, "test_ap75": 1.0}
    assert result.boxes.mean(iou=0.85) == 0.0


def test_classes_without_objects_count_nowhere_and_a_wrong_class_is_wrong():
    truth = objects([[0, 0, 10, 10], [50, 50, 10, 10]], [0, 2])
    boxes, labels = [[0, 0, 10, 10], [50, 50, 10, 10], [5, 5, 9, 9]], [0, 1, 3]
    result = score([found(0, truth, boxes, [0.9, 0.8, 0.7], labels)], num_classes=5)
    assert result.boxes.by_class("abcde") == {"a": 1.0, "b": None, "c": 0.0, "d": None, "e": None}
    assert result.score == 0.5


def test_a_last_class_that_nothing_shows_or_finds_is_absent_too():
    result = score([found(0, objects([[0, 0, 10, 10]], [0]), [[0, 0, 10, 10]], [0.9], [0])], num_classes=3)
    assert result.boxes.by_class("abc") == {"a": 1.0, "b": None, "c": None}
    assert result.boxes.curve(2).tolist() == [-1.0] * 101


def test_sizes_are_those_of_coco():
    truth = objects([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 0])
    result = score([found(0, truth, [[0, 0, 10, 10]], [0.9], [0])], num_classes=5)
    assert result.boxes.by_area() == {"small": 1.0, "medium": 0.0, "large": None}


def test_crowds_are_neither_missed_nor_held_against_a_detector():
    truth = objects([[0, 0, 10, 10], [30, 30, 60, 60]], [0, 0], crowd=[False, True])
    boxes = [[40, 40, 8, 8], [0, 0, 10, 10]]  # the first lies in the crowd
    assert score([found(0, truth, boxes, [0.9, 0.8], [0, 0])], num_classes=5).score == 1.0
    assert score([found(0, truth, boxes[1:], [0.8], [0])], num_classes=5).score == 1.0


def test_pictures_without_detections_or_without_objects_count_as_they_should():
    nothing, one = objects([], []), objects([[0, 0, 10, 10]], [0])
    assert score([found(0, one, [], [], []), found(1, nothing, [], [], [])], num_classes=5).score == 0.0
    here = found(0, one, [[0, 0, 10, 10]], [0.5], [0])
    assert score([here, found(1, nothing, [], [], [])], num_classes=5).score == 1.0
    assert score([here, found(1, nothing, [[0, 0, 10, 10]], [0.9], [0])], num_classes=5).score == 0.5
    for empty in ([], [found(0, nothing, [], [], [])], [found(0, nothing, [[1, 1, 2, 2]], [0.9], [0])]):
        with pytest.raises(ValueError, match="there is nothing to test on: no test picture holds an object"):
            score(empty, num_classes=5)


def splits_of(root, **changed):
    spec = DetectionData(**({"root": str(root), "size": (48, 64), "masks": True} | changed))
    return load_detection_split(spec, "train"), load_detection_split(spec, "test")


def guess(target: dict, *, seed: int) -> Detections:
    """The truth, shaken, some of it lost, with wrong ones among it, and rectangles as masks."""
    random = torch.Generator().manual_seed(seed)
    boxes = torch.cat([target["boxes"], target["boxes"] / 2]).double()
    boxes = boxes + 3 * torch.rand(boxes.shape, generator=random, dtype=torch.float64)
    labels = torch.cat([target["labels"], 1 - target["labels"]])
    scores = torch.rand(len(boxes), generator=random, dtype=torch.float64)
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.float64)  # as the batch is padded
    for mask, box in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 0.9
    return Detections(boxes, scores, labels, masks)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_result_is_what_faster_coco_eval_gives_for_the_json(coco_folder, kind):
    """The whole way, from files of 24 x 32 through a network's input of 48 x 64, padded to 64 x 64."""
    split = splits_of(coco_folder)[1]
    guesses = [guess(split[i][1], seed=i) for i in range(len(split))]
    model = Scripted(guesses[:2], guesses[2:])
    loader = DataLoader(split, batch_size=2, collate_fn=split.collate)
    result = evaluate_detection(model, loader, num_classes=2)
    assert model.sizes == [[48, 64]] * 3
    truth = COCO(str(coco_folder / "annotations/instances_test.json"))
    lines = []
    for index, each in enumerate(guesses):
        shapes = each.boxes.tolist() if kind == "bbox" else each.masks
        for label, certainty, shape in zip(each.labels.tolist(), each.scores.tolist(), shapes, strict=True):
            line = {"image_id": 10 + index, "category_id": [3, 7][label], "score": certainty}
            if kind == "bbox":
                left, top, right, bottom = (side / 2 for side in shape)
                lines.append(line | {"bbox": [left, top, right - left, bottom - top]})
            else:
                small = nn.functional.interpolate(shape[None, None, :48], (24, 32), mode="bilinear")[0, 0] > 0.5
                lines.append(line | {"segmentation": rle.encode(np.asfortranarray(small.byte().numpy()))})
    direct = COCOeval_faster(truth, truth.loadRes(lines), kind)
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    mine = result.boxes if kind == "bbox" else result.masks
    # The library names "all" first and writes -1 where there are no such objects.
    want = [None if value == -1 else pytest.approx(value, abs=1e-12) for value in direct.stats[:6]]
    assert [mine.mean(), mine.mean(iou=0.5), mine.mean(iou=0.75), *mine.by_area().values()] == want
    assert 0 < mine.mean() < 1
    assert np.array_equal(mine.table, np.array(direct.eval["precision"])[..., -1])


def test_the_truth_itself_scores_one(coco_folder):
    split = splits_of(coco_folder)[1]
    targets = [split[i][1] for i in range(len(split))]
    perfect = [
        Detections(
            t["boxes"], torch.ones(len(t["labels"])), t["labels"], nn.functional.pad(t["masks"].float(), (0, 0, 0, 16))
        )
        for t in targets
    ]
    loader = DataLoader(split, batch_size=3, collate_fn=split.collate)
    result = evaluate_detection(Scripted(perfect), loader, num_classes=2)
    assert result.metrics() == dict.fromkeys(
        ["test_map", "test_ap50", "test_ap75", "test_mask_map", "test_mask_ap50", "test_mask_ap75"], 1.0
    )
    assert result.images == 3


def test_masks_count_only_where_the_network_draws_and_the_split_reads_them(coco_folder):
    split = splits_of(coco_folder)[1]
    unmasked = splits_of(coco_folder, masks=False)[1]
    full = [guess(split[i][1], seed=i) for i in range(3)]
    bare = [each._replace(masks=None) for each in full]
    for guesses, chosen in ((bare, split), (full, unmasked)):
        loader = DataLoader(chosen, batch_size=3, collate_fn=chosen.collate)
        assert evaluate_detection(Scripted(guesses), loader, num_classes=2).masks is None


def test_boxes_and_masks_return_to_the_files_pixels():
    """A file of 10 x 40 seen at 5 x 10: rows by 2, columns by 4, and the padding below is left out."""
    masks = torch.zeros(1, 8, 16)
    masks[0, 2:, 5:] = 1
    seen = Detections(torch.tensor([[5.0, 2.0, 10.0, 5.0]]), torch.ones(1), torch.zeros(1, dtype=torch.long), masks)
    whole = in_file(seen, size=torch.tensor([5, 10]), original=torch.tensor([10, 40]))
    assert whole.boxes.tolist() == [[20, 4, 40, 10]]
    assert whole.masks.shape == (1, 10, 40)
    whole.masks[0, 4, 20] ^= True  # enlarging rounds the corner
    assert whole.masks[0, 4:, 20:].all()
    assert int(whole.masks.sum()) == 6 * 20
    none = in_file(
        Detections(*(part[:0] for part in seen)), size=torch.tensor([5, 10]), original=torch.tensor([10, 40])
    )
    assert none.masks.shape == (0, 10, 40)


def test_what_is_not_finite_is_refused(coco_folder):
    split = splits_of(coco_folder, masks=False)[1]
    guesses = [guess(split[i][1] | {"masks": None}, seed=i)._replace(masks=None) for i in range(3)]
    guesses[2].scores[0] = torch.nan
    loader = DataLoader(split, batch_size=3, collate_fn=split.collate)
    with pytest.raises(ValueError, match="test picture 2 gives values that are not finite; check images and weights"):
        evaluate_detection(Scripted(guesses), loader, num_classes=2)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [("yolo", [f"predict.{grid}.conv" for grid in range(3)]), ("mask_rcnn", ["boxes.classify"])],
    ids=["yolo", "mask_rcnn"],
)
def test_a_network_whose_scores_are_nan_is_refused_though_its_head_drops_them(coco_folder, detector, kind, layers):
    split = splits_of(coco_folder, masks=False)[1]
    model = detector(kind)
    for layer in layers:
        nn.init.constant_(model.head.get_submodule(layer).bias, torch.nan)
    images, targets = split.collate([split[0]])
    with torch.no_grad():
        (seen,) = model.detect(model(images), targets[0]["size"][None])
    assert not len(seen.scores)
    loader = DataLoader(split, batch_size=3, collate_fn=split.collate)
    with pytest.raises(ValueError, match="test picture 0 gives values that are not finite; check images and weights"):
        evaluate_detection(model, loader, num_classes=2)


def test_pictures_that_two_processes_test_count_once(coco_folder, monkeypatch):
    split = splits_of(coco_folder)[1]
    guesses = [guess(split[i][1], seed=i) for i in range(3)]
    loader = DataLoader(split, batch_size=3, collate_fn=split.collate)
    alone = evaluate_detection(Scripted(guesses), loader, num_classes=2)
    monkeypatch.setattr(detection_evaluate, "gather_object", lambda here: [*here[1:], here[0], here[1]])
    together = evaluate_detection(Scripted(guesses), loader, num_classes=2, accelerator=object())
    assert np.array_equal(alone.boxes.table, together.boxes.table)
    assert together.images == 3


def test_evaluation_prints_nothing_and_keeps_the_mode(coco_folder, capfd):
    split = splits_of(coco_folder)[1]
    model = Scripted([guess(split[i][1], seed=i) for i in range(3)]).train()
    evaluate_detection(model, DataLoader(split, batch_size=3, collate_fn=split.collate), num_classes=2)
    assert capfd.readouterr() == ("", "")
    assert model.training


def test_constant_boxes_find_what_lies_at_the_same_place_in_every_picture(tmp_path, draw_coco):
    """A cat in one place always; a dog in one place in the first three pictures of four, elsewhere in the last."""
    places = [[2, 2, 8, 8], [2, 2, 8, 8], [2, 2, 8, 8], [20, 12, 8, 8]]
    pictures = [[([12, 2, 6, 18], 7), (place, 3)] for place in places]
    for split in ("train", "test"):
        draw_coco(tmp_path, split=split, pictures=pictures)
    result = constant_boxes(*splits_of(tmp_path, masks=False))
    # The more frequent place comes first, right in three pictures; then the other one: 4 of 8 right in the end.
    dog = (76 * 1 + 25 * 4 / 8) / 101  # recalls 0 to 0.75, and 0.76 to 1
    assert result.boxes.by_class(["dog", "cat"], iou=0.5) == {"dog": pytest.approx(dog), "cat": 1.0}
    one = constant_boxes(*splits_of(tmp_path, masks=False), limit=1)
    assert one.boxes.by_class(["dog", "cat"]) == {"dog": 0.0, "cat": 1.0}


def test_constant_boxes_scale_with_the_picture_and_leave_crowds_out(tmp_path, draw_coco):
    content = draw_coco(tmp_path, split="train", pictures=[[([6, 4, 12, 8], 3), ([0, 0, 5, 5], 7)]], size=(24, 32))
    content["annotations"][1]["iscrowd"] = 1
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(content))
    draw_coco(tmp_path, split="test", pictures=[[([12, 8, 24, 16], 3)]], size=(48, 64))
    assert constant_boxes(*splits_of(tmp_path, masks=False)).score == 1.0

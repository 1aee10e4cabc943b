"""Which detections count, and which are the same."""

import torch

from spikeformers.heads import Detections
from spikeformers.heads.detections import CERTAIN, certain, matched


def boxes(*corners: tuple[float, ...], labels: list[int], scores: list[float] | None = None) -> Detections:
    return Detections(
        torch.tensor(corners).float().view(-1, 4),
        torch.tensor(scores or [0.9] * len(labels)),
        torch.tensor(labels, dtype=torch.int64),
    )


def test_detections_match_by_class_and_box_each_once():
    found = boxes((0, 0, 10, 10), (0, 0, 10, 10), (20, 20, 30, 30), labels=[0, 0, 1])
    other = boxes((0, 0, 10, 10.5), (20, 20, 30, 30), labels=[0, 0])
    assert matched(found, found) == 3
    assert matched(found, other) == 1  # the second box meets nothing that is left, the third has another class
    assert matched(found, boxes(labels=[])) == 0


def test_no_pair_is_lost_to_a_box_that_fits_two():
    found = boxes((0, 0, 10, 10), (0, 0, 10, 15), labels=[0, 0])
    other = boxes((0, 0, 10, 12), (0, 0, 10, 7), labels=[0, 0])  # the second one meets the first of `found` alone
    assert matched(found, other) == 2


def test_boxes_are_the_same_from_half_an_overlap_on():
    wide = boxes((0, 0, 10, 20), labels=[0])
    assert matched(boxes((0, 0, 10, 10), labels=[0]), wide) == 1  # an IoU of 1/2
    assert matched(boxes((0, 0, 10, 9.9), labels=[0]), wide) == 0


def test_detections_match_whatever_their_precision():
    found = boxes((0, 0, 10, 10), labels=[0])
    assert matched(found._replace(boxes=found.boxes.double()), found) == 1


def test_a_detection_is_certain_from_its_score_on():
    found = boxes((0, 0, 1, 1), (0, 0, 2, 2), labels=[0, 1], scores=[0.5, 0.1])
    assert certain(found).labels.tolist() == [0]
    assert certain(found, threshold=0.5).labels.tolist() == [0]
    assert certain(found, threshold=0.0).labels.tolist() == [0, 1]
    assert 0.1 < CERTAIN < 0.5

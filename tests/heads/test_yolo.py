"""Boxes, who learns them and the loss equal cases worked by hand; the network learns, whatever stands in an image."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from spikeformers.backbones.meta_spikeformer import SIZES, MetaSpikeFormerConfig
from spikeformers.heads.detections import Target
from spikeformers.heads.detector import Detector, DetectorConfig
from spikeformers.heads.yolo import YOLO, Cells, GridOutput, YOLOConfig, decode, fit_anchors, learners
from spikeformers.layers import FeatureInfo
from spikeformers.neurons import neuron_builder, set_steps

FEATURES = FeatureInfo(("a", "b", "c", "d", "e"), (4, 4, 8, 8, 12), (2, 4, 8, 16, 16))
BACKBONE = MetaSpikeFormerConfig(dims=(8, 8, 12, 16), blocks=(1, 0, 1, 1, 1), heads=2)
ONE_ANCHOR = (10.0, 10.0, 20.0, 20.0, 40.0, 40.0)  # for each grid


def head(*, num_classes: int = 2, steps: int = 1, neuron: str = "i_lif", **options) -> YOLO:
    config = YOLOConfig(**{"dim": 8, "anchors": ONE_ANCHOR} | options)
    builder = neuron_builder(neuron, steps=steps)
    return config.build(FEATURES, num_classes=num_classes, neuron=builder, steps=steps).double().eval()


def detector(*, neuron: str = "i_lif", steps: int = 1, **options) -> Detector:
    torch.manual_seed(0)
    config = YOLOConfig(**{"dim": 8} | options)
    return DetectorConfig(BACKBONE, config, num_classes=2, neuron=neuron, steps=steps).build().double()


def awake(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and predictions that look trained, so that there is something to find."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.3, 1.5)
            nn.init.normal_(module.bias, 0.5, 0.5)
    for layer in model.head.predict:
        nn.init.normal_(layer.conv.weight, std=0.3)
    return model.eval()


def maps(rows: int, height: int = 64, width: int = 96) -> list[Tensor]:
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in FEATURES.strides]
    return [3 * torch.rand(rows, c, *size).double() for c, size in zip(FEATURES.channels, sizes, strict=True)]


def target(*boxes: list[float], labels: list[int] | None = None, size: tuple[int, int] = (64, 64)) -> Target:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
        "size": torch.tensor(size),
        "crowd": torch.zeros(len(boxes), dtype=torch.bool),
    }


def silent(*, anchors: int = 1, num_classes: int = 2, images: int = 1) -> GridOutput:
    """For images of 64 x 64: every number 0, objects as good as ruled out."""
    grids = [torch.zeros(images, anchors, 5 + num_classes, side, side).double() for side in (8, 4, 2)]
    for grid in grids:
        grid[:, :, 4] = -50
    return GridOutput(*(grid.flatten(1, 2) for grid in grids))


def encode(boxes: Tensor, cells: Cells) -> Tensor:
    """What `decode` reads, for boxes that it can reach."""
    low, high = boxes.split(2, dim=1)
    offset = ((low + high) / 2 - cells.corner) / cells.stride
    return torch.cat([(offset + 0.5) / 2, ((high - low) / cells.anchor).sqrt() / 2], 1).logit()


def test_boxes_by_hand():
    cells = Cells(*(torch.tensor(each).double() for each in ([[16.0, 8.0]] * 2, [[8.0]] * 2, [[12.0, 20.0]] * 2)))
    third = math.log(3)  # whose sigmoid is 3/4
    raw = torch.tensor([[0, 0, 0, 0], [third, -third, third, -third]], dtype=torch.float64)
    # Zeros: the anchor, 12 x 20, in the middle of the cell, (20, 12).  Quarters: centre (16 + 8, 8 + 0), and sides
    # 12 (3/2)^2 = 27 and 20 (1/2)^2 = 5.
    expected = torch.tensor([[14, 2, 26, 22], [10.5, 5.5, 37.5, 10.5]]).double()
    torch.testing.assert_close(decode(raw, cells), expected, rtol=0, atol=1e-12)


def test_decoding_what_was_encoded_is_the_identity():
    cells = Cells(8 * torch.randint(0, 9, (50, 2)).double(), torch.full((50, 1), 8.0).double(), torch.rand(50, 2) + 10)
    centre = cells.corner + 8 * (2 * torch.rand(50, 2).double() - 0.5)
    half = cells.anchor * (0.1 + 1.8 * torch.rand(50, 2).double())
    boxes = torch.cat([centre - half, centre + half], 1)
    torch.testing.assert_close(decode(encode(boxes, cells), cells), boxes, rtol=0, atol=1e-9)


def test_a_box_never_has_sides_that_ciou_cannot_divide_by():
    raw = torch.full((1, 4), -1e4, requires_grad=True)
    cells = Cells(torch.full((1, 2), 1000.0), torch.tensor([[8.0]]), torch.tensor([[10.0, 10.0]]))
    box = decode(raw, cells)
    assert (box[:, 2:] > box[:, :2]).all()
    nn.functional.relu(box).sum().backward()
    assert raw.grad.isfinite().all()


def test_who_learns_a_box_by_hand():
    anchors = torch.tensor([[20.0, 20.0], [5.0, 20.0], [79.0, 30.0]])
    # Centre (21, 14) on cells of 8: (2.625, 1.75), so cell (2, 1), right of it (3, 1), below it (2, 2).  Sides 20 x 20:
    # the second anchor is 4 times narrower and does not fit, the third, 3.95 times wider, does.
    place, box = learners(torch.tensor([[11.0, 4.0, 31.0, 24.0]]), anchors=anchors, stride=8, size=(4, 5))
    first = [1 * 5 + 2, 1 * 5 + 3, 2 * 5 + 2]
    assert place.tolist() == [*first, *(2 * 20 + each for each in first)]
    assert box.tolist() == [0] * 6


def test_neighbours_off_the_grid_learn_nothing():
    corners = torch.tensor([[0.0, 0.0, 4.0, 4.0], [20.0, 30.0, 24.0, 32.0], [14.0, 14.0, 19.0, 19.0]])
    place, box = learners(corners, anchors=torch.tensor([[4.0, 4.0]]), stride=8, size=(4, 3))
    # Centres (0.25, 0.25), with nothing to the left or above; (2.75, 3.875), in the last cell; (2.0625, 2.0625).
    assert place.tolist() == [0, 11, 2 * 3 + 2, 2 * 3 + 1, 1 * 3 + 2]
    assert box.tolist() == [0, 1, 2, 2, 2]


def test_rows_are_places_of_their_grid_anchor_row_and_column():
    model, output = head(anchors=tuple(map(float, range(1, 13)))), silent(anchors=2)
    output.middle[0, 7 + 1, 3, 2] = 5.0  # the second anchor, y of its box
    rows, cells = model.rows(output)
    index = 2 * 64 + 1 * 16 + 3 * 4 + 2
    assert rows.shape == (1, 2 * (64 + 16 + 4), 7)
    assert rows[0, :, 1].nonzero().tolist() == [[index]]
    assert [each[index].tolist() for each in cells] == [[32, 48], [16], [7, 8]]


def test_a_perfect_prediction_has_no_loss_of_boxes_and_should_be_certain():
    model, output = head(), silent()
    truth = target([11, 6, 22, 17], labels=[1])
    place, _ = model._all_learners(output, truth["boxes"])
    rows, cells = model.rows(output)
    rows[0, place, :4] = encode(truth["boxes"].double().expand(len(place), 4), cells.at(place))
    rows[0, place, 4:] = torch.tensor([50.0, -50.0, 50.0]).double()
    sizes = (8, 4, 2)
    pieces = rows.split([side**2 for side in sizes], 1)
    perfect = GridOutput(*(each.mT.unflatten(2, (side, side)) for each, side in zip(pieces, sizes, strict=True)))
    # The box of 11 x 11 fits the anchors of all grids; the coarsest grid has no cell above its centre.
    assert len(place) == 3 + 3 + 2
    for part in model.loss(perfect, [truth]).values():
        assert part == pytest.approx(0, abs=1e-6)  # torchvision's CIoU adds 1e-7 to what it divides by
    found = model.detect(perfect)[0]
    torch.testing.assert_close(found.boxes[:1], truth["boxes"].double(), rtol=0, atol=1e-9)
    assert found.labels[0] == 1
    assert found.scores[0] == pytest.approx(1)


def test_the_loss_by_hand():
    model, output = head(anchors=(8.0, 8.0, 1e3, 1e3, 1e3, 1e3)), silent()
    for grid in output:
        grid.zero_()
    # Centre (20, 12): just what cell (2, 1) of the finest grid says by zeros. Its neighbours (1, 1) and (2, 0) are one
    # cell off: squares of 8 that touch, IoU 0, centres 8 apart in a hull of 8 x 16: distance 1 + 64/320.
    parts = model.loss(output, [target([16, 8, 24, 16], labels=[1])])
    assert parts["boxes"] == pytest.approx(2 * 1.2 / 3, abs=1e-6)
    # All say sigmoid(0); a cross-entropy of log 2 each, whatever is wanted: two classes, and each of 84 cells.
    assert parts["classes"] == pytest.approx(0.1 * 2 * math.log(2))
    assert parts["objectness"] == pytest.approx(30 * math.log(2))


def test_a_cell_that_learns_several_boxes_should_be_as_certain_as_the_best_is_covered():
    model = head(anchors=(8.0, 8.0, 1e3, 1e3, 1e3, 1e3))
    boxes = [[16, 8, 24, 16], [17, 8, 25, 16]]
    objectness = []
    for truth in (boxes, boxes[::-1], boxes[:1]):
        output = silent()
        output.fine[0, 4] = 0
        output.fine.requires_grad_()
        model.loss(output, [target(*truth)])["objectness"].backward()
        objectness.append(output.fine.grad[0, 4, 1, 2])
    # d BCE / d logit = sigmoid(0) - wanted, over 84 cells; wanted is 1 where the better box is covered.
    assert objectness == pytest.approx([30 / 84 * -0.5] * 3, abs=1e-6)


def test_without_boxes_only_certainty_is_taught():
    model, output = head(), silent(images=2)
    empty = model.loss(output, [target(), target()])
    assert empty["boxes"] == empty["classes"] == 0
    for grid in output:
        grid[:, 4] = 0
    assert model.loss(output, [target(), target()])["objectness"] == pytest.approx(30 * math.log(2))


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param([target([5, 5, 30, 40]), target()], id="one image without boxes"),
        pytest.param([target(), target()], id="no boxes at all"),
        pytest.param([target([-20, 30, 25, 90]), target([50, 50, 70, 64])], id="partly outside"),
        pytest.param([target([5, 5, 5, 40], [7, 7, 7, 7]), target([5, 5, 30, 40])], id="no area"),
        pytest.param([target([1, 1, 63, 2]), target()], id="no anchor fits"),
        pytest.param([target(*[[i % 50, i % 47, i % 50 + 12, i % 47 + 15] for i in range(1000)]), target()], id="1000"),
    ],
)
def test_any_targets_give_a_finite_loss_and_gradients(targets):
    model = detector()
    parts = model.loss(model(torch.rand(2, 3, 64, 64).double(), targets), targets)
    assert set(parts) == {"boxes", "objectness", "classes"}
    learnt = any(len(each["boxes"]) for each in targets) and targets[0]["boxes"].tolist() != [[1, 1, 63, 2]]
    assert bool(parts["boxes"] > 0) == bool(parts["classes"] > 0) == learnt
    sum(parts.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_boxes_of_no_area_and_crowds_are_not_learnt():
    model = detector().eval()
    output = model(torch.rand(1, 3, 64, 64).double())
    box, flat, crowd = [5, 5, 30, 40], [9, 9, 9, 40], [20, 20, 50, 60]
    several = target(box, flat, crowd)
    several["crowd"][2] = True
    assert model.loss(output, [several]) == model.loss(output, [target(box)])


def test_gradients_reach_every_parameter():
    model = detector()
    targets = [target([5, 5, 30, 40], [10, 10, 30, 22], [2, 2, 62, 60], labels=[0, 1, 0]) for _ in range(2)]
    sum(model.loss(model(torch.rand(2, 3, 64, 64).double(), targets), targets).values()).backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_the_paper_s_network_has_16_8_million_parameters():
    model = DetectorConfig(SIZES["meta_spikeformer_15m"], YOLOConfig()).build()
    total, neck = (sum(each.numel() for each in part.parameters()) for part in (model, model.head))
    assert total - neck == 14_751_208
    assert total == 16_833_125


@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 75), (33, 17), (20, 9), (1, 1)])
def test_any_size_of_image_has_grids_with_halves_rounded_up(height, width):
    model = awake(detector())
    output = model(torch.rand(2, 3, height, width).double())
    channels = 3 * (5 + 2)
    assert [tuple(each.shape) for each in output] == [
        (2, channels, math.ceil(height / stride), math.ceil(width / stride)) for stride in (8, 16, 32)
    ]
    for found in model.detect(output, torch.tensor([[height, width]] * 2)):
        assert len(found.boxes)
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height] * 2)).all()


def test_an_image_smaller_than_a_cell_can_be_learnt():
    model, targets = detector(), [target([2, 3, 14, 12], size=(15, 18)) for _ in range(2)]
    parts = model.loss(model(torch.rand(2, 3, 15, 18).double(), targets), targets)
    assert parts["boxes"] > 0


def test_detections_do_not_depend_on_who_shares_the_batch():
    model, images = awake(detector(steps=2, neuron="lif")), torch.rand(2, 3, 64, 80).double()
    together = model.detect(model(images))
    for image, found in zip(images, together, strict=True):
        (alone,) = model.detect(model(image[None]))
        assert len(found.scores)
        assert all(torch.equal(one, other) for one, other in zip(found[:3], alone[:3], strict=True))


def test_more_steps_change_nothing_for_a_neuron_without_memory_and_something_for_one_with():
    images = torch.rand(2, 3, 64, 64).double()
    for neuron, same in (("i_lif", True), ("lif", False)):
        model = awake(detector(neuron=neuron))
        once = model(images)
        twice = set_steps(model, 2)(images)
        for one, other in zip(once, twice, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12) == same  # convolutions of other batches round anew


def test_time_is_kept_through_neck_and_predictions_and_averaged_at_the_end():
    model, given = head(), maps(2)
    apart = model(given, image_size=(64, 96))
    together = set_steps(model, 2)(given, image_size=(64, 96))  # two steps of one image
    for one, other in zip(apart, together, strict=True):
        assert not torch.equal(one[0], one[1])
        torch.testing.assert_close(other, one.mean(0, keepdim=True), rtol=0, atol=1e-12)


def test_maps_of_every_grid_know_those_of_the_others():
    neck, given = head().neck, [3 * torch.rand(1, 8, 8, 12).double(), 3 * torch.rand(1, 12, 4, 6).double()]
    before = neck(given)
    for index in (0, 1):
        changed = list(given)
        changed[index] = given[index] + 1
        assert all(not torch.equal(one, other) for one, other in zip(before, neck(changed), strict=True))


def test_each_class_above_the_threshold_is_found_and_the_most_certain_come_first():
    output = silent()
    output.fine[0, 4:, 1, 2] = torch.tensor([50.0, math.log(3), -math.log(3)]).double()
    output.middle[0, 4:, 3, 3] = torch.tensor([50.0, -50.0, 0.0]).double()
    found = head(score_threshold=0.2).detect(output)[0]
    assert found.scores.tolist() == pytest.approx([0.75, 0.5, 0.25])
    assert found.labels.tolist() == [0, 1, 1]
    # The middle grid's last cell: centre (56, 56), anchor 20, which the image cuts off at 64.
    assert found.boxes.tolist() == [[15, 7, 25, 17], [46, 46, 64, 64], [15, 7, 25, 17]]
    assert found.masks is None


def test_of_boxes_of_one_class_that_overlap_only_the_most_certain_stays():
    output = silent()
    output.fine[0, :, 1, 2:4] = 0
    output.fine[0, 4, 1, 2:4] = 50
    output.fine[0, 5:, 1, 2] = torch.tensor([3.0, -50.0]).double()
    output.fine[0, 5:, 1, 3] = torch.tensor([2.0, 1.0]).double()
    # Squares of 10 that are 8 apart: IoU 20/180.
    assert head(overlap=0.1).detect(output)[0].labels.tolist() == [0, 1]
    assert head(overlap=0.12).detect(output)[0].labels.tolist() == [0, 0, 1]


def test_limit_and_candidates_keep_the_most_certain():
    output = silent()
    output.fine[0, 4:] = torch.randn(3, 8, 8).double()
    every = head().detect(output)[0].scores
    assert len(every) > 10
    assert (every[1:] <= every[:-1]).all()
    assert torch.equal(head(limit=3).detect(output)[0].scores, every[:3])
    assert head(limit=3).limit == 3
    assert len(head(candidates=5).detect(output)[0].scores) <= 5


def test_nothing_found_is_empty_and_has_its_shapes():
    for found in head().detect(silent(images=2), torch.tensor([[64, 64], [40, 20]])):
        assert (found.boxes.shape, found.scores.shape, found.labels.shape) == ((0, 4), (0,), (0,))
        assert found.labels.dtype == torch.int64


def test_boxes_within_the_padding_are_not_found():
    output = silent()
    output.fine[0, 4:, :, 6] = 50  # centres at x = 52, squares of 10 from 47
    assert len(head().detect(output, torch.tensor([[64, 48]]))[0].boxes)
    assert len(head().detect(output, torch.tensor([[64, 47]]))[0].boxes) == 0


def test_an_untrained_network_expects_little():
    model = head(num_classes=5)
    rows, _ = model.rows(model([torch.zeros_like(each) for each in maps(1)], image_size=(64, 96)))
    scores = rows.sigmoid()
    torch.testing.assert_close(scores[..., 4], torch.full_like(scores[..., 4], 0.01))
    torch.testing.assert_close(scores[..., 5:], torch.full_like(scores[..., 5:], 0.2))


def test_under_autocast_predictions_and_losses_are_of_float32():
    model, targets = detector().float(), [target([5, 5, 30, 40])] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.rand(2, 3, 64, 64), targets)
        parts = model.loss(output, targets)
    assert {each.dtype for each in (*output, *parts.values())} == {torch.float32}
    assert model.detect(output)[0].boxes.dtype == torch.float32


def test_the_last_layers_are_those_that_predict():
    model = head()
    layers = [model.get_submodule(name) for name in YOLO.last_layers]
    assert all(type(layer) is nn.Conv2d and layer.bias is not None for layer in layers)
    assert [name for name, each in model.named_modules() if type(each) is nn.Conv2d][-3:] == list(YOLO.last_layers)


def test_fitted_anchors_are_the_centres_of_clusters_on_logarithms_small_to_large_and_always_the_same():
    ratio = torch.tensor([[0.8, 1.25], [1.25, 0.8], [1, 1]]).double()  # geometric means 1
    centres = torch.tensor([[100.0, 200.0], [10.0, 12.0], [60.0, 30.0]]).double()
    sides = (centres[:, None] * ratio).flatten(0, 1)
    anchors = fit_anchors(sides, count=3)
    assert anchors == pytest.approx((10, 12, 60, 30, 100, 200))
    assert fit_anchors(sides, count=3) == anchors
    assert YOLOConfig(anchors=anchors).anchors == anchors


def test_anchors_that_cannot_be_fitted_are_refused():
    with pytest.raises(ValueError, match="9 anchors need as many boxes of different sizes, got 2"):
        fit_anchors(torch.tensor([[3.0, 4.0], [5.0, 6.0], [3.0, 4.0]]))
    with pytest.raises(ValueError, match="drop the boxes of no area"):
        fit_anchors(torch.tensor([[3.0, 0.0], [5.0, 6.0]]), count=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": (8.0, 8.0, 16.0, 16.0)}, "multiple of 6 numbers, got 4"),
        ({"anchors": (8.0, 8.0, 16.0, -1.0, 9.0, 9.0)}, "anchors must be positive"),
        ({"anchors": (8.0, 8.0, 16.0, math.nan, 9.0, 9.0)}, "anchors must be positive"),
        ({"anchors": (8.0, 8.0, 16.0, math.inf, 9.0, 9.0)}, "anchors must be positive"),
        ({"box_weight": math.nan}, "box_weight must be a finite number, at least 0, got nan"),
        ({"objectness_weight": math.inf}, "objectness_weight must be a finite number"),
        ({"class_weight": -1.0}, "class_weight must be a finite number"),
        ({"score_threshold": math.nan}, r"score_threshold must lie in \[0, 1\], got nan"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"overlap": 1.5}, r"overlap must lie in \[0, 1\], got 1.5"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        YOLOConfig(**options)


@pytest.mark.parametrize("strides", [(16,), (4, 16)])
def test_a_backbone_without_the_maps_is_refused(strides):
    features = FeatureInfo(tuple("ab")[: len(strides)], (8, 8)[: len(strides)], strides)
    with pytest.raises(ValueError, match="YOLO reads maps of two strides"):
        YOLOConfig().build(features, num_classes=2, neuron=neuron_builder("i_lif"), steps=1)


def shapes(count: int, *, size: int = 64) -> tuple[Tensor, list[Target]]:
    """Images with a rectangle (class 0) and an ellipse (class 1) of any colours on dark noise."""
    images, targets = torch.rand(count, 3, size, size) * 0.2, []
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    for image in images:
        sides = torch.randint(12, 30, (2, 2))
        low = (torch.rand(2, 2) * (size - sides)).long()
        for label, (left, top, width, height) in enumerate(torch.cat([low, sides], 1).tolist()):
            across, down = (2 * (x - left) / width - 1).abs(), (2 * (y - top) / height - 1).abs()
            inside = torch.maximum(across, down) < 1 if label == 0 else across**2 + down**2 < 1
            image[:, inside] = 0.5 + 0.5 * torch.rand(3, 1)
        targets.append(target(*torch.cat([low, low + sides], 1).tolist(), labels=[0, 1], size=(size, size)))
    return images, targets


def average_precision(model: Detector, images: Tensor, targets: list[Target]) -> float:
    """COCO's, at an IoU of 1/2."""
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    with torch.no_grad():
        found = model.eval().detect(model(images))
    metric.update(
        [{"boxes": each.boxes, "scores": each.scores, "labels": each.labels} for each in found],
        [{"boxes": each["boxes"], "labels": each["labels"]} for each in targets],
    )
    return float(metric.compute()["map_50"])


@pytest.mark.slow
def test_eight_images_can_be_learnt_by_heart():
    """25 to 40 s on one thread; AP50 was 1 for both seeds tried, so 0.95 leaves room for other machines."""
    images, targets = shapes(8)
    backbone = MetaSpikeFormerConfig(dims=(8, 16, 24, 32), blocks=(1, 1, 1, 1, 1), heads=2)
    anchors = (12.0, 12.0, 16.0, 24.0, 24.0, 16.0) * 3
    model = DetectorConfig(backbone, YOLOConfig(dim=24, anchors=anchors), num_classes=2, neuron="i_lif").build()
    assert average_precision(model, images, targets) < 0.1
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=200)
    for _ in range(200):
        optimizer.zero_grad()
        sum(model.loss(model(images, targets), targets).values()).backward()
        optimizer.step()
        schedule.step()
    assert average_precision(model, images, targets) >= 0.95

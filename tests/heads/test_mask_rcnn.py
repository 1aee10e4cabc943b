import dataclasses

import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import nn
from torchvision.ops import masks_to_boxes

from spikeformers import deploy, energy, quantize, record
from spikeformers.backbones.meta_spikeformer import SIZES
from spikeformers.heads import DetectorConfig
from spikeformers.heads.detections import Detections
from spikeformers.heads.mask_rcnn import DenseStage, MaskRCNNConfig
from spikeformers.layers import FeatureInfo
from spikeformers.neurons import neuron_builder

BACKBONE = dataclasses.replace(SIZES["meta_spikeformer_15m"], dims=(8, 8, 8, 16), blocks=(1, 0, 0, 1, 0))
FEATURES = FeatureInfo(("a", "b", "c", "d", "e"), (2, 4, 4, 8, 8), (2, 4, 8, 16, 16))
SMALL = {"region_dim": 8, "fc_dim": 16, "anchor_sizes": (8, 12, 16, 24, 32), "samples": 16, "regions": 40}


def detector(neuron="i_lif", steps=1, **options):
    """In eval mode, float64, with norms that look trained, so that every neuron fires."""
    config = MaskRCNNConfig(**{**SMALL, "norm": "batch_norm", "score_threshold": 0.0, "limit": 9, **options})
    model = DetectorConfig(BACKBONE, config, num_classes=3, neuron=neuron, steps=steps).build().double()
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 1.5)
            nn.init.normal_(module.bias, 0.3, 0.5)
    for name in ("proposals.head.objectness", "proposals.head.deltas", "boxes.classify", "boxes.deltas"):
        nn.init.normal_(model.head.get_submodule(name).weight, 0, 0.2)
    return model.eval()


def target(*boxes, labels=None, size=(48, 64), shape=(48, 64)):
    """Boxes with masks that fill them, in an image of `shape`."""
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    rows, columns = torch.arange(shape[0])[:, None] + 0.5, torch.arange(shape[1]) + 0.5
    masks = [(columns > x1) & (columns < x2) & (rows > y1) & (rows < y2) for x1, y1, x2, y2 in corners.tolist()]
    return {
        "boxes": corners,
        "labels": torch.tensor(labels or [1] * len(corners), dtype=torch.int64),
        "size": torch.tensor(size),
        "crowd": torch.zeros(len(corners), dtype=torch.bool),
        "masks": torch.stack(masks) if masks else torch.zeros(0, *shape, dtype=torch.bool),
    }


def pictures(count=2, height=48, width=64):
    return torch.rand(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def losses(model, images, targets, seed=5):
    torch.manual_seed(seed)  # samples are drawn by lot
    return model.loss(model(images, targets), targets)


TWO = [target((4, 6, 20, 30), (30, 10, 60, 40), labels=[0, 2]), target((10, 10, 40, 44))]


@pytest.mark.parametrize(
    ("size", "total", "neck"), [("15m", 34_864_088, 2_568_192), ("55m", 75_008_496, 2_754_560)], ids=["15m", "55m"]
)
def test_parameters_are_those_of_table_3_and_of_each_part_of_the_authors_code(size, total, neck):
    with torch.device("meta"):
        model = DetectorConfig(SIZES[f"meta_spikeformer_{size}"], MaskRCNNConfig(), neuron="lif").build()

    def count(part):
        return sum(parameter.numel() for parameter in part.parameters())

    head = model.head
    found = [count(each) for each in (model, head.neck, head.proposals, head.boxes, head.masks)]
    # 768: the biases of four pixels where a transposed convolution has one for all.
    assert found == [total, neck, 593_935, 12_846_080 + 1_049_600 + 81 * 1025 + 80 * 4 * 1025, 2_643_280 + 768]
    assert round(total / 1e6, 1) == {"15m": 34.9, "55m": 75.0}[size]


def test_it_reads_the_last_four_maps_at_their_true_strides():
    head = MaskRCNNConfig(**SMALL).build(FEATURES, num_classes=3, neuron=neuron_builder("i_lif"))
    assert head.box_pool.strides == head.mask_pool.strides == (4, 8, 16, 16)
    assert head.proposals.anchor_generator.strides == (4, 8, 16, 16, 32)
    assert [layer.conv.in_channels for layer in head.neck.lateral] == [4, 4, 8, 8]


def test_without_memory_steps_alike_change_nothing():
    once, often = detector("i_lif"), detector("i_lif", steps=2)
    often.load_state_dict(once.state_dict())
    # Convolutions of twice the batch round otherwise, which moves no spike here.
    torch.testing.assert_close(losses(often, pictures(), TWO), losses(once, pictures(), TWO), rtol=0, atol=1e-12)
    for mine, other in zip(often.detect(often(pictures())), once.detect(once(pictures())), strict=True):
        torch.testing.assert_close(tuple(mine), tuple(other), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("part", "size"), [("boxes", 7), ("masks", 14)])
def test_results_of_regions_are_means_of_those_of_each_step(part, size):
    once, often = (detector(steps=steps).head.get_submodule(part) for steps in (1, 2))
    often.load_state_dict(once.state_dict())
    first, second = (3 * torch.rand(5, 8, size, size, dtype=torch.float64) for _ in range(2))
    found, each = often(torch.cat((first, second))), zip(once(first), once(second), strict=True)
    means = [(a + b) / 2 for a, b in each]
    for mine, other in zip(found, means, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_the_neurons_of_both_stages_keep_time_and_results_are_averaged_over_it():
    model = detector("lif", steps=3)
    with record(model) as spikes:
        output = model(pictures())
    regions = len(output.classes)
    assert {name: each.shape[0] for name, each in spikes.items() if name.startswith("head.boxes")} == dict.fromkeys(
        [f"head.boxes.neuron{index}" for index in (1, 2, 3)], 3 * regions
    )
    assert all(len(each) == 6 for name, each in spikes.items() if name.startswith(("head.neck", "head.proposals")))
    assert output.dense.objectness.shape[0] == 2
    assert output.masks.shape == (sum(len(each.boxes) for each in output.found), 3, 28, 28)


def test_a_recorder_and_an_energy_report_hear_every_layer():
    model = detector("lif", steps=2).float()
    images = pictures().float()
    with record(model) as spikes:
        model(images)
    assert spikes.keys() == {name for name, module in model.named_modules() if type(module).__name__ == "LIF"}
    told = str(energy.measure(model, images).table())
    for layer in ("neck.lateral.3", "proposals.head.conv", "proposals.head.deltas", "boxes.fc1", "masks.enlarge"):
        assert f"head.{layer}" in told


def test_detections_do_not_depend_on_who_shares_the_batch():
    model, images = detector(), pictures()
    both = model.detect(model(images))
    for index in range(2):
        alone = model.detect(model(images[index : index + 1]))[0]
        assert len(alone.boxes) == 9
        # Matrices of other heights round otherwise in the last digits; boxes and their order are equal.
        torch.testing.assert_close(tuple(alone), tuple(both[index]), rtol=0, atol=1e-10)


def test_detections_are_sorted_limited_and_cut_off_at_the_picture():
    model = detector(score_threshold=0.1)
    output = model(pictures())
    free = model.detect(output)
    sizes = torch.tensor([[48, 64], [20, 30]])
    found = model.detect(output, sizes)
    torch.testing.assert_close(tuple(found[0]), tuple(free[0]), rtol=0, atol=0)
    assert 0 < len(found[1].boxes) < len(free[1].boxes) <= 9
    for each, (height, width) in zip(found, sizes.tolist(), strict=True):
        assert torch.equal(each.scores, each.scores.sort(descending=True).values)
        assert each.scores.min() > 0.1
        assert each.boxes.min() >= 0
        assert each.boxes[:, 2].max() <= width
        assert each.boxes[:, 3].max() <= height
        assert (each.boxes[:, 2:] > each.boxes[:, :2]).all()
        assert each.masks.shape == (len(each.boxes), 48, 64)
        assert set(each.labels.tolist()) <= {0, 1, 2}


def test_masks_are_those_of_the_class_that_was_found_and_lie_in_the_box():
    model = detector()
    masks = torch.full((1, 3, 28, 28), -50.0).double()
    masks[0, 2] = 50
    box = torch.tensor([[10.0, 8, 38, 36]]).double()
    found = [Detections(box, torch.ones(1).double(), torch.tensor([2]))]
    drawn = model.detect(model(pictures(1))._replace(masks=masks, found=found))[0].masks[0]
    inside = target((11, 9, 37, 35))["masks"][0]  # the edge is blurred
    assert drawn[inside].min() > 0.99
    assert drawn[~target((8, 6, 40, 38))["masks"][0]].max() == 0


def test_what_repeats_the_samples_costs_nothing_and_what_contradicts_them_does():
    model = detector()
    torch.manual_seed(2)
    output = model(pictures(), TWO)
    samples, choice = output.samples, model.head.choice
    labels, on = torch.cat(samples.labels), torch.cat(samples.on_objects(3))
    classes = torch.full_like(output.classes, -50).scatter(1, labels[:, None], 50)
    deltas = torch.full_like(output.deltas, 99)
    deltas[on, labels[on]] = torch.cat(samples.deltas)[on]
    assert choice.losses(classes, deltas, samples) == {"classes": 0, "boxes": 0}
    assert choice.losses(-classes, deltas + 1, samples)["classes"] > 99
    # Smooth L1 with beta 1/9 of four differences of 1, over all samples.
    expected = on.sum() * 4 * (1 - 1 / 18) / len(on)
    torch.testing.assert_close(choice.losses(classes, deltas + 1, samples)["boxes"], expected.double())
    filled = torch.full_like(output.masks, 50.0)
    all_of_it = [each | {"masks": torch.ones_like(each["masks"])} for each in TWO]
    assert choice.mask_losses(filled, samples, all_of_it)["masks"] < 1e-12
    assert choice.mask_losses(-filled, samples, all_of_it)["masks"] == 50


def test_samples_hold_the_boxes_of_the_targets_with_their_labels():
    samples = detector()(pictures(), TWO).samples
    for index, each in enumerate(TWO):
        for box, label in zip(each["boxes"].double(), each["labels"], strict=True):
            place = (samples.regions[index] == box).all(1)
            assert samples.labels[index][place].tolist() == [label]
            torch.testing.assert_close(samples.deltas[index][place], torch.zeros(1, 4).double(), rtol=0, atol=1e-12)
        assert 0 < samples.on_objects(3)[index].sum() <= 4  # a quarter of 16
        assert (samples.labels[index] == 3).sum() > 0


@pytest.mark.parametrize("norm", ["none", "batch_norm"])
@pytest.mark.parametrize(
    "targets", [TWO, [target(), TWO[1]], [target(), target()]], ids=["full", "one is empty", "both are empty"]
)
def test_every_parameter_has_a_gradient_and_the_loss_is_finite_whatever_the_images_hold(targets, norm):
    model = detector(norm=norm).train()
    parts = losses(model, pictures(), targets)
    assert list(parts) == ["objectness", "rpn_box", "classes", "boxes", "masks"]
    assert all(each.isfinite() and each.ndim == 0 for each in parts.values())
    sum(parts.values()).backward()
    # The first map of the backbone is only read by the next one; a loss of 0 gives a gradient of 0, not none.
    missing = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.isfinite().all()]
    assert missing == []
    empty = all(len(each["labels"]) == 0 for each in targets)
    assert (parts["masks"] == 0) == (parts["boxes"] == 0) == (parts["rpn_box"] == 0) == empty


def test_boxes_beyond_the_picture_are_cut_off_and_empty_ones_and_crowds_left_out():
    model, images = detector(), pictures(1)
    plain = target((40, 20, 64, 48))
    odd = target((40, 20, 90, 70), (5, 5, 5, 30), (1, 1, 20, 20))
    odd["crowd"][2] = True
    odd["masks"][0] = plain["masks"][0]
    expected, found = losses(model, images, [plain]), losses(model, images, [odd])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_thousand_boxes_are_learnt_from():
    corners = torch.rand(1000, 2) * torch.tensor([50.0, 34.0])
    crowded = target(*torch.cat((corners, corners + 2 + 8 * torch.rand(1000, 2)), 1).tolist())
    parts = losses(detector(mask_head="none"), pictures(1), [crowded])
    assert list(parts) == ["objectness", "rpn_box", "classes", "boxes"]
    assert all(each.isfinite() for each in parts.values())


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 49)])
def test_images_smaller_than_strides_are_taken(size):
    model = detector()
    images = pictures(2, *size)
    for each in model.detect(model(images)):
        assert each.boxes.shape[1] == 4
        assert each.masks.shape[1:] == size
    small = target((0, 0, size[1], size[0]), size=size, shape=size)
    assert all(each.isfinite() for each in losses(model, images, [small, small]).values())


@pytest.mark.parametrize("training", [False, True])
def test_nothing_found_is_a_result(training):
    model = detector(score_threshold=1.0).train(training)
    output = model(pictures())
    for each in model.detect(output, torch.tensor([[48, 64], [20, 30]])):
        assert [tuple(part.shape) for part in each] == [(0, 4), (0,), (0,), (0, 48, 64)]
    assert output.masks.shape == (0, 3, 28, 28)


def test_without_a_single_region_the_second_stage_gives_nothing():
    model = detector().eval()
    dense = model.head.dense(model.forward_features(pictures()))
    far = dense._replace(deltas=dense.deltas.detach() + torch.tensor([999.0, 0, 0, 0]).double())
    found = model.detect(model.head.complete(far, image_size=(48, 64)))
    assert [len(each.boxes) for each in found] == [0, 0]


def test_a_head_of_boxes_alone_needs_no_masks_and_a_head_of_masks_says_so():
    bare = [{name: part for name, part in each.items() if name != "masks"} for each in TWO]
    model = detector(mask_head="none")
    assert "masks" not in losses(model, pictures(), bare)
    assert model.detect(model(pictures()))[0].masks is None
    with pytest.raises(ValueError, match=r'a target without "masks": add them, or build it .* mask_head="none"'):
        losses(detector(), pictures(), bare)


def test_a_loss_needs_samples_and_detections_need_proposals():
    model = detector()
    with pytest.raises(ValueError, match="give it the targets too, then the loss"):
        model.loss(model(pictures()), TWO)
    with pytest.raises(ValueError, match="looked at samples and not at proposals: leave them out"):
        model.detect(model(pictures(), TWO))


def test_under_autocast_losses_and_boxes_are_of_float32():
    model, images = detector().float(), pictures().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {each.dtype for each in losses(model, images, TWO).values()} == {torch.float32}
        found = model.detect(model(images))
    assert {found[0].boxes.dtype, found[0].scores.dtype, found[0].masks.dtype} == {torch.float32}


def test_stages_apart_give_what_the_whole_gives():
    model = detector()
    stage = DenseStage(model.backbone, model.head)
    whole = model(pictures())
    parts = model.head.complete(stage(pictures()), image_size=(48, 64))
    assert torch.equal(whole.classes, parts.classes)
    assert torch.equal(whole.masks, parts.masks)


@pytest.mark.parametrize(("part", "size"), [("boxes", 7), ("masks", 14)])
def test_networks_of_regions_run_on_integers_exactly(part, size):
    head = quantize.prepare(detector(), bits=4).head
    network, pooled = head.get_submodule(part), 3 * torch.rand(3, 8, size, size)
    engine = deploy.integer(network, pooled)
    assert all(layer.spike_fed for layer in engine.report().layers)
    # Sums of counts are exact; the last layer's are multiplied by its step sizes in float32.
    for mine, other in zip(
        *(x if part == "boxes" else [x] for x in (engine(pooled), network(pooled.double()))), strict=True
    ):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


def test_every_norm_folds_and_changes_nothing():
    model = detector()
    fused = deploy.fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    for mine, other in zip(fused.detect(fused(pictures())), model.detect(model(pictures())), strict=True):
        torch.testing.assert_close(tuple(mine), tuple(other), rtol=0, atol=1e-10)  # rounding


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (FeatureInfo(("a", "b", "c"), (1, 1, 1), (4, 8, 16)), {}, "reads 4 maps, and this backbone gives 3"),
        (FEATURES, {"anchor_sizes": (8, 16)}, r"anchor_sizes needs one size above 0 for each of 5 maps, got \(8, 16\)"),
        (FEATURES, {"anchor_sizes": (8, 16, 32, 0, 64)}, "one size above 0 for each of 5 maps"),
        (FEATURES, {"anchor_sizes": (8, 16, 32, -8, 64)}, "one size above 0 for each of 5 maps"),
        (FEATURES, {"samples": 3}, "samples must be at least 4, got 3"),
        (FEATURES, {"region_dim": 0}, "region_dim must be at least 1, got 0"),
        (FEATURES, {"score_threshold": -0.1}, r"score_threshold must lie in \[0, 1\], got -0.1"),
        (FEATURES, {"nms_threshold": float("nan")}, r"nms_threshold must lie in \[0, 1\], got nan"),
        (FEATURES, {"norm": "layer"}, "norm: unknown choice 'layer'"),
        (FEATURES, {"mask_head": "fnc"}, "mask_head: unknown choice 'fnc'; closest: fcn"),
    ],
)
def test_what_cannot_be_built_is_said(features, options, message):
    with pytest.raises(ValueError, match=message):
        MaskRCNNConfig(**{**SMALL, **options}).build(features, num_classes=3, neuron=neuron_builder("i_lif"))


def painted(size=64):
    """A rectangle in the upper half and an ellipse in the lower one, on noise."""
    rows, columns = torch.arange(size)[:, None] + 0.5, torch.arange(size) + 0.5
    image, masks = 0.1 * torch.randn(3, size, size), []
    for label, colour in enumerate(([1.0, -1, 0], [-1.0, 1, 0.5])):
        width, height = torch.randint(16, 29, (2,)).tolist()
        left = int(torch.randint(1, size - width, ()))
        top = int(torch.randint(1, size // 2 - height + 1, ())) + label * size // 2
        across, down = (columns - left) / width * 2 - 1, (rows - top) / height * 2 - 1
        inside = across**2 + down**2 < 1 if label else (across.abs() < 1) & (down.abs() < 1)
        image += inside * torch.tensor(colour)[:, None, None]
        masks.append(inside)
    masks = torch.stack(masks)
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    return image, target(*boxes.tolist(), labels=[0, 1], size=(size, size), shape=(size, size)) | {"masks": masks}


def average_precision(found, targets):
    """COCO's AP50 of boxes."""

    def row(image, box, label):
        x1, y1, x2, y2 = box.tolist()
        area = (x2 - x1) * (y2 - y1)
        return {
            "image_id": image,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "category_id": int(label),
            "area": area,
            "iscrowd": 0,
        }

    truth = [row(image, *each) for image, t in enumerate(targets) for each in zip(t["boxes"], t["labels"], strict=True)]
    guesses = [
        row(image, box, label) | {"score": float(score)}
        for image, each in enumerate(found)
        for box, score, label in zip(each.boxes, each.scores, each.labels, strict=True)
    ]
    coco = COCO(
        {
            "images": [{"id": image, "height": 64, "width": 64} for image in range(len(targets))],
            "annotations": [each | {"id": index + 1} for index, each in enumerate(truth)],
            "categories": [{"id": 0, "name": "rectangle"}, {"id": 1, "name": "ellipse"}],
        }
    )
    judged = COCOeval_faster(coco, coco.loadRes(guesses), "bbox")
    judged.run()
    return judged.stats_as_dict["AP_50"]


@pytest.mark.slow
def test_it_learns_eight_pictures_from_scratch():
    pairs = [painted() for _ in range(8)]
    images, targets = torch.stack([image for image, _ in pairs]), [each for _, each in pairs]
    backbone = dataclasses.replace(BACKBONE, dims=(8, 16, 24, 32), blocks=(1, 0, 1, 1, 0))
    config = MaskRCNNConfig(
        region_dim=16, fc_dim=64, norm="batch_norm", anchor_sizes=(8, 16, 24, 32, 48), samples=32, regions=100
    )
    model = DetectorConfig(backbone, config, num_classes=2, neuron="i_lif").build()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=100)
    for _ in range(100):
        optimiser.zero_grad()
        sum(model.loss(model(images, targets), targets).values()).backward()
        optimiser.step()
        schedule.step()
    model.eval()
    found = model.detect(model(images))
    assert average_precision(found, targets) >= 0.95
    overlaps = [
        max(float((drawn & mask).sum() / (drawn | mask).sum()) for drawn in each.masks > 0.5)
        for each, goal in zip(found, targets, strict=True)
        for mask in goal["masks"]
    ]
    assert min(overlaps) > 0.7

"""Matching and losses of mask classification: worked by hand, cheap, finite, and clear where an image is unusual."""

import math

import pytest
import torch
from torch import Tensor

from spikeformers.heads.mask_loss import (
    MaskLossWeights,
    Matches,
    all_mask_losses,
    dice_losses,
    mask_losses,
    match,
    matching_costs,
)
from spikeformers.heads.masks import MaskClassification

WEIGHTS = MaskLossWeights()
HUGE = 30.0  # a logit whose sigmoid is 1 within 1e-13


def predicted(classes: list[list[float]], masks: list[list[float]]) -> MaskClassification:
    """One image; each mask a row of pixels."""
    rows = torch.tensor(masks, dtype=torch.float64)[None, :, None]
    return MaskClassification(torch.tensor(classes, dtype=torch.float64)[None], rows)


def random_output(*, queries: int, classes: int, batch: int = 2, size: int = 8) -> MaskClassification:
    return MaskClassification(torch.randn(batch, queries, classes + 1), torch.randn(batch, queries, size, size))


def as_pairs(matches: Matches) -> set[tuple[int, int, int]]:
    return set(zip(*(part.tolist() for part in matches), strict=True))


def test_costs_by_hand():
    # One query of even odds for both classes and "no object"; two pixels, one inside class 1.
    output = predicted([[0, 0, 0]], [[0, 0]])
    targets = torch.tensor([[[True, False]]])
    by_class, by_focal, by_dice = matching_costs(
        output.class_logits[0], output.mask_logits[0], classes=torch.tensor([1]), targets=targets, weights=WEIGHTS
    )
    assert by_class.item() == pytest.approx(-1 / 3)
    # -log(1/2) (1/2)^2 at both pixels, times 1/4 inside and 3/4 outside, averaged, weighted by 20.
    assert by_focal.item() == pytest.approx(20 * math.log(2) * 0.25 * (0.25 + 0.75) / 2)
    assert by_dice.item() == pytest.approx(1 - (2 * 0.5 + 1) / (1 + 1 + 1))


def test_matching_takes_the_cheapest_assignment_as_a_whole():
    # Query 0 is the best for both classes, a little better for class 0; query 1 is hopeless for class 1 only.
    output = predicted([[2.0, 1.9, 0], [1.8, -9, 0]], [[0, 0], [0, 0]])
    labels = torch.tensor([[[0, 1]]])
    assert as_pairs(match(output, labels, weights=WEIGHTS)) == {(0, 1, 0), (0, 0, 1)}


def test_matching_follows_masks_where_classes_say_nothing():
    output = predicted([[0, 0, 0], [0, 0, 0]], [[-5, 5], [5, -5]])
    assert as_pairs(match(output, torch.tensor([[[0, 1]]]), weights=WEIGHTS)) == {(0, 1, 0), (0, 0, 1)}


def test_losses_by_hand():
    output = predicted([[0, 0, 0], [0, 0, 0]], [[0, 0], [HUGE, HUGE]])
    losses = mask_losses(output, torch.tensor([[[0, 255]]]), weights=WEIGHTS)
    # Query 0 takes class 0: it covers less of the pixel without a label. Query 1 should say "no object", weight 0.1.
    assert losses["loss_cls"].item() == pytest.approx(math.log(3), rel=1e-6)
    assert losses["loss_mask"].item() == pytest.approx(20 * math.log(2) * 0.25 * (0.25 + 0.75) / 2)
    assert losses["loss_dice"].item() == pytest.approx(1 - (2 * 0.5 + 1) / (1 + 1 + 1), rel=1e-6)


def test_dice_of_a_perfect_mask_is_zero_and_of_its_opposite_nearly_one():
    target = torch.tensor([[[1.0, 0, 1, 0]]])
    logits = (2 * target - 1) * HUGE
    assert dice_losses(logits, target).item() == pytest.approx(0, abs=1e-6)
    assert dice_losses(-logits, target).item() == pytest.approx(1 - 1 / 5)


def test_queries_without_a_class_learn_that_there_is_no_object_a_tenth_as_much():
    output = predicted([[HUGE, 0, 0], [0, 0, 1]], [[HUGE, HUGE], [0, 0]])
    losses = mask_losses(output, torch.zeros(1, 1, 2, dtype=torch.long), weights=WEIGHTS)
    unmatched = 0.1 * -math.log(math.e / (2 + math.e))
    assert losses["loss_cls"].item() == pytest.approx(unmatched / 1.1, rel=1e-6)


def test_auxiliary_outputs_add_their_losses_under_their_number():
    first, last = (random_output(queries=4, classes=3) for _ in range(2))
    labels = torch.randint(3, (2, 16, 16))
    losses = all_mask_losses(last._replace(auxiliary=(first,)), labels, weights=WEIGHTS)
    assert list(losses) == ["loss_cls", "loss_mask", "loss_dice", "d0.loss_cls", "d0.loss_mask", "d0.loss_dice"]
    alone = mask_losses(first, labels, weights=WEIGHTS)
    assert all(torch.equal(losses[f"d0.{name}"], loss) for name, loss in alone.items())


def test_an_image_of_ignored_pixels_teaches_only_that_there_is_no_object():
    output = random_output(queries=3, classes=4)
    output.mask_logits.requires_grad_()
    labels = torch.full((2, 16, 16), 255)
    losses = mask_losses(output, labels, weights=WEIGHTS)
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    expected = torch.nn.functional.cross_entropy(output.class_logits.flatten(0, 1), torch.full((6,), 4))
    assert losses["loss_cls"].item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(sum(losses.values()), output.mask_logits)
    assert not grad.any()


def test_an_image_of_one_class_matches_one_query():
    matches = match(random_output(queries=5, classes=3, batch=1), torch.full((1, 8, 8), 2), weights=WEIGHTS)
    assert matches.classes.tolist() == [2]


def test_more_classes_than_queries_leave_classes_unmatched_and_the_loss_finite():
    output, labels = random_output(queries=2, classes=5, batch=1), torch.arange(5).repeat(5, 1)[None]
    matches = match(output, labels, weights=WEIGHTS)
    assert sorted(matches.queries.tolist()) == [0, 1]
    assert len(set(matches.classes.tolist())) == 2
    assert torch.isfinite(sum(mask_losses(output, labels, weights=WEIGHTS).values()))


@pytest.mark.parametrize("label", [3, -1, 254])
def test_a_label_that_is_no_class_is_named(label):
    labels = torch.zeros(2, 8, 8, dtype=torch.long)
    labels[1, 3, 3] = label
    with pytest.raises(ValueError, match=f"label {label} is no class .* 0 to 2"):
        match(random_output(queries=3, classes=3), labels, weights=WEIGHTS)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_losses_and_gradients_of_extreme_logits_are_finite_in_float32(scale):
    output = random_output(queries=4, classes=3)
    leaves = [(scale * part).requires_grad_() for part in output[:2]]
    loss = sum(mask_losses(MaskClassification(*leaves), torch.randint(3, (2, 16, 16)), weights=WEIGHTS).values())
    gradients = torch.autograd.grad(loss, leaves)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_logits_that_are_not_numbers_give_a_loss_that_is_none():
    output = random_output(queries=4, classes=3)
    output.mask_logits[0, 1] = math.nan
    output.class_logits[1] = math.nan
    loss = sum(mask_losses(output, torch.randint(3, (2, 16, 16)), weights=WEIGHTS).values())
    assert not torch.isfinite(loss)


def test_losses_of_half_precision_are_computed_in_float32():
    output = random_output(queries=4, classes=3)
    half = MaskClassification(*(part.bfloat16() for part in output[:2]))
    as_float = MaskClassification(*(part.float() for part in half[:2]))
    labels = torch.randint(3, (2, 16, 16))
    for name, loss in mask_losses(half, labels, weights=WEIGHTS).items():
        assert torch.equal(loss, mask_losses(as_float, labels, weights=WEIGHTS)[name])


def test_class_weights_weigh_queries_by_their_class():
    output = predicted([[0, 0, 0], [0, 0, 1.0]], [[HUGE, -HUGE], [-HUGE, HUGE]])
    labels = torch.tensor([[[0, 1]]])
    loss = mask_losses(output, labels, weights=WEIGHTS, class_weights=torch.tensor([3.0, 1.0]))["loss_cls"].item()
    assert loss == pytest.approx((3 * math.log(3) + math.log(2 + math.e)) / 4, rel=1e-6)


def test_masks_count_as_the_mean_over_processes(monkeypatch):
    """Three more masks elsewhere, two processes: (M + 3) / 2 masks each."""

    def add_three(count: Tensor) -> None:
        count += 3

    output, labels = random_output(queries=4, classes=3, batch=1), torch.full((1, 16, 16), 1)
    alone = mask_losses(output, labels, weights=WEIGHTS)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_three)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shared = mask_losses(output, labels, weights=WEIGHTS)
    assert shared["loss_dice"].item() == pytest.approx(alone["loss_dice"].item() / 2, rel=1e-6)
    assert shared["loss_mask"].item() == pytest.approx(alone["loss_mask"].item() / 2, rel=1e-6)
    assert torch.equal(shared["loss_cls"], alone["loss_cls"])


def test_the_map_of_one_perfect_query_is_its_class_inside_its_mask():
    masks = torch.full((1, 1, 4, 4), -HUGE)
    masks[..., :2] = HUGE
    scores = MaskClassification(torch.tensor([[[-HUGE, HUGE, -HUGE]]]), masks).semantic((8, 8))
    assert scores.shape == (1, 2, 8, 8)
    assert torch.allclose(scores[0, 1, :, :3], torch.ones(8, 3))
    assert scores[0, 1, :, 5:].max() < 1e-6
    assert scores[0, 0].max() < 1e-6


def test_a_query_that_says_no_object_paints_nothing():
    scores = MaskClassification(torch.tensor([[[0.0, 0, HUGE]]]), torch.full((1, 1, 4, 4), HUGE)).semantic((4, 4))
    assert scores.max() < 1e-6


def test_at_the_resolution_of_the_masks_labels_shrink_instead():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, 2:] = 1
    given = random_output(queries=3, classes=2, batch=1, size=2)
    at_masks = all_mask_losses(given, labels, weights=MaskLossWeights(resolution="masks"))
    expected = all_mask_losses(given, labels[:, ::2, ::2], weights=MaskLossWeights())
    assert at_masks == expected
    assert at_masks["loss_mask"] != all_mask_losses(given, labels, weights=MaskLossWeights())["loss_mask"]

"""Eq. 13 by hand and by its identities, what a silent head does to it, and how layers of two networks are paired."""

import copy
import gc
import math

import pytest
import timm
import torch
from torch import nn

from spikeformers.backbones.meta_spikeformer import ANN_TWIN
from spikeformers.distill import RULES, AttentionOperands, FineGrainedDistillation, Twin, fgd_loss, listen, similarity
from spikeformers.zoo import create_model

NORMS = ("frobenius", "rows")
SIZES = {"num_classes": 10, "dims": (8, 16, 32, 40), "blocks": (1, 1, 1, 2, 1)}


def student(**overrides) -> nn.Module:
    return create_model("meta_spikeformer_15m", **(SIZES | {"neuron": "ie_lif"} | overrides))


def twin() -> nn.Module:
    return student(**ANN_TWIN)


def watched(distillation: FineGrainedDistillation, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with distillation.watch():
        model(images)
    return distillation.loss(images)


def layers(*, count: int = 2, batch: int = 3, heads: int = 4, width: int = 5, tokens: int = 6) -> list:
    return [tuple(torch.randn(3, batch, heads, width, tokens, dtype=torch.float64)) for _ in range(count)]


def operands(stage: str, *, grid: tuple[int, int] = (2, 2), heads: int = 2, value: float = 1.0) -> AttentionOperands:
    x = torch.full((1, heads, 3, grid[0] * grid[1]), value)
    return AttentionOperands(f"{stage}.block.attn", stage, grid, (x, x, x))


def of_tokens(*tokens: tuple[float, ...]) -> torch.Tensor:
    """One image, one head; tokens last."""
    return torch.tensor(tokens, dtype=torch.float64).T[None, None]


# Tokens (1, 0) and (1, 1): products 1, 1, 1, 2, of length sqrt(7); rows of length sqrt(2) and sqrt(5).
TWO, GRAM = of_tokens((1, 0), (1, 1)), torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
APART = of_tokens((3, 0), (0, 3))  # their similarity is the unit matrix over sqrt(2)


def test_similarity_by_hand():
    # Square roots and quotients of single numbers: the last bit of float64.
    assert torch.allclose(similarity(TWO)[0, 0], GRAM / math.sqrt(7), atol=1e-15, rtol=0)
    rows = torch.tensor([[math.sqrt(2)], [math.sqrt(5)]], dtype=torch.float64)
    assert torch.allclose(similarity(TWO, norm="rows")[0, 0], GRAM / rows, atol=1e-15, rtol=0)


def test_loss_by_hand():
    # Lengths are 1, so the squared distance is 2 - 2 <G, G'>: <G, G'> = (1 + 2) / sqrt(7) sqrt(2).
    distance = math.sqrt(2 - 6 / math.sqrt(14))
    found = fgd_loss([(TWO, TWO, APART)], [(APART, TWO, TWO)])
    assert found.item() == pytest.approx(2 * distance, abs=1e-14)  # q and v differ, k does not
    # Rows: <G_1, G'_1> = 1 / sqrt(2), <G_2, G'_2> = 2 / sqrt(5).
    by_rows = math.sqrt((2 - 2 / math.sqrt(2)) + (2 - 4 / math.sqrt(5)))
    assert fgd_loss([(TWO, TWO, APART)], [(APART, TWO, TWO)], norm="rows").item() == pytest.approx(
        2 * by_rows, abs=1e-14
    )


@pytest.mark.parametrize("norm", NORMS)
def test_loss_is_the_written_sum_over_layers_heads_and_operands_averaged_over_the_batch(norm):
    ours, theirs = layers(width=5), layers(width=2)
    total = 0.0
    for layer in range(2):
        for operand in range(3):
            for image in range(3):
                for head in range(4):
                    matrices = []
                    for x in (ours[layer][operand][image, head], theirs[layer][operand][image, head]):
                        gram = torch.stack([torch.stack([(a * b).sum() for b in x.T]) for a in x.T])
                        length = gram.square().sum() if norm == "frobenius" else gram.square().sum(1, keepdim=True)
                        matrices.append(gram / length.sqrt())
                    total += (matrices[0] - matrices[1]).square().sum().sqrt().item()
    # Sums of at most 36 float64 numbers in another order.
    assert fgd_loss(ours, theirs, norm=norm).item() == pytest.approx(total / 3, rel=1e-12)
    assert fgd_loss(ours, theirs, norm=norm, reduction="mean").item() == pytest.approx(total / 72, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_loss_vanishes_where_only_scale_and_rotation_of_the_tokens_differ(norm):
    ours = layers()
    assert fgd_loss(ours, ours, norm=norm).item() == 0
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    turned = [tuple(7.5 * rotation @ x for x in qkv) for qkv in ours]
    assert fgd_loss(turned, ours, norm=norm).item() < 1e-12  # 24 terms of float64 rounding


def test_loss_does_not_ask_which_head_is_which_but_which_token_it_does():
    ours, theirs = layers(), layers()
    expected = fgd_loss(ours, theirs).item()
    shuffled = [[tuple(x[:, [2, 0, 3, 1]] for x in qkv) for qkv in each] for each in (ours, theirs)]
    assert fgd_loss(*shuffled).item() == pytest.approx(expected, rel=1e-12)  # another order of the sum
    assert fgd_loss(shuffled[0], theirs).item() != pytest.approx(expected, rel=1e-3)
    moved = [tuple(x.roll(1, 3) for x in qkv) for qkv in ours]
    assert fgd_loss(moved, theirs).item() != pytest.approx(expected, rel=1e-3)


def test_averaging_over_heads_compares_means_of_matrices_and_lets_heads_differ():
    ours, theirs = layers(count=1, heads=2), layers(count=1, heads=5)
    expected = sum(
        (similarity(x).mean(1) - similarity(y).mean(1)).flatten(1).norm(dim=1).mean()
        for x, y in zip(ours[0], theirs[0], strict=True)
    )
    found = fgd_loss(ours, theirs, average_heads=True).item()
    assert found == pytest.approx(expected.item(), rel=1e-12)  # the same sums by another route


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("reduction", "average_heads"), [("sum", False), ("mean", True)])
def test_gradient_is_that_of_the_formula(norm, reduction, average_heads):
    theirs = layers(batch=2, heads=2, width=2, tokens=3)

    def loss(*ours: torch.Tensor) -> torch.Tensor:
        pairs = [ours[:3], ours[3:]]
        return fgd_loss(pairs, theirs, norm=norm, reduction=reduction, average_heads=average_heads)

    ours = [x.requires_grad_() for qkv in layers(batch=2, heads=2, width=4, tokens=3) for x in qkv]
    assert torch.autograd.gradcheck(loss, ours)  # its own tolerances, float64


@pytest.mark.parametrize("norm", NORMS)
def test_a_silent_head_is_zero_far_from_the_teacher_and_has_a_finite_gradient(norm):
    x = torch.randn(2, 3, 4, 5)
    x[0, 1] = 0
    x[1, 2, :, 3] = 0  # one silent token
    x.requires_grad_()
    matrices = similarity(x, norm=norm)
    assert not matrices[0, 1].any()
    assert not matrices[1, 2, 3].any()
    other = torch.randn(2, 3, 4, 5)
    fgd_loss([(x, x, x)], [(other, other, other)], norm=norm).backward()
    assert x.grad.isfinite().all()
    assert x.grad[0, 0].any()
    assert not x.grad[0, 1].any()
    silent, wanted = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    length = {"frobenius": 1, "rows": math.sqrt(2)}[norm]  # of the teacher's matrix, all that is left
    found = fgd_loss([(silent,) * 3], [(wanted,) * 3], norm=norm).item()
    assert found == pytest.approx(3 * length, abs=1e-6)  # float32


@pytest.mark.parametrize("norm", NORMS)
def test_no_difference_has_a_zero_gradient(norm):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    fgd_loss([(x, x, x)], [(x.detach(),) * 3], norm=norm).backward()
    assert not x.grad.any()


def test_similarity_is_float32_under_autocast():
    x = torch.randn(1, 2, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = similarity(x), similarity(x.bfloat16())
    assert torch.equal(found[0], similarity(x))
    assert torch.equal(found[1], similarity(x.bfloat16().float()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 1}, "got 1 for 2"),
        ({"batch": 2}, "batch must agree, got 2 of the student and 3 of the teacher"),
        ({"heads": 2}, "heads must agree, got 2 of the student and 4 of the teacher"),
        ({"tokens": 4}, "tokens must agree, got 4 of the student and 6 of the teacher"),
    ],
)
def test_shapes_that_cannot_be_compared_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fgd_loss(*((layers(), layers(**change)) if "count" in change else (layers(**change), layers())))


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="got 0 for 0"):
        fgd_loss([], [])


def test_unknown_choices_are_refused():
    for choice, message in (({"norm": "row"}, "rows"), ({"reduction": "men"}, "mean"), ({"rule": "sam"}, "same")):
        with pytest.raises(ValueError, match=f"unknown choice .* closest: {message}"):
            FineGrainedDistillation(student(), twin(), **choice)


def test_same_refuses_another_layout_and_names_the_rule_for_it():
    plain = [operands("a"), operands("a")]
    align = RULES["same"].align
    assert align(plain, plain) is plain
    for other, message in (
        ([operands("a")], "layers, student 2, teacher 1"),
        ([operands("a"), operands("a", heads=3)], "heads in a.block.attn, student 2, teacher 3"),
        ([operands("a"), operands("a", grid=(1, 4))], "tokens in a.block.attn, student 2x2, teacher 1x4"),
    ):
        with pytest.raises(ValueError, match=f"{message}; .* rule='caformer'"):
            align(plain, other)


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        ((6, 2), (9, 3), [0, 2, 3, 5, 6, 8, 9, 11]),  # Meta-SpikeFormer 15M beside caformer_s18
        ((1, 1), (9, 3), [8, 11]),
        ((2, 1), (2, 1), [0, 1, 2]),
    ],
)
def test_caformer_pairs_the_blocks_of_a_stage_evenly_and_ends_with_the_last(ours, theirs, chosen):
    teacher = [operands(f"stages.{stage}") for stage, blocks in enumerate(theirs) for _ in range(blocks)]
    teacher = [AttentionOperands(str(index), layer.stage, layer.grid, layer.qkv) for index, layer in enumerate(teacher)]
    blocks = [operands(f"stage{stage}", heads=8) for stage, blocks in enumerate(ours) for _ in range(blocks)]
    assert [int(layer.name) for layer in RULES["caformer"].align(blocks, teacher)] == chosen


def test_caformer_resizes_maps_of_the_teacher_to_the_grid_of_the_student():
    # A ramp over columns, the same for every head and channel but for its slope.
    ramp = torch.arange(4.0).expand(2, 4).flatten()
    slopes = torch.arange(1.0, 7).view(1, 2, 3, 1)
    x = slopes * ramp
    teacher = [AttentionOperands("t", "stages.3", (2, 4), (x, x + 1, -x))]
    (found,) = RULES["caformer"].align([operands("stage4", grid=(2, 8))], teacher)
    fine = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]).expand(2, 8).flatten()  # half-pixel centres
    for map_, expected in zip(found.qkv, (slopes * fine, slopes * fine + 1, -slopes * fine), strict=True):
        torch.testing.assert_close(map_, expected)  # float32
    assert found.grid == (2, 8)


def test_caformer_refuses_stages_that_have_no_partner():
    align = RULES["caformer"].align
    with pytest.raises(ValueError, match=r"student has attention in 1 \(blocks\), the teacher in 2 \(c, d\)"):
        align([operands("blocks")], [operands("c"), operands("d")])
    with pytest.raises(ValueError, match="stage3 has 2, c has 1; take a deeper teacher"):
        align([operands("stage3"), operands("stage3")], [operands("c")])


def test_a_student_equal_to_its_teacher_has_no_loss():
    network = student().double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    distillation = FineGrainedDistillation(network, copy.deepcopy(network))
    assert watched(distillation, network, images).item() == 0


def test_loss_is_that_of_the_spikes_and_the_twin_heard_one_by_one():
    model, teacher = student(neuron="lif", steps=4), twin().eval()
    images = torch.randn(2, 3, 32, 32)
    with listen(model.eval()) as ours:
        model(images)
    pairs = [layer.qkv for layer in ours], [layer.qkv for layer in Twin(teacher).operands(images)]
    for options in ({}, {"norm": "rows"}, {"reduction": "mean"}):
        found = watched(FineGrainedDistillation(model, teacher, **options), model, images)
        assert torch.equal(found, fgd_loss(*pairs, **options))


def learning(
    distillation: FineGrainedDistillation, model: nn.Module, images: torch.Tensor, *, steps: int
) -> list[float]:
    """The loss before each of some optimiser steps that minimise nothing else."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = watched(distillation, model, images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "steps"), [("meta_spikeformer_15m", 2), ("qsd_transformer_t", 1)])
def test_the_student_learns_the_similarities_of_its_twin(name, steps):
    model = create_model(name, **SIZES, neuron="ie_lif", steps=steps)
    images = torch.randn(4, 3, 32, 32)
    distillation = FineGrainedDistillation(model, twin())
    taught = copy.deepcopy(distillation.teacher.state_dict())
    losses = learning(distillation, model, images, steps=8)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, taught[name]) for name, value in distillation.teacher.state_dict().items())


def test_the_student_learns_from_caformer_s18():
    model = student()
    images = torch.randn(2, 3, 64, 64)
    caformer = timm.create_model("caformer_s18", pretrained=False)
    distillation = FineGrainedDistillation(model, caformer, rule="caformer")
    losses = learning(distillation, model, images, steps=5)
    assert losses[-1] < 0.95 * losses[0]
    with pytest.raises(ValueError, match="layers, student 3, teacher 12"):
        watched(FineGrainedDistillation(model, caformer), model, images)


def test_gradients_reach_what_feeds_the_attentions_and_nothing_else():
    model = student()
    distillation = FineGrainedDistillation(model, twin())
    watched(distillation, model, torch.randn(2, 3, 32, 32)).backward()
    assert model.stage1a.down.conv.conv.weight.grad.any()
    assert model.head.weight.grad is None
    assert all(parameter.grad is None for parameter in distillation.teacher.parameters())


def test_the_loss_and_the_teacher_stay_float32_under_autocast_and_follow_float64_images():
    model = student()
    images = torch.randn(2, 3, 32, 32)
    distillation = FineGrainedDistillation(model, twin())
    taught = []
    distillation.teacher.network.stage3.block0.attn.q.register_forward_hook(lambda *call: taught.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert watched(distillation, model, images).dtype == torch.float32
        assert watched(distillation, model, images.bfloat16()).dtype == torch.float32
    assert watched(distillation, model.double(), images.double()).dtype == torch.float64
    assert taught == [torch.float32, torch.float32, torch.float64]


def test_one_loss_for_each_watched_forward_pass_and_none_after_a_failed_one():
    model = student()
    images = torch.randn(2, 3, 32, 32)
    distillation = FineGrainedDistillation(model, twin())
    watched(distillation, model, images)
    with pytest.raises(RuntimeError, match="no forward pass was watched"):
        distillation.loss(images)
    with distillation.watch():
        model(images)
    with pytest.raises(ValueError, match="3 input channels"), distillation.watch():
        model(images[:, :2])
    with pytest.raises(RuntimeError, match="no forward pass was watched"):
        distillation.loss(images)


def test_other_images_than_the_watched_are_refused():
    model = student()
    distillation = FineGrainedDistillation(model, twin())
    with distillation.watch():
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="batch must agree, got 2 of the student and 3"):
        distillation.loss(torch.randn(3, 3, 32, 32))


def test_what_was_heard_is_freed_with_the_loss():
    model = student(steps=2)
    images = torch.randn(7, 3, 32, 64)
    distillation = FineGrainedDistillation(model, twin())

    def alive() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor and each.shape == (7, 8, 4, 8) for each in gc.get_objects())

    with distillation.watch():
        model(images)
    assert alive() == 6  # averages of q, k and v of the two attentions in stage 3
    loss = distillation.loss(images)
    loss.backward()
    del loss
    assert alive() == 0


def test_a_student_whose_attention_has_no_k_is_refused_at_once():
    with pytest.raises(ValueError, match=r"stage3.block0.attn is SDSA2"):
        FineGrainedDistillation(student(attention="sdsa2"), twin())

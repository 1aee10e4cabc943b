"""Fine-grained distillation: similarities between tokens in the student's q, k, v pulled to those of an ANN teacher.

Paper: QSD-Transformer, Sec. 4.3. Eq. 13 `fgd_loss`; Eq. 14 is cross-entropy + 2 * this loss, in train/.
Departures from the paper: Eq. 13 is garbled in every text of it and no code was released. Its form is taken from the
work that its words follow (Q-ViT, DGD): per layer and head the l2 norm of the difference of l2-normalised X X^T, for X
in q, k, v after the figure. What stays open is an option: `norm` (whole matrix, or each row), `reduction` (sums, or
means); the batch is averaged. A teacher of another layout than the student's needs a rule of `RULES`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.distill.teachers import AttentionOperands, attentions, listen, teacher_of
from spikeformers.neurons import ACTIVATIONS, as_membrane, choose

NORMS = {"frobenius": (-2, -1), "rows": (-1,)}  # the axes of one length
TEACHER_ACTIVATIONS = {"none": nn.Identity()} | {name: build() for name, build in ACTIVATIONS.items()}
REDUCTIONS = {"sum": torch.sum, "mean": torch.mean}  # over layers, heads, and q, k, v
Layers = list[AttentionOperands]
QKV = tuple[Tensor, Tensor, Tensor]  # [B, M, K, N] each


def similarity(x: Float[Tensor, "B M K N"], *, norm: str = "frobenius") -> Float[Tensor, "B M N N"]:
    """G~ = G / ||G|| with G = X X^T over the width K, tokens last in `x`, in float32 at least, also under autocast.

    `norm`: frobenius (one length for each head) or rows (one for each token).  A silent head or token, all zero, gives
    zeros, and its gradient is zero too.  Source: QSD-Transformer, Eq. 13.
    """
    axes = choose("norm", norm, NORMS)
    with torch.autocast(x.device.type, enabled=False):
        x = as_membrane(x)
        gram = x.mT @ x
        length = torch.linalg.vector_norm(gram, dim=axes, keepdim=True)
        return gram / length.where(length > 0, 1)


def fgd_loss(
    student: Sequence[QKV],
    teacher: Sequence[QKV],
    *,
    norm: str = "frobenius",
    reduction: str = "sum",
    average_heads: bool = False,
) -> Float[Tensor, ""]:
    """sum over layers, heads and X in q, k, v of ||G~_X student - G~_X teacher||_2, then the mean over the batch.

    One (q, k, v) for each layer.  Widths may differ.  `reduction`: sum (the paper's) or mean over the same terms.
    `average_heads` compares the mean of G~ over heads, one term for a layer, and lets their number differ.
    Raises ValueError if layers, batches, heads or tokens differ.  Source: QSD-Transformer, Eq. 13.
    """
    reduce = choose("reduction", reduction, REDUCTIONS)
    if not student or len(student) != len(teacher):
        raise ValueError(f"one layer of the teacher for each of the student's, got {len(teacher)} for {len(student)}")
    terms = []
    for ours, theirs in zip(student, teacher, strict=True):
        for x, y in zip(ours, theirs, strict=True):
            _check_fit(x, y, heads=not average_heads)
            difference = _heads(x, norm=norm, average=average_heads) - _heads(y, norm=norm, average=average_heads)
            terms.append(torch.linalg.vector_norm(difference, dim=(2, 3)))
    return reduce(torch.cat(terms, 1), dim=1).mean()


def _heads(x: Tensor, *, norm: str, average: bool) -> Float[Tensor, "B M N N"]:
    matrices = similarity(x, norm=norm)
    return matrices.mean(1, keepdim=True) if average else matrices


def _check_fit(student: Tensor, teacher: Tensor, *, heads: bool) -> None:
    """Raises ValueError unless batch, heads (if they count) and tokens agree."""
    axes = {"batch": 0, "heads": 1, "tokens": 3} if heads else {"batch": 0, "tokens": 3}
    for what, axis in axes.items():
        if student.shape[axis] != teacher.shape[axis]:
            raise ValueError(
                f"{what} must agree, got {student.shape[axis]} of the student and {teacher.shape[axis]} of the "
                f"teacher, [B, M, K, N] = {list(student.shape)} and {list(teacher.shape)}"
            )


def _same(student: Layers, teacher: Layers) -> Layers:
    """The teacher's layers as they are. Raises ValueError if layers, heads or grids of tokens differ."""
    differences = [("layers", len(student), len(teacher))]
    for ours, theirs in zip(student, teacher, strict=False):
        differences.append((f"heads in {ours.name}", ours.qkv[0].shape[1], theirs.qkv[0].shape[1]))
        differences.append((f"tokens in {ours.name}", _times(ours.grid), _times(theirs.grid)))
    for what, ours, theirs in differences:
        if ours != theirs:
            raise ValueError(
                f"the teacher's layout is not the student's: {what}, student {ours}, teacher {theirs}; take the "
                "student's own twin, or rule='caformer', which pairs blocks stage by stage, averages over heads and "
                "resizes grids of tokens"
            )
    return teacher


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _by_stage(student: Layers, teacher: Layers) -> Layers:
    """For block i of the n in a student's stage, block floor((i + 1) m / n) - 1 of the m in the teacher's, resized.

    Raises ValueError if the stages differ in number, or one of the teacher's has fewer blocks.
    """
    ours, theirs = _stages(student), _stages(teacher)
    if len(ours) != len(theirs):
        raise ValueError(
            f"rule 'caformer' pairs stages: the student has attention in {len(ours)} ({', '.join(ours)}), the teacher "
            f"in {len(theirs)} ({', '.join(theirs)}); take the student's own twin with rule='same'"
        )
    chosen = []
    for (stage, blocks), candidates in zip(ours.items(), theirs.values(), strict=True):
        n, m = len(blocks), len(candidates)
        if m < n:
            raise ValueError(
                f"rule 'caformer' needs a block of the teacher for each of the student's: {stage} has {n}, "
                f"{candidates[0].stage} has {m}; take a deeper teacher or a shallower student"
            )
        chosen += [resized(candidates[(i + 1) * m // n - 1], block.grid) for i, block in enumerate(blocks)]
    return chosen


def _stages(layers: Layers) -> dict[str, Layers]:
    return {stage: list(group) for stage, group in groupby(layers, attrgetter("stage"))}


def resized(layer: AttentionOperands, grid: tuple[int, int]) -> AttentionOperands:
    """`layer` with its maps q, k, v interpolated to another grid of tokens (bilinear)."""

    def stretch(x: Tensor) -> Tensor:
        maps = x.flatten(1, 2).unflatten(2, layer.grid)
        return F.interpolate(maps, size=grid, mode="bilinear").flatten(2).unflatten(1, x.shape[1:3])

    q, k, v = layer.qkv
    return replace(layer, grid=grid, qkv=(stretch(q), stretch(k), stretch(v)))


@dataclass(frozen=True)
class Rule:
    """How a teacher's layers stand beside the student's.

    `align` (student's layers, teacher's layers) gives one layer of the teacher for each of the student's, on its grid.
    `average_heads`: their similarities are averaged over heads before they are compared.
    """

    align: Callable[[Layers, Layers], Layers]
    average_heads: bool = False


RULES = {"same": Rule(_same), "caformer": Rule(_by_stage, average_heads=True)}


class FineGrainedDistillation:
    """The loss of a student that learns the similarities of a teacher's q, k, v.

    Example:
        distillation = FineGrainedDistillation(student, teacher)
        with distillation.watch():
            outputs = model(images)  # the student, or a wrapper around it
        loss = cross_entropy(outputs, labels) + 2 * distillation.loss(images)
    `teacher`: see `teacher_of`; it is frozen.  `rule`: one of RULES, or your own.  `norm`, `reduction`: see `fgd_loss`.
    `activation`: what the teacher's q, k, v pass before they are compared: none, gelu or relu.
    Raises ValueError for a choice that does not exist, or a network without attention that multiplies q, k and v.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        rule: str | Rule = "same",
        norm: str = "frobenius",
        reduction: str = "sum",
        activation: str = "none",
    ) -> None:
        self.rule = choose("rule", rule, RULES)
        for field, choice, known in (("norm", norm, NORMS), ("reduction", reduction, REDUCTIONS)):
            choose(field, choice, known)
        attentions(student)
        self.student, self.teacher = student, teacher_of(teacher)
        self.norm, self.reduction = norm, reduction
        self.activation = choose("activation", activation, TEACHER_ACTIVATIONS)
        self._layers: Layers = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inside this context call the student once, with gradients: `loss` is about that forward pass."""
        self._layers = []
        with listen(self.student) as layers:
            yield
        self._layers = layers

    def loss(self, images: Tensor) -> Float[Tensor, ""]:
        """The loss for the `images` of the forward pass just watched, which is forgotten.

        The teacher follows the images to their device, and runs in float32, or float64 if they have that.
        Raises RuntimeError without a watched pass, ValueError for a teacher that the rule cannot map.
        """
        if not self._layers:
            raise RuntimeError("no forward pass was watched: call the student inside watch(), once for each loss")
        student, self._layers = self._layers, []
        with torch.autocast(images.device.type, enabled=False):
            images = as_membrane(images)
            teacher = self.rule.align(student, self.teacher.to(images).operands(images))
        return fgd_loss(
            [layer.qkv for layer in student],
            [tuple(self.activation(x) for x in layer.qkv) for layer in teacher],
            norm=self.norm,
            reduction=self.reduction,
            average_heads=self.rule.average_heads,
        )

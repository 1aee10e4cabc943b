"""What fine-grained distillation adds to a training step: time, and memory kept for the backward pass.

Paper: QSD-Transformer, Sec. 4.3 (its reviewers asked; the paper has no figure).
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spikeformers.distill.fgd import FineGrainedDistillation


@dataclass(frozen=True)
class Cost:
    """Of a step's forward and backward pass: seconds, and MB (10^6 bytes) kept between them."""

    seconds: float
    seconds_plain: float
    kept_mb: float
    kept_plain_mb: float


def cost(
    student: nn.Module,
    distillation: FineGrainedDistillation,
    images: Tensor,
    *,
    autocast: torch.dtype | None = None,
    repeats: int = 3,
) -> Cost:
    """Medians over `repeats` steps on `images` with and without the loss, taken in turn; `student` stays as it is.

    `autocast`: precision of the forward passes, None for that of the images.
    """
    student = copy.deepcopy(student).train()
    choices = {"rule": distillation.rule, "norm": distillation.norm, "reduction": distillation.reduction}
    choices |= {"activation": distillation.activation}
    distillation = FineGrainedDistillation(student, distillation.teacher, **choices)

    def plain() -> Tensor:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            return student(images).float().sum()

    def distilled() -> Tensor:
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            with distillation.watch():
                logits = student(images)
            return logits.float().sum() + distillation.loss(images)

    took: dict[str, list[float]] = {"plain": [], "distilled": []}
    for _ in range(repeats):
        for name, step in (("plain", plain), ("distilled", distilled)):
            _wait(images)
            began = time.perf_counter()
            step().backward()
            _wait(images)
            took[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(times) for name, times in took.items()}
    return Cost(seconds["distilled"], seconds["plain"], kept_mb(student, distilled), kept_mb(student, plain))


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def kept_mb(model: nn.Module, step: Callable[[], Tensor]) -> float:
    """MB that `step`, a forward pass of `model`, keeps for backward besides the model's own weights."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(kept.values()) / 1e6

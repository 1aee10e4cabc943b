"""The optimiser of a recipe, and the learning rate as a closed function of the step, so that resuming is exact."""

import math

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from spikeformers.train.recipe import Optim, Recipe


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Any optimiser of timm; 1-D parameters (biases, norms) are not decayed. Raises ValueError for an unknown name."""
    try:
        return create_optimizer_v2(model, opt=optim.name, lr=optim.lr, weight_decay=optim.weight_decay)
    except ValueError as error:
        raise ValueError(f"optim.name {optim.name!r} is no optimiser of timm (try adamw, lamb or lambc)") from error


def peak_rate(recipe: Recipe, *, processes: int) -> float:
    """The highest learning rate: `optim.lr`, scaled by the images of a step over `optim.lr_batch` if that is set."""
    images = recipe.batch_size * recipe.accumulate * processes
    return recipe.optim.lr * (images / recipe.optim.lr_batch if recipe.optim.lr_batch else 1.0)


def learning_rate(step: int, *, steps_per_epoch: int, epochs: int, peak: float, optim: Optim) -> float:
    """Rate of the optimiser step number `step` (from 0): linear from 0 in the warm-up, then half a cosine."""
    epoch = step / steps_per_epoch
    if epoch < optim.warmup_epochs:
        return peak * epoch / optim.warmup_epochs
    rest = max(epochs - optim.warmup_epochs, 1e-12)
    done = min((epoch - optim.warmup_epochs) / rest, 1.0)
    floor = min(optim.min_lr, peak)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every parameter group use `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(model: nn.Module, *, clip: float) -> torch.Tensor:
    """Global norm of the gradients before clipping; scales them down to `clip` if that is above 0."""
    parameters = [each for each in model.parameters() if each.grad is not None]
    if clip > 0:
        return nn.utils.clip_grad_norm_(parameters, clip)
    return nn.utils.get_total_norm([each.grad for each in parameters])

"""The optimiser of a recipe, and the learning rate as a closed function of the step, so that resuming is exact."""

import math
from collections.abc import Iterable

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.tensor import DTensor

from spikeformers.neurons import closest
from spikeformers.train.recipe import Optim, Recipe


def build_optimizer(model: nn.Module, optim: Optim, *, fused: bool = False) -> torch.optim.Optimizer:
    """Any optimiser of timm; 1-D parameters (biases, norms) are not decayed unless `optim` says otherwise.

    `fused`: in its form that updates all parameters in one pass.

    With `optim.layer_decay` below 1 every group of parameters has its layer's `lr_scale`, layers being those of the
    model's `group_matcher` (timm's protocol).  `optim.rates`, `undecayed` and `decay_1d` make groups by name instead.
    Raises ValueError for an unknown optimiser or part, one without a fused form, a model without layers, or both kinds
    of groups.
    """
    decays, by_name = optim.layer_decay < 1, bool(optim.rates or optim.undecayed or optim.decay_1d)
    if decays and by_name:
        raise ValueError(
            f"optim.layer_decay={optim.layer_decay} makes its own groups of parameters, so optim.rates, "
            "optim.undecayed and optim.decay_1d cannot: set optim.layer_decay=1 or leave them out"
        )
    if decays and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"optim.layer_decay={optim.layer_decay} needs a network that lists its layers, but {type(model).__name__} "
            "has no group_matcher(coarse=False) as timm's have: set optim.layer_decay=1"
        )
    groups = parameter_groups(model, optim) if by_name else model
    try:
        return create_optimizer_v2(
            groups,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay if decays else None,
            **({"fused": True} if fused else {}),
        )
    except TypeError as error:
        if "fused" not in str(error):
            raise
        raise ValueError(
            f"optim.name {optim.name!r} has no fused form (adamw, adam and sgd do): set speed.fused_optimizer=false"
        ) from error
    except ValueError as error:
        raise ValueError(f"optim.name {optim.name!r} is no optimiser of timm (try adamw, lamb or lambc)") from error


def parameter_groups(model: nn.Module, optim: Optim) -> list[dict]:
    """Trainable parameters by `lr_scale` (the longest part in `optim.rates` that a name begins with) and decay.

    Raises ValueError for an entry of `optim.rates` or `optim.undecayed` that no parameter has in its name.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for part in optim.rates:
        if not any(_within(name, part) for name in parameters):
            raise ValueError(f"optim.rates.{part} names no part of the network; {closest(part, _parts(parameters))}")
    for part in optim.undecayed:
        if not any(part in name for name in parameters):
            raise ValueError(f"optim.undecayed: no parameter has {part!r} in its name; {closest(part, parameters)}")
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in parameters.items():
        around = [part for part in optim.rates if _within(name, part)]
        scale = optim.rates[max(around, key=len)] if around else 1.0
        free = any(part in name for part in optim.undecayed) or (parameter.ndim <= 1 and not optim.decay_1d)
        decay = 0.0 if free else optim.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _within(name: str, part: str) -> bool:
    return f"{name}.".startswith(f"{part}.")


def _parts(names: Iterable[str]) -> list[str]:
    """Every module that a parameter of these names lies in."""
    return sorted({name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)})


def peak_rate(recipe: Recipe, *, processes: int) -> float:
    """The highest learning rate: `optim.lr`, scaled by the images of a step over `optim.lr_batch` if that is set."""
    images = recipe.batch_size * recipe.accumulate * processes
    return recipe.optim.lr * (images / recipe.optim.lr_batch if recipe.optim.lr_batch else 1.0)


def learning_rate(step: int, *, steps_per_epoch: int, epochs: int, peak: float, optim: Optim) -> float:
    """Rate of the optimiser step number `step` (from 0): linear in the warm-up, the schedule, then the cool-down.

    With `optim.per_epoch` it is the rate of the epoch's beginning, and the warm-up covers the schedule's first part
    instead of delaying it, as in timm 0.5.4: floor + (peak - floor) / 2 * (1 + cos(pi * epoch / end)).
    """
    end = epochs - optim.cooldown_epochs
    floor = min(optim.min_lr, peak)
    epoch = step // steps_per_epoch if optim.per_epoch else step / steps_per_epoch
    if epoch >= end:
        return floor
    if epoch < optim.warmup_epochs:
        return optim.warmup_lr + (peak - optim.warmup_lr) * epoch / optim.warmup_epochs
    start = 0 if optim.per_epoch else optim.warmup_epochs
    done = (epoch - start) / (end - start)
    left = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else (1 - done) ** optim.power
    return floor + (peak - floor) * left


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let every parameter group use `rate`, times its layer's `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def gradient_norm(model: nn.Module, *, clip: float) -> torch.Tensor:
    """Global norm of the gradients before clipping; scales them down to `clip` if that is above 0."""
    parameters = [each for each in model.parameters() if each.grad is not None]
    if clip > 0:
        norm = nn.utils.clip_grad_norm_(parameters, clip)
    else:
        norm = nn.utils.get_total_norm([each.grad for each in parameters])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # under FSDP each process has a part

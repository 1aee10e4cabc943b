"""Time: how many steps a model unrolls, and streaming, where each step arrives by itself.

Inside a network every tensor is [T*B, ...], time-major. Only modules derived from `Temporal` know T. Nothing survives a
forward pass; `streaming` is the one explicit exception and ends with its context.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass
class Stream:
    """What a stream carries between steps: one tensor per temporal module, keyed by the module's name."""

    carried: dict[str, Tensor] = field(default_factory=dict)
    ticks: dict[str, int] = field(default_factory=dict)

    def read(self, name: str, like: Tensor) -> Tensor | None:
        """The tensor carried for `name`, or None at the first step. Raises ValueError if the batch changed."""
        state = self.carried.get(name)
        if state is not None and state.shape != like.shape:
            raise ValueError(
                f"a stream keeps its batch: {name} carries shape {tuple(state.shape)}, this step brings "
                f"{tuple(like.shape)}; open a new sf.streaming context for another batch"
            )
        return state

    def write(self, name: str, state: Tensor) -> None:
        """Carry `state` to the next step."""
        self.carried[name] = state.detach()

    def tick(self, name: str) -> int:
        """Count one more step of module `name`; returns the number of steps seen."""
        self.ticks[name] = self.ticks.get(name, 0) + 1
        return self.ticks[name]


class Temporal(nn.Module):
    """A module that knows the number of time steps T folded into the batch axis."""

    def __init__(self, *, steps: int = 1) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self.stream: Stream | None = None
        self.stream_name = ""

    def unfold(self, x: Tensor) -> Tensor:
        """[T*B, ...] -> [T, B, ...]. Raises ValueError if the first axis is no multiple of T."""
        if x.shape[0] % self.steps:
            raise ValueError(f"first axis {x.shape[0]} is not a multiple of steps={self.steps}: expected [T*B, ...]")
        return x.unflatten(0, (self.steps, x.shape[0] // self.steps))


class Door(Temporal):
    """Where a batch enters a network: images are repeated over T, clips must bring exactly T frames."""

    def __init__(self, *, in_channels: int, steps: int = 1) -> None:
        super().__init__(steps=steps)
        self.in_channels = in_channels

    def forward(self, x: Tensor) -> Float[Tensor, "TB C H W"]:
        """images [B, C, H, W] or clip [T, B, C, H, W] -> [T*B, C, H, W]. Raises ValueError for any other input."""
        if x.ndim not in (4, 5):
            raise ValueError(f"expected images [B, C, H, W] or a clip [T, B, C, H, W], got shape {tuple(x.shape)}")
        if x.shape[-3] != self.in_channels:
            raise ValueError(
                f"this model takes {self.in_channels} input channels, got {x.shape[-3]} in shape {tuple(x.shape)}; "
                f"build it with in_channels={x.shape[-3]} or convert the input"
            )
        if not x.is_floating_point():
            raise ValueError(f"images must be floating point, got {x.dtype}: convert and normalise them first")
        if x.ndim == 4:
            return x if self.steps == 1 else x.repeat(self.steps, 1, 1, 1)
        # A wrong T that divides T*B would mix images silently further on.
        if x.shape[0] != self.steps:
            raise ValueError(
                f"clip has {x.shape[0]} frames, the model runs {self.steps} steps: call set_steps(model, {x.shape[0]})"
            )
        return x.flatten(0, 1)


class TimeMean(Temporal):
    """Mean over T as a sequential sum divided by T; in a stream, the mean of the steps so far."""

    def forward(self, x: Float[Tensor, " TB *shape"]) -> Float[Tensor, " B *shape"]:
        slices = self.unfold(x)
        if self.stream is not None:
            before = self.stream.read(self.stream_name, slices[0])
            total = slices[0] if before is None else before + slices[0]
            self.stream.write(self.stream_name, total)
            return total / self.stream.tick(self.stream_name)
        total = slices[0]
        for t in range(1, self.steps):
            total = total + slices[t]
        return total / self.steps


class AfterTime(nn.Module):
    """Base of parts that read averages over time: their neurons run one step, whatever T the rest of a model runs."""


def temporal_modules(model: nn.Module) -> dict[str, Temporal]:
    """The modules of `model` that know about time, by name; nothing inside an `AfterTime` does."""
    found, after = {}, []
    for name, module in model.named_modules():
        if name.startswith(tuple(after)):
            continue
        if isinstance(module, AfterTime):
            after.append(f"{name}.".lstrip("."))
        elif isinstance(module, Temporal):
            found[name] = module
    return found


def set_steps(model: nn.Module, steps: int) -> nn.Module:
    """Set the number of time steps T everywhere in `model`, in place; compiled graphs are dropped.

    Raises ValueError if steps < 1 or nothing in the model knows about time.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    found = temporal_modules(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no neuron and nothing else that knows time steps")
    for module in found.values():
        module.steps = steps
    torch.compiler.reset()  # a compiled graph has the old T unrolled into it
    return model


@contextmanager
def streaming(model: nn.Module) -> Iterator[nn.Module]:
    """Inside this context `model(frame)` is one time step and membranes carry over to the next call.

    frame: [B, C, H, W] or [1, B, C, H, W]. Returns the mean logits of the steps so far, so that after T frames they are
    those of the whole clip (spikes equal; logits to 1e-12 in float64). Runs eagerly, also for a compiled model.
    Raises ValueError in train mode (batch norm would see one step instead of T) or if the batch changes.
    """
    if model.training:
        raise ValueError("streaming needs model.eval(): batch norm in train mode pools its statistics over all steps")
    found = temporal_modules(model)
    if any(module.stream is not None for module in found.values()):
        raise ValueError("this model is already streaming: leave that sf.streaming context first")
    stream = Stream()
    before = {name: module.steps for name, module in found.items()}
    for name, module in found.items():
        module.steps, module.stream, module.stream_name = 1, stream, name
    try:
        with torch.compiler.set_stance("force_eager"):
            yield model
    finally:
        for name, module in found.items():
            module.steps, module.stream, module.stream_name = before[name], None, ""

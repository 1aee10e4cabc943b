"""What a fast form must know of a neuron: its constants, without its module."""

from dataclasses import dataclass
from typing import Literal

SurrogateName = Literal["sigmoid", "atan", "rectangle"]


@dataclass(frozen=True)
class LIFForm:
    """Constants of `neurons.LIF`; `slope` is that of its surrogate (the width of a rectangle)."""

    tau: float
    threshold: float
    v_reset: float | None
    decay_input: bool
    detach_reset: bool
    surrogate: SurrogateName
    slope: float


@dataclass(frozen=True)
class IntegerForm:
    """Constants of the integer family: counts of gain * current / threshold, each worth `unit`."""

    levels: int
    unit: float
    threshold: float
    gain: float
    half_up: bool
    decay: float | None

"""What every spiking neuron shares: its steps, its levels, and the value of one spike."""

from collections.abc import Callable

import torch
from torch import Tensor

from spikeformers import kernels
from spikeformers.neurons.steps import Temporal

LARGEST_LEVELS = 255  # counts are handed on as uint8


def as_membrane(x: Tensor) -> Tensor:
    """`x` in the precision of membranes: float32, or float64 if it has that."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class Neuron(Temporal):
    """Turns currents [T*B, ...] into spikes of the same shape: counts 0..`levels`, each worth `unit`.

    Subclasses write the three equations of a neuron: `charge`, `spike` and, where the membrane lives on from step to
    step (`carries=True`), `discharge`.
    """

    def __init__(self, *, steps: int, levels: int, unit: float, threshold: float | Tensor, carries: bool) -> None:
        super().__init__(steps=steps)
        if not 1 <= levels <= LARGEST_LEVELS:
            raise ValueError(f"levels must be at least 1 and at most {LARGEST_LEVELS}, got {levels}")
        if not isinstance(threshold, Tensor) and threshold <= 0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        self.levels = levels
        self.unit = unit
        self.threshold = threshold  # a Parameter registers itself: a learnable threshold (SDSA-4)
        self.carries = carries

    def charge(self, current: Tensor, membrane: Tensor | None) -> Tensor:
        """h[t] from the input x[t] and the membrane v[t-1] left by the step before (None at rest)."""
        raise TypeError(f"{type(self).__name__} must define charge()")

    def spike(self, h: Tensor) -> Tensor:
        """Spikes s[t] = unit * counts of the charged membrane h[t]."""
        raise TypeError(f"{type(self).__name__} must define spike()")

    def discharge(self, h: Tensor, spikes: Tensor) -> Tensor:
        """v[t], what the spikes leave of h[t]."""
        raise TypeError(f"{type(self).__name__} must define discharge()")

    def defined_by(self, owner: type["Neuron"]) -> bool:
        """Whether this neuron's equations are those of `owner`, so that constants of `owner` describe it."""
        mine = type(self)
        return all(getattr(mine, name) is getattr(owner, name) for name in ("charge", "spike", "discharge", "loop"))

    def form(self) -> kernels.LIFForm | kernels.IntegerForm | None:
        """The constants of this neuron for a fast form equal to `loop`; None where there is none."""
        return None

    def forward(self, current: Tensor) -> Tensor:
        """currents [T*B, ...] -> spikes [T*B, ...] in the dtype of the input; membranes in float32 or wider."""
        form = self.form() if self.stream is None else None
        if form is None or (self.carries and current.shape[0] % self.steps):
            return self.loop(current)
        spikes = kernels.run(current, form, steps=self.steps, loop=self.loop)
        return self.loop(current) if spikes is None else spikes

    def loop(self, current: Tensor) -> Tensor:
        """What `forward` computes, step by step: the definition, with which every fast form is compared."""
        dtype = current.dtype
        slices = as_membrane(current)
        if not self.carries:
            return self.spike(self.charge(slices, None)).to(dtype)
        # unbind, not indexing: its backward stacks the steps, where indexing would fill all T with zeros for each step.
        slices = self.unfold(slices).unbind(0)
        membrane = None if self.stream is None else self.stream.read(self.stream_name, slices[0])
        fired = []
        for t in range(self.steps):
            h = self.charge(slices[t], membrane)
            fired.append(self.spike(h))
            if t < self.steps - 1 or self.stream is not None:
                membrane = self.discharge(h, fired[t])
        if self.stream is not None:
            self.stream.write(self.stream_name, membrane)
        return (fired[0] if self.steps == 1 else torch.cat(fired)).to(dtype)

    def counts(self, spikes: Tensor) -> Tensor:
        """Spikes as this neuron emits them -> integer counts 0..levels (uint8), same shape."""
        return (spikes / self.unit).round().to(torch.uint8)

    def extra_repr(self) -> str:
        threshold = "learnable" if isinstance(self.threshold, Tensor) else f"{self.threshold:g}"
        return f"steps={self.steps}, levels={self.levels}, unit={self.unit:g}, threshold={threshold}"


NeuronBuilder = Callable[..., Neuron]
"""Called as `neuron()` or `neuron(threshold=0.5)`: what blocks take to build one neuron for each use."""

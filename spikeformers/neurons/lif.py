"""Leaky integrate-and-fire neuron: binary spikes, a membrane over T steps, rest before every forward pass.

Paper: Yao et al., Meta-SpikeFormer, ICLR 2024, Eqs. 4-6 (Spikformer uses the same).
Departures from the paper: Eq. 4 adds the whole input; the authors' code divides it by tau (`decay_input=True`, the
default here, because the published accuracies come from it), so at T=1 a neuron fires from an input of tau * threshold.
"""

from torch import Tensor

from spikeformers import kernels
from spikeformers.neurons.neuron import Neuron
from spikeformers.neurons.surrogate import ATan, Rectangle, Sigmoid, Surrogate

IN_KERNELS: dict[type, kernels.SurrogateName] = {Sigmoid: "sigmoid", ATan: "atan", Rectangle: "rectangle"}


class LIF(Neuron):
    """Membrane h[t], spikes s[t] = 1 where h[t] >= threshold.

    `decay_input` True:  h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau.
    `decay_input` False: h[t] = v[t-1] - (v[t-1] - v_reset) / tau + x[t].
    `v_reset` a number:  v[t] = h[t] * (1 - s[t]) + v_reset * s[t] (hard).
    `v_reset` None:      v[t] = h[t] - threshold * s[t] (soft; the rest is 0).
    `detach_reset`:      no gradient through s[t] in the reset.
    Shapes: [T*B, ...] -> [T*B, ...].  Raises ValueError if tau < 1 or threshold <= 0.
    Source: Meta-SpikeFormer, Eqs. 4-6.
    """

    def __init__(
        self,
        *,
        steps: int = 1,
        tau: float = 2.0,
        threshold: float | Tensor = 1.0,
        v_reset: float | None = 0.0,
        decay_input: bool = True,
        detach_reset: bool = True,
        surrogate: Surrogate = Sigmoid(),  # noqa: B008 - frozen dataclass
    ) -> None:
        if tau < 1:
            raise ValueError(f"tau must be at least 1 (1 forgets the step before), got {tau}")
        super().__init__(steps=steps, levels=1, unit=1.0, threshold=threshold, carries=True)
        self.tau = tau
        self.v_reset = v_reset
        self.decay_input = decay_input
        self.detach_reset = detach_reset
        self.surrogate = surrogate

    def charge(self, current: Tensor, membrane: Tensor | None) -> Tensor:
        rest = self.v_reset or 0.0
        if membrane is None:
            h = current / self.tau if self.decay_input else current
            return h + rest if rest else h
        leak = membrane - rest if rest else membrane
        if self.decay_input:
            return membrane + (current - leak) / self.tau
        return membrane - leak / self.tau + current

    def spike(self, h: Tensor) -> Tensor:
        return self.surrogate(h - self.threshold)

    def discharge(self, h: Tensor, spikes: Tensor) -> Tensor:
        s = spikes.detach() if self.detach_reset else spikes
        if self.v_reset is None:
            return h - self.threshold * s
        kept = h * (1 - s)
        return kept + self.v_reset * s if self.v_reset else kept

    def form(self) -> kernels.LIFForm | None:
        surrogate = IN_KERNELS.get(type(self.surrogate))
        if surrogate is None or isinstance(self.threshold, Tensor) or not self.defined_by(LIF):
            return None
        (slope,) = vars(self.surrogate).values()
        return kernels.LIFForm(
            tau=self.tau,
            threshold=self.threshold,
            v_reset=self.v_reset,
            decay_input=self.decay_input,
            detach_reset=self.detach_reset,
            surrogate=surrogate,
            slope=slope,
        )

"""Integer neurons: train with counts 0..D at one step, infer with binary spikes over D virtual steps.

I-LIF    counts n = clip(round(x), 0, D), as they are.           Luo et al., ECCV 2024
NI-LIF   n / D, rounding half to even, window inclusive.         Spike2Former, Eqs. 16-18 (D = 4)
IE-LIF   clip(gain * x, 0, D) rounded half up, window exclusive. QSD-Transformer, Eqs. 9-10 (D = 4, gain 4)
Departures from the papers: as in the released code there is no membrane between time steps unless `decay` is given
(decay = beta of Spike2Former Eq. 18, tau of QSD Eq. 9); then U[t] = decay * (U[t-1] - n[t-1]) + x[t], soft reset.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers import kernels
from spikeformers.neurons.neuron import Neuron
from spikeformers.neurons.surrogate import round_half_even, round_half_up


def i_lif(current: Float[Tensor, " TB *shape"], *, levels: int) -> Float[Tensor, " TB *shape"]:
    """Integer spikes n = clip(round(current), 0, D), D = `levels`, half to even.

    Gradient: 1 where 0 <= current <= D, else 0.  Raises ValueError if levels < 1.
    Source: Luo et al., "Integer-Valued Training and Spike-Driven Inference SNN", ECCV 2024.
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    return round_half_even(current, levels)


def ni_lif(current: Float[Tensor, " TB *shape"], *, levels: int) -> Float[Tensor, " TB *shape"]:
    """Normalised integer spikes n/D with n = clip(round(current), 0, D), D = `levels`, half to even.

    Gradient: 1/D where 0 <= current <= D, else 0.  Raises ValueError if levels < 1.
    Source: Spike2Former, Eqs. 16-18.
    """
    return i_lif(current, levels=levels) / levels


def ie_lif(
    current: Float[Tensor, " TB *shape"], *, levels: int, gain: float = 4.0, unit: float = 0.25
) -> Float[Tensor, " TB *shape"]:
    """Spikes unit * n with n = floor(clip(gain * current, 0, D) + 1/2), D = `levels`, half up.

    Gradient: gain * unit where 0 < gain * current < D, else 0.  Raises ValueError if levels < 1.
    Source: QSD-Transformer, Eqs. 9-10; gain and unit as in its released code (unit 1/2 after attention).
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    return round_half_up(gain * current, levels) * unit


class _IntegerNeuron(Neuron):
    """Membrane bookkeeping of the integer family: without `decay` each step stands alone."""

    def __init__(self, *, steps: int, levels: int, unit: float, threshold: float | Tensor, decay: float | None) -> None:
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1] or be None, got {decay}")
        super().__init__(steps=steps, levels=levels, unit=unit, threshold=threshold, carries=decay is not None)
        self.decay = decay

    def charge(self, current: Tensor, membrane: Tensor | None) -> Tensor:
        """U[t] = x[t] + H[t-1] in units of one count."""
        u = current if isinstance(self.threshold, float) and self.threshold == 1.0 else current / self.threshold
        return u if membrane is None else u + membrane

    def spike(self, h: Tensor) -> Tensor:
        return i_lif(h, levels=self.levels)

    def discharge(self, h: Tensor, spikes: Tensor) -> Tensor:
        """H[t] = decay * (U[t] - n[t])."""
        return self.decay * (h - spikes / self.unit)

    def form(self) -> kernels.IntegerForm | None:
        owner = next((each for each in (ILIF, NILIF, IELIF) if isinstance(self, each)), None)
        if owner is None or isinstance(self.threshold, Tensor) or not self.defined_by(owner):
            return None
        return kernels.IntegerForm(
            levels=self.levels,
            unit=self.unit,
            threshold=self.threshold,
            gain=getattr(self, "gain", 1.0),
            half_up=owner is IELIF,
            decay=self.decay,
        )


class ILIF(_IntegerNeuron):
    """Counts 0..`levels` of current / threshold, un-normalised; see `i_lif`."""

    def __init__(
        self, *, steps: int = 1, levels: int = 4, threshold: float | Tensor = 1.0, decay: float | None = None
    ) -> None:
        super().__init__(steps=steps, levels=levels, unit=1.0, threshold=threshold, decay=decay)


class NILIF(_IntegerNeuron):
    """Counts divided by `norm`; see `ni_lif`. None: by `levels`.

    A `norm` of 8 beside 4 levels is Spike2Former's ablation "Norm with Const 8" (Table 3).
    """

    def __init__(
        self,
        *,
        steps: int = 1,
        levels: int = 4,
        threshold: float | Tensor = 1.0,
        norm: int | None = None,
        decay: float | None = None,
    ) -> None:
        norm = levels if norm is None else norm
        super().__init__(steps=steps, levels=levels, unit=1.0 / norm, threshold=threshold, decay=decay)
        self.norm = norm

    def spike(self, h: Tensor) -> Tensor:
        return i_lif(h, levels=self.levels) / self.norm


class IELIF(_IntegerNeuron):
    """Half-up counts of gain * current / threshold, each worth `unit`; see `ie_lif`.

    `gain` None means D, `unit` None means 1/D, so that the output again lies in 0..1.
    """

    def __init__(
        self,
        *,
        steps: int = 1,
        levels: int = 4,
        threshold: float | Tensor = 1.0,
        gain: float | None = None,
        unit: float | None = None,
        decay: float | None = None,
    ) -> None:
        unit = 1.0 / levels if unit is None else unit
        super().__init__(steps=steps, levels=levels, unit=unit, threshold=threshold, decay=decay)
        self.gain = float(levels) if gain is None else gain

    def charge(self, current: Tensor, membrane: Tensor | None) -> Tensor:
        return super().charge(self.gain * current, membrane)

    def spike(self, h: Tensor) -> Tensor:
        return round_half_up(h, self.levels) * self.unit


class SigmoidL2(nn.Module):
    """Counts of levels * sigmoid(current), divided by their length over channels [T*B, C, ...].

    Spike2Former's ablation "Norm with Sigmoid & L2" (Table 3), of which the paper says no more than that it does not
    converge. What it gives are real numbers: its counts have no common unit.
    """

    def __init__(
        self, *, steps: int = 1, levels: int = 4, threshold: float | Tensor = 1.0, decay: float | None = None
    ) -> None:
        super().__init__()
        self.counts = ILIF(steps=steps, levels=levels, threshold=threshold, decay=decay)

    def forward(self, current: Float[Tensor, "TB C *shape"]) -> Float[Tensor, "TB C *shape"]:
        return F.normalize(self.counts(self.counts.levels * current.sigmoid()), dim=1)

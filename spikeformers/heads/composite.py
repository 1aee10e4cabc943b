"""A backbone and a head as one network, and the one config that both share: what segmenters and detectors are."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from spikeformers.layers import FeatureInfo, Pretrained
from spikeformers.neurons import LEVELLED, NEURONS, NeuronBuilder, neuron_builder
from spikeformers.quantize import prepare


@runtime_checkable
class BackboneConfig(Protocol):
    """Sizes of a backbone; `build_stages` makes it without a classifier."""

    def build_stages(self) -> nn.Module: ...


@runtime_checkable
class HeadConfig(Protocol):
    """Sizes of a head.  `own_neurons`: its fields that name other neurons than the network's, and may be empty."""

    own_neurons: ClassVar[tuple[str, ...]]

    def build(self, features: FeatureInfo, *, num_classes: int, neuron: NeuronBuilder, steps: int) -> nn.Module: ...


@dataclass(frozen=True)
class CompositeConfig:
    """A backbone, a head, and what both share; `create_model` takes fields of all three by name.

    `temporal`: the integer neurons' membranes live on from step to step (Spike2Former, Eqs. 16-18), keeping `decay` of
    what the spikes leave (beta of Eq. 18, to which the paper gives no value).  `head_neuron`: another one for the head;
    "": the same.  `bits` of weights, 2..8; 0: floats.
    """

    backbone: BackboneConfig
    head: HeadConfig
    num_classes: int = 150
    in_channels: int = 3
    neuron: str | NeuronBuilder = "ni_lif"
    head_neuron: str | NeuronBuilder = ""
    levels: int = 4
    steps: int = 1
    temporal: bool = False
    decay: float = 0.5
    bits: int = 0

    def __post_init__(self) -> None:
        fields, inside, ahead = (
            {each.name for each in dataclasses.fields(part)} for part in (self, self.backbone, self.head)
        )
        if both := sorted((inside & ahead) - fields):
            raise ValueError(
                f"backbone and head both have an option {both[0]!r}, and a value would go to both: rename one of them"
            )
        if self.decay != CompositeConfig.decay and not self.temporal:
            raise ValueError(f"decay={self.decay} is for membranes that live on: add temporal=True, or leave it out")

    def head_config(self) -> HeadConfig:
        """`head` with builders in the place of the names of its own neurons."""
        named = {field: getattr(self.head, field) for field in self.head.own_neurons}
        return dataclasses.replace(self.head, **{field: self.builder(name) for field, name in named.items() if name})

    def builder(self, neuron: str | NeuronBuilder) -> NeuronBuilder:
        """Of neurons with the levels and steps of the network, and the membrane of Eqs. 16-18 if `temporal`."""
        return neuron_builder(self.carried(neuron), levels=self.levels, steps=self.steps)

    def carried(self, neuron: str | NeuronBuilder) -> str | NeuronBuilder:
        """`neuron`, with the membrane of Eqs. 16-18 if `temporal`. Raises ValueError for one that cannot have it."""
        if not self.temporal:
            return neuron
        chosen = NEURONS.get(neuron) if isinstance(neuron, str) else neuron
        if getattr(chosen, "func", chosen) not in LEVELLED:
            raise ValueError(f"temporal is for integer neurons (i_lif, ni_lif, ie_lif), got neuron={neuron!r}")
        return partial(chosen, decay=self.decay)


class Composite(Pretrained):
    """Images [B, C, H, W] -> what its head gives."""

    def __init__(self, config: CompositeConfig) -> None:
        super().__init__()
        if config.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {config.num_classes}")
        self.config = config
        self.backbone = dataclasses.replace(
            config.backbone,
            neuron=config.carried(config.neuron),
            in_channels=config.in_channels,
            levels=config.levels,
            steps=config.steps,
        ).build_stages()
        self.head = config.head_config().build(
            self.backbone.feature_info,
            num_classes=config.num_classes,
            neuron=config.builder(config.head_neuron or config.neuron),
            steps=config.steps,
        )
        if config.bits:
            prepare(self, bits=config.bits)

    @property
    def steps(self) -> int:
        """Time steps T that the model runs; change them with `set_steps`."""
        return self.backbone.steps

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and strides of the maps that the head reads from."""
        return self.backbone.feature_info

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Maps of all levels of the backbone, fine to coarse, time folded into the batch."""
        return self.backbone.forward_features(x)

"""Meta-SpikeFormer: Conv and Transformer SNN blocks over four stages.

Paper: Yao et al., ICLR 2024. Eqs. 7-10 ConvBlock, 11-14 TransformerBlock, 15 SDSA-3 (attention/sdsa.py), Table 5
ablations (the fields of MetaSpikeFormerConfig), Table 7 sizes.
Departures from the paper: none in the mathematics; where the text and the authors' code differ, the code's way is the
default, since the published accuracies come from it (docs/errata.md lists each). Tokens stay pixels of [TB, C, H, W]
maps and every linear layer on tokens is a 1x1 convolution: the same numbers, one kind of layer to merge and deploy.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.attention import QSDSA, SDSA, Rectified, SoftmaxAttention
from spikeformers.layers import (
    SHORTCUTS,
    ChannelConv,
    ChannelMLP,
    ConvBN,
    FeatureInfo,
    LayerScaleBlock,
    MembraneShortcut,
    Mixer,
    Pretrained,
    RepConv,
    SepConv,
    TransformerBlock,
)
from spikeformers.neurons import Door, NeuronBuilder, TimeMean, choose, neuron_builder


class Identity(nn.Identity):
    """The mixer that mixes nothing."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder) -> None:
        super().__init__()


class Pooling(nn.AvgPool2d):
    """The token mixer of PoolFormer: 3x3 averages."""

    def __init__(self, dim: int, *, neuron: NeuronBuilder) -> None:
        super().__init__(3, stride=1, padding=1, count_include_pad=False)


class ConvBlock(nn.Module):
    """U' = U + SepConv(U); U'' = U' + ChannelConv(U').  Source: Meta-SpikeFormer, Eqs. 7-10."""

    def __init__(
        self, dim: int, *, token_mixer: Mixer | None, channel_mixer: Mixer, shortcut: Mixer, neuron: NeuronBuilder
    ) -> None:
        super().__init__()
        self.sep_conv = None
        if token_mixer is not None:
            self.sep_shortcut = shortcut(neuron=neuron)
            self.sep_conv = token_mixer(dim, neuron=neuron)
        self.channel_shortcut = shortcut(neuron=neuron)
        self.channel_conv = channel_mixer(dim, neuron=neuron)

    def forward(self, u: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB C H W"]:
        if self.sep_conv is not None:
            u = self.sep_shortcut(u, self.sep_conv)
        return self.channel_shortcut(u, self.channel_conv)


@dataclass(frozen=True)
class MetaSpikeFormerConfig:
    """Every size and every switch of Table 5; each named choice may also be a builder of your own.

    `conv_token_mixer`, `conv_channel_mixer`: of conv blocks.  `attention`, `channel_mixer`: token and channel mixer of
    transformer blocks.  Token mixers: sep_conv, sdsa1..sdsa4, sdsa3_width (Spike2Former's), sdsa3_learned (for
    `attention.balance`), q_sdsa (QSD-Transformer's), softmax (an ANN's), identity, pooling; for conv blocks also none,
    which drops the shortcut too.  Channel mixers: conv, mlp, identity.
    `qkv`, `proj`: rep_conv, linear, or these with an MPRF behind, rep_conv_mprf, linear_mprf.
    `shortcut`: ms, sew, vs.
    `layer_scale`: what learnable factors of the branches of transformer blocks start at; 0: there are none.
    `dims`: channels C1..C4 of stages 1-4; the first level of stage 1 has C1/2.  `blocks`, `strides`: of the five levels
    stage1a, stage1b, stage2, stage3, stage4; blocks (0, 0, 0, 6, 2) are four plain convolutions before a transformer.
    `levels` is D of integer neurons.  `pyramid=False` keeps stage 3's width and drops the last down-sampling.
    `head_spikes=False` lets the main classifier read un-spiked means, as the authors' code did before March 2024.
    `distillation` adds the second classifier of DeiT: a pair of logits in training, their mean in evaluation.
    """

    dims: tuple[int, ...] = (96, 192, 384, 480)
    num_classes: int = 1000
    in_channels: int = 3
    steps: int = 1
    neuron: str | NeuronBuilder = "lif"
    levels: int = 4
    heads: int = 8
    mlp_ratio: int = 4
    blocks: tuple[int, ...] = (1, 1, 2, 6, 2)
    strides: tuple[int, ...] = (2, 2, 2, 2, 1)
    kinds: tuple[str, ...] = ("conv", "conv", "conv", "transformer", "transformer")
    conv_token_mixer: str | Mixer = "sep_conv"
    conv_channel_mixer: str | Mixer = "conv"
    attention: str | Mixer = "sdsa3"
    channel_mixer: str | Mixer = "mlp"
    qkv: str | Callable[[int, int], nn.Module] = "rep_conv"
    proj: str | Callable[[int, int], nn.Module] = "rep_conv"
    shortcut: str | type[MembraneShortcut] = "ms"
    layer_scale: float = 0.0
    single_scale_stem: bool = False
    pyramid: bool = True
    head_spikes: bool = True
    distillation: bool = False

    def build(self) -> "MetaSpikeFormer":
        return MetaSpikeFormer(self)

    def build_stages(self) -> "MetaSpikeFormerStages":
        """The network without its classifier."""
        return MetaSpikeFormerStages(self)


PROJECTIONS = {"rep_conv": RepConv, "linear": partial(ConvBN, kernel=1)}
PROJECTIONS |= {f"{name}_mprf": partial(Rectified, projection=layer) for name, layer in PROJECTIONS.items()}
ATTENTION = SDSA | {"q_sdsa": QSDSA, "softmax": SoftmaxAttention}
ANN_TWIN = {"neuron": "gelu", "attention": "softmax", "steps": 1}
"""Overrides that make any Meta-SpikeFormer an ordinary network of the same layers, with GELU and softmax attention."""
MIXERS: dict[str, Mixer] = {"sep_conv": SepConv, "identity": Identity, "pooling": Pooling}  # add your own by name


def _neuron(config: MetaSpikeFormerConfig) -> NeuronBuilder:
    return neuron_builder(config.neuron, levels=config.levels, steps=config.steps)


def _shortcut(config: MetaSpikeFormerConfig) -> type[MembraneShortcut]:
    return choose("shortcut", config.shortcut, SHORTCUTS)


def _block(config: MetaSpikeFormerConfig, kind: str, dim: int) -> nn.Module:
    """One block of `kind` "conv" or "transformer" with the mixers that `config` chooses."""
    projections = {name: choose(name, getattr(config, name), PROJECTIONS) for name in ("qkv", "proj")}
    attention = {name: partial(operator, heads=config.heads, **projections) for name, operator in ATTENTION.items()}
    token = MIXERS | attention
    channel = {
        "conv": partial(ChannelConv, ratio=config.mlp_ratio),
        "mlp": partial(ChannelMLP, ratio=config.mlp_ratio),
        "identity": Identity,
    }
    shared = {"shortcut": _shortcut(config), "neuron": _neuron(config)}
    if choose("kinds", kind, {"conv": "conv", "transformer": "transformer"}) == "conv":
        return ConvBlock(
            dim,
            token_mixer=choose("conv_token_mixer", config.conv_token_mixer, {**token, "none": None}),
            channel_mixer=choose("conv_channel_mixer", config.conv_channel_mixer, channel),
            **shared,
        )
    block = partial(LayerScaleBlock, layer_scale=config.layer_scale) if config.layer_scale else TransformerBlock
    return block(
        dim,
        token_mixer=choose("attention", config.attention, token),
        channel_mixer=choose("channel_mixer", config.channel_mixer, channel),
        **shared,
    )


def _down(config: MetaSpikeFormerConfig, in_channels: int, dim: int, *, stride: int, kernel: int) -> nn.Sequential:
    """Down-sampling: SN - Conv - BN between membranes, Conv - BN - SN between spikes; the image is not spiked."""
    conv = ConvBN(in_channels, dim, kernel, stride=stride, bias=True)
    if _shortcut(config).carries_spikes:
        return nn.Sequential(OrderedDict(conv=conv, neuron=_neuron(config)()))
    if kernel == 7:
        return nn.Sequential(OrderedDict(conv=conv))
    return nn.Sequential(OrderedDict(neuron=_neuron(config)(), conv=conv))


@dataclass(frozen=True)
class _Level:
    """One row of the stage table: a down-sampling convolution, unless stride is 0, then blocks of one kind."""

    name: str
    dim: int
    stride: int
    kind: str
    blocks: int


def _levels(config: MetaSpikeFormerConfig) -> list[_Level]:
    """The stage table of `config`, after Fig. 2 and Table 7."""
    c1, c2, c3, c4 = config.dims
    names = ("stage1a", "stage1b", "stage2", "stage3", "stage4")
    dims = (c1 // 2, c1, c2, c3, c4 if config.pyramid else c3)
    strides = config.strides if config.pyramid else (*config.strides[:4], 0)
    levels = [_Level(*row) for row in zip(names, dims, strides, config.kinds, config.blocks, strict=True)]
    if config.single_scale_stem:
        first, second = levels[:2]
        stem = _Level("stage1", c1, first.stride * second.stride, first.kind, first.blocks + second.blocks)
        levels = [stem, *levels[2:]]
    return levels


class MetaSpikeFormerStages(nn.Module):
    """The network without its classifier, for heads that read maps.

    `forward_features` gives the map of every level, [T*B, C_i, H_i, W_i] with time folded in, as `feature_info` lists.
    """

    def __init__(self, config: MetaSpikeFormerConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        levels = _levels(config)
        self.level_names = tuple(level.name for level in levels)
        self.door = Door(in_channels=config.in_channels, steps=config.steps)
        dims = (config.in_channels, *(level.dim for level in levels))
        for index, (level, (before, dim)) in enumerate(zip(levels, pairwise(dims), strict=True)):
            stage = OrderedDict()
            if level.stride:
                stage["down"] = _down(config, before, dim, stride=level.stride, kernel=3 if index else 7)
            for block in range(level.blocks):
                stage[f"block{block}"] = _block(config, level.kind, dim)
            self.add_module(level.name, nn.Sequential(stage))
        strides = [1]
        for level in levels:
            strides.append(strides[-1] * max(level.stride, 1))
        self.feature_info = FeatureInfo(self.level_names, dims[1:], tuple(strides[1:]))

    @property
    def steps(self) -> int:
        """Time steps T that the model runs; change them with `set_steps`."""
        return self.door.steps

    def group_matcher(self, *, coarse: bool = False) -> dict[str, str | list[tuple[str, tuple[int, ...] | None]]]:
        """Regular expressions for the names of each layer's weights, for rates that fall with depth (timm's protocol).

        A layer is a block, the first of a level with the `down` in front of it, or a `down` without blocks; `coarse`: a
        level. What they leave out, the classifiers, comes last.
        """
        if coarse:
            return {name: rf"{name}\." for name in self.level_names}
        return {name: [(rf"{name}\.block(\d+)\.", None), (rf"{name}\.down\.", (0,))] for name in self.level_names}

    def forward_features(self, x: Tensor) -> list[Real[Tensor, "TB _ _ _"]]:
        """Membrane maps of all levels, fine to coarse, time folded into the batch."""
        x = self.door(x)
        maps = []
        for name in self.level_names:
            x = getattr(self, name)(x)
            maps.append(x)
        return maps


class MetaSpikeFormer(MetaSpikeFormerStages, Pretrained):
    """Images [B, C, H, W] or clips [T, B, C, H, W] -> logits [B, num_classes].

    In training with `distillation`, `forward` gives the pair (logits, logits_kd).
    """

    def __init__(self, config: MetaSpikeFormerConfig) -> None:
        super().__init__(config)
        # A stream of spikes needs no neuron here; un-spiked, only the second classifier would use it.
        spiked = not _shortcut(config).carries_spikes and (config.head_spikes or config.distillation)
        width = self.feature_info.channels[-1]
        self.head_neuron = _neuron(config)() if spiked else nn.Identity()
        self.head = nn.Linear(width, config.num_classes)
        self.head_kd = nn.Linear(width, config.num_classes) if config.distillation else None
        # One each: in a stream a mean over time carries its own sum.
        self.time_mean = TimeMean(steps=config.steps)
        self.time_mean_kd = TimeMean(steps=config.steps) if config.distillation else None
        for head in (self.head, self.head_kd):
            if head is not None:
                nn.init.trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Float[Tensor, "B L"] | tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        # The mean over pixels comes first and its neuron second (a spike per channel), as in the authors' code.
        pooled = self.forward_features(x)[-1].mean((2, 3))
        spikes = self.head_neuron(pooled)
        logits = self.time_mean(self.head(spikes if self.config.head_spikes else pooled))
        if self.head_kd is None:
            return logits
        logits_kd = self.time_mean_kd(self.head_kd(spikes))
        return (logits, logits_kd) if self.training else (logits + logits_kd) / 2


def _check(config: MetaSpikeFormerConfig) -> None:
    """Raises ValueError for sizes that no network has."""
    if len(config.dims) != 4 or min(config.dims) < 2 or config.dims[0] % 2:
        raise ValueError(f"dims must be four channel counts, the first even, got {config.dims}")
    for field in ("num_classes", "in_channels", "steps", "levels", "heads", "mlp_ratio"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(config, field)}")
    if config.layer_scale < 0:
        raise ValueError(f"layer_scale must not be negative, got {config.layer_scale}")
    for field in ("blocks", "strides", "kinds"):
        if len(getattr(config, field)) != 5:
            raise ValueError(f"{field} needs one entry for each of five levels, got {getattr(config, field)}")
    if min(config.strides) < 1:
        raise ValueError(f"strides must be at least 1, got {config.strides}")
    if min(config.blocks) < 0:
        raise ValueError(f"blocks must not be negative, got {config.blocks}")


SIZES = {  # Table 7; stage 4 of the smallest has 360 channels (the text's 10C = 320 does not give 15.1 M parameters)
    "meta_spikeformer_15m": MetaSpikeFormerConfig(dims=(64, 128, 256, 360)),
    "meta_spikeformer_31m": MetaSpikeFormerConfig(dims=(96, 192, 384, 480)),
    "meta_spikeformer_55m": MetaSpikeFormerConfig(dims=(128, 256, 512, 640)),
}

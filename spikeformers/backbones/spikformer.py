"""Spikformer V1 and V2: a spiking patch stem, then transformer blocks of spiking self-attention on one scale.

Paper: Zhou et al., Spikformer V2 (2024; V1: ICLR 2023). Eqs. 1-6 network, 7 SPS, 11-13 SSA (attention/ssa.py), Sec. 4.1
and Figs. 4-5 SCS, Table 1 and 6 the other attentions (attention/vsa.py), Table 6 IAND (layers/shortcut.py).
Departures from the paper: none in the mathematics. V1 is its authors' code; of V2 no code was released, its layout is
the only one that gives all five published parameter counts, and what those leave open (a residual around each pair of
stem convolutions, neurons after every down-sampling, heads of width 64) is decided in docs/decisions/0009.
Tokens stay pixels of [TB, C, H, W] maps and every linear layer on tokens is a 1x1 convolution (decision 0002).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

from jaxtyping import Float, Real
from torch import Tensor, nn

from spikeformers.attention import SSA, VSA, IdentityMap, LeakyReLUMap, LearnableScaleSSA, ReLUMap, VSAFloatV
from spikeformers.attention import SoftmaxAttention as Softmax
from spikeformers.layers import SHORTCUTS, ChannelMLP, ConvBN, Mixer, Pretrained, TransformerBlock
from spikeformers.layers.features import FeatureInfo
from spikeformers.neurons import Door, NeuronBuilder, TimeMean, choose, neuron_builder

Shortcut = Callable[..., nn.Module]
"""Called as `shortcut(neuron=builder)`; the module is called as `shortcut(x, branch)`."""


class SPSBlock(nn.Module):
    """x = MP(SN(BN(Conv2d(x)))); without MP where it keeps its size.  Source: Eq. 7, order as coded."""

    def __init__(self, in_channels: int, dim: int, *, pool: bool, neuron: NeuronBuilder) -> None:
        super().__init__()
        self.conv = ConvBN(in_channels, dim, 3)
        self.neuron = neuron()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()

    def forward(self, x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB O _ _"]:
        return self.pool(self.neuron(self.conv(x)))


class _Stem(nn.Module):
    """Blocks in a row; the map behind each, fine to coarse."""

    blocks: nn.ModuleList
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def forward(self, x: Real[Tensor, "TB C H W"]) -> list[Real[Tensor, "TB _ _ _"]]:
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


class SPS(_Stem):
    """Spiking patch splitting: four blocks of D/8, D/4, D/2, D channels, then the position embedding RPE.

    The last log2(patch_size) blocks pool; RPE is SN(BN(Conv2d(x))), added by the shortcut.  Source: Eqs. 1-3, 7.
    """

    def __init__(
        self, in_channels: int, dim: int, *, patch_size: int, neuron: NeuronBuilder, shortcut: Shortcut
    ) -> None:
        super().__init__()
        if dim % 8:
            raise ValueError(f"the SPS stem needs a dim that is a multiple of 8, got {dim}")
        halvings = _halvings(patch_size, most=4)
        self.channels = (dim // 8, dim // 4, dim // 2, dim)
        pools = [block >= 4 - halvings for block in range(4)]
        self.strides = tuple(accumulate((1 + pool for pool in pools), int.__mul__))
        widths = pairwise((in_channels, *self.channels))
        self.blocks = nn.ModuleList(
            SPSBlock(*width, pool=pool, neuron=neuron) for width, pool in zip(widths, pools, strict=True)
        )
        self.rpe_shortcut = shortcut(neuron=neuron)
        self.rpe = ConvBN(dim, dim, 3)

    def forward(self, x: Real[Tensor, "TB C H W"]) -> list[Real[Tensor, "TB _ _ _"]]:
        *finer, tokens = super().forward(x)
        return [*finer, self.rpe_shortcut(tokens, self.rpe)]


def stem_layers(dim: int, *, neuron: NeuronBuilder, layers: int, kernel: int, ratio: int = 4) -> nn.Sequential:
    """`layers` x Conv - BN with neurons between: `dim` channels in and out, `ratio` x dim inside.

    The branch of an SCS block: two 3x3 layers, expanding four times, are the paper's; Fig. 4 varies number and kernel.
    Source: Sec. 4.1, Fig. 4.
    """
    widths = [dim, *[ratio * dim] * (layers - 1), dim]
    chain = OrderedDict()
    for index, (inside, out) in enumerate(pairwise(widths), start=1):
        if index > 1:
            chain[f"neuron{index - 1}"] = neuron()
        chain[f"conv{index}"] = ConvBN(inside, out, kernel)
    return nn.Sequential(chain)


class SCSBlock(nn.Module):
    """Down-sampling SN(BN(Conv 2x2, stride 2)), then a residual branch of convolutions.  Source: Sec. 4.1, Fig. 5 b."""

    def __init__(
        self, in_channels: int, dim: int, *, branch: Mixer | None, neuron: NeuronBuilder, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.down = ConvBN(in_channels, dim, 2, stride=2)
        self.neuron = neuron()
        self.branch = None
        if branch is not None:
            self.shortcut = shortcut(neuron=neuron)
            self.branch = branch(dim, neuron=neuron)

    def forward(self, x: Real[Tensor, "TB C H W"]) -> Real[Tensor, "TB O _ _"]:
        x = self.neuron(self.down(x))
        return x if self.branch is None else self.shortcut(x, self.branch)


class SCS(_Stem):
    """Spiking convolutional stem: log2(patch_size) blocks, each half the size and twice the width of the one before.

    `branch`: builder of each block's convolutions (see `stem_layers`), None for down-sampling alone.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        patch_size: int,
        neuron: NeuronBuilder,
        shortcut: Shortcut,
        branch: Mixer | None,
    ) -> None:
        super().__init__()
        halvings = _halvings(patch_size, most=8)
        widest = 2 ** (halvings - 1)
        if dim % widest:
            raise ValueError(f"patch_size={patch_size} needs a dim that is a multiple of {widest}, got {dim}")
        self.channels = tuple(dim // 2 ** (halvings - 1 - block) for block in range(halvings))
        self.strides = tuple(2 ** (block + 1) for block in range(halvings))
        self.blocks = nn.ModuleList(
            SCSBlock(*width, branch=branch, neuron=neuron, shortcut=shortcut)
            for width in pairwise((in_channels, *self.channels))
        )


def _halvings(patch_size: int, *, most: int) -> int:
    """log2 of the patch size. Raises ValueError if it is not a power of two from 2 to 2^most."""
    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings or not 1 <= halvings <= most:
        raise ValueError(f"patch_size must be a power of two from 2 to {2**most}, got {patch_size}")
    return halvings


@dataclass(frozen=True)
class SpikformerConfig:
    """Sizes and switches; each named choice may also be a builder of your own.

    `dim`, `depth`, `heads`, `mlp_ratio`: of the transformer blocks.  `patch_size`: input pixels a token stands for, a
    side.  `stem`: sps (V1) or scs (V2).  `stem_branch`: of each scs block, conv0..conv3 or linear0..linear3 (Fig. 4).
    `attention`: ssa, ssa_learnable (its scale is a parameter); vsa, vsa_float_v, identity, relu, leaky_relu (Table 1);
    softmax (an ANN's).  `scale`: of ssa and of the three maps.  `shortcut`: sew (the paper's ADD), iand, vs, or
    residual (an ANN's).  `tokens`: "linear" gives q, k, v biases and small initial weights, as the authors' CIFAR code
    does; "conv" neither, as their ImageNet and event code.  `levels` is D of integer neurons.
    """

    dim: int = 512
    depth: int = 8
    heads: int = 8
    num_classes: int = 1000
    in_channels: int = 3
    steps: int = 1
    neuron: str | NeuronBuilder = "lif"
    levels: int = 4
    mlp_ratio: int = 4
    patch_size: int = 16
    stem: str | Callable[..., nn.Module] = "scs"
    stem_branch: str | Mixer = "conv2"
    attention: str | Mixer = "ssa"
    scale: float = 0.125
    shortcut: str | Shortcut = "sew"
    tokens: str = "conv"

    def build(self) -> "Spikformer":
        return Spikformer(self)


ANN_TWIN = {"neuron": "gelu", "shortcut": "residual", "attention": "softmax", "steps": 1}
"""Overrides that make any Spikformer an ordinary transformer of the same layers (Table 4, Transformer-4-384)."""

STEM_BRANCHES: dict[str, Mixer | None] = {  # three layers expand twice, not four times: the weights of two
    f"{kind}{layers}": partial(stem_layers, layers=layers, kernel=kernel, ratio=2 if layers == 3 else 4)
    for kind, kernel in (("conv", 3), ("linear", 1))
    for layers in (1, 2, 3)
} | {"conv0": None, "linear0": None}
SCALED = {"ssa": SSA, "ssa_learnable": LearnableScaleSSA}
SCALED |= {"identity": IdentityMap, "relu": ReLUMap, "leaky_relu": LeakyReLUMap}
UNSCALED = {"vsa": VSA, "vsa_float_v": VSAFloatV, "softmax": Softmax}
BETWEEN_SPIKES = {name: SHORTCUTS[name] for name in ("sew", "iand", "vs", "residual")}
TOKENS = {"conv": False, "linear": True}  # biases of q, k, v


def _stem(config: SpikformerConfig, *, neuron: NeuronBuilder, shortcut: Shortcut) -> nn.Module:
    branch = choose("stem_branch", config.stem_branch, STEM_BRANCHES)
    build = choose("stem", config.stem, {"sps": SPS, "scs": partial(SCS, branch=branch)})
    return build(config.in_channels, config.dim, patch_size=config.patch_size, neuron=neuron, shortcut=shortcut)


def _attention(config: SpikformerConfig) -> Mixer:
    qkv = partial(ConvBN, kernel=1, bias=choose("tokens", config.tokens, TOKENS))
    known = {name: partial(kind, heads=config.heads, qkv=qkv, scale=config.scale) for name, kind in SCALED.items()}
    known |= {name: partial(kind, heads=config.heads, qkv=qkv) for name, kind in UNSCALED.items()}
    return choose("attention", config.attention, known)


class Spikformer(Pretrained):
    """Images [B, C, H, W] or clips [T, B, C, H, W] -> logits [B, num_classes].  Source: Eqs. 1-6.

    `forward_features` gives the stem's map at every scale but the last, where the blocks' output stands,
    [T*B, C_i, H_i, W_i] with time folded in, as `feature_info` lists.
    """

    def __init__(self, config: SpikformerConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        neuron = neuron_builder(config.neuron, levels=config.levels, steps=config.steps)
        shortcut = choose("shortcut", config.shortcut, BETWEEN_SPIKES)
        self.door = Door(in_channels=config.in_channels, steps=config.steps)
        self.stem = _stem(config, neuron=neuron, shortcut=shortcut)
        names = (*(f"stem.blocks.{index}" for index in range(len(self.stem.channels) - 1)), "blocks")
        self.feature_info = FeatureInfo(names, self.stem.channels, self.stem.strides)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    config.dim,
                    token_mixer=_attention(config),
                    channel_mixer=partial(ChannelMLP, ratio=config.mlp_ratio),
                    shortcut=shortcut,
                    neuron=neuron,
                )
                for _ in range(config.depth)
            )
        )
        self.time_mean = TimeMean(steps=config.steps)
        self.head = nn.Linear(config.dim, config.num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """As coded: linear layers small and without bias, convolutions as torch has them."""
        small: list[nn.Module] = [self.head]
        if self.config.tokens == "linear":
            small += [module for module in self.blocks.modules() if isinstance(module, nn.Conv2d)]
        for layer in small:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:  # a token mixer of the user's own may have none
                nn.init.zeros_(layer.bias)

    @property
    def steps(self) -> int:
        """Time steps T that the model runs; change them with `set_steps`."""
        return self.door.steps

    def group_matcher(self, *, coarse: bool = False) -> dict:
        """Parameters by depth, for layer-wise learning rates: the stem, each block, the head (MAE's ids; timm)."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None)]}

    def forward_features(self, x: Tensor) -> list[Real[Tensor, "TB _ _ _"]]:
        """Spike maps of all scales, fine to coarse, time folded into the batch."""
        *finer, tokens = self.stem(self.door(x))
        return [*finer, self.blocks(tokens)]

    def forward(self, x: Tensor) -> Float[Tensor, "B L"]:
        # The mean over pixels and time comes before the classifier, as coded.
        return self.head(self.time_mean(self.forward_features(x)[-1].mean((2, 3))))


def _check(config: SpikformerConfig) -> None:
    """Raises ValueError for sizes that no network has."""
    for field in ("dim", "heads", "num_classes", "in_channels", "steps", "levels", "mlp_ratio"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(config, field)}")
    if config.depth < 0:
        raise ValueError(f"depth must not be negative, got {config.depth}")
    if config.scale <= 0:
        raise ValueError(f"scale must be positive, got {config.scale}")


def _v1(dim: int, depth: int, heads: int) -> SpikformerConfig:
    return SpikformerConfig(dim=dim, depth=depth, heads=heads, steps=4, stem="sps")


def _cifar(dim: int, depth: int, heads: int) -> SpikformerConfig:
    return SpikformerConfig(
        dim=dim, depth=depth, heads=heads, steps=4, num_classes=10, patch_size=4, stem="sps", tokens="linear"
    )


SIZES = {
    # Table 2, V1. The code has heads for 512 only; 384 and 768 after the authors' later tool (docs/errata.md).
    "spikformer_8_384": _v1(384, 8, 8),
    "spikformer_6_512": _v1(512, 6, 8),
    "spikformer_8_512": _v1(512, 8, 8),
    "spikformer_10_512": _v1(512, 10, 8),
    "spikformer_8_768": _v1(768, 8, 12),
    # Table 4: 32 pixels, 8x8 tokens.
    "spikformer_cifar_4_256": _cifar(256, 4, 8),
    "spikformer_cifar_2_384": _cifar(384, 2, 12),
    "spikformer_cifar_4_384": _cifar(384, 4, 12),
    # Table 5, CIFAR10-DVS: 128 pixels, events of two polarities.
    "spikformer_dvs_2_256": SpikformerConfig(
        dim=256, depth=2, heads=16, steps=16, num_classes=10, in_channels=2, stem="sps", scale=0.25
    ),
    # Tables 2 and 3, V2, at the paper's T=1; heads of width 64.
    "spikformer_v2_8_384": SpikformerConfig(dim=384, depth=8, heads=6),
    "spikformer_v2_8_512": SpikformerConfig(dim=512, depth=8, heads=8),
    "spikformer_v2_12_512": SpikformerConfig(dim=512, depth=12, heads=8),
    "spikformer_v2_12_768": SpikformerConfig(dim=768, depth=12, heads=12),
    "spikformer_v2_16_768": SpikformerConfig(dim=768, depth=16, heads=12),
}

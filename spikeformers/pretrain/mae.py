"""Masked pre-training: a spiking encoder sees a quarter of an image, an ANN decoder draws the rest.

Paper: Spikformer V2, Sec. 4.2, Fig. 6, Sec. 5.2.1, after MAE (He et al., CVPR 2022). T=1 there, any T here.
Departures from the paper: none. Spike-Driven Transformer V3's released code, by one of the authors, differs (all tokens
run through the blocks, restored in shuffled order, ratio fixed at 1/2) and is not followed; docs/errata.md says why.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from spikeformers.backbones import MetaSpikeFormer, Spikformer
from spikeformers.layers.masked import SPATIAL, Visible, masked
from spikeformers.neurons import Neuron

TARGET_EPSILON = 1e-6  # beside the variance of a patch, as in MAE


@dataclass(frozen=True)
class Reconstruction:
    """What the decoder drew: `patches` [B, N, P] in units of the target, for the grid `visible` [B, h, w] it saw."""

    patches: Float[Tensor, "B N P"]
    visible: Bool[Tensor, "B h w"]


class Decoder(nn.Module):
    """Visible tokens [B, V, D] and their places -> pixels of every patch [B, N, P]; an ANN, dropped after pre-training.

    A learnable token stands for each hidden patch; fixed 2-D sine positions on all; pre-norm ViT blocks of timm.
    Source: Spikformer V2, Sec. 4.2 ("Transformer decoder") and 5.2.1: 4 layers, 256 wide, 4 heads.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, grid: tuple[int, int], dim: int = 256, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        if dim % 4 or dim % heads:
            raise ValueError(f"decoder_dim must be a multiple of 4 and of decoder_heads={heads}, got {dim}")
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        position = build_sincos2d_pos_embed(list(grid), dim=dim)
        self.register_buffer("position", position, persistent=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.pixels = nn.Linear(dim, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        for layer in (self.embed, self.pixels):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "B V D"], places: Int64[Tensor, "B V"]) -> Float[Tensor, "B N P"]:
        seen = self.embed(tokens)
        everywhere = self.mask_token.to(seen.dtype).expand(len(seen), len(self.position), -1)
        x = everywhere.scatter(1, places.unsqueeze(-1).expand_as(seen), seen) + self.position
        return self.pixels(self.norm(self.blocks(x)))


class MAE(nn.Module):
    """Encoder and decoder: images [B, C, S, S] -> `Reconstruction`.

    `encoder`: a Spikformer (its blocks run on visible tokens only) or a Meta-SpikeFormer (masked throughout, since its
    blocks convolve); it is trained in place, under the keys `encoder.*`, and its classifier is not used.
    `image_size`: S.  `mask_ratio`: share of hidden patches; floor(N (1 - ratio)) of N stay visible.
    `decoder_dim`, `decoder_depth`, `decoder_heads`: of the decoder.  `normalise_target`: each patch by its own mean and
    deviation, the paper's target; else pixels as they are.
    Raises ValueError for another encoder, a size that is no whole number of patches, or a ratio that hides none or all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        image_size: int,
        mask_ratio: float = 0.75,
        decoder_dim: int = 256,
        decoder_depth: int = 4,
        decoder_heads: int = 4,
        normalise_target: bool = True,
    ) -> None:
        super().__init__()
        encoder = getattr(encoder, "_orig_mod", encoder)  # a compiled one would not hear the hooks of masking
        self._encode = _encoding_of(encoder)
        _check_silence(encoder)
        self.patch_size = encoder.feature_info.strides[-1]
        if image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of the patch size {self.patch_size}, got {image_size}")
        side = image_size // self.patch_size
        self.grid = (side, side)
        self.num_visible = int(side * side * (1 - mask_ratio) + 1e-9)  # or 100 * (1 - 0.9) would be 9
        if not 0 < self.num_visible < side * side:
            raise ValueError(
                f"mask_ratio={mask_ratio} leaves {self.num_visible} of {side * side} patches visible: at least one "
                "must be seen and one hidden"
            )
        self.normalise_target = normalise_target
        self.encoder = encoder
        out_dim = self.patch_size**2 * encoder.config.in_channels
        sizes = {"dim": decoder_dim, "depth": decoder_depth, "heads": decoder_heads}
        self.decoder = Decoder(encoder.feature_info.channels[-1], out_dim, grid=self.grid, **sizes)

    def draw_mask(self, images: Tensor, *, generator: torch.Generator | None = None) -> Bool[Tensor, "B h w"]:
        """A random grid for each image, `num_visible` cells of it visible; from a CPU `generator` if one is given."""
        noise = torch.rand(len(images), self.grid[0] * self.grid[1], generator=generator)
        visible = torch.zeros_like(noise, dtype=torch.bool)
        visible.scatter_(1, noise.argsort(1)[:, : self.num_visible], True)
        return visible.view(-1, *self.grid).to(images.device)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Reconstruction:
        """images [B, C, S, S], and a grid [B, h, w] with equally many visible cells for each, drawn if absent."""
        visible = self.draw_mask(images) if visible is None else visible
        tokens, places = self.encode(images, visible)
        return Reconstruction(self.decoder(tokens, places), visible)

    @torch.compiler.disable  # hooks come and go inside
    def encode(
        self, images: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B h w"]
    ) -> tuple[Float[Tensor, "B V D"], Int64[Tensor, "B V"]]:
        """What the encoder makes of the visible patches, averaged over time, and which patches these are.

        Raises ValueError for images of another size, or a mask that does not fit them.
        """
        self._check(images, visible)
        places = visible.flatten(1).nonzero()[:, 1].view(len(images), -1)
        tokens = self._encode(self.encoder, images, Visible(visible), places)
        return self.encoder.time_mean(tokens).mT, places

    def _check(self, images: Tensor, visible: Tensor) -> None:
        side, channels = self.grid[0] * self.patch_size, self.encoder.config.in_channels
        if tuple(images.shape[1:]) != (channels, side, side):
            raise ValueError(f"images must be [B, {channels}, {side}, {side}], got shape {tuple(images.shape)}")
        wanted = (len(images), *self.grid)
        if tuple(visible.shape) != wanted or visible.dtype != torch.bool:
            raise ValueError(
                f"visible must be {list(wanted)} of torch.bool, got {list(visible.shape)} of {visible.dtype}: give one "
                "grid for each image, as draw_mask does"
            )
        counts = visible.flatten(1).sum(1).unique().tolist()
        if len(counts) > 1 or counts == [0]:
            raise ValueError(f"every image must have equally many visible cells, at least one; got {counts}")

    def patchify(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B N P"]:
        """Pixels of each patch, rows first, channels last."""
        p, (h, w) = self.patch_size, self.grid
        return images.unflatten(2, (h, p)).unflatten(4, (w, p)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B C S S"]:
        """The inverse of `patchify`."""
        p, (h, w) = self.patch_size, self.grid
        tiles = patches.unflatten(2, (p, p, -1)).unflatten(1, (h, w))
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def target(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B N P"]:
        """What the decoder should draw: patches of the images, each normalised by its own mean and deviation."""
        patches = self.patchify(images)
        if not self.normalise_target:
            return patches
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        return (patches - mean) / (variance + TARGET_EPSILON).sqrt()

    def image_losses(self, images: Float[Tensor, "B C S S"], drawn: Reconstruction) -> Float[Tensor, " B"]:
        """Squared error of each image, averaged over the pixels of a patch and over hidden patches only.

        Raises ValueError if nothing was hidden.
        """
        if bool(drawn.visible.all()):
            raise ValueError("every patch was visible: there is no hidden one to draw, so no loss")
        error = (drawn.patches.to(images.dtype) - self.target(images)).square().mean(-1)
        hidden = ~drawn.visible.flatten(1)
        return (error * hidden).sum(1) / hidden.sum(1)

    def loss(self, images: Float[Tensor, "B C S S"], drawn: Reconstruction) -> Float[Tensor, ""]:
        """The mean of `image_losses`: what pre-training minimises."""
        return self.image_losses(images, drawn).mean()

    def picture(self, images: Float[Tensor, "B C S S"], drawn: Reconstruction) -> Float[Tensor, "B C S S"]:
        """The reconstruction as an image: hidden patches as drawn (with the true patch's mean and deviation where the
        target is normalised, as MAE shows them), visible ones as they are."""
        patches, own = drawn.patches.to(images.dtype), self.patchify(images)
        if self.normalise_target:
            mean, variance = own.mean(-1, keepdim=True), own.var(-1, keepdim=True)
            patches = patches * (variance + TARGET_EPSILON).sqrt() + mean
        return self.unpatchify(torch.where(drawn.visible.flatten(1).unsqueeze(-1), own, patches))


def _gather_tokens(x: Tensor, places: Tensor) -> Float[Tensor, "TB C V"]:
    """The tokens of a map [T*B, C, h, w] at `places` [B, V], the same in every step."""
    index = places.repeat(len(x) // len(places), 1).unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index)


def _encode_spikformer(encoder: Spikformer, images: Tensor, visible: Visible, places: Tensor) -> Tensor:
    """The stem on covered maps, the blocks on visible tokens: a map of one row, where no layer may mix neighbours."""
    with masked(encoder.stem, visible):
        tokens = encoder.stem(encoder.door(visible.cover(images)))[-1]
    return encoder.blocks(_gather_tokens(tokens, places).unsqueeze(2)).flatten(2)


def _encode_meta_spikeformer(encoder: MetaSpikeFormer, images: Tensor, visible: Visible, places: Tensor) -> Tensor:
    """Every stage on covered maps: attention without softmax sums over visible tokens, since hidden ones are silent."""
    with masked(encoder, visible):
        return _gather_tokens(encoder.forward_features(visible.cover(images))[-1], places)


def _check_silence(encoder: nn.Module) -> None:
    """Raises ValueError for a neuron that fires without input: it would at hidden positions too."""
    for name, neuron in encoder.named_modules():
        if not isinstance(neuron, Neuron):
            continue
        silence = torch.zeros(neuron.steps, 1, device=next(encoder.parameters()).device)
        if neuron(silence).any():
            raise ValueError(f"{name} fires without input, so hidden positions cannot stay silent: {neuron}")


ENCODINGS: dict[type[nn.Module], Callable] = {
    Spikformer: _encode_spikformer,
    MetaSpikeFormer: _encode_meta_spikeformer,
}


def _encoding_of(encoder: nn.Module) -> Callable:
    for name, layer in encoder.named_modules():
        mixes = isinstance(layer, SPATIAL) and layer.kernel_size not in (1, (1, 1))
        if mixes and isinstance(encoder, Spikformer) and name.startswith("blocks."):
            raise ValueError(
                f"{name} mixes neighbours ({layer}), but blocks get visible tokens only, whose neighbours are gone: "
                "pre-train with an attention of 1x1 layers"
            )
    for kind, encode in ENCODINGS.items():
        if isinstance(encoder, kind):
            return encode
    known = ", ".join(kind.__name__ for kind in ENCODINGS)
    raise ValueError(f"masked pre-training knows {known}, got {type(encoder).__name__}")

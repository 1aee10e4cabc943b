"""Spike2Former's head: pixel decoder, transformer decoder and mask embedding, from feature maps to classes and masks.

Paper: Lei et al., "Spike2Former: Efficient Spiking Transformer for High-performance Image Segmentation", AAAI 2025.
Eqs. 1-8 encoder (heads/pixel_decoder.py), 9-13 decoder (heads/mask_decoder.py), 14-15 mask embedding and the product
below (heads/mask_embedding.py), 16-18 NI-LIF (neurons/integer.py), Table 3 ablations (fields of Spike2FormerConfig).
Departures from the paper: those of the parts, named there; losses and matching are MaskFormer's (heads/mask_loss.py).
Masks are products of spikes and real numbers at half the image's resolution, as in the authors' code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int64, Real
from torch import Tensor, nn

from spikeformers.attention import LearnableWidthScaledSSA, WidthScaledSSA, learnable
from spikeformers.attention.sdda import (
    SDDA,
    WIDE_ESC,
    DepthwiseQuery,
    ReleasedSDDA,
    SoftmaxSDDA,
    SpikeQuery,
    SpikingQuerySDDA,
)
from spikeformers.heads.mask_decoder import (
    FFN,
    DecoderLayer,
    MaskDecoder,
    ReleasedFFN,
    SoftmaxCrossAttention,
    SoftmaxSelfAttention,
    SpikeCrossAttention,
    SpikeSelfAttention,
)
from spikeformers.heads.mask_embedding import SHORTCUTS, MaskEmbedding, Shortcut
from spikeformers.heads.mask_loss import MaskLossWeights, all_mask_losses
from spikeformers.heads.masks import MaskClassification
from spikeformers.heads.pixel_decoder import (
    Encoder,
    PixelDecoder,
    ReleasedSpikeMLP,
    SDTELayer,
    SpikeMLP,
    VanillaEncoderLayer,
)
from spikeformers.layers import FeatureInfo, Mixer, Pointwise
from spikeformers.neurons import NeuronBuilder, TimeMean, choose


class Spike2FormerHead(nn.Module):
    """Maps of all levels of a backbone, [T*B, C_i, H_i, W_i] -> MaskClassification at the finest of `pyramid`.

    `pyramid`: which of the maps are read, fine to coarse.  In training every state of the decoder predicts, the last
    one last; in evaluation only the last.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("embedding.classifier", "pixel_decoder.embedding")

    def __init__(
        self,
        pyramid: tuple[int, ...],
        *,
        pixel_decoder: nn.Module,
        decoder: nn.Module,
        embedding: nn.Module,
        steps: int = 1,
        weights: MaskLossWeights = MaskLossWeights(),  # noqa: B008 - frozen dataclass
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.pixel_decoder = pixel_decoder
        self.decoder = decoder
        self.embedding = embedding
        self.class_mean = TimeMean(steps=steps)
        self.mask_mean = TimeMean(steps=steps)
        self.weights = weights

    def forward(self, maps: list[Real[Tensor, "TB _ _ _"]]) -> MaskClassification:
        memories, pixels = self.pixel_decoder([maps[level] for level in self.pyramid])
        states = self.decoder(list(memories))
        states = torch.cat(states if self.training else states[-1:], dim=2)
        classes, mask_spikes = self.embedding(states)
        classes = self.class_mean(classes.permute(0, 2, 3, 1))
        masks = self.mask_mean(mask_products(mask_spikes, pixels))
        *earlier, last = zip(classes.unbind(1), masks.unbind(1), strict=True)
        return MaskClassification(*last, auxiliary=tuple(MaskClassification(*each) for each in earlier))

    def semantic(self, output: MaskClassification, size: tuple[int, int]) -> Float[Tensor, "B L H W"]:
        """Scores [B, classes, H, W] at `size` = (H, W); see MaskClassification."""
        return output.semantic(size)

    def loss(
        self,
        output: MaskClassification,
        labels: Int64[Tensor, "B H W"],
        *,
        class_weights: Float[Tensor, " L"] | None = None,
    ) -> Float[Tensor, ""]:
        """The sum of `losses`."""
        return torch.stack(list(self.losses(output, labels, class_weights=class_weights).values())).sum()

    def losses(
        self,
        output: MaskClassification,
        labels: Int64[Tensor, "B H W"],
        *,
        class_weights: Float[Tensor, " L"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Every loss by its name in the authors' code; labels [B, H, W], IGNORE where there is none."""
        return all_mask_losses(output, labels, weights=self.weights, class_weights=class_weights)


def mask_products(
    mask_spikes: Real[Tensor, "TB C L Q"], pixels: Float[Tensor, "TB C H W"]
) -> Float[Tensor, "TB L Q H W"]:
    """Eq. 15 for L states: how much each pixel belongs to each query, sum over channels of spike times pixel."""
    queries = mask_spikes.flatten(2).mT
    masks = queries @ pixels.flatten(2)
    return masks.unflatten(1, mask_spikes.shape[2:]).unflatten(3, pixels.shape[2:])


ATTENTION_SCALES = {"fixed": float, "learnable": learnable}
ENCODER_ATTENTIONS = {"fixed": WidthScaledSSA, "learnable": LearnableWidthScaledSSA}
DECODER_ATTENTIONS = {
    "spike": (SpikeCrossAttention, SpikeSelfAttention),
    "softmax": (SoftmaxCrossAttention, SoftmaxSelfAttention),
}
FFNS = {"fixed": FFN, "released": ReleasedFFN}
ENCODER_MLPS = {"fixed": SpikeMLP, "released": ReleasedSpikeMLP}
SDDA_OF = {
    ("fixed", "weights"): SDDA,
    ("fixed", "query"): SpikingQuerySDDA,
    ("fixed", "none"): SoftmaxSDDA,
    ("released", "weights"): ReleasedSDDA,
}
SDDA_PROJECTIONS = {"esc": WIDE_ESC, "linear": Pointwise}
SDDA_QUERIES = {"dw_conv": DepthwiseQuery, "plain": SpikeQuery}


@dataclass(frozen=True)
class Spike2FormerConfig:
    """Every size of the head and every switch of Table 3 about it; choices of parts may also be builders of your own.

    `groups`, `encoder_layers`, `encoder_hidden` and `encoder_scale` are the encoder's: no effect where it is "none".
    `layout`: "fixed", or "released" with every slip of the authors' code, for their checkpoints.
    `encoder`: sdte, vanilla (spiking self-attention) or none.  `sdda_projection`: esc or linear.  `sdda_query`: dw_conv
    or plain.  `sdda_spikes`: the attention "weights" are spikes, or the sampled "query" is, or "none", where
    weights are a softmax.  `encoder_query`: the "single" coarsest map is encoded, or "multi", all that the decoder
    reads.
    `mask_shortcut`: conv, none, spikes (without its convolution) or membrane.
    `alpha`: what spikes inside the mask embedding are multiplied by; D undoes the norm of NI-LIF, and for I-LIF, which
    has none, take 1.
    `cross_attention_neuron`: another neuron's name for SDCA alone ("ni_lif" in a network of "i_lif" is Table 3's "Norm
    only in Cross-Attn"); "": the network's.  The table's other neurons: i_lif, ni_lif_const8, sigmoid_l2.
    `decoder_attention`: spike, or softmax (an ANN's, see ANN_TWIN).
    For training without a trained backbone: `attention_scale` "learnable" instead of "fixed", balanced on the first
    batch (attention/balance.py), and `encoder_scale`, where the factors of SDTE's branches start, at 0.1 or more.
    `loss_resolution`: of the "labels", or of the "masks" (MaskLossWeights).
    """

    own_neurons: ClassVar[tuple[str, ...]] = ("cross_attention_neuron",)

    dim: int = 256
    queries: int = 100
    encoder_layers: int = 6
    encoder_hidden: int = 1024
    groups: int = 32
    decoder_layers: int = 6
    decoder_heads: int = 8
    decoder_hidden: int = 2048
    alpha: float = 4.0
    layout: str = "fixed"
    encoder: str | Mixer = "sdte"
    sdda_projection: str | Mixer = "esc"
    sdda_query: str | Mixer = "dw_conv"
    sdda_spikes: str = "weights"
    encoder_query: str = "single"
    mask_shortcut: str | Shortcut = "conv"
    cross_attention_neuron: str | NeuronBuilder = ""
    decoder_attention: str = "spike"
    attention_scale: str = "fixed"
    encoder_scale: float = 1e-6
    loss_resolution: str = "labels"

    def build(
        self, features: FeatureInfo, *, num_classes: int, neuron: NeuronBuilder, steps: int = 1
    ) -> Spike2FormerHead:
        """The head for a backbone with these `features`. Raises ValueError for a choice or a size that cannot be."""
        self._check_choices()
        pyramid = features.pyramid()
        memories = max(1, len(pyramid) - 1)
        pixel_decoder = PixelDecoder(
            tuple(features.channels[level] for level in pyramid),
            dim=self.dim,
            encoder=self._encoder(),
            neuron=neuron,
            query_levels=choose("encoder_query", self.encoder_query, {"single": 1, "multi": memories}),
        )
        decoder = MaskDecoder(
            self.dim,
            queries=self.queries,
            memories=memories,
            layers=self.decoder_layers,
            layer=self._decoder_layer(neuron=neuron),
        )
        embedding = MaskEmbedding(
            self.dim,
            queries=self.queries,
            num_classes=num_classes,
            shortcut=choose("mask_shortcut", self.mask_shortcut, SHORTCUTS),
            neuron=neuron,
            alpha=self.alpha,
        )
        resolution = choose("loss_resolution", self.loss_resolution, {name: name for name in ("labels", "masks")})
        return Spike2FormerHead(
            pyramid,
            pixel_decoder=pixel_decoder,
            decoder=decoder,
            embedding=embedding,
            steps=steps,
            weights=MaskLossWeights(resolution=resolution),
        )

    def _check_choices(self) -> None:
        """Raises ValueError for a choice that another one leaves without effect."""
        if isinstance(self.cross_attention_neuron, str) and self.cross_attention_neuron:
            raise ValueError(
                f"a head of its own takes a builder, got cross_attention_neuron={self.cross_attention_neuron!r}: say "
                "neuron_builder(name, levels=, steps=), or name it in a SegmenterConfig"
            )
        if self.encoder == "none" and self.encoder_query == "multi":
            raise ValueError("encoder_query='multi' encodes all that the decoder reads: not with encoder='none'")
        if self.encoder == "sdte":
            return
        if self.layout == "released":
            raise ValueError(f"layout='released' is of encoder='sdte', got encoder={self.encoder!r}: use 'fixed'")
        for name in ("sdda_projection", "sdda_query", "sdda_spikes"):
            if (value := getattr(self, name)) != getattr(Spike2FormerConfig, name):
                raise ValueError(f"{name}={value!r} is of encoder='sdte', got encoder={self.encoder!r}: leave it out")

    def _encoder(self) -> Mixer:
        """What refines a map: called as `encoder(dim, neuron=builder)`."""
        if self.encoder_hidden % self.dim:
            raise ValueError(f"encoder_hidden must be a multiple of dim={self.dim}, got {self.encoder_hidden}")
        ratio = self.encoder_hidden // self.dim
        mlp = choose("layout", self.layout, ENCODER_MLPS)
        choose("sdda_spikes", self.sdda_spikes, dict.fromkeys(("weights", "query", "none")))
        if (self.layout, self.sdda_spikes) not in SDDA_OF:
            raise ValueError(
                f"sdda_spikes={self.sdda_spikes!r} is not in the authors' code and has no released layout: use 'fixed'"
            )
        attention = partial(
            SDDA_OF[self.layout, self.sdda_spikes],
            groups=self.groups,
            proj=choose("sdda_projection", self.sdda_projection, SDDA_PROJECTIONS),
            query=choose("sdda_query", self.sdda_query, SDDA_QUERIES),
        )
        sdte = partial(SDTELayer, attention=attention, mlp=partial(mlp, ratio=ratio), layer_scale=self.encoder_scale)
        vanilla = partial(
            VanillaEncoderLayer,
            attention=choose("attention_scale", self.attention_scale, ENCODER_ATTENTIONS),
            ratio=ratio,
        )
        encoders = {
            "sdte": partial(Encoder, layer=sdte, depth=self.encoder_layers),
            "vanilla": partial(Encoder, layer=vanilla, depth=self.encoder_layers),
            "none": partial(Encoder, depth=0),
        }
        return choose("encoder", self.encoder, encoders)

    def _decoder_layer(self, *, neuron: NeuronBuilder) -> Callable[[], DecoderLayer]:
        ffn = choose("layout", self.layout, FFNS)
        attention = {
            "heads": self.decoder_heads,
            "scale": choose("attention_scale", self.attention_scale, ATTENTION_SCALES),
        }
        crossing = self.cross_attention_neuron or neuron
        cross, own = choose("decoder_attention", self.decoder_attention, DECODER_ATTENTIONS)
        return lambda: DecoderLayer(
            cross(self.dim, neuron=crossing, **attention),
            own(self.dim, neuron=neuron, **attention),
            ffn(self.dim, self.decoder_hidden, neuron=neuron),
        )


ANN_TWIN = {
    "neuron": "gelu",
    "attention": "softmax",
    "sdda_spikes": "none",
    "decoder_attention": "softmax",
    "attention_scale": "fixed",
    "alpha": 1.0,
    "steps": 1,
}
"""Overrides that make any Spike2Former an ordinary network of the same layers, with GELU and softmax attention."""

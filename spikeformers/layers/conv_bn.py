"""Convolution followed by batch norm: the linear half of every spiking layer, mergeable into one convolution."""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

NormChain = tuple[nn.Module, tuple[tuple[nn.Module, str], ...]]
"""A convolution, and the norms right behind it in order, each as the module that holds it and its name there."""


def bn_affine(bn: nn.BatchNorm2d) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Scale and shift per channel that `bn` applies in eval mode: y = scale * x + shift.

    Raises ValueError for a norm that also rounds (`quantize.prepare(..., exact=True)`).
    """
    if hasattr(bn, "of_zero"):
        raise ValueError(
            f"a {type(bn).__name__} rounds what it gives, so it is no scale and shift and merges into no layer: "
            "networks prepared with exact=True run as they are"
        )
    scale = 1 / torch.sqrt(bn.running_var + bn.eps)
    scale, shift = (scale, 0) if bn.weight is None else (bn.weight * scale, bn.bias)
    return scale, shift - bn.running_mean * scale


def bn_of_zero(bn: nn.Module) -> Float[Tensor, " C"]:
    """What `bn` makes of a zero in eval mode; a norm that rounds says so itself."""
    return bn.of_zero() if hasattr(bn, "of_zero") else bn_affine(bn)[1]


def weight_in_use(layer: nn.Module) -> Tensor:
    """The weight that a convolution or linear layer multiplies by: the quantised one where it has low-bit weights."""
    return layer.quantized_weight() if hasattr(layer, "quantized_weight") else layer.weight


def bias_in_use(layer: nn.Module) -> Tensor | None:
    """The bias that a convolution or linear layer adds, quantised where that is."""
    return layer.quantized_bias() if hasattr(layer, "quantized_bias") else layer.bias


def weight_of(layer: nn.Module) -> Tensor:
    """The weight in use, without its gradient."""
    return weight_in_use(layer).detach()


def merge_conv_bn(conv: nn.Conv2d, *norms: nn.BatchNorm2d | nn.Identity) -> nn.Conv2d:
    """A new convolution with bias that equals `conv` followed by `norms` in eval mode; folded ones are identities."""
    weight = weight_of(conv)
    bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    for norm in norms:
        if isinstance(norm, nn.Identity):
            continue
        scale, shift = (part.detach() for part in bn_affine(norm))
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
    return conv2d_from(weight, bias, like=conv)


def conv2d_from(weight: Tensor, bias: Tensor | None, *, like: nn.Conv2d) -> nn.Conv2d:
    """nn.Conv2d holding `weight` [O, I/groups, kh, kw] and `bias` [O], which moves over its input as `like` does."""
    groups = like.groups
    conv = nn.utils.skip_init(
        nn.Conv2d,
        weight.shape[1] * groups,
        weight.shape[0],
        weight.shape[2:],
        stride=like.stride,
        padding=like.padding,
        dilation=like.dilation,
        groups=groups,
        padding_mode=like.padding_mode,
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.weight.data.copy_(weight)
    if bias is not None:
        conv.bias.data.copy_(bias)
    return conv


class ConvBN(nn.Sequential):
    """Conv2d (square kernel; odd ones padded to keep the size at stride 1) and BatchNorm2d.

    [TB, C, H, W] -> [TB, O, H', W'].
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=bias)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))

    def norm_chain(self) -> NormChain:
        """What `quantize.fold` folds."""
        return self.conv, ((self, "bn"),)

    def merge(self) -> nn.Conv2d:
        """The one convolution that equals this layer in eval mode."""
        return merge_conv_bn(self.conv, self.bn)

"""RepConv: a factored 3x3 convolution with batch norms between its factors, equal to one dense 3x3 at inference.

Paper: Meta-SpikeFormer, Sec. 3.2 (generation of Q, K, V and the projection). As its authors coded it: 1x1 - BN with
border - depthwise 3x3 - 1x1 - BN - BN, in series. (Ding et al.'s RepVGG has parallel branches; this has none.)
"""

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn import functional as F

from spikeformers.layers.conv_bn import NormChain, bn_affine, bn_of_zero, conv2d_from, merge_conv_bn, weight_of


def pad_with_bn_of_zero(x: Float[Tensor, "TB C H W"], *norms: nn.Module) -> Tensor:
    """Pad by one pixel with what the norm makes of a zero input, so that a padded 1x1 - BN - 3x3 merges exactly.

    Several `norms` share the channels in equal parts.
    The border takes the running statistics, also in train mode (already updated by this forward), and no gradient.
    """
    responses = [bn_of_zero(norm) for norm in norms]
    response = torch.cat(responses) if len(norms) > 1 else responses[0]  # exported graphs keep what they were
    frame = 1 - F.pad(x.new_ones(1, 1, x.shape[2], x.shape[3]), (1, 1, 1, 1))
    # Adding 0 inside keeps the interior bit for bit; one fused pass, and no in-place write for export to undo.
    return F.pad(x, (1, 1, 1, 1)) + frame * response.detach().to(x.dtype).view(1, -1, 1, 1)


class RepConv(nn.Module):
    """[TB, C, H, W] -> [TB, O, H, W]; 2 C^2 + 15 C parameters where O = C."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pw1 = nn.Conv2d(in_channels, in_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.dw = nn.Conv2d(in_channels, in_channels, 3, groups=in_channels, bias=False)
        self.pw2 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Real[Tensor, "TB C H W"]) -> Float[Tensor, "TB O H W"]:
        x = pad_with_bn_of_zero(self.bn1(self.pw1(x)), self.bn1)
        return self.bn3(self.bn2(self.pw2(self.dw(x))))

    def norm_chain(self) -> NormChain:
        """What `quantize.fold` folds; bn1 stays, the border needs it."""
        return self.pw2, ((self, "bn2"), (self, "bn3"))

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """The dense 3x3 convolution, zero padding 1, that equals this layer in eval mode."""
        s1, b1 = bn_affine(self.bn1)
        last = merge_conv_bn(self.pw2, self.bn2, self.bn3)
        inner, depthwise, outer = weight_of(self.pw1)[:, :, 0, 0], weight_of(self.dw)[:, 0], last.weight[:, :, 0, 0]
        kernel = torch.einsum("om,mij,mc->ocij", outer, depthwise, s1[:, None] * inner)
        like = nn.Conv2d(self.pw1.in_channels, self.pw2.out_channels, 3, padding=1, device="meta")
        return conv2d_from(kernel, outer @ (depthwise.sum((1, 2)) * b1) + last.bias, like=like)

"""Where learnable attention scales start: so that an attention neuron is driven by one spike's worth on average.

A product of three spike maps grows with the number of tokens and with the cube of a spike's worth: NI-LIF's 1/D leaves
the neurons behind it silent at large D (decision 0018), long sequences saturate them. Either way the map is constant,
the branch is dead, and each batch norm behind it multiplies gradients by 1/sqrt(eps). One pass over a batch sets every
scale to what a unit mean wants; the scale folds into the threshold like any other.  The weights of a deformable
attention start at zero, so that it attends to nothing: there it starts with one spike on every point.
Source: after layer-sequential unit-variance initialisation, Mishkin & Matas, ICLR 2016.
"""

import torch
from torch import Tensor, nn

from spikeformers.attention.sdda import SDDA

TARGET = 1.0  # mean membrane of an attention neuron, in thresholds


@torch.no_grad()
def balance(model: nn.Module, images: Tensor) -> int:
    """Set the learnable `scale` of every attention in `model`, in order, from one pass over `images` [B, C, H, W], and
    let every untrained SDDA attend.

    In the mode that the model is in; running statistics of norms are left as they were. Attentions without a learnable
    scale stay. Returns how many were set.  An attention whose product is zero everywhere keeps its scale.
    """
    for module in model.modules():
        if isinstance(module, SDDA) and not module.attn_conv.conv.weight.any():
            nn.init.constant_(module.attn_conv.bn.bias, TARGET)
    attentions = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "scale", None), nn.Parameter) and hasattr(module, "attn")
    ]
    statistics = {
        module: (module.momentum, module.num_batches_tracked.clone())
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    done: list[nn.Module] = []

    def prepared(attention: nn.Module):
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            (membrane,) = arguments
            factor = TARGET / membrane.mean()
            if torch.isfinite(factor) and factor > 0:
                attention.scale.mul_(factor)
                done.append(attention)
                return (membrane * factor,)
            return (membrane,)

        return hook

    handles = [each.attn.register_forward_pre_hook(prepared(each)) for each in attentions]
    try:
        for norm in statistics:
            norm.momentum = 0.0
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for norm, (momentum, seen) in statistics.items():
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(seen)
    return len(done)

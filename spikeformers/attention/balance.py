"""Where learnable attention scales start: so that an attention neuron is driven by one spike's worth on average.

A product of three spike maps grows with the number of tokens and with the cube of a spike's worth: NI-LIF's 1/D leaves
the neurons behind it silent at large D (decision 0018), long sequences saturate them. Either way the map is constant,
the branch is dead, and each batch norm behind it multiplies gradients by 1/sqrt(eps). One pass over a batch sets every
scale to what a unit mean wants; the scale folds into the threshold like any other.  The weights of a deformable
attention start at zero, so that it attends to nothing: there it starts with one spike on every point.
Source: after layer-sequential unit-variance initialisation, Mishkin & Matas, ICLR 2016.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from spikeformers.attention.sdda import SDDA
from spikeformers.neurons import LIF, Neuron, as_membrane

TARGET = 1.0  # mean charge of an attention neuron, in what one spike takes


def drive(neuron: nn.Module, current: Tensor) -> Tensor:
    """Mean charge by `current` from rest, in what one spike takes; of an activation of an ANN the mean current."""
    if not isinstance(neuron, Neuron):
        return current.mean()
    charge = neuron.charge(as_membrane(current), None).mean()
    return charge / neuron.threshold if isinstance(neuron, LIF) else charge  # others count in thresholds


@torch.no_grad()
def balance(model: nn.Module, images: Tensor, *, skip: Collection[str] = ()) -> int:
    """Set the learnable `scale` of every attention in `model`, in order, from one pass over `images` [B, C, H, W], and
    let every untrained SDDA attend.

    In the mode that the model is in; running statistics of norms are left as they were. Attentions without a learnable
    scale stay, and those whose scale `skip` names (by its name among the parameters: trained ones). Returns how many
    were set.  An attention whose product is zero everywhere keeps its scale.
    """
    for module in model.modules():
        if isinstance(module, SDDA) and not module.attn_conv.conv.weight.any():
            nn.init.constant_(module.attn_conv.bn.bias, TARGET)
    attentions = [
        module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scale", None), nn.Parameter)
        and hasattr(module, "attn")
        and f"{name}.scale".lstrip(".") not in skip
    ]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    done: list[nn.Module] = []

    def prepared(attention: nn.Module):
        def hook(neuron: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            (current,) = arguments
            factor = TARGET / drive(neuron, current)
            if torch.isfinite(factor) and factor > 0:
                attention.scale.mul_(factor)
                done.append(attention)
                return (current * factor,)
            return (current,)

        return hook

    handles = [each.attn.register_forward_pre_hook(prepared(each)) for each in attentions]
    try:
        for norm in norms:
            norm.momentum = 0.0
        model(images)
    finally:
        for handle in handles:
            handle.remove()
        for norm, (momentum, seen) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(seen)
    return len(done)

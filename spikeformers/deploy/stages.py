"""Networks of two stages: the first computes maps and numbers of whole images, the second looks at regions of them.

Between the two, regions are chosen by sorting and comparing boxes, so many as there are: no graph of tensors holds it.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from spikeformers.deploy.runtime import IntegerModel
from spikeformers.heads.mask_rcnn import DenseStage, MaskRCNN


def network_of(model: nn.Module) -> nn.Module:
    """What an engine runs, or `model` itself."""
    return model.net if isinstance(model, IntegerModel) else getattr(model, "_orig_mod", model)


def has_two_stages(model: nn.Module) -> bool:
    """True for a network that finds boxes in regions of its choice (Mask R-CNN), and for its engine."""
    net = network_of(model)
    return isinstance(getattr(net, "head", None), MaskRCNN) and not isinstance(net, DenseStage)


def refuse_two_stages(model: nn.Module) -> None:
    """Raises ValueError for a network of two stages."""
    if has_two_stages(model):
        raise ValueError(
            "this network chooses regions between two stages, which no graph (ONNX, OpenVINO, NIR) holds: give "
            "sf.deploy.first_stage(model), and do the rest in torch by sf.deploy.completed(model, run)"
        )


def first_stage(model: nn.Module) -> nn.Module:
    """The part of a network of two stages, or of its engine, that other runtimes can run: images -> `heads.Dense`.

    It shares all layers with `model`. What follows it is `completed`.
    Raises ValueError for a network of one stage.
    """
    if not has_two_stages(model):
        raise ValueError(f"{type(network_of(model)).__name__} has no second stage: export it as it is")
    net = network_of(model)
    stage = DenseStage(net.backbone, net.head).train(net.training)
    if isinstance(model, IntegerModel):
        return IntegerModel(stage, spike_fed=model.spike_fed, fused=model.fused)
    return stage


def completed(model: nn.Module, run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """What computes all that `model`, of two stages, gives, if `run` computes the first one; of images [B, C, H, W]."""
    head = network_of(model).head
    return lambda images: head.complete(run(images), image_size=tuple(images.shape[-2:]))

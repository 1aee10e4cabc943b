"""What `export` compares an engine by: graphs give what the network gives, in its form."""

import pytest
import torch
from torch import nn

from spikeformers.deploy import export_onnx, integer
from spikeformers.deploy.outputs import largest_difference
from spikeformers.heads import MaskClassification
from spikeformers.neurons import ILIF
from spikeformers.train.exporting import onnx_runner


class Masks(nn.Module):
    """The smallest network that gives classes and masks."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron, self.conv = ILIF(), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        pixels = self.conv(self.neuron(x))
        return MaskClassification(pixels.mean((2, 3))[:, None], pixels)


@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_an_onnx_file_gives_classes_and_masks_in_the_form_of_its_engine(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images = 4 * torch.randn(2, 3, 4, 8)
    engine = integer(Masks().eval(), images[..., :4])
    file = export_onnx(engine, images[..., :4], tmp_path / "masks.onnx")
    run = onnx_runner(file, engine(images[:1, ..., :4]))
    part = images[..., 4:]  # as a window is, no contiguous tensor
    wanted, found = engine(part), run(part)
    assert isinstance(found, MaskClassification)
    assert wanted.mask_logits.std() > 0
    assert largest_difference(found, wanted) <= 1e-6  # one sum of four products, in float32

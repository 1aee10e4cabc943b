"""Small networks whose batch norms look trained."""

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers.neurons import IELIF, ILIF


@pytest.fixture
def small():
    """Builds a small Meta-SpikeFormer in eval mode with random batch norm statistics."""

    def build(neuron: str = "i_lif", steps: int = 1, **overrides) -> nn.Module:
        sizes = {"dims": (8, 16, 24, 32), "num_classes": 5, "blocks": (1, 1, 1, 1, 1)}
        model = sf.create_model("meta_spikeformer_15m", neuron=neuron, steps=steps, **(sizes | overrides))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.3, 1.5)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias, 0.3, 0.5)
        return model.eval()

    return build


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32)


@pytest.fixture(scope="session")
def dyadic():
    """Builds a network whose float sums are exact in any order on `dyadic_images`, full of halves to round."""

    def build() -> nn.Module:
        layers = [nn.Conv2d(3, 8, 3, padding=1), IELIF()]  # half up
        layers += [nn.Conv2d(8, 12, 3, stride=2, padding=1), IELIF()]  # fused
        layers += [nn.Conv2d(12, 12, 5, padding=2, groups=12, bias=False), nn.MaxPool2d(2), ILIF()]  # half to even
        layers += [nn.AvgPool2d(2), IELIF(levels=8), nn.Flatten(), nn.Linear(48, 16), ILIF(), nn.Linear(16, 5)]
        for layer, scale in zip(layers, (1, 0, 2, 0, 16, 0, 0, 0, 0, 0, 8, 0, 1), strict=True):
            if scale:
                layer.weight.data.mul_(scale)  # every neuron fires
        for parameter in layers[0].parameters():
            parameter.data.copy_(torch.randint(-8, 9, parameter.shape) / 32)
        return nn.Sequential(*layers).eval()

    return build


@pytest.fixture(scope="session")
def dyadic_images():
    """Gives as many pictures of multiples of 1/4."""
    return lambda batch: torch.randint(-8, 9, (batch, 3, 16, 16)) / 4

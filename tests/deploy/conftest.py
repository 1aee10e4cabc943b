"""Small networks whose batch norms look trained."""

import pytest
import torch
from torch import nn

import spikeformers as sf


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

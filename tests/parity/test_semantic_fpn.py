"""Semantic FPN in its integer form against the authors' code, in float64: logits and gradients to the last bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikeformers.heads import SemanticFPN, SemanticFPNConfig
from spikeformers.layers import FeatureInfo
from spikeformers.neurons import neuron_builder
from spikeformers.weights.semantic_fpn import own_key

HERE = Path(__file__).parent


def own_name(key: str) -> str:
    return own_key(key).removeprefix("head.")


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return load_file(HERE / "semantic_fpn.safetensors")


@pytest.fixture(scope="module")
def head(reference) -> SemanticFPN:
    features = FeatureInfo(("a", "b", "c", "d"), (4, 8, 16, 20), (2, 4, 8, 16))
    head = SemanticFPNConfig(neck_dim=12, fpn_dim=12, neck="batch_norm").build(
        features, num_classes=5, neuron=neuron_builder("ni_lif", levels=4), steps=1
    )
    weights = {own_name(k.removeprefix("w.")): v.double() for k, v in reference.items() if k.startswith("w.")}
    counters = {k: v for k, v in head.state_dict().items() if k.endswith("num_batches_tracked")}
    head.double().load_state_dict(weights | counters)
    return head.eval()


def test_logits_and_gradients_are_theirs(reference, head):
    maps = [reference[f"feat{level}"].clone().requires_grad_() for level in range(4)]
    logits = head(maps)
    torch.testing.assert_close(logits, reference["y"], rtol=0, atol=0)
    (logits * reference["gy"]).sum().backward()
    for level, each in enumerate(maps):
        torch.testing.assert_close(each.grad, reference[f"gfeat{level}"], rtol=0, atol=0)
    norms = {own_name(k.removeprefix("gnorm.")): v for k, v in reference.items() if k.startswith("gnorm.")}
    assert norms.keys() == dict(head.named_parameters()).keys()
    for name, parameter in head.named_parameters():
        # Sums of squares in another order.
        torch.testing.assert_close(parameter.grad.norm(), norms[name].squeeze(), rtol=1e-12, atol=1e-12)

"""Merged networks are the same function."""

import pytest
import torch
from torch import nn

from spikeformers.deploy import fuse
from spikeformers.energy.firing import record
from spikeformers.layers import ConvBN

NEURONS = [("lif", 4), ("i_lif", 1), ("ie_lif", 1), ("ni_lif", 1)]


@pytest.mark.parametrize(("neuron", "steps"), NEURONS)
def test_a_fused_network_equals_the_original_in_every_spike_and_logit(small, images, neuron, steps):
    model = small(neuron, steps).double()
    fused = fuse(model)
    with record(model) as wanted:
        logits = model(images.double())
    with record(fused) as got:
        # Rounding of float64 only: merging changes the order of sums.
        assert (fused(images.double()) - logits).abs().max() <= 1e-12
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert sum(int(counts.sum()) for counts in got.values()) > 0


def test_every_membrane_of_a_fused_network_is_equal_too(small, images):
    model = small("i_lif").double()
    pairs = zip(model.forward_features(images.double()), fuse(model).forward_features(images.double()), strict=True)
    # Membranes reach 1e2 here, so float64 leaves about 1e-13.
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) <= 1e-12


def test_fusing_leaves_no_batch_norm_and_the_original_untouched(small):
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not any(module.training for module in fused.modules())
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_fused_model_refuses_to_be_saved_as_the_catalogues_model(small, tmp_path):
    with pytest.raises(ValueError, match="create_model"):
        fuse(small()).save_pretrained(tmp_path / "model")


def test_plain_convolution_and_norm_in_a_sequence_merge():
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).double().eval()
    nn.init.normal_(chain[1].running_mean)
    nn.init.uniform_(chain[1].running_var, 0.5, 2)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    fused = fuse(chain)
    assert isinstance(fused[1], nn.Identity)
    torch.testing.assert_close(fused(x), chain(x), rtol=0, atol=1e-12)


def test_a_single_layer_fuses_to_its_convolution():
    layer = ConvBN(3, 4, 3, stride=2).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    fused = fuse(layer)
    assert type(fused) is nn.Conv2d
    torch.testing.assert_close(fused(x), layer(x), rtol=0, atol=1e-12)

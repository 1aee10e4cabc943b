"""The engine in OpenVINO: its numbers are the torch engine's, and its convolutions of spikes run in 8 bits."""

import copy
import pickle

import pytest
import torch
from torch import nn

from spikeformers.deploy import integer
from spikeformers.neurons import IELIF, ILIF, set_steps

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("unchecked")  # the exporter would trace the checker's wrappers


def dyadic() -> nn.Module:
    """A network whose float sums are exact in any order on `dyadic_images`, full of halves for its neurons to round."""
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


def dyadic_images(batch: int) -> torch.Tensor:
    return torch.randint(-8, 9, (batch, 3, 16, 16)) / 4


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, nn.Module]:
    """A network, its engine in torch and its engine in OpenVINO."""
    torch.manual_seed(0)
    model, images = dyadic(), dyadic_images(1)
    return model, integer(model, images), integer(model, images, backend="openvino")


def test_where_float_sums_are_exact_every_bit_is_the_torch_engines(pair):
    model, engine, other = pair
    for batch in (1, 4):
        images = dyadic_images(batch)
        wanted = engine(images)
        assert wanted.std() > 0
        assert torch.equal(other(images), wanted)
    ours, theirs = engine.compare(model, images), other.compare(model, images)
    assert theirs == ours
    assert theirs.flip_rates
    for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(again(images), wanted)


def test_another_size_and_other_steps_are_refused(pair):
    *_, other = pair
    with pytest.raises(ValueError, match=r"takes \['B', 3, 16, 16\] \(B any number\), got \[1, 3, 8, 8\]"):
        other(dyadic_images(1)[..., :8, :8])
    with pytest.raises(ValueError, match="nothing else that knows time steps"):
        set_steps(other, 2)


def test_openvino_runs_layers_that_read_spikes_in_eight_bits_and_no_other(small, images):
    model = small("ie_lif", blocks=(0, 0, 0, 1, 0))
    engine, other = integer(model, images), integer(model, images, backend="openvino")
    fed = {layer.name for layer in engine.report().layers if layer.spike_fed}
    assert other.eight_bit_convolutions() == len(fed)
    assert {layer.name for layer in other.report().layers if layer.primitive} == fed
    # Float layers sum in another order than torch's: logits differ by 1e-6 unless a count flips, which none does here.
    torch.testing.assert_close(other(images), engine(images), rtol=0, atol=1e-5)
    assert other.compare(model, images).flip_rates == engine.compare(model, images).flip_rates


@pytest.mark.slow
def test_clips_of_binary_spikes_run_over_their_steps(small):
    model, clip = small("lif", 2), torch.randn(2, 3, 3, 32, 32)
    engine, other = integer(model, clip), integer(model, clip, backend="openvino")
    torch.testing.assert_close(other(clip), engine(clip), rtol=0, atol=1e-5)

"""The engine in OpenVINO: its numbers are the torch engine's, and its convolutions of spikes run in 8 bits."""

import copy
import gc
import pickle
import signal

import pytest
import torch
from torch import nn

from spikeformers.deploy import integer
from spikeformers.neurons import set_steps

pytest.importorskip("openvino")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("unchecked")  # the exporter would trace the checker's wrappers


@pytest.fixture(scope="module")
def pair(dyadic, dyadic_images) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A network, its engine in torch and its engine in OpenVINO."""
    torch.manual_seed(0)
    model, images = dyadic(), dyadic_images(1)
    return model, integer(model, images), integer(model, images, backend="openvino")


def test_where_float_sums_are_exact_every_bit_is_the_torch_engines(pair, dyadic_images):
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


def test_ctrl_c_is_heard_after_engines_came_and_went(pair, dyadic_images):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    first, second = copy.deepcopy(pair[2]), copy.deepcopy(pair[2])
    for engine in (first, second):
        engine(dyadic_images(1))
    del first, engine
    gc.collect()
    del second
    gc.collect()
    with pytest.raises(KeyboardInterrupt):  # on a signal stack that is gone this would end the process
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_another_size_and_other_steps_are_refused(pair, dyadic_images):
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

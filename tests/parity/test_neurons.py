"""Integer neurons against the authors' outputs and gradients, with zero tolerance: every value is dyadic."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spikeformers.neurons import IELIF, ILIF, NILIF

REFERENCE = load_file(Path(__file__).parent / "neurons.safetensors")


@pytest.mark.parametrize(
    ("case", "neuron"),
    [
        ("multispike", IELIF(levels=4)),
        ("multispike_att", IELIF(levels=4, unit=0.5)),
        ("seg_multispike_norm4", NILIF(levels=4)),
        ("norm1", ILIF(levels=4)),
    ],
)
def test_qsd_neurons_equal_the_released_code(case, neuron):
    x = REFERENCE[f"ie_lif/{case}/x"].clone().requires_grad_()
    y = neuron(x)
    assert torch.equal(y, REFERENCE[f"ie_lif/{case}/y"])
    y.backward(REFERENCE[f"ie_lif/{case}/upstream"])
    assert torch.equal(x.grad, REFERENCE[f"ie_lif/{case}/grad_x"])


@pytest.mark.parametrize(
    ("case", "neuron"), [("qif_D8", NILIF(levels=8)), ("norm4_D4", NILIF(levels=4)), ("ilif_D4", ILIF(levels=4))]
)
def test_spike2former_neurons_equal_the_released_code(case, neuron):
    x = REFERENCE["ni_lif/x"].clone().requires_grad_()
    y = neuron(x)
    assert torch.equal(y, REFERENCE[f"ni_lif/{case}.y"])
    y.backward(REFERENCE["ni_lif/g"])
    assert torch.equal(x.grad, REFERENCE[f"ni_lif/{case}.gx"])


def test_temporal_ni_lif_equals_six_calls_of_the_released_neuron_without_reset():
    x = REFERENCE["ni_lif/seq.x"].clone().requires_grad_()
    y = NILIF(steps=6, levels=8, decay=1.0)(x)
    assert torch.equal(y, REFERENCE["ni_lif/seq.y"])
    y.backward(REFERENCE["ni_lif/seq.g"])
    # Sums over six steps: float64 re-association only.
    assert torch.allclose(x.grad, REFERENCE["ni_lif/seq.gx"], atol=1e-14, rtol=0)

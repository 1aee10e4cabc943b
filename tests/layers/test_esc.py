"""ESC: every convolution reads spikes; its size, and what Table 3 puts in its place."""

import torch

from spikeformers.energy import record
from spikeformers.layers import ESC, Pointwise
from spikeformers.neurons import neuron_builder

NI_LIF = neuron_builder("ni_lif")


def test_each_of_the_three_convolutions_reads_what_a_neuron_emitted():
    esc = ESC(8, neuron=NI_LIF).double()
    read = {}
    for name in ("pw1", "dw", "pw2"):
        getattr(esc, name).register_forward_hook(lambda _, args, __, name=name: read.__setitem__(name, args[0]))
    with record(esc) as spikes:
        esc(torch.randn(2, 8, 5, 6, dtype=torch.float64) * 2)
    for name, x in read.items():
        assert torch.equal(x * 4, spikes[f"{name}_neuron"].double()), name
        assert x.any(), name


def test_kernel_changes_the_depthwise_convolution_alone():
    count = {kernel: sum(p.numel() for p in ESC(256, neuron=NI_LIF, kernel=kernel).parameters()) for kernel in (3, 5)}
    assert count[3] == 269_312  # the encoder's, in the paper's size
    assert count[5] - count[3] == (25 - 9) * 512


def test_pointwise_keeps_the_width_unless_told():
    x = torch.randn(2, 8, 3, 5)
    assert Pointwise(8, neuron=NI_LIF)(x).shape == x.shape
    assert Pointwise(8, 3, neuron=NI_LIF)(x).shape == (2, 3, 3, 5)
    assert Pointwise(8, neuron=NI_LIF).conv.conv.bias is not None

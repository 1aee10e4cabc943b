"""SDSA operators: by hand, both product orders equal, and what each operator may and may not see."""

import pytest
import torch
from torch import nn

from spikeformers.attention import SDSA, SDSA2, SDSA3, SDSA4
from spikeformers.layers import ConvBN, RepConv
from spikeformers.neurons import neuron_builder

LIF = neuron_builder("lif")


class Passed(nn.Module):
    """A projection whose output is chosen by the test, whatever comes in."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.value: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.value is None else self.value


def operator(name: str, **currents: torch.Tensor) -> nn.Module:
    module = SDSA[name](4, neuron=neuron_builder("i_lif", levels=1), heads=2, qkv=Passed, proj=Passed)
    for branch, current in currents.items():
        getattr(module, f"{branch}_conv").value = current
    return module


def test_sdsa_1_masks_q_by_the_fired_column_sums_of_k_and_v():
    q = torch.ones(1, 4, 2, 2)
    k, v = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    k[0, 1, 0, 0] = 1  # only channel 1 has a coincidence of K and V
    out = operator("sdsa1", q=q, k=k, v=v)(torch.zeros(1, 4, 2, 2))
    assert out.sum((0, 2, 3)).tolist() == [0, 4, 0, 0]


def test_sdsa_2_masks_v_by_the_fired_column_sums_of_q_and_has_no_k():
    q, v = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    q[0, 2, 1, 1] = 1
    module = operator("sdsa2", q=q, v=v)
    assert module(torch.zeros(1, 4, 2, 2)).sum((0, 2, 3)).tolist() == [0, 0, 4, 0]
    assert not hasattr(module, "k_conv")


@pytest.mark.parametrize("name", SDSA)
def test_every_operator_keeps_shape_and_emits_gradients(name):
    module = SDSA[name](16, neuron=neuron_builder("i_lif", levels=4), heads=4)
    spikes = torch.randint(0, 5, (2, 16, 5, 4)).float().requires_grad_()
    out = module(spikes)
    assert out.shape == spikes.shape
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_sdsa_4_starts_as_sdsa_3_with_one_more_parameter():
    three, four = SDSA3(16, neuron=LIF), SDSA4(16, neuron=LIF)
    state = four.state_dict()
    assert state.pop("attn.threshold").item() == 0.5
    three.load_state_dict(state)
    spikes = torch.randint(0, 2, (2, 16, 6, 6)).float()
    for module in (three, four):
        nn.init.constant_(module.q_conv.bn3.bias, 2)
        nn.init.constant_(module.k_conv.bn3.bias, 2)
        nn.init.constant_(module.v_conv.bn3.bias, 2)
    out = four(spikes)
    assert torch.equal(three(spikes), out)
    out.sum().backward()
    assert four.attn.threshold.grad is not None


def test_spike2formers_sdsa_is_sdsa_3_scaled_by_the_width_of_a_head_with_threshold_one():
    q, k, v = (torch.randint(0, 2, (2, 4, 4, 5)).float() for _ in range(3))
    for name, learnt in (("sdsa3_width", False), ("sdsa3_learned", True)):
        module = SDSA[name](16, neuron=LIF, heads=4)
        assert torch.equal(module.mix(q, k, v), (v @ k.mT @ q) / 2)
        assert module.attn.threshold == 1
        assert type(module.q_conv) is RepConv
        assert isinstance(module.scale, nn.Parameter) == learnt


def test_heads_split_channels_in_contiguous_groups():
    module = SDSA3(8, neuron=LIF, heads=2, qkv=lambda i, o: ConvBN(i, o, 1))
    x = torch.arange(8.0).view(1, 8, 1, 1)
    assert module.split(x)[0, 1, :, 0].tolist() == [4, 5, 6, 7]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="dim=10, heads=4"):
        SDSA2(10, neuron=LIF, heads=4)

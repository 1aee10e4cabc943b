"""The firing recorder: names, counts, wrappers, and what it refuses."""

import pytest
import torch
from torch import nn

from spikeformers.energy import record
from spikeformers.neurons import IELIF, ILIF, LIF, NILIF
from spikeformers.zoo import create_model


def tiny(**overrides) -> nn.Module:
    sizes = {"dims": (8, 16, 16, 24), "strides": (1, 2, 2, 2, 1), "blocks": (1, 0, 0, 1, 1), "num_classes": 3}
    return create_model("meta_spikeformer_15m", **(sizes | overrides)).eval()


def test_names_are_those_of_the_modules():
    model = tiny()
    with record(model) as spikes:
        model(torch.randn(2, 3, 16, 16))
    assert {"stage1a.block0.sep_conv.neuron", "stage3.block0.attn.q", "head_neuron"} <= set(spikes)
    assert all(isinstance(model.get_submodule(name), LIF) for name in spikes)


@pytest.mark.parametrize("neuron", [ILIF(levels=4), NILIF(levels=4), IELIF(levels=4), IELIF(levels=3, gain=1.0)])
def test_counts_are_whole_numbers_of_spikes_whatever_one_spike_is_worth(neuron):
    model = nn.Sequential(neuron)
    current = torch.randn(64, 5) * 4
    with record(model) as spikes:
        output = model(current)
    assert spikes["0"].dtype == torch.uint8
    assert spikes["0"].max() == neuron.levels
    torch.testing.assert_close(spikes["0"] * neuron.unit, output)


def test_steps_stay_folded_into_the_batch_and_the_last_forward_wins():
    model = tiny(steps=3)
    with record(model) as spikes:
        model(torch.randn(2, 3, 16, 16))
        model(torch.randn(4, 3, 16, 16))
    assert spikes["stage3.block0.attn.q"].shape == (3 * 4, 16, 2, 2)


def test_records_a_compiled_model_under_the_names_of_the_bare_one(unchecked):
    bare = nn.Sequential(nn.Conv2d(2, 4, 1), LIF(steps=2), nn.Conv2d(4, 2, 1), ILIF())
    images = torch.randn(4, 2, 3, 3) * 4
    compiled = torch.compile(bare, backend="eager")
    compiled(images)  # a graph that already exists must not be used
    with record(compiled) as spikes:
        compiled(images)
    with record(bare) as expected:
        bare(images)
    assert list(spikes) == list(expected) == ["1", "3"]
    assert all(torch.equal(spikes[name], expected[name]) for name in expected)


def test_strips_the_prefixes_of_wrappers():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    wrapped = Wrapper(Wrapper(nn.Sequential(LIF())))
    with record(wrapped) as spikes:
        wrapped(torch.ones(1, 1))
    assert list(spikes) == ["0"]


def test_leaves_no_hook_and_works_under_gradients():
    model = tiny().train()
    with record(model) as spikes:
        model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert not any(value.requires_grad for value in spikes.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_raises_if_nothing_ran():
    with pytest.raises(RuntimeError, match="inside the context"), record(tiny()):
        pass


def test_an_error_inside_is_not_hidden():
    with pytest.raises(KeyError), record(tiny()):
        raise KeyError("mine")


def test_raises_for_a_model_without_neurons():
    with pytest.raises(ValueError, match="no spiking neuron"), record(nn.Linear(2, 2)):
        pass

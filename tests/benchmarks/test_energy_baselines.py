"""The script that sets plain networks and one of spikingjelly beside ours: what it builds, and a row of each kind."""

import pytest
import torch

from spikeformers import create_model


def test_a_row_is_measured_over_time_and_every_published_size_has_its_network(noting):
    pytest.importorskip("spikingjelly", reason="needs the extra `bench`")
    from spikingjelly.activation_based import layer, neuron

    script = noting("energy_baselines", lambda recipe: None)
    assert list(script.builders()) == [*script.PUBLISHED, *script.OURS]
    torch.manual_seed(0)
    parts = (layer.Conv2d(3, 4, 3, bias=False), layer.BatchNorm2d(4), neuron.IFNode(), layer.Conv2d(4, 2, 1))
    theirs = script.row_of("sew_resnet18", script.Repeated(torch.nn.Sequential(*parts)), torch.randn(2, 3, 8, 8))
    assert (theirs["T"], theirs["GMACs"]) == (4, 36 * (4 * 27 + 8) / 1e9)
    assert 0 < theirs["firing rate"] < 1
    ours = script.row_of("ours", create_model("spikformer_cifar_2_384", dim=16, heads=2), torch.randn(2, 3, 32, 32))
    assert ours["published GMACs"] is None
    assert ours["firing rate"] > 0

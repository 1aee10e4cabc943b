"""Mask embedding equals Eqs. 14-15 by hand, and each row of Table 3 about it changes what it should."""

import pytest
import torch
from torch import Tensor, nn

from spikeformers.heads.mask_embedding import (
    SHORTCUTS,
    ConvShortcut,
    MaskEmbedding,
    MembraneShortcut,
    NoShortcut,
    ScaledSpikes,
    SpikeShortcut,
)
from spikeformers.neurons import NILIF, neuron_builder

DIM, QUERIES, CLASSES = 8, 5, 3


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def embedding(shortcut: type[nn.Module] = ConvShortcut, *, alpha: float = 4.0) -> MaskEmbedding:
    made = MaskEmbedding(
        DIM, queries=QUERIES, num_classes=CLASSES, shortcut=shortcut, neuron=neuron_builder("ni_lif"), alpha=alpha
    )
    return made.double().eval()


def test_a_query_fires_once_where_it_is_positive_and_each_spike_is_worth_one():
    states = double(2, DIM, 1, QUERIES)
    module = embedding()
    assert torch.equal(module.query_spikes(states.sigmoid()), (states > 0).double())


def test_spikes_are_worth_alpha_over_levels():
    spikes = ScaledSpikes(2.0, neuron=lambda: NILIF(levels=4))(torch.tensor([0.4, 0.6, 2.4, 9.0]))
    assert spikes.tolist() == [0, 0.5, 1.0, 2.0]


def test_classes_and_mask_spikes_are_their_equations():
    module = embedding()
    states = double(2, DIM, 1, QUERIES)
    for parameter in (*module.mask_mlp.parameters(), *module.shortcut.conv.conv.parameters()):
        nn.init.normal_(parameter)
    nn.init.constant_(module.shortcut.weight, 2.0)
    spikes = (states > 0).double()[:, :, 0]  # [TB, C, Q]

    def neuron(x: Tensor) -> Tensor:
        return x.clamp(0, 4).round()

    mlp = module.mask_mlp
    hidden = neuron(mlp.conv1.weight[:, :, 0, 0] @ spikes)
    hidden = neuron(mlp.conv2.weight[:, :, 0, 0] @ hidden)
    mask = mlp.conv3.weight[:, :, 0, 0] @ hidden + mlp.conv3.bias[:, None]
    mixed = torch.einsum("oq,bcq->bco", module.shortcut.conv.conv.weight[:, :, 0, 0], spikes) / (1 + 1e-5) ** 0.5
    classes = module.classifier.weight[:, :, 0, 0] @ spikes + module.classifier.bias[:, None]
    made_classes, made_spikes = module(states)
    assert torch.allclose(made_classes[:, :, 0], classes, atol=1e-12)
    assert torch.equal(made_spikes[:, :, 0], neuron(mask + 2 * mixed))
    assert set(made_spikes.unique().tolist()) == {0, 1, 2, 3, 4}


def test_states_are_embedded_side_by_side_as_they_are_alone():
    module = embedding()
    states = [double(2, DIM, 1, QUERIES) for _ in range(3)]
    together = module(torch.cat(states, dim=2))
    for index, state in enumerate(states):
        for whole, alone in zip(together, module(state), strict=True):
            assert torch.allclose(whole[:, :, index], alone[:, :, 0], atol=1e-12)


def test_in_training_the_shortcut_pools_its_statistics_over_all_states():
    module = embedding().train()
    states = double(2, DIM, 3, QUERIES)
    module(states)
    mixed = module.shortcut.conv.conv((states > 0).double().transpose(1, 3))
    assert torch.allclose(module.shortcut.conv.bn.running_mean, 0.1 * mixed.mean((0, 2, 3)), atol=1e-12)


def test_each_shortcut_adds_what_its_row_of_table_3_says():
    membrane, spikes = double(2, DIM, 1, QUERIES), double(2, DIM, 1, QUERIES)
    added = {name: shortcut(QUERIES).double().eval() for name, shortcut in SHORTCUTS.items()}
    for module in added.values():
        for name, parameter in module.named_parameters():
            if name == "weight":
                nn.init.constant_(parameter, 3.0)
    assert not added["none"](membrane, spikes).any()
    assert torch.equal(added["spikes"](membrane, spikes), 3 * spikes)
    assert torch.equal(added["membrane"](membrane, spikes), 3 * membrane)
    nn.init.eye_(added["conv"].conv.conv.weight.data[:, :, 0, 0])
    assert torch.allclose(added["conv"](membrane, spikes), 3 * spikes, rtol=1e-5)  # eps of the norm


def test_the_membrane_shortcut_gets_states_as_they_are_not_their_sigmoid():
    module, states = embedding(MembraneShortcut), 4 * double(2, DIM, 1, QUERIES)
    for parameter in module.mask_mlp.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(states)[1], states.clamp(0, 4).round())
    assert module(states)[1].max() > 1


@pytest.mark.parametrize("alpha", [0.0, -1.0])
def test_spikes_worth_nothing_are_refused(alpha):
    with pytest.raises(ValueError, match=f"must be above 0, got {alpha}"):
        embedding(alpha=alpha)


@pytest.mark.parametrize(
    ("shortcut", "parameters"),
    [(ConvShortcut, 1 + 5 * 5 + 2 * 5), (SpikeShortcut, 1), (MembraneShortcut, 1), (NoShortcut, 0)],
)
def test_parameters_of_shortcuts(shortcut, parameters):
    assert sum(each.numel() for each in shortcut(QUERIES).parameters()) == parameters


def test_without_a_shortcut_a_new_mask_embedding_is_silent():
    """The last layer starts near zero: what Table 3's "vanilla" row has to grow from, and the ME-shortcut avoids."""
    states = double(2, DIM, 1, QUERIES)
    assert not embedding(NoShortcut)(states)[1].any()
    assert embedding(SpikeShortcut)(states)[1].any()


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        MaskEmbedding(DIM, queries=2, num_classes=0, shortcut=NoShortcut, neuron=NILIF)

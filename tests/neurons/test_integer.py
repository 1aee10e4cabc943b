"""The integer family: rounding, windows and memory by hand; counts against the binary neuron they stand for."""

import pytest
import torch

from spikeformers.neurons import IELIF, ILIF, NILIF, build_neuron, i_lif, ie_lif, neuron_builder, ni_lif

TIES = torch.tensor([-1.0, -0.0, 0.5, 1.5, 2.5, 3.5, 3.49, 4.0, 4.5, 9.0], dtype=torch.float64)


def test_i_lif_rounds_half_to_even_after_clipping():
    assert i_lif(TIES, levels=4).tolist() == [0, 0, 0, 2, 2, 4, 3, 4, 4, 4]


def test_ni_lif_is_the_same_counts_divided_by_their_maximum():
    assert torch.equal(ni_lif(TIES, levels=4) * 4, i_lif(TIES, levels=4))


def test_ie_lif_rounds_half_up_after_its_gain():
    x = torch.tensor([0.124, 0.125, 0.375, 0.625, 0.875, 1.2], dtype=torch.float64)
    assert ie_lif(x, levels=4).tolist() == [0, 0.25, 0.5, 0.75, 1, 1]
    assert ie_lif(x, levels=4, unit=0.5).tolist() == [0, 0.5, 1, 1.5, 2, 2]


def gradient(function, points: list[float]) -> list[float]:
    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    function(x).sum().backward()
    return x.grad.tolist()


def test_windows_are_inclusive_for_i_lif_and_ni_lif_and_exclusive_for_ie_lif():
    ends = [-1e-9, 0.0, 2.0, 4.0, 4.0 + 1e-9]
    assert gradient(lambda x: i_lif(x, levels=4), ends) == [0, 1, 1, 1, 0]
    assert gradient(lambda x: ni_lif(x, levels=4), ends) == [0, 0.25, 0.25, 0.25, 0]
    ends = [0.0, 1e-9, 0.5, 1.0 - 1e-9, 1.0, 1.1]
    assert gradient(lambda x: ie_lif(x, levels=4), ends) == [0, 1, 1, 1, 0, 0]
    assert gradient(lambda x: ie_lif(x, levels=4, unit=0.5), ends) == [0, 2, 2, 2, 0, 0]


@pytest.mark.parametrize("name", ["i_lif", "ni_lif", "ie_lif"])
def test_backward_keeps_one_byte_per_element(name):
    saved = []
    pack = lambda t: saved.append(t.numel() * t.element_size()) or t  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    x = torch.randn(64, 32, requires_grad=True)
    with hooks:
        build_neuron(name, levels=4)(x)
    assert sum(saved) == x.numel()


@pytest.mark.parametrize("name", ["i_lif", "ni_lif", "ie_lif"])
def test_steps_are_independent_without_decay(name):
    x = torch.randn(4 * 3, 5) * 3
    assert torch.equal(build_neuron(name, steps=4)(x), build_neuron(name, steps=1)(x))


def test_temporal_ni_lif_follows_equations_16_to_18_by_hand():
    # beta 0.5, D 4: U=1.6 n=2 H=-0.2 | U=0.8 n=1 H=-0.1 | U=5.9 n=4 H=0.95 | U=1.45 n=1
    neuron = NILIF(steps=4, levels=4, decay=0.5)
    x = torch.tensor([[1.6], [1.0], [6.0], [0.5]], dtype=torch.float64)
    assert neuron(x).flatten().tolist() == [0.5, 0.25, 1.0, 0.25]


def test_temporal_ie_lif_follows_equation_9_by_hand():
    # U in counts, gain 4: 4*0.3=1.2 n=1 left 0.2 | 4*0.35+0.2=1.6 n=2 left -0.4 | 4*0.5-0.4=1.6 n=2
    neuron = IELIF(steps=3, levels=4, decay=1.0)
    x = torch.tensor([[0.3], [0.35], [0.5]], dtype=torch.float64)
    assert neuron(x).flatten().tolist() == [0.25, 0.5, 0.5]


def test_with_decay_one_nothing_is_lost_below_saturation():
    x = torch.rand(8, 100, dtype=torch.float64) * 3
    emitted = ILIF(steps=8, levels=4, decay=1.0)(x)
    # What is emitted differs from what came in by the last remainder only, at most 1/2.
    assert (emitted.sum(0) - x.sum(0)).abs().max() <= 0.5


def test_counts_equal_binary_spikes_of_an_integrate_and_fire_neuron_over_virtual_steps():
    # QSD spec: IE-LIF = soft-reset IF on u = 4x, threshold 1, initial membrane 1/2, fired D steps after accumulating.
    x = torch.randn(10_000, dtype=torch.float64)
    membrane, fired = 4 * x + 0.5, torch.zeros_like(x)
    for _ in range(4):
        spike = (membrane >= 1).double()
        membrane, fired = membrane - spike, fired + spike
    assert torch.equal(IELIF(levels=4)(x) * 4, fired)


def test_threshold_scales_the_input():
    x = torch.randn(50) * 3
    assert torch.equal(ILIF(threshold=0.5)(x), ILIF()(x * 2))


def test_learnable_threshold_gets_a_gradient():
    threshold = torch.nn.Parameter(torch.tensor(0.5))
    neuron = neuron_builder("i_lif", levels=4)(threshold=threshold)
    neuron(torch.rand(20)).sum().backward()
    assert dict(neuron.named_parameters())["threshold"] is threshold
    assert threshold.grad.abs() > 0


@pytest.mark.parametrize("name", ["i_lif", "ni_lif", "ie_lif"])
def test_counts_are_whole_numbers_up_to_levels(name):
    neuron = build_neuron(name, levels=7)
    counts = neuron.counts(neuron(torch.randn(1000) * 5))
    assert counts.dtype == torch.uint8
    assert set(counts.unique().tolist()) == set(range(8))


@pytest.mark.parametrize("name", ["lif", "i_lif", "ni_lif", "ie_lif"])
def test_vmap_and_compile_give_what_the_loop_gives(name, unchecked):
    neuron = build_neuron(name, steps=2)
    x = torch.randn(3, 4, 5) * 2
    assert torch.equal(torch.vmap(neuron)(x), torch.stack([neuron(row) for row in x]))
    compiled = torch.compile(neuron, fullgraph=True, backend="aot_eager")
    leaf, twin = x[0].clone().requires_grad_(), x[0].clone().requires_grad_()
    compiled(leaf).sum().backward()
    neuron(twin).sum().backward()
    assert torch.allclose(leaf.grad, twin.grad, atol=1e-6)


def test_unknown_neuron_names_the_closest():
    with pytest.raises(ValueError, match="i_lif"):
        build_neuron("ilif")
    with pytest.raises(ValueError, match=r"levels must be at least 1.* got 0"):
        build_neuron("i_lif", levels=0)


def test_a_neuron_class_takes_levels_as_its_name_does():
    assert neuron_builder(ILIF, levels=8)().levels == 8


def test_levels_beyond_a_byte_are_refused():
    with pytest.raises(ValueError, match="at most 255, got 300"):
        ILIF(levels=300)

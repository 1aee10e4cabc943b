"""LIF against numbers worked by hand, and against the loop that defines it."""

import copy

import pytest
import torch

from spikeformers.neurons import LIF, ATan, Rectangle, Sigmoid


def run(neuron: LIF, currents: list[float]) -> list[float]:
    return neuron(torch.tensor(currents, dtype=torch.float64).view(-1, 1)).flatten().tolist()


def test_hard_reset_with_decayed_input_follows_the_hand_worked_trace():
    # h: 0.75 | 0.75+(1.5-0.75)/2=1.125 fires, v=0 | 2/2=1.0 fires (>=), v=0 | 1.9/2=0.95
    assert run(LIF(steps=4), [1.5, 1.5, 2.0, 1.9]) == [0, 1, 1, 0]


def test_input_without_decay_follows_equation_4_of_the_paper():
    # h: 0.75 | 0.375+0.75=1.125 fires | 0.99 | 0.495+0.5=0.995
    assert run(LIF(steps=4, decay_input=False), [0.75, 0.75, 0.99, 0.5]) == [0, 1, 0, 0]


def test_soft_reset_keeps_what_exceeds_the_threshold():
    # h: 3/2=1.5 fires v=0.5 | 0.5+(1.6-0.5)/2=1.05 fires v=0.05 | hard reset would give 0.8
    soft, hard = LIF(steps=2, v_reset=None), LIF(steps=2)
    assert run(soft, [3.0, 1.6]) == [1, 1]
    assert run(hard, [3.0, 1.6]) == [1, 0]


def test_nonzero_reset_potential_is_the_rest_of_the_membrane():
    # v starts at 0.4: h = 0.4 + 1.2/2 = 1.0 fires, v = 0.4; 0.4 + (1.1-0)/2 = 0.95
    assert run(LIF(steps=2, v_reset=0.4), [1.2, 1.1]) == [1, 0]


def test_at_one_step_a_neuron_fires_from_tau_times_threshold():
    assert run(LIF(), [2.0]) == [1]
    assert run(LIF(), [1.9999999]) == [0]
    assert run(LIF(threshold=0.5), [1.0]) == [1]


@pytest.mark.parametrize(
    ("surrogate", "at_zero", "at_half"),
    [
        (Sigmoid(4.0), 1.0, 4 * 0.8807970779778823 * 0.11920292202211769),
        (ATan(2.0), 1.0, 1 / (1 + (torch.pi / 2) ** 2)),
        (Rectangle(1.0), 1.0, 0.0),
    ],
)
def test_surrogate_derivatives_match_their_formulas(surrogate, at_zero, at_half):
    distance = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    spikes = surrogate(distance)
    assert spikes.tolist() == [1, 1]
    spikes.sum().backward()
    assert distance.grad.tolist() == pytest.approx([at_zero, at_half], abs=1e-12)


@pytest.mark.parametrize("surrogate", [Sigmoid(), ATan(), Rectangle(2.0)])
def test_surrogate_derivatives_integrate_to_one(surrogate):
    x = torch.linspace(-200, 200, 400_001, dtype=torch.float64, requires_grad=True)
    surrogate(x).sum().backward()
    # ATan falls as 1/x^2: its tails beyond 200 hold about 2e-3.
    assert torch.trapezoid(x.grad, x.detach()).item() == pytest.approx(1.0, abs=3e-3)


def test_gradient_reaches_earlier_steps_through_the_leak_and_not_through_a_detached_reset():
    x = torch.tensor([[3.0], [1.0]], dtype=torch.float64, requires_grad=True)
    LIF(steps=2)(x)[1].sum().backward()
    assert x.grad[0].item() == 0.0  # step 1 fired: 1 - s = 0 blocks the path, and s itself is detached
    y = torch.tensor([[3.0], [1.0]], dtype=torch.float64, requires_grad=True)
    LIF(steps=2, detach_reset=False)(y)[1].sum().backward()
    assert y.grad[0].item() != 0.0


def test_images_of_a_batch_do_not_see_one_another():
    x = torch.randn(4 * 3, 5, dtype=torch.float64) * 3
    together = LIF(steps=4)(x).view(4, 3, 5)
    for b in range(3):
        alone = LIF(steps=4)(x.view(4, 3, 5)[:, b].contiguous())
        assert torch.equal(together[:, b], alone)


def test_order_of_time_matters_and_is_time_major():
    x = torch.tensor([[1.5], [1.5], [0.0], [0.0]])
    assert LIF(steps=4)(x).flatten().tolist() == [0, 1, 0, 0]
    assert LIF(steps=4)(x.flip(0)).flatten().tolist() == [0, 0, 0, 1]


def test_two_passes_are_equal_because_no_state_survives():
    neuron, x = LIF(steps=2), torch.randn(8, 6) * 3
    first = neuron(x)
    assert torch.equal(first, neuron(x))
    assert torch.equal(first, copy.deepcopy(neuron)(x))
    assert not neuron.state_dict()


def test_membranes_are_float32_under_bfloat16():
    # 1.9921875 is exact in bfloat16, but 1.9921875/2 + ... accumulates below its resolution
    x = torch.tensor([0.25, 1.8671875, 1.0], dtype=torch.bfloat16).view(3, 1)
    spikes = LIF(steps=3)(x)
    assert spikes.dtype == torch.bfloat16
    assert torch.equal(spikes.float(), LIF(steps=3)(x.float()))


@pytest.mark.parametrize("steps", [1, 3])
def test_compiles_to_one_graph_and_exports_with_equal_spikes(steps, unchecked):
    neuron, x = LIF(steps=steps), torch.randn(6, 4) * 3
    compiled = torch.compile(neuron, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), neuron(x))
    assert torch.equal(torch.export.export(neuron, (x,)).module()(x), neuron(x))


def test_double_backward_matches_finite_differences_of_the_first():
    x = torch.tensor([0.7, 1.9, 2.3], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(LIF()(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    eps = 1e-6
    shifted = [(x.detach() + d).requires_grad_() for d in (eps, -eps)]
    up, down = (torch.autograd.grad(LIF()(s).sum(), s)[0] for s in shifted)
    assert torch.allclose(second, (up - down) / (2 * eps), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"), [({"tau": 0.5}, "tau"), ({"threshold": 0.0}, "threshold"), ({"steps": 0}, "steps")]
)
def test_impossible_settings_are_refused_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        LIF(**options)


def test_batch_that_is_no_multiple_of_steps_is_refused():
    with pytest.raises(ValueError, match="multiple of steps=4"):
        LIF(steps=4)(torch.zeros(6, 2))

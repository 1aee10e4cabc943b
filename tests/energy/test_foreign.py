"""Neurons of other libraries: found or named, whatever way they keep time, at rest before each image."""

import pytest
import torch
from torch import nn

from spikeformers.energy import measure
from spikeformers.neurons import LIF

PJ = 1e-9  # mJ


class Fires(nn.Module):
    """A neuron of somebody else: integrates, fires above 1, subtracts what it fired; one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.membrane = 0.0

    def forward(self, x):
        self.membrane = self.membrane + x
        spikes = (self.membrane >= 1).to(x)
        self.membrane = self.membrane - spikes
        return spikes


class Sequence(Fires):
    """The same over the first axis, [T, B, ...]."""

    def forward(self, x):
        return torch.stack([super(Sequence, self).forward(step) for step in x])


class Loop(nn.Module):
    """T calls of a network of one step."""

    def __init__(self, neuron: nn.Module, steps: int) -> None:
        super().__init__()
        self.stem, self.neuron, self.mix = nn.Conv2d(1, 2, 1, bias=False), neuron, nn.Conv2d(2, 3, 1)
        self.stem.weight.data.fill_(1.0)
        self.steps = steps

    def once(self, x):
        return self.mix(self.neuron(self.stem(x)))

    def forward(self, x):
        return sum(self.once(x) for _ in range(self.steps)) / self.steps


class AtOnce(Loop):
    """T steps in one call: layers see [T*B, ...], the neuron [T, B, ...]."""

    def forward(self, x):
        x = self.stem(x.repeat(self.steps, 1, 1, 1)).unflatten(0, (self.steps, -1))
        return self.mix(self.neuron(x).flatten(0, 1)).unflatten(0, (self.steps, -1)).mean(0)


# a pixel of 0.5 fires in the second step of two, one of 1 in both
PIXELS = torch.tensor([[[0.5, 0.5], [0.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]).unsqueeze(1)


@pytest.mark.parametrize(("kind", "neuron"), [(Loop, Fires), (AtOnce, Sequence)])
def test_a_named_neuron_is_counted_over_its_steps_by_hand(kind, neuron):
    report = measure(kind(neuron(), 2), PIXELS, neurons=(Fires,))
    stem, mix = report.layers
    assert (report.steps, report.images, stem.steps, mix.steps) == (2, 2, 2, 2)
    assert (stem.macs, mix.macs, stem.rate) == (4 * 2, 4 * 2 * 3, None)
    # of 8 elements an image has 2 and 2 spikes in the first step, 6 and 2 in the second
    assert mix.rates == pytest.approx(((2 + 2) / 16, (6 + 2) / 16))
    assert mix.sd_rates == pytest.approx((0, (6 - 2) / 8 / 2**0.5))
    assert mix.rate == pytest.approx((2 + 2 + 6 + 2) / 32)
    spent = [PJ * (2 * 8 * 4.6 + 0.9 * 3 * spikes) for spikes in (8, 4)]
    assert report.image_mj == pytest.approx(spent)
    assert report.ann_mj == pytest.approx(PJ * 4.6 * (8 + 24))
    assert (report.spikes_per_image, report.firing_rate) == ((8 + 4) / 2, (8 + 4) / 32)


def test_without_its_name_a_neuron_is_an_activation():
    report = measure(Loop(Fires(), 2), PIXELS[:1])
    assert (report.firing_rate, [layer.rate for layer in report.layers][-1]) == (0, None)


def test_membranes_are_at_rest_before_and_after():
    model = Loop(Fires(), 2)
    model.neuron.membrane = 100.0
    assert measure(model, PIXELS, neurons=(Fires,)).spikes_per_image == 6
    assert model.neuron.membrane == 0.0


def test_clips_are_split_along_their_batch_and_other_shapes_refused():
    model = nn.Sequential(Sequence(), nn.Linear(3, 2))
    clip = torch.rand(4, 5, 2, 2, 3)
    report = measure(model, clip, neurons=(Fires,))
    assert (report.steps, report.images, report.layers[0].macs) == (4, 5, 2 * 2 * 3 * 2)
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\) may be a batch or time steps"):
        measure(model, torch.rand(4, 5, 3), neurons=(Fires,))


class Graded(nn.Module):
    def forward(self, x):
        return (4 * x).round() / 2, x  # spikes and membrane, as some libraries do


def test_counts_and_their_unit_are_told_by_attributes():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron, self.head = Graded(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.neuron(x)[0])

    model, x = Net(), torch.tensor([[0.0, 0.25, 0.5, 1.0]])
    with pytest.raises(ValueError, match=r"neuron \(Graded\) fired 0 to 2, .*give Graded the attributes `levels`"):
        measure(model, x, neurons=(Graded,))
    model.neuron.levels, model.neuron.unit = 4, 0.5
    report = measure(model, x, neurons=(Graded,))
    assert (report.layers[0].rate, report.spikes_per_image) == ((0 + 1 + 2 + 4) / 4, 7)
    assert report.firing_rate == 7 / 16


def test_a_neuron_that_does_not_run_is_an_error():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron, self.head = Fires(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x)

    with pytest.raises(ValueError, match="no neuron of the model ran"):
        measure(Net(), torch.rand(1, 4), neurons=(Fires,))


@pytest.mark.parametrize("convention", ["as_executed", "honest", "honest_sram"])
def test_a_foreign_neuron_costs_what_ours_costs_that_fires_the_same(convention):
    class Ours(nn.Module):
        def __init__(self, neuron) -> None:
            super().__init__()
            self.neuron, self.mix = neuron, nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.mix(self.neuron(x))

    x = 4 * torch.rand(3, 2, 4, 4)
    ours = measure(Ours(LIF()), x, convention=convention)
    theirs = measure(Ours(Plain()), x, convention=convention, neurons=(Plain,))
    assert theirs.image_mj == pytest.approx(ours.image_mj, rel=1e-12)
    assert [layer.name for layer in theirs.layers] == [layer.name for layer in ours.layers]


class Plain(nn.Module):
    """What LIF computes in one step."""

    def forward(self, x):
        return (x / 2 >= 1).to(x)


@pytest.fixture(scope="module")
def jelly():
    return pytest.importorskip("spikingjelly.activation_based", reason="needs the extra `bench`")


@pytest.mark.parametrize("name", ["LIFNode", "IFNode", "ParametricLIFNode", "ILIFNode"])
def test_spikingjelly_is_recognised_in_both_of_its_step_modes(jelly, name):
    from spikingjelly.activation_based import functional, layer, neuron

    def build(mode: str) -> nn.Module:
        torch.manual_seed(0)
        parts = (layer.Conv2d(3, 4, 3, padding=1), layer.MaxPool2d(2), layer.Conv2d(4, 5, 1, bias=False))
        net = nn.Sequential(parts[0], getattr(neuron, name)(), *parts[1:])
        functional.set_step_mode(net, mode)
        return net

    class Looped(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            return sum(self.net(x) for _ in range(3))

    images = 6 * torch.randn(2, 3, 6, 6)
    clip = images.repeat(3, 1, 1, 1, 1)
    together, looped = measure(build("m"), clip), measure(Looped(build("s")), images)
    assert (together.steps, looped.steps, together.images) == (3, 3, 2)
    net, pooled = build("m"), []
    net[3].register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        net(clip)
    rates = pooled[0].double().flatten(2).mean((1, 2))
    assert rates.max() > (1 if name == "ILIFNode" else 0.1)
    assert together.layers[1].rates == pytest.approx(rates.tolist())
    assert looped.image_mj == pytest.approx(together.image_mj, rel=1e-12)
    assert looped.ann_mj == pytest.approx(together.ann_mj, rel=1e-12)
    assert looped.layers[1].rates == pytest.approx(rates.tolist())


def test_a_sew_resnet_of_spikingjelly_adds_up_its_spikes(jelly):
    from spikingjelly.activation_based import functional, neuron
    from spikingjelly.activation_based.model import sew_resnet

    torch.manual_seed(0)
    model = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=neuron.IFNode, num_classes=5)
    functional.set_step_mode(model, "m")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
    report = measure(model, torch.rand(2, 1, 3, 32, 32))
    first, *inner, last = report.layers
    assert (first.rate, last.rate, report.steps, report.uncounted) == (None, None, 2, ())
    assert all(layer.rate is not None for layer in inner)
    assert max(layer.rate for layer in inner) > 1  # sums of spikes
    with pytest.raises(ValueError, match=r"\(TernaryIFNode\) fired -1 to"):
        measure(nn.Sequential(neuron.TernaryIFNode(), nn.Conv2d(3, 2, 1)), -8 * torch.rand(1, 3, 4, 4))

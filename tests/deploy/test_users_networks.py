"""Networks that users write: merged, folded and run in integers, they compute what they computed."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spikeformers as sf
from spikeformers.deploy import fuse, integer
from spikeformers.deploy.form import integer_form
from spikeformers.layers import ConvBN, RepConv
from spikeformers.neurons import IELIF, ILIF, LIF


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def chain(*layers: nn.Module) -> nn.Module:
    """An image, a convolution, spikes, `layers`, spikes, logits."""
    return nn.Sequential(nn.Conv2d(3, 6, 1), IELIF(), *layers, IELIF(), nn.Conv2d(6, 4, 1), Pool())


def tied(layer: nn.Module) -> nn.Module:
    return chain(layer, IELIF(), layer)


def two_norms() -> nn.Module:
    conv = nn.Conv2d(6, 6, 3, padding=1)
    return chain(conv, nn.BatchNorm2d(6), IELIF(), conv, nn.BatchNorm2d(6))


class Aliased(nn.Module):
    """Layers that stand under two names, and run under either."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.conv, self.last = nn.Conv2d(3, 6, 1), IELIF(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.body = nn.Sequential(self.conv, nn.BatchNorm2d(6), IELIF(), self.conv, self.act)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.act(self.first(x)))).mean((2, 3))


class Small(nn.Module):
    """Image, convolution, spikes, `between`, convolution, logits."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(3, 6, 1), IELIF(), nn.Conv2d(6, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.act(current=self.first(x)))).mean((2, 3))


NETWORKS = {
    "dilation": lambda: chain(nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.BatchNorm2d(6)),
    "reflect": lambda: chain(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
    "same": lambda: chain(nn.Conv2d(6, 6, 3, padding="same"), nn.BatchNorm2d(6)),
    "norm without weight": lambda: chain(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)),
    "tied ConvBN": lambda: tied(ConvBN(6, 6, 3)),
    "tied RepConv": lambda: tied(RepConv(6, 6)),
    "one convolution, two norms": two_norms,
    "two names": Aliased,
}


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_of_ones_own_merges_folds_and_runs_in_integers(network, bits):
    model = NETWORKS[network]()
    if bits:
        sf.quantize.prepare(model, bits=bits)
    images = torch.randn(6, 3, 9, 9)
    model(images)  # in train mode: norms see data
    model.eval()
    twin = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted = twin(images.double())
        torch.testing.assert_close(integer_form(twin)(images.double()), wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(fuse(twin)(images.double()), wanted, rtol=0, atol=1e-10)
    engine = integer(model, images)
    assert torch.equal(engine(images)[:1], engine(images[:1]))
    if bits:  # no weight is rounded: float32 sums alone may differ
        torch.testing.assert_close(engine(images).double(), wanted, rtol=0, atol=1e-5)


def test_a_norm_of_the_batch_stays_where_it_is():
    model, images = (
        chain(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)).eval(),
        torch.randn(6, 3, 9, 9),
    )
    assert isinstance(fuse(model)[3], nn.BatchNorm2d)
    assert isinstance(integer(model, images).net[3], nn.BatchNorm2d)


def test_a_sequential_that_serves_as_a_list_is_refused():
    parts = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    model, images = Small(None), torch.randn(4, 3, 5, 5)
    model.parts = parts
    model.between = lambda spikes: model.act(model.parts[1](model.parts[0](spikes) + spikes))
    model(images)
    model.eval()
    model.between = lambda spikes: spikes  # a copy's closure would run the layers of the original
    assert integer(model, images)

    class AsList(Small):
        def forward(self, x: Tensor) -> Tensor:
            spikes = self.act(self.first(x))
            return self.last(self.act(self.parts[1](self.parts[0](spikes) + spikes))).mean((2, 3))

    model.__class__ = AsList
    with pytest.raises(ValueError, match=r"nn\.Sequential serve as a list"):
        integer(model, images)


@pytest.mark.parametrize("learned", [False, True])
def test_counts_that_fall_with_the_current_are_right_too(learned):
    neuron = ILIF(threshold=nn.Parameter(torch.tensor(-0.5))) if learned else IELIF(gain=-4.0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), IELIF(), nn.Conv2d(6, 6, 1), neuron, nn.Conv2d(6, 4, 1), Pool())
    sf.quantize.prepare(model, bits=4)
    images = torch.randn(6, 3, 9, 9)
    assert not integer(model.eval(), images).compare(copy.deepcopy(model).double(), images.double()).flipped


def test_sums_that_float32_cannot_hold_take_the_readable_path():
    layer = nn.Conv2d(2048, 2, 1)
    layer.weight.data.fill_(127 / 64)
    model = nn.Sequential(ILIF(levels=128), layer, ILIF(levels=4, threshold=2.0**17), nn.Conv2d(2, 1, 1), Pool()).eval()
    images = 128 * torch.rand(3, 2048, 3, 3)
    engine = integer(model, images)
    assert not engine.report().layers[0].primitive
    assert not any(engine.compare_layers(copy.deepcopy(model).double(), images.double()).values())


SELECTIONS = {
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "axes": lambda x: x.swapaxes(2, 3).movedim(2, 3),
    "largest": lambda x: F.adaptive_max_pool2d(x, 2),
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selections_of_spikes_are_spikes_everywhere(selection):
    model, images = Small(SELECTIONS[selection]).eval().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert sf.deploy.audit(model, images).verdict == "integer-driven"
    assert integer(model, images).spike_fed == {"last"}
    unrolled = sf.deploy.unroll(model)
    with torch.no_grad():
        torch.testing.assert_close(unrolled(images), model(images), rtol=0, atol=1e-12)
    audited = sf.deploy.audit(unrolled, images)
    assert audited.verdict == "spike-driven"


def test_a_network_over_time_without_a_door_takes_steps_and_images_folded():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), LIF(steps=4), nn.Conv2d(6, 6, 1), LIF(steps=4), nn.Conv2d(6, 4, 1), Pool()
    )
    rows = 3 * torch.randn(4 * 3, 3, 5, 5)
    engine = integer(model.eval(), rows)
    assert engine(rows).shape == (12, 4)
    assert engine.compare(model, rows).total == 12

"""Only what is proven to be read by watched modules alone may change its type."""

import pytest
import torch
from torch import Tensor, nn

from spikeformers.deploy import integer
from spikeformers.deploy.wiring import OTHER, probe
from spikeformers.neurons import ILIF, i_lif


class Pair(nn.Module):
    """neuron -> conv -> neuron -> conv, with `more` done to what the first convolution gave and to its spikes."""

    def __init__(self, more) -> None:
        super().__init__()
        self.first, self.second = ILIF(), ILIF()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        current = self.conv(self.first(x))
        spikes = self.second(current)
        return self.last(spikes).mean((2, 3)) + self.more(current, spikes)


READERS = {
    "nothing": (lambda current, spikes: 0, ["second"], ["last"]),
    "shape": (lambda current, spikes: current.shape[0] + spikes.ndim, ["second"], ["last"]),
    "function": (lambda current, spikes: i_lif(current, levels=2).mean((2, 3)), ["second", OTHER], ["last"]),
    "view": (lambda current, spikes: spikes.mT.sum((2, 3)), ["second"], ["last", OTHER]),
    "index": (lambda current, spikes: spikes[:, :, 0, 0], ["second"], ["last", OTHER]),
    "in place": (lambda current, spikes: current.add_(1).sum() * 0, ["second", OTHER], ["last"]),
}


@pytest.mark.parametrize("case", READERS)
def test_every_other_reader_is_noticed(case):
    more, of_current, of_spikes = READERS[case]
    readers = probe(Pair(more).eval(), torch.randn(1, 3, 4, 4)).readers
    assert list(dict.fromkeys(readers["conv"])) == of_current
    assert list(dict.fromkeys(readers["second"])) == of_spikes
    assert readers["first"] == ["conv"]


@pytest.mark.parametrize("case", READERS)
def test_tensors_with_other_readers_stay_float_and_numbers_stay_right(case):
    model, images = Pair(READERS[case][0]).eval(), 2 * torch.randn(3, 3, 4, 4)
    for layer in (model.conv, model.last):  # dyadic weights on the 8-bit grid: both forms are exact
        layer.weight.data.copy_(torch.randint(-126, 127, layer.weight.shape) / 64)
        layer.weight.data[:, 0] = 127 / 64
        layer.bias.data.fill_(0.25)
    engine = integer(model, images)
    paths = {layer.name: layer.path for layer in engine.report().layers}
    assert paths == {"conv": "fused" if OTHER not in READERS[case][1] else "int8", "last": "int8"}
    torch.testing.assert_close(engine(images), model(images).detach(), rtol=0, atol=1e-5)  # float32 means


class Twice(Pair):
    """Its last layer is called twice; `more` says with what the second time."""

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.second(self.last(self.second(self.conv(self.first(x)))))
        return self.last(self.more(spikes))


@pytest.mark.parametrize(
    ("again", "path"),
    [
        (lambda spikes: spikes, "int8"),
        (lambda spikes: spikes + spikes, "float"),  # up to twice as many
        (lambda spikes: 2 * spikes, "float"),  # another unit
        (lambda spikes: spikes - 0.5, "float"),  # no spikes
    ],
)
def test_a_layer_used_twice_is_integer_if_it_reads_the_same_kind_of_spikes(again, path):
    model, images = Twice(again).eval(), 2 * torch.randn(3, 3, 4, 4)
    for layer in (model.conv, model.last):  # on the 8-bit grid
        layer.weight.data.copy_(torch.randint(-126, 127, layer.weight.shape) / 64)
        layer.weight.data[:, 0] = 127 / 64
        layer.bias.data.fill_(0.25)
    engine = integer(model, images)
    assert {layer.name: layer.path for layer in engine.report().layers} == {"conv": "int8", "last": path}
    torch.testing.assert_close(engine(images), model(images).detach(), rtol=0, atol=1e-5)


def test_a_layer_used_twice_never_fires_itself():
    """Even if one neuron, which runs once, is all that reads either result."""

    class Forgetful(Pair):
        def forward(self, x: Tensor) -> Tensor:
            spikes = self.first(x)
            self.conv(spikes)
            return self.last(self.second(self.conv(spikes)))

    engine = integer(Forgetful(None).eval(), torch.randn(1, 3, 4, 4))
    assert {layer.name: layer.path for layer in engine.report().layers} == {"conv": "int8", "last": "int8"}


@pytest.mark.parametrize("change", [lambda x: x.mul_(0.1), lambda x: x.mT.mul_(0.1), lambda x: x.relu_()])
def test_spikes_changed_in_place_are_no_spikes_any_more(change):
    class Changed(Pair):
        def forward(self, x: Tensor) -> Tensor:
            spikes = self.second(self.conv(self.first(x)))
            change(spikes)
            return self.last(spikes).mean((2, 3))

    model, images = Changed(None).eval(), 2 * torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        model.conv.weight.data.copy_(torch.eye(4, 3)[..., None, None] * 2 + 0.5)
    engine = integer(model, images)
    assert {layer.name: layer.path for layer in engine.report().layers} == {"conv": "fused", "last": "float"}
    assert engine.compare(model, images).largest_error < 0.05  # 8-bit weights of the first convolution alone

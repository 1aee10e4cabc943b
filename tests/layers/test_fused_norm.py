"""Networks whose neurons take the norms in front of them, against the same networks as they are; equal bit for bit."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import spikeformers as sf
from spikeformers import kernels
from spikeformers.layers import ConvBN, fuse_norms, separate_norms
from spikeformers.neurons import ILIF, LIF, NILIF, Neuron
from spikeformers.train.parallel import sync_bn

NEURONS = {
    "lif_1": lambda: LIF(),
    "lif_4": lambda: LIF(steps=4),
    "i_lif": lambda: ILIF(),
    "ni_lif_decay": lambda: NILIF(steps=4, decay=0.5),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Chain(nn.Sequential):
    """Conv - BN - SN - Conv - BN, the last read by nobody that fires."""

    def __init__(self, neuron: Neuron) -> None:
        super().__init__(ConvBN(3, 6, 3), neuron, ConvBN(6, 4, 1))


class TwoReaders(Chain):
    """The output of the norm goes to the neuron and around it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[2](self[1](y) + y)


class Returned(Chain):
    """The output of the norm goes to the neuron and out of the network."""

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        y = self[0](x)
        return {"maps": [y, self[2](self[1](y))]}


class BesideTheNorm(Chain):
    """Uses the numbers of its first norm, as long as it is a plain one without hooks, and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self[0]
        if type(bn) is not nn.BatchNorm2d or bn._forward_hooks:
            return super().forward(x)
        y = functional.batch_norm(conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training)
        return self[2](self[1](y))


class Checkpointed(nn.Module):
    """A neuron that is run again in backward; its norm is not."""

    def __init__(self, neuron: Neuron, *, reentrant: bool) -> None:
        super().__init__()
        self.neuron, self.reentrant = neuron, reentrant

    def forward(self, y: Tensor) -> Tensor:
        return checkpoint(self.neuron, y, use_reentrant=self.reentrant)


def meta(**overrides) -> nn.Module:
    """Fires everywhere, with finite gradients: deep networks of few channels have others at initialisation."""
    sizes = {"dims": (8, 16, 32, 40), "num_classes": 5, "attention": "sdsa3_width", "head_spikes": False}
    model = sf.create_model("meta_spikeformer_15m", **sizes, **overrides)
    for name, module in model.named_modules():
        if name.endswith(("q_conv.bn3", "k_conv.bn3", "v_conv.bn3")):
            nn.init.ones_(module.bias)
    return model


def spikformer(**overrides) -> nn.Module:
    sizes = {"dim": 32, "depth": 2, "heads": 4, "num_classes": 5}
    return sf.create_model("spikformer_cifar_4_256", **sizes, **overrides)


def fused(model: nn.Module, example: Tensor) -> nn.Module:
    twin = copy.deepcopy(model)
    assert fuse_norms(twin, example)
    return twin


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and all parameters."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    out = model(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(each.grad for each in model.parameters() if each.grad is not None)]


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    assert_equal(list(one.state_dict().values()), list(other.state_dict().values()))


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, parameters not counted."""
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("neuron", NEURONS.values(), ids=NEURONS)
def test_spikes_gradients_and_statistics_are_those_of_the_norm_in_front_bit_for_bit(neuron, training, layout):
    for dtype in (torch.float32, torch.float64):
        x = (torch.randn(8, 3, 9, 7, dtype=dtype) * 2 + 1).to(memory_format=layout)
        plain = Chain(neuron()).to(dtype)
        plain(x)  # running statistics of their own, for eval mode
        twin = fused(plain, x)
        for _ in range(2):
            assert_equal(step(twin.train(training), x), step(plain.train(training), x))
        assert_equal_states(twin, plain)


def test_half_precision_of_autocast_gives_the_same_numbers():
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    twin = fused(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (step(model, x) for model in (twin, plain))
    assert found[0].dtype == torch.bfloat16
    assert_equal(found, wanted)
    assert_equal_states(twin, plain)


@pytest.mark.parametrize(
    ("build", "neuron", "steps", "count"),
    # meta_spikeformer: two in each of 4 conv blocks, q, k, v and one in the MLP in each of 8 transformer blocks, all
    # others end in a membrane or a norm. spikformer: every norm of 5 in the stem and 2 blocks of 6.
    [(meta, "lif", 4, 40), (meta, "i_lif", 1, 40), (spikformer, "lif", 2, 17), (spikformer, "ni_lif", 1, 17)],
)
def test_whole_networks_train_to_the_same_numbers(build, neuron, steps, count):
    x, plain = torch.randn(2, 3, 32, 32), build(neuron=neuron, steps=steps)
    twin = copy.deepcopy(plain)
    found = fuse_norms(twin, x)
    assert len(found) == count
    assert_equal_states(twin, plain)
    for _ in range(2):
        results = []
        for model in (twin, plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            results.append(step(model.train(), x))
            optimizer.step()
        assert all(torch.isfinite(each).all() for each in results[1])
        assert_equal(*results)
    assert_equal_states(twin, plain)
    assert torch.equal(twin.eval()(x), plain.eval()(x))


def test_memory_kept_for_backward_falls_by_what_lif_neurons_read():
    x, plain = torch.randn(8, 3, 16, 16), Chain(LIF(steps=4))
    y = 8 * 6 * 16 * 16 * 4
    fell = kept_bytes(plain, x) - kept_bytes(fused(plain, x), x)
    assert y - 200 < fell <= y  # a few numbers a channel in its place
    model, images = meta(neuron="lif", steps=4), torch.randn(2, 3, 32, 32)
    assert kept_bytes(fused(model, images), images) < 0.9 * kept_bytes(model, images)


def test_an_integer_neuron_keeps_a_byte_an_element_and_no_currents():
    x, plain = torch.randn(4, 3, 16, 16), Chain(ILIF())
    assert kept_bytes(fused(plain, x), x) <= kept_bytes(plain, x) + 200


@pytest.mark.parametrize("kind", [TwoReaders, Returned])
def test_a_norm_that_something_else_reads_is_left_alone(kind):
    x, model = torch.randn(8, 3, 9, 7), kind(LIF(steps=4))
    assert fuse_norms(model, x) == []
    assert type(model[0].bn) is nn.BatchNorm2d


def test_a_norm_whose_output_meets_no_neuron_is_left_alone():
    class Kept(Chain):
        def forward(self, x: Tensor) -> Tensor:
            self.aside = self[0](x)
            return self[1](x)

    assert fuse_norms(Kept(LIF(steps=4)), torch.randn(8, 3, 9, 7)) == []


def test_a_norm_that_is_not_called_is_left_alone():
    assert fuse_norms(BesideTheNorm(LIF(steps=4)), torch.randn(8, 3, 9, 7)) == []


def test_what_writes_to_the_output_of_a_fused_norm_is_heard_by_the_neuron():
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    twin = fused(plain, x)
    between = [nn.Sequential(each[0], nn.ReLU(inplace=True), each[1], each[2]) for each in (twin, plain)]
    assert_equal(*(step(each, x) for each in between))
    grads = []
    for model in (twin, plain):
        y = model[0](x)
        y.mul_(2)
        grads.append(torch.autograd.grad(model[1](y).sum(), list(model[0].parameters())))
    assert_equal(*grads)


def test_running_statistics_may_move_between_a_pass_in_eval_mode_and_its_backward():
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4)).eval()
    twin = fused(plain, x)
    grads = []
    for model in (twin, plain):
        y = model[1](model[0](x))
        if model is twin:
            model[0].train()(x + 5)
        (grad,) = torch.autograd.grad(y.sum(), model[0].bn.bias)
        grads.append(grad)
    assert torch.equal(*grads)


def test_what_reads_a_fused_norm_later_gets_its_output_and_gradient():
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    twin = fused(plain, x)
    for model in (twin, plain):
        model.__class__ = TwoReaders
    found, wanted = step(twin, x), step(plain, x)
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)  # three gradients are added in another order
    seen = []
    twin[0].bn.register_forward_hook(lambda _, __, y: seen.append(y.mean()))
    twin(x)
    assert torch.equal(seen[0], nn.Sequential(*separate_norms(twin)[0])(x).mean())


def test_neurons_without_a_fast_form_and_norms_of_another_kind_are_left_alone():
    x = torch.randn(8, 3, 9, 7)
    assert fuse_norms(Chain(LIF(threshold=nn.Parameter(torch.ones(())))), x) == []
    for change in ({"affine": False}, {"momentum": None}, {"track_running_stats": False}):
        model = Chain(LIF())
        model[0].bn = nn.BatchNorm2d(6, **change)
        assert fuse_norms(model, x) == []
    model = Chain(LIF())
    sync_bn(model)
    assert fuse_norms(model, x) == []


def test_the_search_leaves_statistics_random_state_modes_and_gradients_as_they_were():
    x, model = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    model.append(nn.Dropout(0.5))
    model.eval()
    model[1].train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fuse_norms(model, x)
    assert_equal(list(model.state_dict().values()), list(before.values()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [False, True, False, False]
    assert not model[0].bn.training
    assert all(each.grad is None for each in model.parameters())


def test_separated_norms_are_plain_again_and_only_they_are_fused_anew():
    x, model = torch.randn(8, 3, 9, 7), Chain(LIF())
    found = fuse_norms(model, x)
    with pytest.raises(ValueError, match=r"Chain has fused norms already: call separate_norms\(model\) first"):
        fuse_norms(model, x)
    assert all(type(each) is not nn.BatchNorm2d for each in [model[0].bn])
    assert separate_norms(model) is model
    assert [type(each.bn) for each in (model[0], model[2])] == [nn.BatchNorm2d] * 2
    assert fuse_norms(model, x) == found == ["0.bn"]


def test_an_example_that_does_not_fit_leaves_the_network_as_it_was():
    model = Chain(LIF(steps=4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not a multiple of steps=4"):
        fuse_norms(model.eval(), torch.randn(3, 3, 9, 7))
    assert type(model[0].bn) is nn.BatchNorm2d
    assert not model[0].bn.training
    assert_equal(list(model.state_dict().values()), list(before.values()))


def test_a_copy_of_a_fused_network_is_fused_and_shares_nothing():
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    twin = fused(plain, x)
    average = copy.deepcopy(twin)
    assert_equal(step(average, x), step(plain, x))
    assert not torch.equal(average[0].bn.running_mean, twin[0].bn.running_mean)


def test_activation_checkpoints_recompute_a_fused_pair():
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    twin = fused(plain, x)
    for reentrant in (False, True):
        between = nn.Sequential(twin[0], Checkpointed(twin[1], reentrant=reentrant), twin[2])
        assert_equal(step(between, x), step(plain, x))


def test_without_gradients_or_fast_forms_a_fused_norm_is_a_plain_one():
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    twin = fused(plain, x)
    with torch.no_grad():
        assert type(twin[0](x)) is Tensor
    with kernels.readable():
        assert type(twin[0](x)) is Tensor
    assert type(twin[0](x)) is kernels.Normed
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        twin(x[:1, :, :1, :1])


def test_a_compiled_network_holds_plain_norms(unchecked):
    x, plain = torch.randn(8, 3, 9, 7), Chain(LIF(steps=4))
    twin = fused(plain, x)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), plain(x))
    assert_equal_states(twin, plain)


def test_second_derivatives_are_those_of_the_network_as_it_is():
    x, plain = torch.randn(6, 3, 3, 3, dtype=torch.float64), Chain(LIF(steps=3)).double()
    found = []
    for model in (fused(plain, x), plain):
        leaves = [x.detach().requires_grad_(), *model.parameters()]
        first = torch.autograd.grad(model(leaves[0]).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)  # the loop's sums, in another order

"""Recomputation: the very gradients and statistics of before, and less memory kept for backward."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils._pytree import tree_leaves

import spikeformers as sf
from spikeformers.layers import ResidualShortcut
from spikeformers.neurons import ILIF
from spikeformers.quantize import prepare
from spikeformers.train.recompute import recompute, undo_recompute

SMALL = {"dims": (8, 16, 32, 40), "num_classes": 5}
NETWORKS = {
    "meta_spikeformer": ("meta_spikeformer_15m", SMALL | {"steps": 2}, 32),
    "layer scale": ("meta_spikeformer_15m", SMALL | {"steps": 2, "layer_scale": 0.5}, 32),
    "qsd_transformer": ("qsd_transformer_t", SMALL, 32),
    "spikformer": ("spikformer_cifar_2_384", {"dim": 32, "heads": 4, "num_classes": 5}, 16),
    "spikformer_v2": ("spikformer_v2_8_384", {"dim": 32, "heads": 4, "depth": 2, "num_classes": 5, "steps": 2}, 32),
}


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    stem, sizes, size = NETWORKS[name]
    model = sf.create_model(stem, **sizes)
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and path.endswith(("conv.bn3", "conv.bn")):
            nn.init.constant_(module.bias, 1.0)  # attention is silent at initialisation otherwise
    return model, torch.rand(2, 3, size, size)


def trained(model: nn.Module, images: torch.Tensor, *, steps: int = 2) -> list[torch.Tensor]:
    """Gradients of the last of a few steps; statistics move in each."""
    for _ in range(steps):
        model.zero_grad()
        model(images).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def kept(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a forward pass in train mode keeps for backward, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images)
    del logits
    return sum(found.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_statistics_and_random_numbers_are_those_of_the_network_as_it_was(name):
    model, images = built(name)
    twin = recompute(copy.deepcopy(model))
    torch.manual_seed(1)
    wanted, after = trained(model, images), torch.rand(1)
    torch.manual_seed(1)
    found = trained(twin, images)
    assert torch.rand(1) == after
    assert any(gradient.any() for gradient in wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    state = model.state_dict()
    assert twin.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
    assert torch.equal(twin.eval()(images), model.eval()(images))


class Dropping(nn.Module):
    """A branch with noise of its own and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), DropPath(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.bn(self.conv(x)))


def test_a_second_run_draws_the_random_numbers_of_the_first():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut, self.branch = ResidualShortcut(neuron=ILIF), Dropping()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shortcut(x, self.branch)

    model = Network()
    twin = recompute(copy.deepcopy(model))
    x = torch.randn(16, 4, 3, 3)
    torch.manual_seed(1)
    wanted = trained(model, x)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(trained(twin, x), wanted, strict=True))


def test_a_step_keeps_a_third_of_the_memory_and_what_a_further_step_adds_falls_alike():
    plain = {steps: kept(sf.create_model("meta_spikeformer_15m", **SMALL, steps=steps), IMAGES) for steps in (1, 4)}
    twice = {
        steps: kept(recompute(sf.create_model("meta_spikeformer_15m", **SMALL, steps=steps)), IMAGES)
        for steps in (1, 4)
    }
    assert twice[4] < plain[4] / 3
    assert twice[4] - twice[1] < (plain[4] - plain[1]) / 3


IMAGES = torch.rand(2, 3, 64, 64)


def test_copies_of_a_network_recompute_by_their_own_norms():
    model, images = built("meta_spikeformer")
    twin = copy.deepcopy(recompute(model))
    before = copy.deepcopy(model.state_dict())
    trained(twin, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    own = set(twin.modules())
    assert all(norm in own for module in twin.modules() for norm in getattr(module, "norms", []))
    assert recompute(twin) is twin  # once more changes nothing
    assert twin.stage1a.block0.sep_shortcut.__class__.__mro__.count(type(model.stage1a.block0.sep_shortcut)) == 1


def test_eval_mode_runs_every_branch_once_also_with_gradients():
    model, images = built("spikformer")
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    recompute(model).eval()(images).sum().backward()
    assert len(calls) == 1
    model.train()(images).sum().backward()
    assert len(calls) == 3


def test_a_second_forward_before_backward_is_refused_where_borders_read_statistics():
    model, images = built("meta_spikeformer")
    recompute(model)
    both = model(images).sum() + model(images.flip(0)).sum()
    with pytest.raises(ValueError, match="call backward after each forward pass"):
        both.backward()
    model, images = built("spikformer")
    twin = recompute(copy.deepcopy(model))
    gradients = []
    for network in (model, twin):
        (network(images).square().sum() + network(images.flip(0)).square().sum()).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_undone_it_is_the_network_of_before():
    model, _ = built("meta_spikeformer")
    kinds = [(type(module), vars(module).keys()) for module in model.modules()]
    undo_recompute(recompute(model))
    assert [(type(module), vars(module).keys()) for module in model.modules()] == kinds


def test_a_dense_network_recomputes_its_head_as_well(segmenter):
    model = segmenter("spike2former").train()
    images = torch.rand(2, 3, 32, 32)
    twin = recompute(copy.deepcopy(model))

    def gradients(network: nn.Module) -> list[torch.Tensor]:
        outputs = [leaf for leaf in tree_leaves(network(images)) if isinstance(leaf, torch.Tensor)]
        sum(each.square().sum() for each in outputs).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    wanted = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(twin), wanted, strict=True))


def test_networks_that_cannot_are_refused_by_name():
    with pytest.raises(ValueError, match="Linear has no residual branch"):
        recompute(nn.Linear(1, 1))
    model = sf.create_model("meta_spikeformer_15m", **SMALL)
    prepare(model, bits=4, exact=True)
    with pytest.raises(ValueError, match="prepared with exact=True cannot recompute"):
        recompute(model)

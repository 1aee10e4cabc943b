"""Exact networks: the engine gives every count and logit of the trained network, whatever the batch."""

import copy

import pytest
import torch
from torch import nn

import spikeformers as sf
from spikeformers.deploy import integer
from spikeformers.deploy.rounding import Rounding
from spikeformers.quantize import FixedPointNorm


@pytest.fixture
def exact() -> nn.Module:
    sizes = {"dims": (8, 16, 24, 32), "num_classes": 5, "blocks": (1, 1, 1, 1, 1)}
    model = sf.create_model("qsd_transformer_t", **sizes, layer_scale=0.0, bits=0)
    sf.quantize.prepare(model, bits=4, exact=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, 0.3, 0.5)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("fast", [True, False])
def test_no_count_and_no_logit_of_an_exact_network_differs_at_any_batch_size(exact, images, fast):
    engine = integer(exact, images, fast=fast)
    assert any(isinstance(module, Rounding) for module in engine.modules())
    for model in (exact, copy.deepcopy(exact).double(), sf.quantize.convert(copy.deepcopy(exact))):
        dtype = next(model.parameters()).dtype
        for batch in (images, images[:1], images[2:4], images.flip(0)):
            found = engine.compare(model, batch.to(dtype))
            assert found.flipped == ()
            assert found.largest_error == 0
            assert len(found.flip_rates) > 20
    assert not any(engine.compare_layers(exact, images).values())
    assert len(engine.fused) == 8


def test_a_rounding_is_the_norm_that_it_came_from(exact):
    x = torch.randn(3, 16, 5, 5) * 4
    for norm in (module for module in exact.modules() if isinstance(module, FixedPointNorm)):
        if norm.num_features == 16:
            rounding = Rounding.of(norm)
            assert torch.equal(rounding(x), norm(x))
            assert torch.equal(rounding.of_zero(), norm.of_zero())


def test_an_exact_network_is_not_merged_and_not_split_into_nir(exact, images, tmp_path):
    for act in (lambda: sf.deploy.fuse(exact), lambda: sf.deploy.export_nir(exact, images, tmp_path / "nir")):
        with pytest.raises(ValueError, match=r"prepared exact \(quantize\.exact_integer\)"):
            act()
    assert not list(tmp_path.iterdir())


def test_an_engine_is_no_network_to_convert_or_audit(exact, images):
    engine = integer(exact, images)
    with pytest.raises(ValueError, match="integer engine already"):
        integer(engine, images)
    with pytest.raises(ValueError, match="no network to audit"):
        sf.deploy.audit(engine, images)

"""Layers and products made by functions of torch, published sizes of networks, and what is listed as uncounted."""

import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d, deform_conv2d

from spikeformers.energy import Operation, measure, trace
from spikeformers.neurons import LIF


class Calls(nn.Module):
    """A neuron, and a function of what it fires."""

    def __init__(self, function) -> None:
        super().__init__()
        self.neuron, self.function = LIF(), function

    def forward(self, x):
        return self.function(self.neuron(x))


def operations(function, images: torch.Tensor) -> list[Operation]:
    return [each for each in trace(Calls(function), images).operations if each.macs]


IMAGES = torch.rand(2, 6, 8, 8) * 4


@pytest.mark.parametrize(
    ("function", "kind", "macs"),
    [
        (lambda s: F.linear(s, torch.ones(5, 8)), "linear", 6 * 8 * 8 * 5),
        (lambda s: F.conv2d(s, torch.ones(4, 3, 3, 3), groups=2), "conv", 4 * 36 * 3 * 9),
        (lambda s: F.conv2d(input=s, weight=torch.ones(4, 6, 1, 1)), "conv", 4 * 64 * 6),
        (lambda s: F.conv_transpose2d(s, torch.ones(6, 4, 2, 2), stride=2), "conv", 6 * 64 * 4 * 4),
        (lambda s: s @ torch.ones(8, 3), "product", 6 * 8 * 8 * 3),
        (lambda s: torch.einsum("bchw,dc->bdhw", s, torch.ones(7, 6)), "product", 64 * 6 * 7),
        (lambda s: torch.bmm(s.flatten(2), torch.ones(2, 64, 3)), "product", 6 * 64 * 3),
        (lambda s: torch.baddbmm(torch.ones(2, 6, 3), s.flatten(2), torch.ones(2, 64, 3)), "product", 6 * 64 * 3),
        (lambda s: torch.addmm(torch.ones(3), s.flatten(1), torch.ones(384, 3)), "product", 384 * 3),
        (lambda s: torch.tensordot(s, torch.ones(8, 5), dims=1), "product", 6 * 8 * 8 * 5),
    ],
)
def test_functions_count_as_layers_and_products_at_the_rate_of_their_spikes(function, kind, macs):
    (found,) = operations(function, IMAGES)
    assert (found.name, found.kind, found.macs) == (f"{kind}1", kind, macs)
    torch.testing.assert_close(found.rates, LIF()(IMAGES).double().flatten(1).mean(1))


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.qkv, self.fused = nn.Linear(16, 48), fused

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v


@pytest.mark.parametrize("convention", ["meta_spikeformer", "as_executed", "honest"])
def test_fused_attention_costs_what_it_costs_spelt_out(convention):
    torch.manual_seed(0)
    fused, spelt = Attention(fused=True), Attention(fused=False)
    x = torch.randn(3, 5, 16)
    one, other = (measure(model, x, convention=convention) for model in (fused, spelt))
    assert [layer.macs for layer in one.layers[1:3]] == [2 * 5 * 5 * 8] * 2
    for layer, spelt_out in zip(one.layers[:3], other.layers[:3], strict=True):
        assert (layer.name, layer.macs, layer.mj) == (spelt_out.name, spelt_out.macs, spelt_out.mj)
    assert {layer.kind for layer in one.layers} == {layer.kind for layer in other.layers}


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_is_four_projections_and_two_products(batch_first):
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
    shape = (3, 7, 16) if batch_first else (7, 3, 16)
    found = trace(model.eval(), torch.randn(shape)).operations
    images = 3 if batch_first else 7  # torch's own order has the tokens where images are elsewhere
    assert [operation.name for operation in found] == [
        *(f"self_attn.{each}" for each in ("q_proj", "k_proj", "v_proj", "product1", "product2", "out_proj")),
        *("linear1", "linear2"),
    ]
    total = [operation.macs * images for operation in found]
    assert total == [3 * 7 * 16 * 16] * 3 + [3 * 7 * 7 * 16] * 2 + [3 * 7 * 16 * 16] + [3 * 7 * 16 * 32] * 2


def test_projections_of_spikes_by_multi_head_attention_are_additions():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neuron, self.attention = LIF(), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            spikes = self.neuron(x)
            return self.attention(spikes, spikes, x)[0]

    x = torch.rand(2, 5, 8) * 4
    q, k, v, *rest = trace(Net().eval(), x).operations
    rates = LIF()(x).double().flatten(1).mean(1)
    torch.testing.assert_close(q.rates, rates)
    torch.testing.assert_close(k.rates, rates)
    assert all(operation.rates is None for operation in (v, *rest))


def test_deformable_convolution_multiplies_samples_between_pixels():
    layer = DeformConv2d(6, 4, 3, padding=1)
    (found,) = operations(lambda s: layer(s, torch.zeros(2, 18, 8, 8)), IMAGES)
    (again,) = operations(
        lambda s: deform_conv2d(s, torch.zeros(2, 18, 8, 8), layer.weight, padding=(1, 1)),
        IMAGES,
    )
    assert (found.kind, found.macs, found.rates) == ("conv", 64 * 4 * 6 * 9, None)
    assert again.macs == found.macs


@pytest.mark.parametrize(
    ("name", "published"),  # G MACs at 224 pixels, from the papers' tables
    [
        ("resnet18", 1.82),
        ("vit_base_patch16_224", 17.6),
        ("pvt_v2_b1", 2.1),
        ("swin_tiny_patch4_window7_224", 4.5),
        ("tnt_s_patch16_224", 5.2),
    ],
)
def test_plain_networks_have_their_published_size(name, published):
    with torch.device("meta"):
        found = trace(timm.create_model(name).eval(), torch.empty(1, 3, 224, 224))
    assert sum(operation.macs for operation in found.operations) / 1e9 == pytest.approx(published, rel=0.02)
    assert found.uncounted == ()
    assert (found.images, found.sites) == (1, 0)


class TwoProducts(nn.Linear):
    """A layer that multiplies more than its class says."""

    def forward(self, x):
        return super().forward(x) + x @ self.weight.T


@pytest.mark.parametrize(
    ("part", "listed"),
    [
        (nn.LSTM(8, 8), r"part \(LSTM\): \w+"),
        (nn.GRUCell(8, 8), r"part \(GRUCell\): addmm"),
        (TwoProducts(8, 8), r"part \(TwoProducts\): (addmm|mm)"),
        (nn.EmbeddingBag(9, 8), r"part \(EmbeddingBag\): _embedding_bag"),
    ],
)
def test_what_it_cannot_count_is_listed_in_the_table_and_the_numbers(part, listed):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part = nn.Linear(8, 8), part

        def forward(self, x):
            x = self.first(x)
            return self.part(x.abs().long().clamp(max=8) if isinstance(self.part, nn.EmbeddingBag) else x)

    report = measure(Net(), torch.randn(3, 8))
    (found,) = report.uncounted
    assert re.fullmatch(listed, found)
    assert f"NOT COUNTED: {found}" in report.table()
    assert report.to_json()["uncounted"] == [found]


def test_bilinear_layers_and_fourier_transforms_are_listed():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bilinear = nn.Linear(8, 8), nn.Bilinear(8, 8, 4)

        def forward(self, x):
            return torch.fft.rfft(self.bilinear(x, self.linear(x)))

    found = measure(Net(), torch.randn(3, 8)).uncounted
    assert [each.partition(":")[0] for each in found] == ["bilinear (Bilinear)", "model (Net)"]


def test_norms_gates_and_embeddings_are_no_gap():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.embedding = nn.Parameter(torch.ones(8)), nn.Embedding(4, 8)
            self.parts = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.PReLU(), nn.GELU(), nn.Softmax(-1))

        def forward(self, x):
            return self.parts(x * self.scale + self.embedding.weight[:3]).sigmoid()

    assert measure(Net(), torch.randn(3, 8)).uncounted == ()


def test_a_custom_function_with_a_product_inside_is_counted():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ x.T

    class Net(nn.Module):
        def forward(self, x):
            return Square.apply(x)

    (layer,) = measure(Net(), torch.randn(3, 8)).layers
    assert layer.macs * 3 == 3 * 8 * 3

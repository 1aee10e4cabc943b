"""Every product is listed: a network worked by hand, sums against the energy report, verdicts, and merging."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import deform_conv2d, roi_align

import spikeformers as sf
from spikeformers.attention import SDSA
from spikeformers.backbones import ANN_TWIN
from spikeformers.deploy import audit, fuse, unroll
from spikeformers.deploy.audit import AuditReport
from spikeformers.energy import measure
from spikeformers.layers import SepConv
from spikeformers.neurons import ILIF, LIF

PJ = 1e-9  # mJ
PIXELS = torch.tensor([[[0.0, 1.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 1.0]]]).unsqueeze(1)


class ByHand(nn.Module):
    """A stem of weights 1 and 2, counts 13 and 3 of two images, binary spikes 6 and 2, and every kind of product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1, bias=False)
        self.stem.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        self.norm = nn.BatchNorm2d(2, eps=0.0)
        self.counts, self.binary = ILIF(levels=4), LIF(tau=1.0)
        self.mix, self.thin, self.head = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 1, 1), nn.Linear(2, 5)
        self.gain = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x):
        u = self.gain * self.norm(self.stem(x))  # 0 1 1 3 and 0 2 2 6; 0 0 0 1 and 0 0 0 2
        a, b = self.counts(u), self.binary(u)
        self.mix(a), self.thin(b)
        _ = b * a, a * u, u * u, b * self.gain, 0.125 * u
        _ = F.interpolate(u, scale_factor=2, mode="bilinear"), F.layer_norm(u, [2, 2]), u.softmax(1), F.normalize(u)
        _ = a.flatten(2) @ b.flatten(2).mT
        return self.head(a.mean((2, 3)))


def test_every_kind_of_product_by_hand():
    report = audit(ByHand().eval(), PIXELS)
    found = {(row.name, row.kind, row.how): (row.products, row.rate, row.mj) for row in report.rows}
    mac, ac = 4.6 * PJ, 0.9 * PJ
    expected = {
        ("stem", "conv", "MAC"): (8, None, 8 * mac),
        ("norm", "norm", "free"): (8, None, 0),
        ("", "scale", "free"): (8, None, 0),  # the gain, behind the norm of a layer
        ("mix", "conv", "AC (integer)"): (24, 1.0, 24 * ac),  # 13 and 3 counts in 2 x 8 elements
        ("thin", "conv", "AC (binary)"): (8, 0.5, 4 * ac),
        ("", "mask", "AC (binary)"): (8, 1.0, 0),  # the counts are where the binary spikes are
        ("", "mask", "AC (integer)"): (8, 1.0, 8 * ac),
        ("", "product", "MAC"): (8, None, 8 * mac),
        ("", "scale", "AC (binary)"): (8, 0.5, 4 * ac),
        ("", "constant", "free"): (8, None, 0),
        ("", "taps", "MAC"): (128, None, 128 * mac),  # 4 for each of 2 x 4 x 4
        ("", "norm", "MAC"): (24, None, 24 * mac),
        ("", "softmax", "MAC"): (8, None, 8 * mac),
        ("", "unknown", "MAC"): (16, None, 16 * mac),  # squares and divisions
        ("", "matmul", "AC (binary)"): (16, 0.5, 8 * ac),  # 2 x 4 by 4 x 2; 6 and 2 spikes of 8 are the sparser side
        ("", "average", "free"): (2, None, 0),
        ("head", "linear", "MAC"): (10, None, 10 * mac),
    }
    assert {key: (products, rate) for key, (products, rate, _) in found.items()} == {
        key: (products, rate) for key, (products, rate, _) in expected.items()
    }
    assert {key: mj for key, (*_, mj) in found.items()} == pytest.approx(
        {key: mj for key, (*_, mj) in expected.items()}
    )
    assert sum(row.share for row in report.rows) == pytest.approx(1)
    assert report.total_mj == pytest.approx(sum(mj for *_, mj in expected.values()), rel=1e-12)
    roles = {row.name or row.kind: row.role for row in report.rows if row.role}
    assert roles == {"stem": "image", "head": "readout"}
    assert {row.kind: row.into for row in report.rows if row.into} == {"norm": "stem", "scale": "stem"}
    assert {row.bits for row in report.rows if row.kind in ("conv", "linear")} == {32}
    assert (report.verdict, report.images, report.steps) == ("neither", 2, 1)
    assert [row.kind for row in report.offenders] == ["taps", "norm", "unknown", "product", "softmax"]


class Between(nn.Module):
    """Counts, what `connect` makes of them, and a convolution."""

    def __init__(self, connect, neuron: nn.Module | None = None) -> None:
        super().__init__()
        self.neuron, self.connect = neuron or LIF(tau=1.0), connect
        self.conv, self.norm, self.row = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.conv(self.connect(self, self.neuron(x)))


@pytest.mark.parametrize(
    ("connect", "verdict", "kinds"),  # kinds that are listed besides the convolution
    [
        (lambda m, s: s, "spike-driven", set()),
        (lambda m, s: s / 8 * 0.5, "spike-driven", {"constant"}),
        (lambda m, s: F.pad(s, (1, 1, 1, 1)), "spike-driven", set()),
        (lambda m, s: F.pad(s, (1, 1, 1, 1), value=0.5), "neither", set()),
        (lambda m, s: s * (s > 0), "neither", {"mask"}),
        (lambda m, s: s + s, "integer-driven", set()),
        (lambda m, s: F.avg_pool2d(s, 2), "neither", {"average"}),
        (lambda m, s: s * m.row, "neither", {"scale"}),
        (lambda m, s: m.norm(s), "neither", {"norm"}),
        (lambda m, s: m.norm(m.conv(s)), "neither", {"norm"}),
        (lambda m, s: m.neuron(m.norm(m.conv(s))), "spike-driven", {"norm"}),
        (lambda m, s: m.neuron(m.conv(s) * m.row), "neither", {"scale"}),  # a number a column is no number a channel
        (lambda m, s: m.neuron(torch.sigmoid(m.conv(s))), "spike-driven", set()),
        (lambda m, s: m.neuron(1 / m.conv(s)), "neither", {"product"}),
        (lambda m, s: m.neuron(torch.fft.rfft2(s).real), "neither", {"unknown"}),
        (
            lambda m, s: m.neuron(F.cosine_similarity(s, s.flip(2)).unsqueeze(1).repeat(1, 2, 1, 1)),
            "neither",
            {"unknown"},
        ),
        (lambda m, s: m.neuron(F.scaled_dot_product_attention(s, s, s)), "neither", {"matmul", "softmax"}),
        (lambda m, s: m.neuron(torch.einsum("bchw,bcHw->bchH", s, s)), "spike-driven", {"matmul"}),
        (
            lambda m, s: m.neuron(F.grid_sample(s, torch.zeros(2, 3, 3, 2), align_corners=False)),
            "spike-driven",
            {"taps"},
        ),
        (lambda m, s: m.neuron(F.conv2d(s, m.conv.weight * m.row[0])), "spike-driven", set()),
    ],
)
def test_what_stands_between_spikes_and_a_layer_decides(connect, verdict, kinds):
    report = audit(Between(connect), torch.rand(2, 2, 4, 4) * 4)
    assert report.verdict == verdict, report.table()
    assert {row.kind for row in report.rows} - {"conv"} == kinds


def test_operators_of_torchvision_are_counted():
    boxes, kernel = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], torch.ones(5, 3, 3, 3)
    align = Calls(lambda x: roi_align(x, boxes, output_size=2, sampling_ratio=2))
    assert [(r.kind, r.products) for r in audit(align, torch.rand(1, 3, 8, 8)).rows] == [("taps", 3 * 2 * 2 * 4 * 2**2)]
    adaptive = Calls(lambda x: roi_align(x, boxes, output_size=2))
    assert [row.kind for row in audit(adaptive, torch.rand(1, 3, 8, 8)).rows] == ["unknown"]
    deform = Calls(lambda x: deform_conv2d(x, torch.zeros(1, 18, 6, 6), kernel))
    (row,) = audit(deform, torch.rand(1, 3, 8, 8)).rows
    assert (row.kind, row.products) == ("unknown", 36 * 27 * 5 + 36 * 27 * 4)  # kernel, and four taps of each input


def test_an_opaque_function_is_listed_with_at_least_what_it_makes():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = nn.Sequential(LIF(tau=1.0), Calls(lambda s: attention(s, s, s)[0]))
    (row,) = [row for row in audit(model, torch.rand(1, 3, 4) * 4).rows if row.kind == "unknown"]
    # q, k, v and out: 4 x 3 x 4 x 4; scores and map v: 2 x 2 heads x 3 x 3 x 2; softmax 2 x 3 x 3
    assert (row.function, row.products, row.how) == ("multi_head_attention_forward", 192 + 72 + 18, "MAC")
    (row,) = [row for row in audit(nn.LSTM(4, 3), torch.rand(2, 1, 4)).rows if row.kind == "unknown"]
    assert row.products > 0


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def lively(name: str, **overrides) -> nn.Module:
    """A small network in float64 whose neurons do fire."""
    torch.manual_seed(0)
    pyramid = {"dims": (8, 8, 16, 16), "blocks": (1, 0, 0, 1, 1), "strides": (2, 2, 2, 2, 1), "heads": 2}
    sizes = {"dim": 16, "depth": 1, "heads": 2, "patch_size": 4} if name.startswith("spikformer") else pyramid
    model = sf.create_model(name, num_classes=3, **(sizes | overrides)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.constant_(module.bias, 1.0)
    model(images())
    return model.eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


NETWORKS = {
    "meta_spikeformer": ("meta_spikeformer_15m", {"steps": 2}),
    "qsd_transformer": ("qsd_transformer_t", {}),
    "sdsa4": ("meta_spikeformer_15m", {"attention": "sdsa4", "neuron": "i_lif"}),
    "sew": ("spikformer_v2_8_384", {"steps": 2}),
    "iand": ("spikformer_v2_8_384", {"shortcut": "iand", "steps": 2}),
    "vsa": ("spikformer_v2_8_384", {"attention": "vsa"}),
    "relu": ("spikformer_v2_8_384", {"attention": "relu"}),
    "ann": ("spikformer_v2_8_384", ANN_TWIN),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_and_attention_cost_what_the_energy_report_says(network):
    name, overrides = NETWORKS[network]
    model = lively(name, **overrides)
    report, measured = audit(model, images()), measure(model, images(), convention="as_executed")
    counted = [row for row in report.rows if row.kind in ("conv", "linear", "matmul")]
    # Two ways of counting, one by functions and one by modules; the sums differ by rounding only.
    assert sum(row.mj for row in counted) == pytest.approx(measured.total_mj, rel=1e-9)
    by_name = {layer.name: layer.mj for layer in measured.layers if layer.kind != "attention"}
    for row in counted:
        if row.kind != "matmul":
            assert row.mj == pytest.approx(by_name[row.name], rel=1e-9), row.name
    assert {row.kind for row in report.rows if row not in counted and row.mj > 0} <= {"softmax"}


def test_meta_spikeformer_as_trained_is_neither_and_its_factors_are_why():
    report = audit(lively("meta_spikeformer_15m", steps=2), images())
    assert report.verdict == "neither"
    inside = ("sep_conv.pw2.conv", "q_conv.dw", "q_conv.pw2", "k_conv.dw", "k_conv.pw2", "v_conv.dw", "v_conv.pw2")
    assert all(row.name.endswith((*inside, "proj.dw", "proj.pw2")) for row in report.offenders)
    assert len(report.offenders) == 1 + 2 * 4 * 2
    share = sum(row.share for row in report.offenders)
    assert f"{100 * share:.1f} % of the energy" in report.why[0]
    assert "dw and pw2 inside RepConv (16 convolutions" in report.why[1]
    assert "pw2 inside SepConv (one convolution, stage1a.block0.sep_conv.pw2.conv)" in report.why[2]
    assert "it would be spike-driven, with weights of full precision" in report.merging


def test_qsd_transformer_has_four_bits_or_spikes_but_not_both():
    model = lively("qsd_transformer_t")
    trained, merged = audit(model, images()), audit(fuse(model), images())
    weighted = [{row.bits for row in report.rows if row.kind in ("conv", "linear")} for report in (trained, merged)]
    assert weighted == [{4}, {32}]
    assert "no longer of 4 bits" in trained.merging
    assert len(trained.offenders) == 17
    assert [row.name for row in merged.offenders] == ["stage1a.block0.sep_conv.pw2"]
    assert "driven by counts 0..4" in " ".join(merged.why)
    assert "it would be integer-driven" in merged.merging


class Dense(nn.Module):
    """A SepConv with its last two convolutions in one."""

    def __init__(self, sep_conv: SepConv) -> None:
        super().__init__()
        self.pw1, self.neuron, self.dense = sep_conv.pw1, sep_conv.neuron, sep_conv.merge_spatial()

    def forward(self, spikes):
        return self.dense(self.neuron(self.pw1(spikes)))


def test_merging_is_foretold():
    model = lively("qsd_transformer_t")
    foretold = audit(model, images())
    dense = copy.deepcopy(model)
    dense.stage1a.block0.sep_conv = Dense(dense.stage1a.block0.sep_conv)
    merged = fuse(dense)
    report = audit(merged, images())
    assert report.verdict == "integer-driven"
    assert report.offenders == ()
    found = {row.name: row for row in report.rows}
    for merge in foretold.merges:
        name = merge.name.replace("dw+pw2", "dense")
        # Merging does not change a spike in float64, so that energies agree but for rounding.
        assert found[name].mj == pytest.approx(merge.merged_mj, rel=1e-9)
        assert merged.get_submodule(name).weight.numel() == merge.merged_weights
        parts = [model.get_submodule(part).weight.numel() for part in merge.parts]
        assert (sum(parts), merge.bits, merge.spike_fed) == (merge.weights, 4, True)
        dearest = {row.name: row.mj for row in foretold.rows}
        assert merge.mj == pytest.approx(sum(dearest[part] for part in merge.parts), rel=1e-9)
    assert len(foretold.merges) == 9


def test_packed_weights_keep_their_bits_and_their_verdict():
    model = lively("qsd_transformer_t", blocks=(1, 0, 0, 1, 0))
    trained = audit(model, images(1))
    for step in (sf.quantize.convert, sf.quantize.fold):
        report = audit(step(model), images(1))
        assert {row.bits for row in report.rows if row.kind in ("conv", "linear")} == {4}
        assert [row.name for row in report.offenders] == [row.name for row in trained.offenders]
        assert report.total_mj == pytest.approx(trained.total_mj, rel=1e-9)


@pytest.mark.parametrize(
    ("overrides", "verdict"),
    [
        ({"shortcut": "iand"}, "spike-driven"),
        ({"shortcut": "vs"}, "spike-driven"),
        ({"shortcut": "sew"}, "integer-driven"),  # it adds spikes: Meta-SpikeFormer, Sec. 3.3
        ({"shortcut": "vs", "neuron": "i_lif"}, "integer-driven"),
        ({"shortcut": "vs", "neuron": "i_lif", "levels": 1}, "spike-driven"),
        ({"shortcut": "vs", "attention": "vsa"}, "neither"),
        (ANN_TWIN, "neither"),
    ],
)
def test_verdict_on_spikformers(overrides, verdict):
    report = audit(lively("spikformer_v2_8_384", **overrides), images(1))
    assert report.verdict == verdict
    told = " ".join(report.why)
    if verdict == "neither":
        assert ("no spiking neuron" in told) == (overrides is ANN_TWIN)
    else:
        assert "stem.blocks.0.down.conv reads the image" in told
        assert "head reads an average of spikes" in told


def test_unrolled_over_d_virtual_steps_it_is_spike_driven_at_the_same_energy():
    model = lively("spikformer_v2_8_384", shortcut="vs", neuron="i_lif")
    counts, binary = audit(model, images(2)), audit(unroll(model), images(2))
    assert (counts.verdict, binary.verdict) == ("integer-driven", "spike-driven")
    assert binary.total_mj == pytest.approx(counts.total_mj, rel=1e-9)
    rows = {row.label: row for row in binary.rows}
    for row in counts.rows:
        if row.rate is not None:
            assert rows[row.label].products == 4 * row.products
            assert rows[row.label].rate == pytest.approx(row.rate / 4)


def test_attention_by_masks_has_no_product_but_masks():
    attention = SDSA["sdsa1"](4, neuron=lambda threshold=1.0: LIF(threshold=0.1 * threshold), heads=2)
    report = audit(nn.Sequential(LIF(), attention).eval(), torch.rand(2, 4, 3, 3) * 4)
    (masks,) = [row for row in report.rows if row.name == "1"]
    assert (masks.kind, masks.how, masks.products, masks.mj) == ("mask", "AC (binary)", 2 * 4 * 9, 0)


def test_a_head_without_a_neuron_that_reads_membranes_is_named():
    report = audit(lively("meta_spikeformer_15m", head_spikes=False, blocks=(0, 0, 0, 0, 0)), images(1))
    assert [row.name for row in report.offenders] == ["head"]
    assert audit(lively("meta_spikeformer_15m", blocks=(0, 0, 0, 0, 0)), images(1)).verdict == "spike-driven"


def test_time_steps_multiply_products():
    def products(steps: int) -> AuditReport:
        model = nn.Sequential(LIF(tau=1.0, steps=steps), nn.Conv2d(2, 3, 1))
        return audit(model, torch.full((steps * 2, 2, 4, 4), 2.0))

    (one,), (three,) = products(1).rows, products(3).rows
    assert (one.products, one.rate, three.products, three.rate) == (16 * 6, 1, 3 * 16 * 6, 1)
    assert products(3).images == 2


def test_a_loader_is_averaged_and_the_model_comes_back_as_it_was():
    model = lively("meta_spikeformer_15m", steps=2, blocks=(0, 0, 0, 1, 0)).train()
    whole = audit(model, images(5))
    loader = DataLoader(TensorDataset(images(5), torch.zeros(5)), batch_size=2)
    batched = audit(model, loader)
    assert (batched.images, model.training) == (5, True)
    assert batched.total_mj == pytest.approx(whole.total_mj, rel=1e-9)
    assert [row.products for row in batched.rows] == pytest.approx([row.products for row in whole.rows])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_table_and_json_say_everything(tmp_path):
    report = audit(lively("qsd_transformer_t"), images(1))
    told = report.table()
    assert all(row.label in told for row in report.rows if row.how != "free")
    assert "Verdict: neither" in told
    assert "What merging changes:\n  8 RepConv: " in told
    saved = json.loads(report.save(tmp_path / "audit.json").read_text())
    assert saved == report.to_json()
    assert len(saved["rows"]) == len(report.rows) > len(told.splitlines())


def test_a_model_that_multiplies_nothing_is_refused():
    with pytest.raises(ValueError, match="ReLU has nothing to count"):
        audit(nn.ReLU(), torch.rand(1, 3))
    with pytest.raises(ValueError, match="no images to audit"):
        audit(nn.Linear(3, 3), [])


def test_an_ann_of_bare_functions_is_counted():
    weight = torch.ones(4, 3)
    report = audit(Calls(lambda x: F.linear(x, weight).relu()), torch.rand(2, 3))
    (row,) = report.rows
    assert (row.products, row.how, report.images, report.verdict) == (12, "MAC", 2, "neither")

"""The energy report: a network worked by hand, averages over images, conventions, and what it refuses."""

import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spikeformers.deploy import fuse
from spikeformers.energy import CONVENTIONS, Convention, measure, record
from spikeformers.layers import RepConv
from spikeformers.neurons import ILIF, LIF, TimeMean, set_steps
from spikeformers.zoo import create_model

PJ = 1e-9  # mJ


class ByHand(nn.Module):
    """1x1 convolution of weight 1 and 2, counts, 1x1 convolution of 2 channels to 3, mean over pixels, classifier."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1, bias=False)
        self.stem.weight.data = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        self.neuron = neuron
        self.mix = nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.mix(self.neuron(self.stem(x))).mean((2, 3)))


# currents of the first image are 0 1 1 3 and 0 2 2 6: counts 0 1 1 3 and 0 2 2 4 with D = 4, 13 in all;
# of the second image 0 0 0 1 and 0 0 0 2: counts 3 in all
PIXELS = torch.tensor([[[0.0, 1.0], [1.0, 3.0]], [[0.0, 0.0], [0.0, 1.0]]]).unsqueeze(1)


def test_a_network_worked_by_hand():
    report = measure(ByHand(ILIF(levels=4)), PIXELS)
    stem, mix, head = report.layers
    assert [layer.name for layer in report.layers] == ["stem", "mix", "head"]
    assert [layer.kind for layer in report.layers] == ["conv", "conv", "linear"]
    assert (stem.macs, mix.macs, head.macs) == (4 * 1 * 2, 4 * 2 * 3, 3 * 5)
    assert (stem.rate, head.rate) == (None, None)
    # integer spikes are charged by their count: 8 elements an image carry 13 and 3 spikes
    assert mix.rate == (13 + 3) / (2 * 8)
    assert mix.sops == 3 * (13 + 3) / 2
    assert (mix.mac_operations, stem.mac_operations, head.mac_operations) == (0, 8, 15)
    images = [PJ * (8 * 4.6 + 3 * 13 * 0.9 + 15 * 4.6), PJ * (8 * 4.6 + 3 * 3 * 0.9 + 15 * 4.6)]
    assert report.image_mj == pytest.approx(images, rel=1e-12)
    assert report.total_mj == pytest.approx(sum(images) / 2, rel=1e-12)
    assert report.sd_mj == pytest.approx((images[0] - images[1]) / math.sqrt(2), rel=1e-12)
    assert report.ann_mj == pytest.approx(PJ * 4.6 * (8 + 24 + 15), rel=1e-12)
    assert report.spikes_per_image == (13 + 3) / 2
    assert report.firing_rate == (13 + 3) / (2 * 8 * 4)
    assert report.stages()["mix"]["mj"] == mix.mj == pytest.approx(PJ * 0.9 * 24, rel=1e-12)
    assert (report.images, report.steps, report.convention) == (2, 1, "meta_spikeformer")


def test_four_steps_multiply_what_runs_four_times():
    # With tau 1 and the hard reset every step of a constant input is like the first: T=4 is four times T=1.
    model = ByHand(LIF(tau=1.0))
    one = measure(model, PIXELS)
    four = measure(set_steps(model, 4), PIXELS.repeat(4, 1, 1, 1))
    assert (four.steps, four.images) == (4, 2)
    assert [layer.steps for layer in four.layers] == [4, 4, 4]
    assert [layer.macs for layer in four.layers] == [layer.macs for layer in one.layers]
    assert four.layers[1].rate == one.layers[1].rate == (3 + 3 + 1 + 1) / 16
    assert four.total_mj == pytest.approx(4 * one.total_mj, rel=1e-12)
    assert four.sd_mj == pytest.approx(4 * one.sd_mj, rel=1e-12)
    assert four.ann_mj == pytest.approx(one.ann_mj, rel=1e-12)
    assert four.firing_rate == one.firing_rate
    assert four.spikes_per_image == 4 * one.spikes_per_image


def test_rates_of_layers_and_steps_are_means_and_deviations_over_the_images():
    model = ByHand(LIF())
    report = measure(set_steps(model, 2), PIXELS.repeat(2, 1, 1, 1))
    mix = report.layers[1]
    with record(model.eval()) as spikes:
        model(PIXELS.repeat(2, 1, 1, 1))
    counts = spikes["neuron"].double().unflatten(0, (2, 2)).flatten(2).mean(2)  # [T, B]
    assert counts[0].tolist() == [4 / 8, 1 / 8]
    assert mix.rates == pytest.approx(counts.mean(1).tolist(), rel=1e-12)
    assert mix.sd_rates == pytest.approx(counts.std(1).tolist(), rel=1e-12)
    assert report.rates == {"mix": mix.rates}
    fired = 0.9 * PJ * 24 * counts.sum(0)
    assert mix.sd_mj == pytest.approx(float(fired.std()), rel=1e-12)
    assert (report.layers[0].sd_mj, report.layers[0].rates, report.layers[0].sd_rates) == (0, (), ())


def test_the_first_layer_costs_what_the_convention_says():
    model, images = set_steps(ByHand(LIF(tau=1.0)), 4), PIXELS.repeat(4, 1, 1, 1)
    cost = {}
    for choice in ("mac", "mac_once", "ac", "free"):
        convention = Convention("mine", "a test", first_layer=choice)
        cost[choice] = measure(model, images, convention=convention).layers[0].mj
    assert cost == pytest.approx({"mac": 4 * 8 * 4.6 * PJ, "mac_once": 8 * 4.6 * PJ, "ac": 4 * 8 * 0.9 * PJ, "free": 0})


def test_a_merged_layer_is_one_row_and_an_executed_one_is_three():
    model, images = nn.Sequential(ILIF(), RepConv(4, 4)), torch.rand(2, 4, 5, 5) * 4
    (merged,) = measure(model, images).layers
    rate = model[0](images).mean().item()
    assert merged.rate == pytest.approx(rate)
    assert (merged.counted, merged.macs) == (25 * 16 * 9, 25 * (16 + 36 + 16))
    assert merged.mj == pytest.approx(0.9 * PJ * 25 * 16 * 9 * rate)
    first, *inner = measure(model, images, convention="as_executed").layers
    assert [layer.name for layer in (first, *inner)] == ["1.pw1", "1.dw", "1.pw2"]
    assert first.mj == pytest.approx(0.9 * PJ * 25 * 16 * rate)
    assert [layer.mj for layer in inner] == pytest.approx([4.6 * PJ * 25 * 36, 4.6 * PJ * 25 * 16])
    assert first.dense_macs + sum(layer.dense_macs for layer in inner) == merged.dense_macs
    factored = measure(model, images, convention="factored")
    assert factored.total_mj == pytest.approx(0.9 * PJ * 25 * (16 + 36 + 16) * rate)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A small Meta-SpikeFormer in float64 (equal spikes for every batch size) whose neurons do fire."""
    torch.manual_seed(1)
    model = create_model(
        "meta_spikeformer_15m", dims=(8, 16, 16, 24), strides=(1, 2, 2, 2, 1), blocks=(1, 1, 0, 1, 1), steps=2
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 1.0)
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    return model.eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_a_loader_gives_what_one_batch_gives(small):
    batch = images(7)
    once = measure(small, batch)
    loader = DataLoader(TensorDataset(batch, torch.zeros(7)), batch_size=3)
    again = measure(small, loader)
    assert again.image_mj == pytest.approx(once.image_mj, rel=1e-12)
    assert once.sd_mj > 0
    assert all(layer.rate > 0 for layer in once.layers[1:])
    assert again.sd_mj == pytest.approx(once.sd_mj, rel=1e-9)
    assert (again.images, again.spikes_per_image) == (7, pytest.approx(once.spikes_per_image, rel=1e-12))
    for one, other in zip(once.layers, again.layers, strict=True):
        assert (other.name, other.macs, other.dense_macs) == (one.name, one.macs, one.dense_macs)
        assert (other.rate or 0, other.sops, other.mj) == pytest.approx((one.rate or 0, one.sops, one.mj), rel=1e-12)


def test_firing_is_that_of_the_recorder(small):
    report = measure(small, images(3))
    with record(small) as spikes, torch.no_grad():
        small(images(3))
    fired, sites = sum(int(counts.sum()) for counts in spikes.values()), sum(x.numel() for x in spikes.values())
    assert report.spikes_per_image == pytest.approx(fired / 3, rel=1e-12)
    assert report.firing_rate == pytest.approx(fired / sites, rel=1e-12)


def test_a_compiled_model_is_measured_as_the_bare_one():
    model = ByHand(ILIF(levels=4))
    bare = measure(model, PIXELS)
    model.compile(backend="eager")
    assert measure(model, PIXELS) == bare
    assert measure(torch.compile(ByHand(ILIF()), backend="eager"), PIXELS).layers[1] == bare.layers[1]


def test_the_order_of_the_images_does_not_matter(small):
    batch, order = images(5), torch.tensor([3, 0, 4, 1, 2])
    straight, shuffled = measure(small, batch), measure(small, batch[order])
    assert shuffled.image_mj == pytest.approx([straight.image_mj[i] for i in order], rel=1e-12)
    assert shuffled.total_mj == pytest.approx(straight.total_mj, rel=1e-12)


def test_a_clip_of_equal_frames_costs_what_its_image_costs(small):
    batch = images(2)
    assert measure(small, batch.repeat(2, 1, 1, 1, 1)).image_mj == pytest.approx(measure(small, batch).image_mj)


@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_layers_stages_and_images_add_up_to_the_total(small, convention):
    report = measure(small, images(3), convention=convention)
    assert sum(layer.mj for layer in report.layers) == pytest.approx(report.total_mj, rel=1e-12)
    assert sum(stage["mj"] for stage in report.stages().values()) == pytest.approx(report.total_mj, rel=1e-12)
    assert sum(stage["ann_mj"] for stage in report.stages().values()) == pytest.approx(report.ann_mj, rel=1e-12)
    assert list(report.stages())[:6] == ["stage1a", "stage1b", "stage2", "stage3", "stage4", "head"]
    for layer in report.layers:
        moved = report.rules.memory_pj * layer.words
        assert layer.mj == pytest.approx(PJ * (4.6 * layer.mac_operations + 0.9 * layer.sops + moved), rel=1e-12)


def test_dense_macs_do_not_depend_on_the_convention(small):
    totals = [sum(x.dense_macs for x in measure(small, images(1), convention=name).layers) for name in CONVENTIONS]
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-12)


def test_conventions_differ_on_float_weights_and_maps_of_spikes_but_for_two(small):
    found = {name: measure(small, images(1), convention=name).total_mj for name in CONVENTIONS}
    assert found.pop("qsd_transformer") == found["meta_spikeformer"]
    assert found.pop("spikformer_v2_table1") == found["spikformer_v2"]
    assert len(set(found.values())) == len(found)


def test_every_convention_describes_itself_in_the_table(small):
    for name, convention in CONVENTIONS.items():
        table = measure(small, images(1), convention=name).table()
        assert convention.describe() in table
        assert f"Convention {name}: " in table
        assert "4.6 pJ a multiply-accumulate, 0.9 pJ an addition" in table


def test_the_table_of_a_network_without_a_part_says_nothing_of_how_that_is_counted(small):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    for name in ("meta_spikeformer", "as_executed"):
        told = measure(plain, torch.rand(1, 3, 16, 16), convention=name)
        assert "4.6 pJ a multiply-accumulate" in told.table()
        for text in (told.table(), told.to_latex(), told.to_json()["description"]):
            assert not any(part in text for part in ("RepConv", "SepConv", "Attention"))
        assert all(part in measure(small, images(1), convention=name).table() for part in ("RepConv", "Attention"))


def test_the_table_is_aligned_and_has_every_layer_and_stage(small):
    report = measure(small, images(2))
    lines = report.table().splitlines()
    names = [line.split()[0] for line in lines[1 : 1 + len(report.layers)]]
    assert names == [layer.name for layer in report.layers]
    assert len({len(line) for line in lines[: 1 + len(report.layers)]}) == 1
    assert "sd" in report.table()


def test_json_round_trips(small):
    report = measure(small, images(2))
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["total_mj"] == report.total_mj
    assert found["convention"]["name"] == "meta_spikeformer"
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in report.layers]
    assert json.dumps(report.convention)  # a plain name, for summaries


def test_plot_writes_an_image(small, tmp_path):
    path = measure(small, images(1)).plot(tmp_path / "energy.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_silent_network_costs_only_its_first_layer():
    model = ByHand(ILIF())
    model.head = nn.Sequential(ILIF(), nn.Linear(3, 5))
    model.mix.bias.data.zero_()
    report = measure(model, torch.zeros(1, 1, 2, 2))
    assert report.total_mj == pytest.approx(8 * 4.6 * PJ)
    assert (report.firing_rate, report.spikes_per_image, report.sd_mj) == (0, 0, 0)
    assert "0.0000" in report.table()


def test_the_model_comes_back_as_it_was():
    model = ByHand(ILIF()).train()
    model.mix.eval()
    measure(model, PIXELS)
    assert model.training
    assert not model.mix.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        measure(model, torch.zeros(1, 3, 2, 2))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"convention": "meta_spikformer"}, "closest: meta_spikeformer"),
        ({"images": torch.full((1, 1, 2, 2), math.nan)}, "NaN"),
        ({"images": torch.zeros(0, 1, 2, 2)}, "without images"),
        ({"images": []}, "no images"),
        ({"images": ["cat.png"]}, "got str"),
        ({"model": nn.AvgPool2d(2)}, "AvgPool2d has nothing to count"),
    ],
)
def test_mistakes_are_named(arguments, message):
    given = {"model": ByHand(ILIF()), "images": PIXELS, "convention": "meta_spikeformer"} | arguments
    with pytest.raises(ValueError, match=message):
        measure(given["model"], given["images"], convention=given["convention"])


def test_a_choice_that_no_convention_knows_is_refused():
    with pytest.raises(ValueError, match="first_layer must be one of mac, mac_once, ac, free, got 'macs'"):
        Convention("mine", "a test", first_layer="macs")
    with pytest.raises(ValueError, match="classifier must be one of mac, ac, got 'free'"):
        Convention("mine", "a test", classifier="free")


def test_a_merged_network_costs_what_its_training_form_was_said_to_cost(small):
    plain, merged = measure(small, images(2)), measure(fuse(small), images(2))
    assert merged.total_mj == pytest.approx(plain.total_mj, rel=1e-12)
    assert merged.ann_mj == pytest.approx(plain.ann_mj, rel=1e-12)


def test_layers_behind_the_mean_over_time_run_once():
    model = nn.Sequential(ILIF(steps=3), nn.Conv2d(2, 2, 1), ILIF(steps=3), TimeMean(steps=3), nn.Conv2d(2, 4, 1))
    report = measure(model, torch.rand(3 * 2, 2, 3, 3))
    assert [(layer.steps, layer.macs, layer.rate is None) for layer in report.layers] == [
        (3, 9 * 4, False),
        (1, 9 * 8, True),
    ]

"""Fine-tuning at few bits: the recipe made from a run, what is packed, and the sensitivity of each kind of layer."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import spikeformers.train.quantization as quantization
from spikeformers.data.images import load_split
from spikeformers.quantize import prepare, quantizable
from spikeformers.train.checkpoint import write_json
from spikeformers.train.evaluate import evaluate
from spikeformers.train.loop import build_model, train
from spikeformers.train.quantization import (
    Sensitivity,
    Source,
    accuracy_of,
    bits_by_kind,
    fine_tuning,
    low_bit_facts,
    networks,
    pack_run,
    read_source,
    sensitivity,
    stored_fine_tuning,
)
from spikeformers.train.recipe import Init, Optim, Quantize, to_json
from spikeformers.zoo import from_pretrained

COLOURS = ((31, 119, 180), (255, 127, 14))  # the first two of matplotlib
FOUR = [("quantize.bits", "4")]
TWIN = {"neuron": "gelu", "options": {"heads": 2, "attention": "softmax"}}


@pytest.fixture
def source(tiny):
    """Call with fields of `Recipe` to change: a run that was never trained."""

    def made(*, run: Path = Path("runs/tiny"), accuracy: float = 0.9, **changes) -> Source:
        recipe = tiny(**changes)
        model = build_model(recipe, num_classes=10, in_channels=1).eval()
        return Source(run, model, recipe, tuple(map(str, range(10))), accuracy)

    return made


@pytest.mark.parametrize(
    ("epochs", "warmup", "cooldown", "expected"),
    [(12, 2.0, 4.0, (3, 0.5, 1.0)), (300, 15.0, 0.0, (75, 3.75, 0.0)), (3, 0.6, 0.0, (1, 0.2, 0.0))],
)
def test_a_quarter_of_the_epochs_a_third_of_the_rate_and_as_much_less_warm_up(
    source, epochs, warmup, cooldown, expected
):
    optim = Optim(lr=3e-3, warmup_epochs=warmup, cooldown_epochs=cooldown, clip_grad=1.0)
    start = source(epochs=epochs, optim=optim)
    recipe = fine_tuning(start, mark="w4", changes=FOUR)
    assert (recipe.epochs, recipe.optim.warmup_epochs, recipe.optim.cooldown_epochs) == pytest.approx(expected)
    changed = dataclasses.replace(
        start.recipe,
        name="tiny_w4",
        init=Init(backbone="runs/tiny"),
        quantize=Quantize(bits=4),
        optim=dataclasses.replace(recipe.optim, lr=optim.lr / 3),
        epochs=recipe.epochs,
    )
    assert recipe == changed  # everything else is the run's own


def test_the_warm_up_ends_within_the_epochs_even_where_it_did_not_before(source):
    recipe = fine_tuning(source(epochs=4, optim=Optim(warmup_epochs=30.0)), mark="w4", changes=FOUR)
    assert (recipe.epochs, recipe.optim.warmup_epochs) == (1, 1.0)


def test_rates_that_change_by_the_epoch_warm_up_for_whole_ones(source):
    optim = Optim(warmup_epochs=6.0, per_epoch=True)
    whole = fine_tuning(source(epochs=16, optim=optim), mark="w4", changes=FOUR)
    none = fine_tuning(source(epochs=40, optim=dataclasses.replace(optim, warmup_epochs=2)), mark="w4", changes=FOUR)
    assert (whole.optim.warmup_epochs, none.optim.warmup_epochs) == (1.0, 0.0)  # of 1.5 and 0.5


def test_settings_win_and_what_is_not_set_follows_them(source):
    start = source(epochs=12, optim=Optim(lr=3e-3, warmup_epochs=3.0, cooldown_epochs=4.0))
    recipe = fine_tuning(start, mark="w4", changes=[*FOUR, ("epochs", "2"), ("optim.lr", "0.5"), ("seed", "7")])
    assert (recipe.epochs, recipe.optim.lr, recipe.seed) == (2, 0.5, 7)
    assert (recipe.optim.warmup_epochs, recipe.optim.cooldown_epochs) == pytest.approx((0.5, 2 / 3))
    longer = fine_tuning(start, mark="w4", changes=[*FOUR, ("epochs", "60"), ("optim.warmup_epochs", "5")])
    assert (longer.optim.warmup_epochs, longer.optim.cooldown_epochs) == (5.0, 4.0)  # not stretched


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bits": "1"}, "bits must be between 2 and 8, got 1"),
        ({"bits": "9"}, "bits must be between 2 and 8, got 9"),
        ({"bits": "0"}, "choose 2 to 8 bits"),
        ({"bits": "4", "layers.first": "16"}, "got 16"),
        ({"bits": "4", "layers.attenton": "8"}, "closest: attention"),
        ({"bits": "4", "layers.attention": "many"}, "bits of attention must be a whole number"),
    ],
)
def test_bits_that_cannot_be_are_refused_before_training(source, changes, told):
    with pytest.raises(ValueError, match=told):
        fine_tuning(source(), mark="w4", changes=[(f"quantize.{path}", text) for path, text in changes.items()])


def test_a_network_built_with_low_bits_goes_on_from_its_weights_at_other_bits(tiny, tmp_path):
    recipe = tiny(epochs=1, name="qsd")
    options = {"heads": 2, "layer_scale": 1.0}
    model = dataclasses.replace(recipe.model, name="qsd_transformer_t", neuron="ie_lif", options=options)
    train(dataclasses.replace(recipe, model=model), run=tmp_path / "qsd")
    start = read_source(tmp_path / "qsd")
    assert {layer.bits for _, layer, _ in quantizable(start.model)} == {4}
    anew = fine_tuning(start, mark="w2", changes=[("quantize.bits", "2"), ("optim.lr", "0"), ("optim.min_lr", "0")])
    train(anew, run=tmp_path / "w2")
    trained = dict(from_pretrained(tmp_path / "w2" / "model").named_parameters())
    for name, layer, _ in quantizable(start.model):  # a rate of 0 leaves the float weights; step sizes are new
        assert torch.equal(trained[f"{name}.weight"], layer.weight), name
        assert not torch.equal(trained[f"{name}.alpha"], layer.alpha), name
    packed = from_pretrained(pack_run(tmp_path / "w2"))
    assert {layer.bits for _, layer, _ in quantizable(packed)} == {2}
    with pytest.raises(ValueError, match=r"low-bit weights already, by its recipe \(quantize.bits=2\): .*/qsd"):
        read_source(tmp_path / "w2")
    with pytest.raises(ValueError, match=r"built with low-bit weights.* model.options.bits=0"):
        networks(tmp_path / "qsd", twin=None)


def test_packing_keeps_every_prediction_and_the_facts_are_those_of_the_files(source, tmp_path):
    start = source(run=tmp_path / "start", accuracy=0.75)
    model = prepare(start.model, bits={"*": 3, "attention": 8, "first": None})
    model.save_pretrained(tmp_path / "run" / "model")
    packed = pack_run(tmp_path / "run")
    assert packed == tmp_path / "run" / "packed"
    images = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(from_pretrained(packed)(images), from_pretrained(tmp_path / "run" / "model")(images))
    facts = dict(low_bit_facts(start, SimpleNamespace(accuracy=0.5), packed))
    assert facts["Test accuracy"] == f"75.00 % of {tmp_path / 'start'}"
    assert facts["With few bits"] == "50.00 % (-25.00 points)"
    assert facts["Bits, attention"].startswith("8 (24 layers)")
    assert facts["Bits, conv"] == "3 (19 layers), float (1 layer)"
    stored = sum((packed / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert facts["Packed"] == f"{stored / 1e6:.4f} MB on disk: {packed}"


def test_bits_are_counted_by_kind():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(2, 2, 1), torch.nn.Linear(2, 2))
    assert bits_by_kind(model) == {"conv": "float (2 layers)", "linear": "float (1 layer)"}
    prepare(model, bits={"first": 8, "*": 2})
    assert bits_by_kind(model) == {"conv": "2 (1 layer), 8 (1 layer)", "linear": "2 (1 layer)"}


@pytest.fixture
def noted(monkeypatch):
    """Trainings are noted, not done: by folder name their recipe; accuracies fall by a hundredth each time."""
    asked = {}

    def note(recipe, *, run, resume, console):
        asked[run.name] = recipe
        return SimpleNamespace(accuracy=0.9 - len(asked) / 100)

    monkeypatch.setattr(quantization, "train", note)
    return asked


def test_each_kind_alone_and_all_are_fine_tuned_in_folders_of_their_own(source, noted, tmp_path):
    start = source(epochs=12)
    found = sensitivity({"snn": start}, out=tmp_path, bits=3, epochs=2, changes=[("optim.lr", "0.25")])
    assert list(noted) == ["snn-linear", "snn-conv", "snn-attention", "snn-all"]
    chosen = {name: recipe.quantize.chosen() for name, recipe in noted.items()}
    kinds = {f"snn-{kind}": {kind: 3} for kind in ("linear", "conv", "attention")}
    assert chosen == kinds | {"snn-all": 3}
    assert {(each.epochs, each.optim.lr, each.init.backbone) for each in noted.values()} == {(2, 0.25, "runs/tiny")}
    values = found.accuracies["snn"]
    assert values.pop("float") == accuracy_of(start.model, start.recipe)
    assert values == pytest.approx({"linear": 0.89, "conv": 0.88, "attention": 0.87, "all": 0.86})


def test_without_epochs_networks_are_rounded_and_tested_as_they_are(source, noted, tmp_path):
    start = source()
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    found = sensitivity({"snn": start}, out=tmp_path, bits=2, epochs=0).accuracies["snn"]
    assert not noted
    assert not any(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())
    split = load_split(start.recipe.data, "test", seed=start.recipe.seed)
    for variant, bits in {"all": 2, "conv": {"conv": 2}}.items():
        model = build_model(start.recipe, num_classes=10, in_channels=1)
        assert found[variant] == evaluate(prepare(model, bits=bits), split).accuracy, variant


def test_a_network_without_attention_shows_a_dash_for_it(source, noted, tiny, tmp_path):
    model = dataclasses.replace(tiny().model, blocks=(1, 1, 1, 0, 0))
    found = sensitivity({"snn": source(model=model)}, out=tmp_path, bits=4, epochs=1)
    assert list(noted) == ["snn-linear", "snn-conv", "snn-all"]
    assert found.accuracies["snn"]["attention"] is None
    assert found.table()[1][3] == ["only attention", "–", "–"]
    assert found.plot(tmp_path).is_file()


def test_bits_or_settings_that_cannot_be_are_told_before_the_first_training(source, noted, tmp_path):
    for bits, changes in ((9, []), (4, [("optim.rate", "1")])):
        with pytest.raises(ValueError, match=r"between 2 and 8|optim\."):
            sensitivity({"snn": source()}, out=tmp_path, bits=bits, epochs=1, changes=changes)
    assert not noted


@pytest.fixture
def found() -> Sensitivity:
    snn = {"float": 0.8, "linear": 0.75, "conv": 0.8125, "attention": 0.5, "all": 0.4}
    ann = {"float": 0.9, "linear": 0.9, "conv": 0.89, "attention": None, "all": 0.85}
    return Sensitivity(4, 2, {"snn": "runs/a", "ann": "runs/b"}, {"snn": snn, "ann": ann})


def test_the_table_has_percent_and_points_lost(found):
    header, rows = found.table()
    assert header == ["4-bit weights", "SNN %", "points lost", "ANN %", "points lost"]
    assert rows == [
        ["none", "80.00", "0.00", "90.00", "0.00"],
        ["only FC", "75.00", "5.00", "90.00", "0.00"],
        ["only Conv", "81.25", "-1.25", "89.00", "1.00"],
        ["only attention", "50.00", "30.00", "–", "–"],
        ["all", "40.00", "40.00", "85.00", "5.00"],
    ]


def test_the_numbers_and_the_picture_are_saved(found, tmp_path):
    stored = json.loads(found.save(tmp_path / "out").read_text())
    assert {name: stored[name] for name in ("bits", "epochs", "runs", "accuracies")} == dataclasses.asdict(found)
    assert {"versions", "threads", "hardware", "command"} <= stored.keys()
    path = found.plot(tmp_path / "out")
    assert sorted(each.name for each in path.parent.iterdir()) == ["sensitivity.json", "sensitivity.png"]


def test_the_bars_are_as_high_as_the_accuracies(found, tmp_path):
    areas = dict.fromkeys(COLOURS, 0)
    for count, colour in Image.open(found.plot(tmp_path)).convert("RGB").getcolors(2**24):
        areas[colour] = count
    blue, orange = (areas[colour] for colour in COLOURS)
    # sums of the bars; edges of pixels and the two equal squares of the legend move it by a percent or two
    assert blue / orange == pytest.approx((0.8 + 0.75 + 0.8125 + 0.5 + 0.4) / (0.9 + 0.9 + 0.89 + 0.85), rel=0.02)


def test_the_networks_are_a_spiking_one_and_an_ann_in_float_of_the_same_classes(source, monkeypatch, tiny):
    twin = dataclasses.replace(tiny().model, **TWIN)
    runs = {
        "snn": source(run=Path("snn")),
        "ann": source(run=Path("ann"), model=twin),
        "other": dataclasses.replace(source(run=Path("other"), model=twin), classes=("cat", "dog")),
    }
    monkeypatch.setattr(quantization, "read_source", lambda run: runs[run.name])
    assert networks(Path("snn"), twin=None) == {"snn": runs["snn"]}
    assert networks(Path("snn"), twin=Path("ann")) == {"snn": runs["snn"], "ann": runs["ann"]}
    for run, other, told in (
        ("snn", "snn", r"--twin must be an ANN, but snn spikes \(model.neuron=i_lif\)"),
        ("ann", None, "ann has no spiking neuron: give it as --twin"),
        ("snn", "other", "other and snn know different classes"),
    ):
        with pytest.raises(ValueError, match=told):
            networks(Path(run), twin=other and Path(other))


def test_only_a_fine_tuning_of_the_same_run_is_resumed(source, tiny, tmp_path):
    for name in ("one", "two", "out"):
        (tmp_path / name).mkdir()
    one, two = (source(run=tmp_path / name) for name in ("one", "two"))
    assert stored_fine_tuning(tmp_path / "out", source=one) is None
    recipe = fine_tuning(one, mark="w4", changes=FOUR)
    write_json(tmp_path / "out" / "recipe.json", to_json(recipe))
    assert stored_fine_tuning(tmp_path / "out", source=one) == recipe
    with pytest.raises(ValueError, match=f"no fine-tuning of .*/two but tiny_w4, which started from {tmp_path}/one"):
        stored_fine_tuning(tmp_path / "out", source=two)
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = dataclasses.replace(one, run=tmp_path / "moved")
    assert stored_fine_tuning(tmp_path / "out", source=moved) == recipe
    write_json(tmp_path / "out" / "recipe.json", to_json(tiny()))
    with pytest.raises(ValueError, match="but tiny, which started from random weights"):
        stored_fine_tuning(tmp_path / "out", source=one)

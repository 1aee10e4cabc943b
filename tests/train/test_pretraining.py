"""Masked pre-training as a run: it learns, resumes exactly, leaves pictures and a dense encoder to finetune."""

import dataclasses
import json

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file

from spikeformers import from_pretrained
from spikeformers.data.images import ImageSplit, load_split
from spikeformers.train import checkpoint
from spikeformers.train.evaluate import batches_of
from spikeformers.train.logs import read_log
from spikeformers.train.loop import build_model, train
from spikeformers.train.pretraining import PICTURES, MaskedModelling
from spikeformers.train.recipe import Distill, Init, ModelChoice, Optim, Pretrain, Saving, override
from spikeformers.train.report import write_report
from spikeformers.train.saved import read_run
from spikeformers.train.seeds import train_seeds
from spikeformers.train.summary import PretrainSummary, read_summary
from spikeformers.weights import load_backbone

V2 = ModelChoice(name="spikformer_v2_8_384", neuron="lif")
V2 = dataclasses.replace(V2, options={"dim": 16, "depth": 1, "heads": 2, "patch_size": 4})


@pytest.fixture
def mae(tiny):
    """Call with fields of `Recipe` to change: a pre-training of a second."""
    pretrain = Pretrain(mask_ratio=0.75, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    return lambda **changes: tiny(**({"model": V2, "pretrain": pretrain, "name": "tiny_mae"} | changes))


def test_pre_training_lowers_the_loss_of_hidden_patches(mae, tmp_path):
    recipe = mae(epochs=12, optim=Optim(lr=5e-3, clip_grad=1.0))
    summary = train(recipe, run=tmp_path / "run")
    losses = [record["test_loss"] for record in read_log(tmp_path / "run", "epoch")]
    assert isinstance(summary, PretrainSummary)
    assert summary.loss == losses[-1] < 0.9 < losses[0]
    assert summary.best_loss == min(losses)
    assert (summary.visible, summary.patches) == (4, 16)
    assert read_summary(tmp_path / "run") == summary
    assert "stem.blocks.0.neuron" in summary.layers


def test_a_run_leaves_a_dense_encoder_pictures_and_a_report(mae, tmp_path):
    run = tmp_path / "run"
    train(mae(), run=run)
    encoder = from_pretrained(run / "model")
    stored = load_file(run / "checkpoints" / "epoch-0002" / "model.safetensors")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, stored[f"encoder.{name}"]), name
    # Eight rows of three pictures of 16 pixels, with gaps of two.
    assert Image.open(run / PICTURES).size == (3 * 18 + 2, 8 * 18 + 2)
    page = write_report(run).read_text()
    assert 'id="reconstructions"' in page
    assert "Loss of hidden patches" in page
    assert "Confusion" not in page
    with pytest.raises(ValueError, match="learnt nothing: finetune it first"):
        read_run(run)


@pytest.mark.parametrize("unfinished", [False, True])
def test_finetuning_starts_from_the_encoder(mae, tiny, tmp_path, unfinished):
    train(mae(), run=tmp_path / "mae")
    if unfinished:
        (tmp_path / "mae" / "summary.json").unlink()
        (tmp_path / "mae" / "model" / "model.safetensors").unlink()
    recipe = tiny(model=V2, init=Init(backbone=str(tmp_path / "mae")), optim=Optim(lr=1e-3, layer_decay=0.7))
    start = build_model(recipe, num_classes=10, in_channels=1)
    load_backbone(start, recipe.init.backbone)
    stored = load_file(tmp_path / "mae" / "checkpoints" / "epoch-0002" / "model.safetensors")
    body = {name: value for name, value in start.state_dict().items() if not name.startswith("head.")}
    assert body
    assert all(torch.equal(value, stored[f"encoder.{name}"]) for name, value in body.items())
    assert 0 <= train(recipe, run=tmp_path / "tuned").accuracy <= 1


def test_an_interrupted_pre_training_ends_as_the_uninterrupted_one(mae, tmp_path, monkeypatch):
    recipe = mae(saving=Saving(every_steps=2, keep=0))
    train(recipe, run=tmp_path / "whole")
    original, seen = ImageSplit.__getitem__, []

    def getitem(self, key):
        if isinstance(key, tuple) and key[0] == 1:
            seen.append(key)
            if len(seen) == 29:
                monkeypatch.undo()
                raise ConnectionError("power cut")
        return original(self, key)

    monkeypatch.setattr(ImageSplit, "__getitem__", getitem)
    with pytest.raises(ConnectionError):
        train(recipe, run=tmp_path / "broken")
    train(recipe, run=tmp_path / "broken", resume=True)
    one, other = (checkpoint.load(tmp_path / run / "checkpoints" / "epoch-0002")[0] for run in ("whole", "broken"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [[r["test_loss"] for r in read_log(tmp_path / run, "epoch")] for run in ("whole", "broken")]
    assert losses[0] == losses[1]


def test_tests_repeat_their_masks_and_leave_the_mode_alone(mae):
    recipe = mae()
    task = MaskedModelling(recipe)
    model = task.wrap(build_model(recipe, num_classes=10, in_channels=1)).train()
    loader = batches_of(load_split(recipe.data, "test"), batch_size=5)
    assert task.test(model, loader) == task.test(model, loader)
    assert model.training
    with pytest.raises(ValueError, match="nothing to test on"):
        task.test(model, [])
    broken = [(torch.full((2, 1, 16, 16), torch.nan), torch.zeros(2))]
    with pytest.raises(ValueError, match="not finite"):
        task.test(model, broken)


def test_the_classifier_takes_no_part(mae):
    recipe = mae()
    model = MaskedModelling(recipe).wrap(build_model(recipe, num_classes=10, in_channels=1))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.head.weight", "encoder.head.bias"}


def test_recipes_without_a_ratio_classify_and_old_ones_too(tiny, tmp_path):
    train(tiny(epochs=1), run=tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    del stored["recipe"]["pretrain"]  # written before there was pre-training
    (tmp_path / "run" / "summary.json").write_text(json.dumps(stored))
    assert read_summary(tmp_path / "run").accuracy == stored["accuracy"]


def test_an_ann_twin_trains_and_reports_without_spikes(tiny, tmp_path):
    options = V2.options | {"shortcut": "residual", "attention": "softmax"}
    summary = train(tiny(model=dataclasses.replace(V2, neuron="gelu", options=options)), run=tmp_path / "run")
    assert (summary.integer_agreement, summary.layers, summary.firing_rate) == (None, {}, 0)
    assert summary.energy_mj == pytest.approx(summary.ann_energy_mj)
    assert "Integer engine" not in write_report(tmp_path / "run").read_text()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"label_smoothing": 0.1}, "label_smoothing=0.1"), ({"distill": Distill(teacher="resnet18")}, "distill.teacher")],
)
def test_settings_that_only_labels_could_use_are_refused(mae, tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"{named}.* is of no use in pre-training"):
        train(mae(**changes), run=tmp_path / "run")
    mixed = override(mae(), "data.augment.mixup", "0.8")
    with pytest.raises(ValueError, match=r"mixup=0.8 is of no use"):
        train(mixed, run=tmp_path / "run")


def test_seeds_of_a_pre_training_are_refused(mae, tmp_path):
    with pytest.raises(ValueError, match="it has no accuracy to average"):
        train_seeds(mae(), [0, 1], run=tmp_path)

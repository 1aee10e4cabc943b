import dataclasses
import io
import json
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import spikeformers
from spikeformers.data import digits, images, sources
from spikeformers.data.images import ImageSplit, load_split
from spikeformers.train import checkpoint
from spikeformers.train.evaluate import batches_of, evaluate
from spikeformers.train.logs import read_log
from spikeformers.train.loop import build_model, train
from spikeformers.train.recipe import Distill, Init, Optim, Saving, override, to_json
from spikeformers.train.saved import read_run, stored_recipe
from spikeformers.train.seeds import train_seeds


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def interrupt_at(monkeypatch, epoch, place):
    """The `place`-th training image of `epoch` is never read: the user pulls the plug there."""
    original, seen = ImageSplit.__getitem__, []

    def getitem(self, key):
        if isinstance(key, tuple) and key[0] == epoch:
            seen.append(key)
            if len(seen) == place:
                monkeypatch.undo()
                raise ConnectionError("power cut")
        return original(self, key)

    monkeypatch.setattr(ImageSplit, "__getitem__", getitem)


def untimed(run, kind):
    timed = ("seconds", "images_per_second")
    return [{key: value for key, value in record.items() if key not in timed} for record in read_log(run, kind)]


def assert_same_run(one, other, *, epochs):
    """Weights, optimiser, average and log of two runs are equal to the bit."""
    names = [f"checkpoints/epoch-{epochs:04d}", "checkpoints/epoch-0001"]
    for name in names:
        (model, training, _), (model2, training2, _) = checkpoint.load(one / name), checkpoint.load(other / name)
        assert model.keys() == model2.keys()
        assert all(torch.equal(model[key], model2[key]) for key in model)
        first, second = io.BytesIO(), io.BytesIO()
        torch.save(training, first), torch.save(training2, second)
        assert first.getvalue() == second.getvalue()
    weights, weights2 = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert all(torch.equal(weights[key], weights2[key]) for key in weights)
    for kind in ("epoch", "step"):
        assert untimed(one, kind) == untimed(other, kind)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("place", [1, 29], ids=["epoch_end", "mid_epoch"])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(tiny, tmp_path, monkeypatch, precision, place):
    recipe = tiny(precision=precision, ema_decay=0.9, accumulate=2, batch_size=4, saving=Saving(every_steps=2, keep=0))
    recipe = override(recipe, "data.augment.mixup", "0.8")
    train(recipe, run=tmp_path / "whole")
    interrupt_at(monkeypatch, 1, place)
    with pytest.raises(ConnectionError):
        train(recipe, run=tmp_path / "broken")
    expected = "epoch-0001" if place == 1 else "epoch-0001-step-000002"
    assert checkpoint.newest(tmp_path / "broken" / "checkpoints").name == expected
    train(recipe, run=tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken", epochs=2)


def test_an_interrupted_run_on_streamed_pictures_ends_as_the_uninterrupted_one(tiny, tmp_path, monkeypatch):
    pixels, labels = digits.digits("train")
    for part in ("train-0", "train-1", "test-0"):
        pictures = [{"bytes": png(each)} for each in pixels[:16]]
        table = pa.table({"image": pictures, "label": labels[:16]})
        pq.write_table(table, tmp_path / f"{part}.parquet", row_group_size=4)
    monkeypatch.setattr(sources, "ENCODED_LIMIT", 0)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    data = dataclasses.replace(tiny().data, source="parquet", root=str(tmp_path))
    recipe = tiny(data=data, saving=Saving(every_steps=1, keep=0))
    train(recipe, run=tmp_path / "whole")
    with monkeypatch.context() as cut:
        interrupt_at(cut, 1, 20)
        with pytest.raises(ConnectionError):
            train(recipe, run=tmp_path / "broken")
    assert checkpoint.newest(tmp_path / "broken" / "checkpoints").name == "epoch-0001-step-000002"
    train(recipe, run=tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken", epochs=2)


def test_an_interrupted_run_with_layer_decay_ends_as_the_uninterrupted_one(tiny, tmp_path, monkeypatch):
    optim = Optim(lr=2e-3, warmup_epochs=1, warmup_lr=1e-4, cooldown_epochs=1, per_epoch=True, layer_decay=0.5)
    recipe = tiny(epochs=3, optim=optim, saving=Saving(every_steps=2, keep=0))
    recipe = override(override(recipe, "data.augment.mixup", "0.8"), "data.augment.mixing_epochs", "2")
    train(recipe, run=tmp_path / "whole")
    interrupt_at(monkeypatch, 1, 25)
    with pytest.raises(ConnectionError):
        train(recipe, run=tmp_path / "broken")
    assert checkpoint.newest(tmp_path / "broken" / "checkpoints").name == "epoch-0001-step-000002"
    train(recipe, run=tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken", epochs=3)
    rates = [record["lr"] for record in read_log(tmp_path / "whole", "epoch")]
    assert rates == pytest.approx([1e-4, 1e-6 + (2e-3 - 1e-6) / 2, 1e-6])  # of the classifier: no layer's own
    steps = read_log(tmp_path / "whole", "step")
    assert [record["lr"] for record in steps] == [rates[2]]  # step 10 of 12
    _, training, _ = checkpoint.load(tmp_path / "whole" / "checkpoints" / "epoch-0002")
    groups = training["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.5**depth for depth in range(6)}
    assert all(group["lr"] == rates[1] * group["lr_scale"] for group in groups)


def test_ctrl_c_saves_the_step_and_resumes_to_the_same_result(tiny, tmp_path, monkeypatch):
    train(tiny(saving=Saving(keep=0)), run=tmp_path / "whole")
    original = ImageSplit.__getitem__

    def getitem(self, key):
        if isinstance(key, tuple) and key[0] == 1:
            monkeypatch.undo()
            signal.raise_signal(signal.SIGINT)
        return original(self, key)

    monkeypatch.setattr(ImageSplit, "__getitem__", getitem)
    with pytest.raises(KeyboardInterrupt, match="stopped and saved in epoch 2 after step 1"):
        train(tiny(saving=Saving(keep=0)), run=tmp_path / "broken")
    train(tiny(saving=Saving(keep=0)), run=tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken", epochs=2)


def test_a_finished_run_holds_everything_and_loads(tiny, tmp_path):
    text = io.StringIO()
    summary = train(tiny(), run=tmp_path / "run", console=Console(file=text))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.json", "log.jsonl", "tensorboard", "checkpoints", "model", "summary.json"} <= names
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(summary)))
    assert sum(map(sum, stored["confusion"])) == len(stored["predictions"]) == 12
    assert stored["integer_agreement"]["total"] == 12
    assert 0 < stored["firing_rate"] < 1
    assert stored["energy_mj"] > 0
    model = spikeformers.from_pretrained(tmp_path / "run" / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == stored["parameters"]
    epochs = read_log(tmp_path / "run", "epoch")
    assert [record["epoch"] for record in epochs] == [0, 1]
    assert epochs[-1]["test_accuracy"] == stored["accuracy"]
    assert "epoch 2/2" in text.getvalue()
    pointers = {name: checkpoint.pointed(tmp_path / "run" / "checkpoints", name) for name in ("best", "last")}
    assert pointers["last"].name == "epoch-0002"
    assert pointers["best"] is not None


def test_a_finished_run_is_not_trained_again(tiny, tmp_path):
    first = train(tiny(epochs=1), run=tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    assert train(tiny(epochs=1), run=tmp_path, resume=True) == first
    assert (tmp_path / "log.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="already holds a run; continue it with --resume"):
        train(tiny(epochs=1), run=tmp_path)
    with pytest.raises(ValueError, match="epochs: 1 -> 2"):
        train(tiny(epochs=2), run=tmp_path, resume=True)


def test_a_finished_run_without_its_model_says_so_and_makes_it_again(tiny, tmp_path):
    first = train(tiny(epochs=1), run=tmp_path)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"is finished, but its .*/model is gone: .*remove .*/summary.json and --resume"
    ):
        train(tiny(epochs=1), run=tmp_path, resume=True)
    (tmp_path / "summary.json").unlink()
    assert train(tiny(epochs=1), run=tmp_path, resume=True).accuracy == first.accuracy
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


def test_the_same_seed_gives_the_same_network_and_another_does_not(tiny, tmp_path):
    result = train_seeds(tiny(epochs=1), (0, 1), run=tmp_path / "two")
    again = train(tiny(epochs=1), run=tmp_path / "again")
    runs = ("two/seed-0", "again", "two/seed-1")
    weights = [load_file(tmp_path / run / "model" / "model.safetensors")["head.weight"] for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert again.predictions == result.summaries[0].predictions
    accuracies = [each.accuracy for each in result.summaries]
    assert result.mean == pytest.approx(sum(accuracies) / 2)
    assert result.sd == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert json.loads((tmp_path / "two" / "seeds.json").read_text())["accuracies"] == accuracies


def test_bfloat16_with_lamb_stays_near_float32_and_saves_float32(tiny, tmp_path):
    recipe = tiny(epochs=1, optim=Optim(name="lamb", lr=1e-2))
    train(recipe, run=tmp_path / "float32")
    train(dataclasses.replace(recipe, precision="bfloat16"), run=tmp_path / "bfloat16")
    wide, narrow = (read_log(tmp_path / name, "epoch")[0]["train_loss"] for name in ("float32", "bfloat16"))
    assert narrow != wide  # autocast was on
    assert narrow == pytest.approx(wide, abs=0.1)  # of log 10 = 2.3: spikes flip, the loss hardly moves
    weights = load_file(tmp_path / "bfloat16" / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}


def test_a_teacher_trains_the_second_head(tiny, tmp_path):
    recipe = tiny(epochs=1, distill=Distill(teacher="test_vit", weights="random"))
    with pytest.raises(ValueError, match=r"distill\.weights"):
        train(override(recipe, "distill.weights", "no/file"), run=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    recipe = override(recipe, "data.size", "160")  # what this teacher was made for
    recipe = override(recipe, "model.strides", "8,4,2,1,1")
    train(recipe, run=tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {"head.weight", "head_kd.weight"} <= weights.keys()
    assert len(read_log(tmp_path / "run", "epoch")) == 1


@pytest.mark.parametrize("where", ["image", "loss"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, where):
    original = ImageSplit.__getitem__

    def getitem(self, key):
        image, label = original(self, key)
        bad = isinstance(key, tuple) and key[0] == 1
        factor = {"image": float("nan"), "loss": 1e30}[where]
        return (image * factor if bad else image), label

    monkeypatch.setattr(ImageSplit, "__getitem__", getitem)
    with pytest.raises(ValueError, match=r"stopped in epoch 2.*not finite.*|.*the loss is.*") as caught:
        train(tiny(), run=tmp_path)
    assert str(caught.value).count("epoch-0001") == 1
    monkeypatch.undo()
    train(tiny(), run=tmp_path, resume=True)  # the checkpoint is good


def test_any_recipe_starts_from_another_run(tiny, tmp_path):
    train(tiny(epochs=1), run=tmp_path / "first")
    before = load_file(tmp_path / "first" / "model" / "model.safetensors")
    recipe = tiny(epochs=1, init=Init(backbone=str(tmp_path / "first")), optim=Optim(lr=0.0, min_lr=0.0))
    train(recipe, run=tmp_path / "second")
    after = load_file(tmp_path / "second" / "model" / "model.safetensors")
    learnt = [key for key in before if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.equal(before[key], after[key]) for key in learnt)
    with pytest.raises(ValueError, match="nowhere"):
        train(tiny(init=Init(backbone="nowhere")), run=tmp_path / "third")


def test_resuming_does_not_want_the_backbone_again(tiny, tmp_path, monkeypatch):
    train(tiny(epochs=1), run=tmp_path / "first")
    recipe = tiny(init=Init(backbone=str(tmp_path / "first")))
    interrupt_at(monkeypatch, 1, 1)
    with pytest.raises(ConnectionError):
        train(recipe, run=tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    train(recipe, run=tmp_path / "second", resume=True)


def test_a_stored_recipe_resumes_the_run_from_data_that_moved(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert stored_recipe(run, name="tiny") is None
    interrupt_at(monkeypatch, 1, 1)
    with pytest.raises(ConnectionError):
        train(tiny(), run=run)
    assert stored_recipe(run, name="tiny") == tiny()
    with pytest.raises(ValueError, match="is a run of tiny, not of digits"):
        stored_recipe(run, name="digits")
    moved = override(stored_recipe(run, name="tiny"), "data.root", "elsewhere")
    train(moved, run=run, resume=True)
    assert stored_recipe(run, name="tiny") == moved


def test_resuming_on_other_images_or_with_other_processes_is_refused(tiny, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 1, 1)
    with pytest.raises(ConnectionError):
        train(tiny(), run=tmp_path)
    state = checkpoint.newest(tmp_path / "checkpoints") / "state.json"
    stored = json.loads(state.read_text())
    assert stored["fixed"] == {"images": 32, "processes": 1}
    for fixed, message in (
        ({"images": 33, "processes": 1}, "trained on 33 images, but there are 32 now: set data.root"),
        ({"images": 32, "processes": 3}, "trained by 3 process.*--num_processes 3"),
    ):
        state.write_text(json.dumps(stored | {"fixed": fixed}))
        with pytest.raises(ValueError, match=message):
            train(tiny(), run=tmp_path, resume=True)


def test_the_recipe_of_a_run_of_seeds_is_found_in_its_seeds(tiny, tmp_path):
    (tmp_path / "seed-3").mkdir()
    checkpoint.write_json(tmp_path / "seed-3" / "recipe.json", to_json(tiny(seed=3)))
    assert stored_recipe(tmp_path, name="tiny") == tiny(seed=3)


def test_only_the_main_process_writes_the_seeds_file(tiny, tmp_path, monkeypatch):
    summary = train(tiny(epochs=1), run=tmp_path / "seed-0")
    monkeypatch.setattr("spikeformers.train.seeds.train", lambda *_, **__: summary)
    monkeypatch.setattr(PartialState, "is_main_process", False)
    assert train_seeds(tiny(), (0,), run=tmp_path).mean == summary.accuracy
    assert not (tmp_path / "seeds.json").exists()


def test_an_averaged_network_is_the_one_tested_and_saved(tiny, tmp_path):
    summary = train(tiny(ema_decay=0.5), run=tmp_path)
    plain, training, _ = checkpoint.load(tmp_path / "checkpoints" / "epoch-0002")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(value, training["ema"][key]) for key, value in saved.items())
    assert not torch.equal(saved["head.weight"], plain["head.weight"])
    model, recipe, _ = read_run(tmp_path)
    found = evaluate(model, batches_of(load_split(recipe.data, "test"), batch_size=recipe.batch_size))
    assert found.loss == summary.loss


def test_gradients_are_clipped_before_the_step(tiny, tmp_path):
    optim = Optim(name="sgd", lr=1.0, weight_decay=0.0, clip_grad=1e-3)
    recipe = tiny(epochs=1, batch_size=32, optim=optim)  # one step
    before = build_model(recipe, num_classes=10, in_channels=1)
    train(recipe, run=tmp_path)
    after = load_file(tmp_path / "checkpoints" / "epoch-0001" / "model.safetensors")
    moved = torch.cat([(after[name] - value.detach()).flatten() for name, value in before.named_parameters()])
    # Nesterov momentum of 0.9 makes the first step 1.9 gradients long; lr is 1.
    assert float(moved.norm()) == pytest.approx(1.9e-3, rel=0.01)  # float32 weights hold so short a step to 1 %


def test_tensorboard_shows_what_the_log_holds(tiny, tmp_path):
    train(tiny(epochs=3), run=tmp_path)  # 12 steps, so that one of them is logged
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for kind, names in (("epoch", ("test_accuracy", "train_loss", "firing_rate")), ("step", ("loss", "gradient_norm"))):
        records = read_log(tmp_path, kind)
        assert records
        for name in names:
            shown = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
            assert shown == [(record["step"], pytest.approx(record[name])) for record in records]


def test_too_few_images_for_a_step_say_so(tiny, tmp_path):
    with pytest.raises(ValueError, match="lower"):
        train(tiny(accumulate=5), run=tmp_path / "a")
    with pytest.raises(ValueError, match="lower batch_size to at most"):
        train(tiny(batch_size=64), run=tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_the_best_checkpoint_stays_when_others_are_pruned(tiny, tmp_path):
    train(tiny(epochs=4, saving=Saving(keep=1)), run=tmp_path)
    records = read_log(tmp_path, "epoch")
    best = max(range(4), key=lambda i: (records[i]["test_accuracy"], i)) + 1
    kept = {folder.name for folder in checkpoint.complete(tmp_path / "checkpoints")}
    assert kept == {f"epoch-{best:04d}", "epoch-0004"}
    assert checkpoint.pointed(tmp_path / "checkpoints", "best").name == f"epoch-{best:04d}"


def test_the_launchers_precision_does_not_override_the_recipe(tiny, tmp_path, monkeypatch):
    train(tiny(epochs=1), run=tmp_path / "plain")
    AcceleratorState._reset_state(reset_partial_state=True)  # or the first one's precision stays
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(tiny(epochs=1), run=tmp_path / "told")
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("plain", "told")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(("plugin", "name"), [("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron")])
def test_plugins_that_split_the_network_are_refused(tiny, tmp_path, monkeypatch, plugin, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(ValueError, match=f"{name}.* is not supported.*launch without it"):
        train(tiny(), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_version_is_refused_by_name(tiny, tmp_path):
    recipe = tiny(epochs=1)
    train(recipe, run=tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "checkpoints" / "epoch-0001" / "state.json"
    state = json.loads(path.read_text())
    del state["best_score"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"epoch-0001 was written by another version \(it has no best_score\)"):
        train(recipe, run=tmp_path / "run", resume=True)

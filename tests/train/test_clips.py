"""Clips of events through the loop: steps, streams, mixing, and what a run of them leaves behind."""

import io
import re
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import spikeformers as sf
from spikeformers.data.augment import mixed, mixing
from spikeformers.data.event_augment import EventAugment
from spikeformers.data.event_clips import EventData
from spikeformers.data.splits import load_split
from spikeformers.train.clips import step_by_step, stream
from spikeformers.train.evaluate import batches_of, evaluate
from spikeformers.train.loop import build_model, train
from spikeformers.train.recipe import ModelChoice, Optim, Pretrain, Recipe, Testing
from spikeformers.train.report import write_report
from spikeformers.train.tasks import build_task

TINY = {"dim": 16, "depth": 1, "heads": 2, "patch_size": 8}


def recipe(**changes) -> Recipe:
    tiny = Recipe(
        name="tiny",
        data=EventData(steps=3, train_limit=20, test_limit=12),
        model=ModelChoice(name="spikformer_dvs_2_256", options=TINY),
        optim=Optim(lr=1e-3),
        testing=Testing(energy_images=4, integer_images=4),
        epochs=1,
        batch_size=10,
        threads=1,
    )
    return replace(tiny, **changes)


def settled(steps: int, *, neuron: str = "lif") -> torch.nn.Module:
    """A network in float64 whose norms know clips."""
    torch.manual_seed(0)
    model = sf.create_model("spikformer_dvs_2_256", num_classes=10, steps=steps, neuron=neuron, **TINY).double()
    for _ in range(4):
        model(2 * torch.rand(steps, 8, 2, 32, 32, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("neuron", ["lif", "i_lif"])
def test_a_stream_gives_after_the_last_frame_what_the_whole_clip_gives(neuron):
    model, clip = settled(4, neuron=neuron), 2 * torch.rand(4, 3, 2, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = model(clip)
        first = sf.neurons.set_steps(model, 2)(clip[:2])
    sf.neurons.set_steps(model, 4)
    steps = list(stream(model, clip))
    assert len(steps) == 4
    torch.testing.assert_close(steps[1], first, rtol=0, atol=1e-12)  # sums in another order
    torch.testing.assert_close(steps[3], whole, rtol=0, atol=1e-12)


def test_between_frames_the_caller_keeps_its_gradients():
    model = settled(2)
    frames = stream(model, torch.rand(2, 1, 2, 32, 32, dtype=torch.float64))
    next(frames)
    assert torch.is_grad_enabled()
    frames.close()
    assert model.steps == 2


@pytest.mark.parametrize("group", ["distill", "fgd"])
def test_what_works_on_pictures_only_is_refused(group):
    teacher = replace(getattr(recipe(), group), teacher="resnet10t")
    with pytest.raises(ValueError, match=rf"{group}.teacher=resnet10t works on pictures, and digits_dvs gives clips"):
        build_task(replace(recipe(), **{group: teacher}), split=None, device=torch.device("cpu"))


def test_masked_pre_training_of_clips_is_refused():
    masked = replace(recipe(), pretrain=Pretrain(mask_ratio=0.5))
    with pytest.raises(ValueError, match=r"pretrain.mask_ratio=0.5 works on pictures, and digits_dvs gives clips"):
        build_task(masked, split=None, device=torch.device("cpu"))


def test_accuracy_by_step_ends_at_that_of_whole_clips_and_rates_are_those_of_each_frame():
    model = settled(3)
    split = load_split(EventData(steps=3, test_limit=12), "test")
    loader = batches_of(split, batch_size=5)
    found = step_by_step(model, loader)
    assert found.accuracy[-1] == evaluate(model, loader).accuracy
    clips, _ = split.collate([split[index] for index in range(12)])
    with sf.record(model) as spikes, torch.no_grad():
        model(clips.double())
    fired = [sum(int(each.unflatten(0, (3, 12))[t].sum()) for each in spikes.values()) for t in range(3)]
    sites = sum(each.numel() for each in spikes.values()) / 3
    assert found.firing_rate == pytest.approx([count / sites for count in fired], rel=1e-12)


def test_an_ann_of_clips_has_accuracies_and_no_rates():
    model = sf.create_model("spikformer_dvs_2_256", num_classes=10, **TINY, neuron="gelu", shortcut="residual")
    split = load_split(EventData(steps=16, test_limit=4), "test")
    found = step_by_step(model, batches_of(split, batch_size=4))
    assert (len(found.accuracy), found.firing_rate) == (16, [])


def test_mixing_takes_all_frames_of_two_clips_in_one_proportion():
    mixer = mixing(EventAugment(mixup=0.5), num_classes=10)
    clips, labels = torch.stack([torch.full((2, 1, 4, 4), float(i)) for i in range(4)], 1), torch.arange(4)
    torch.manual_seed(0)
    found, target = mixed(mixer, clips.clone(), labels)
    assert found.shape == clips.shape
    share = target[0, 0]
    assert torch.allclose(found[:, 0], (1 - share) * 3 * torch.ones(2, 1, 4, 4))
    assert torch.allclose(found[0], found[1])


def test_a_share_of_batches_is_mixed():
    mixer = mixing(EventAugment(mixup=0.5), num_classes=4, share=0.5)
    clips, labels = torch.stack([torch.full((2, 1, 4, 4), float(i)) for i in range(4)], 1), torch.arange(4)
    left = sum(torch.equal(mixed(mixer, clips.clone(), labels)[0], clips) for _ in range(100))
    assert 25 < left < 75


def test_cutmix_cuts_the_same_window_out_of_all_frames():
    mixer = mixing(EventAugment(cutmix=1.0), num_classes=4)
    clips, labels = torch.stack([torch.full((3, 2, 8, 8), float(i)) for i in range(4)], 1), torch.arange(4)
    found, target = mixed(mixer, clips.clone(), labels)
    assert (found == found[:1, :, :1]).all()
    assert (found[0, 0, 0] == 3).float().mean() == pytest.approx(float(target[0, 3]), abs=1e-6)


def test_the_network_runs_as_many_steps_as_a_clip_has():
    assert build_model(recipe(), num_classes=10, in_channels=2).steps == 3
    wrong = replace(recipe(), model=replace(recipe().model, steps=4))
    with pytest.raises(ValueError, match=r"model.steps=4, but clips have data.steps=3: leave model.steps out"):
        build_model(wrong, num_classes=10, in_channels=2)


def test_a_clip_that_is_not_finite_stops_the_test():
    model, clips = settled(3), torch.zeros(3, 2, 2, 32, 32)
    clips[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        evaluate(model, [(clips, torch.tensor([0, 1]))])


def test_a_run_of_clips_tells_accuracy_and_firing_by_step(tmp_path):
    text = io.StringIO()
    summary = train(recipe(), run=tmp_path / "run", console=Console(file=text, width=1000))
    assert re.search(r"epoch 1/1 .* \d+ clips/s", text.getvalue())
    assert len(summary.by_step["accuracy"]) == len(summary.by_step["firing_rate"]) == 3
    assert summary.by_step["accuracy"][-1] == pytest.approx(summary.accuracy, abs=0.1)  # float32 rounds otherwise
    assert summary.integer_agreement["total"] == 4
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Accuracy by step, %" in page
    assert "Firing by step, %" in page
    assert page.count("data:image/png") >= 12  # event pictures


def test_clips_too_few_for_a_step_are_told_with_what_would_do(tmp_path):
    message = r"20 training clips do not fill one step of batch_size=10 x accumulate=3 .*product of at most 20$"
    with pytest.raises(ValueError, match=message):
        train(recipe(accumulate=3), run=tmp_path / "run")


def test_training_and_test_clips_of_different_frames_are_refused(tmp_path):
    for split, rows in (("train", 34), ("test", 36)):
        for name in ("a", "b"):
            path = tmp_path / split / name / "0.txt"
            path.parent.mkdir(parents=True)
            path.write_text(f"34 {rows}\n1 2 3 1\n")
    folder = recipe(data=EventData(source="eventfolder", root=str(tmp_path), steps=3), batch_size=2)
    message = r"training clips have frames of \(34, 34\) .*, test clips of \(36, 34\): set data.size"
    with pytest.raises(ValueError, match=message):
        train(folder, run=tmp_path / "run")


def test_a_run_of_clips_resumes_to_the_same_weights(tmp_path):
    two = recipe(epochs=2, data=replace(recipe().data, augment=EventAugment(flip=0.5, wide=1.0, mixup=0.5)))
    whole = train(two, run=tmp_path / "whole")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    shutil.rmtree(sorted((again / "checkpoints").glob("epoch*"))[-1])
    (again / "summary.json").unlink()
    resumed = train(two, run=again, resume=True)
    assert resumed.loss == whole.loss
    assert resumed.predictions == whole.predictions

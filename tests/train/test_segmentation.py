"""Segmentation as a task: training to a summary, resuming, whole and sliding tests, class weights, what it refuses."""

import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from torch import nn

from spikeformers.data.splits import load_split
from spikeformers.deploy import integer
from spikeformers.train import optimise
from spikeformers.train.evaluate import batches_of
from spikeformers.train.loop import _check_folder, _Work, build_model, train
from spikeformers.train.recipe import Init, Optim, Saving, Segmentation, to_json
from spikeformers.train.seeds import train_seeds
from spikeformers.train.segmentation import SemanticSegmentation, windows_of
from spikeformers.train.segmentation_evaluate import (
    SegmentationResult,
    Windows,
    balanced_weights,
    evaluate_segmentation,
    pixel_agreement,
    scores_of,
)
from spikeformers.train.summary import SegmentationSummary, read_summary
from spikeformers.train.tasks import build_task
from spikeformers.zoo import from_pretrained

POLY = Optim(
    lr=5e-3, schedule="poly", warmup_epochs=0.5, rates={"backbone": 0.1}, undecayed=("classify",), decay_1d=True
)
CPU = torch.device("cpu")


class Painter(nn.Module):
    """A segmenter whose class scores are its input's channels."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, images):
        return images * self.scale

    def semantic(self, output, size):
        return nn.functional.interpolate(output, size, mode="bilinear")


def test_miou_by_hand():
    """Truth 0 0 / 1 2 predicted 0 1 / 1 1: IoUs 1/2, 1/3 and 0, with a fourth class that is nowhere."""
    truth = torch.tensor([[[0, 0], [1, 2]]])
    guess = nn.functional.one_hot(torch.tensor([[[0, 1], [1, 1]]]), 4).permute(0, 3, 1, 2).double()
    found = evaluate_segmentation(Painter(), [(guess, truth)])
    assert found.confusion.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found.by_class("abcd") == {"a": 1 / 2, "b": 1 / 3, "c": 0.0, "d": None}
    assert found.miou == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert found.pixel_accuracy == 1 / 2
    assert found.mean_accuracy == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found.score == found.miou == found.metrics()["test_miou"]


def test_ignored_pixels_count_nowhere():
    truth = torch.tensor([[[0, 255], [1, 255]]])
    guess = nn.functional.one_hot(torch.tensor([[[0, 1], [1, 0]]]), 2).permute(0, 3, 1, 2).double()
    found = evaluate_segmentation(Painter(), [(guess, truth)])
    assert found.confusion.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match="all its pixels are ignored"):
        evaluate_segmentation(Painter(), [(guess, torch.full_like(truth, 255))])


def test_labels_may_be_of_another_size_than_the_image():
    """Scores are enlarged to the labels: a picture of two halves stays one at twice the size."""
    halves = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]] * 4, [[0.0, 0.0, 1.0, 1.0]] * 4]], dtype=torch.float64)
    truth = torch.tensor([[[0] * 4 + [1] * 4] * 8])
    assert evaluate_segmentation(Painter(), [(halves, truth)]).miou == 1.0


def test_what_is_not_finite_is_refused():
    images = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="test batch 0 gives values that are not finite"):
        evaluate_segmentation(Painter(), [(images, torch.zeros(1, 2, 2, dtype=torch.long))])


def test_one_window_as_large_as_the_image_is_the_whole_image(segmenting):
    model = build_model(segmenting(), num_classes=3, in_channels=3).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    whole = scores_of(model, images, size=(20, 30))
    for crop in ((32, 32), (64, 48)):
        assert torch.equal(scores_of(model, images, size=(20, 30), windows=Windows(crop, (16, 16))), whole)


def test_overlapping_windows_are_averaged():
    """On a network that adds 1 to a window, the sum over windows divided by their number adds 1 everywhere."""
    images = torch.randn(1, 2, 7, 9, dtype=torch.float64)
    windows = Windows((4, 4), (3, 3))
    assert [(r.start, c.start) for r, c in windows.over((7, 9))] == [(r, c) for r in (0, 3) for c in (0, 3, 5)]
    found = scores_of(Painter(), images, size=(7, 9), windows=windows, run=lambda part: part + 1)
    torch.testing.assert_close(found, images + 1)  # a sum of up to four, divided by four: rounded
    offsets = iter(range(6))  # one value for each window: where two overlap, their mean
    found = scores_of(Painter(), images * 0, size=(7, 9), windows=windows, run=lambda part: part + next(offsets))
    assert (found[0, 0, 0, 0], found[0, 0, 0, 3], found[0, 0, 0, 5]) == (0, 0.5, 1.5)
    assert found[0, 0, 3, 3] == (0 + 1 + 3 + 4) / 4


def test_windows_take_the_training_crop_and_refuse_gaps(segmenting):
    assert windows_of(segmenting()) is None
    assert windows_of(segmenting(segmentation=Segmentation(test="slide"))) == Windows((32, 32), (21, 21))
    chosen = Segmentation(test="slide", crop=(16, 24), stride=(8, 8))
    assert windows_of(segmenting(segmentation=chosen)) == Windows((16, 24), (8, 8))
    with pytest.raises(ValueError, match=r"segmentation\.stride=\(8, 30\) leaves gaps.*\(16, 24\)"):
        windows_of(segmenting(segmentation=Segmentation(test="slide", crop=(16, 24), stride=(8, 30))))
    with pytest.raises(ValueError, match=r"segmentation\.stride=\(8, 8\) is of windows.*segmentation\.test=slide"):
        windows_of(segmenting(segmentation=Segmentation(stride=(8, 8))))


def test_a_rare_class_weighs_more_by_hand():
    """Shares 3/4, 1/4 and, of the one mask that holds it, 1/2: the median is 1/2; a class without pixels weighs 1."""
    masks = [torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 0], [0, 1]]), torch.tensor([[2, 2], [255, 255]])]
    masks[2] = torch.tensor([[2, 2], [3, 3]])
    weights = balanced_weights(masks, num_classes=5)
    torch.testing.assert_close(weights, torch.tensor([0.5 / 0.75, 0.5 / 0.25, 1.0, 1.0, 1.0]))
    ignored = balanced_weights([torch.tensor([[0, 255], [255, 255]]), torch.tensor([[1, 0]])], num_classes=2)
    torch.testing.assert_close(ignored, torch.tensor([(2 / 3 + 1 / 2) / 2 / (2 / 3), (2 / 3 + 1 / 2) / 2 / (1 / 2)]))


def test_balanced_weights_reach_the_loss(segmenting):
    recipe = segmenting(segmentation=Segmentation(class_weights=0.5))
    split = load_split(recipe.data, "train")
    task = SemanticSegmentation(recipe, split=split, device=CPU)
    expected = balanced_weights([split.mask(i) for i in range(len(split))], num_classes=3).sqrt()
    torch.testing.assert_close(task.class_weights, expected)
    assert len(set(expected.tolist())) == 3
    seen = []

    class Listener(nn.Module):
        def forward(self, images):
            return images

        def loss(self, output, labels, *, class_weights):
            seen.append(class_weights)
            return output.sum()

    task.loss(Listener(), torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), epoch=0)
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("written", [255, 0])
def test_masks_without_a_class_are_refused_and_absent_classes_are_named(written, segmenting, painted, tmp_path, caplog):
    """As where somebody writes 255 for the one class that is meant, or marks nothing at all."""
    shutil.copytree(painted, tmp_path / "binary")
    for path in (tmp_path / "binary/train/masks").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 0, written, 255).astype(np.uint8)).save(path)
    recipe = segmenting(data=dataclasses.replace(segmenting().data, root=str(tmp_path / "binary")))
    split = load_split(recipe.data, "train")
    if written == 255:
        with pytest.raises(ValueError, match=r"no pixel of the 6 training masks has a class.*0 and 1 instead of 0 and"):
            SemanticSegmentation(recipe, split=split, device=CPU)
        return
    SemanticSegmentation(recipe, split=split, device=CPU)
    (message,) = caplog.messages
    assert message.startswith("no pixel of the 6 training masks is square, band; if it is 255 in the masks: 255 is ign")


def test_a_training_ends_in_a_summary_that_its_network_reaches_again(segmenting, tmp_path):
    testing = dataclasses.replace(segmenting().testing, every=22)
    recipe = segmenting(epochs=22, optim=Optim(lr=0.1, clip_grad=1.0), testing=testing)
    summary = train(recipe, run=tmp_path / "run")
    assert isinstance(summary, SegmentationSummary)
    assert summary == read_summary(tmp_path / "run")
    assert list(summary.per_class_iou) == ["ground", "square", "band"]
    assert summary.miou > 0.4  # a quarter if all is ground
    assert summary.miou <= summary.best_miou
    model = from_pretrained(tmp_path / "run" / "model")
    split = load_split(recipe.data, "test")
    again = evaluate_segmentation(model, batches_of(split, batch_size=2))
    assert again.confusion.tolist() == summary.confusion
    assert again.miou == summary.miou
    assert summary.integer_agreement == pixel_agreement(model, integer(model, split[0][0][None]), split, images=2)
    assert summary.integer_agreement["same"] > 0.9 * summary.integer_agreement["total"]  # 8-bit weights
    assert (tmp_path / "run" / "segmentation.png").is_file()


def test_test_pictures_of_several_sizes_come_one_by_one(segmenting):
    split = load_split(segmenting().data, "test")
    shapes = [tuple(images.shape) for images, _ in batches_of(split, batch_size=4)]
    assert shapes == [(1, 3, 32, 32), (1, 3, 32, 48)] * 2


def test_an_interrupted_segmentation_ends_as_the_uninterrupted_one(segmenting, tmp_path, monkeypatch):
    recipe = segmenting(saving=Saving(every_steps=1), optim=POLY)
    whole = train(recipe, run=tmp_path / "whole")
    steps = iter([None] * 4)
    real = optimise.gradient_norm

    def failing(*given, **options):
        next(steps)  # StopIteration in the fifth of six steps
        return real(*given, **options)

    monkeypatch.setattr("spikeformers.train.loop.gradient_norm", failing)
    with pytest.raises(StopIteration):
        train(recipe, run=tmp_path / "parts")
    monkeypatch.undo()
    resumed = train(recipe, run=tmp_path / "parts", resume=True)
    assert resumed.confusion == whole.confusion
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_segmenter_starts_from_a_classifier_and_from_a_segmenter(segmenting, tiny, tmp_path):
    data = dataclasses.replace(tiny().data, in_channels=3)
    train(tiny(epochs=1, data=data, model=dataclasses.replace(tiny().model, neuron="ni_lif")), run=tmp_path / "cls")
    text = io.StringIO()
    recipe = segmenting(epochs=1, init=Init(backbone=str(tmp_path / "cls")))
    train(recipe, run=tmp_path / "first", console=Console(file=text, width=1000))
    assert "init.backbone: loaded" in text.getvalue()
    assert "head.weight" in text.getvalue()  # the classifier is dropped, and that is said
    first = from_pretrained(tmp_path / "first" / "model").state_dict()
    again = segmenting(init=Init(backbone=str(tmp_path / "first")))
    work = _Work(again, tmp_path / "second", Accelerator())
    assert all(torch.equal(tensor, first[key]) for key, tensor in work.plain.state_dict().items())
    (note,) = work.notes
    assert f"loaded {len(first)} tensors" in note
    assert "left as initialised" not in note


LEARNABLE = {
    "dim": 16,
    "queries": 6,
    "encoder_layers": 1,
    "encoder_hidden": 32,
    "groups": 4,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "decoder_hidden": 32,
    "heads": 2,
    "attention": "sdsa3_learned",
    "attention_scale": "learnable",
}


def test_balancing_leaves_scales_that_came_trained(segmenting, tmp_path):
    """Spike2Former on the backbone of a Semantic FPN, whose head stays out: only the new head's scales are set."""
    fpn = segmenting()
    fpn = dataclasses.replace(
        fpn, model=dataclasses.replace(fpn.model, options=fpn.model.options | {"attention": "sdsa3_learned"})
    )
    source = build_model(fpn, num_classes=3, in_channels=3)
    scales = [name for name, _ in source.named_parameters() if name.endswith(".scale")]
    assert len(scales) == 2
    for number, name in enumerate(scales):
        torch.nn.init.constant_(source.get_parameter(name), 0.25 + number)
    source.save_pretrained(tmp_path / "fpn")
    choice = dataclasses.replace(fpn.model, name="spike2former_ade20k", options=LEARNABLE)
    init = Init(backbone=str(tmp_path / "fpn"), balance=True)
    work = _Work(segmenting(model=choice, init=init), tmp_path / "run", Accelerator())
    assert [work.plain.get_parameter(name).item() for name in scales] == [0.25, 1.25]
    loaded, balanced = work.notes
    assert "dropped from the file: head." in loaded
    new = [name for name, _ in work.plain.named_parameters() if name.endswith(".scale") and name not in scales]
    assert f"init.balance: {len(new)} attention scales start" in balanced
    assert balanced.endswith("; 2 of init.backbone stay as trained")


def test_a_run_may_be_tested_otherwise_when_it_is_resumed(segmenting, tmp_path):
    for name, content in (("recipe.json", to_json(segmenting())), ("summary.json", {})):
        (tmp_path / name).write_text(json.dumps(content))
    windows = Segmentation(test="slide", crop=(16, 16), stride=(16, 16))
    _check_folder(segmenting(segmentation=windows), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"cannot be resumed: segmentation\.class_weights"):
        _check_folder(segmenting(segmentation=Segmentation(class_weights=1.0)), tmp_path, resume=True)


def test_only_an_engine_that_cannot_be_built_is_a_refusal(segmenting, monkeypatch):
    recipe = segmenting()
    split = load_split(recipe.data, "test")
    task = SemanticSegmentation(recipe, split=split, device=CPU)

    def refusing(*_):
        raise ValueError("no layer reads spikes")

    monkeypatch.setattr("spikeformers.train.segmentation.integer", refusing)
    refused = task._integer_part(Painter(), recipe, split)
    assert refused == {"integer_agreement": None, "integer_refused": "no layer reads spikes"}
    monkeypatch.setattr("spikeformers.train.segmentation.integer", lambda *_: refusing)
    with pytest.raises(ValueError, match="no layer reads spikes"):  # an error while it runs is an error
        task._integer_part(Painter(), recipe, split)


def test_neurons_that_never_fire_are_named_once(segmenting, tmp_path):
    text = io.StringIO()
    train(segmenting(), run=tmp_path / "run", console=Console(file=text, width=1000))
    lines = [line for line in text.getvalue().splitlines() if line.startswith("silent in")]
    assert lines[0].startswith("silent in the first step: ")
    assert re.search(r"\((\d+) of 46 neurons without any spike, see \"Start from nothing\" in docs/guides/", lines[0])
    named = [name for line in lines for name in line.split(": ")[1].split(" (")[0].split(", ")[:3]]
    assert len(named) == len(set(named))


def test_a_first_step_that_is_not_finite_names_silent_neurons_and_a_cure(segmenting, tmp_path, monkeypatch):
    monkeypatch.setattr("spikeformers.train.loop.gradient_norm", lambda *_, **__: torch.tensor(torch.inf))
    cure = r"init\.backbone.*init\.balance=true model\.options\.attention=sdsa3_learned.*attention_scale=learnable"
    with pytest.raises(ValueError, match=rf"the gradient norm inf.*silent in the first step: \S+.*{cure}"):
        train(segmenting(), run=tmp_path / "run")


def test_class_weights_and_classifiers_settings_that_cannot_work_are_refused(segmenting, tiny):
    split = load_split(segmenting().data, "train")
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 is of no use in segmentation"):
        build_task(segmenting(label_smoothing=0.1), split=split, device=CPU)
    task = build_task(segmenting(), split=split, device=CPU)
    with pytest.raises(ValueError, match="MetaSpikeFormer gives a class to pictures, not to pixels"):
        task.wrap(build_model(tiny(), num_classes=3, in_channels=3))
    weighted = tiny(segmentation=Segmentation(class_weights=0.5))
    with pytest.raises(ValueError, match=r"segmentation\.class_weights=0\.5 is of no use in classification"):
        build_task(weighted, split=load_split(weighted.data, "train"), device=CPU)
    with pytest.raises(ValueError, match=r"segmentation\.class_weights must lie between 0 .*got 2"):
        Segmentation(class_weights=2.0)
    with pytest.raises(ValueError, match=r"segmentation\.crop must be a height and a width.*\(16,\)"):
        Segmentation(crop=(16,))


def test_seeds_are_compared_by_miou(segmenting, tmp_path):
    found = train_seeds(segmenting(epochs=1), (0, 1), run=tmp_path)
    stored = json.loads((tmp_path / "seeds.json").read_text())
    assert stored["mious"] == [each.miou for each in found.summaries]
    assert stored["miou_mean"] == found.mean == pytest.approx(sum(stored["mious"]) / 2)


def test_a_prepared_loader_gives_the_same_result():
    """With an accelerator the matrices are gathered picture by picture."""
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    labels = images.roll(1, 0).argmax(1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=2)
    accelerator = Accelerator()
    prepared = evaluate_segmentation(
        Painter(), accelerator.prepare_data_loader(loader, device_placement=False), accelerator=accelerator
    )
    alone = evaluate_segmentation(Painter(), loader)
    assert isinstance(alone, SegmentationResult)
    assert torch.equal(prepared.confusion, alone.confusion)

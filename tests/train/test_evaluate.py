import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from spikeformers.data.images import load_split
from spikeformers.train.evaluate import batches_of, drawn, evaluate, firing_rates, integer_agreement, summarise
from spikeformers.train.loop import build_model
from spikeformers.train.recipe import override


class Lookup(nn.Module):
    """Logits are the image itself, flattened."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, images):
        return images.flatten(1) * self.scale


def test_accuracy_loss_confusion_and_predictions_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    split = TensorDataset(logits.view(4, 3, 1, 1), torch.tensor([0, 1, 2, 2]))
    found = evaluate(Lookup(), batches_of(split, batch_size=3))
    assert found.accuracy == 0.75
    assert found.predictions == [0, 1, 1, 2]
    assert found.confusion == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]  # the third image is a 2 seen as a 1
    losses = [
        math.log(math.exp(2) + 2) - 2,
        math.log(math.e + 2) - 1,
        math.log(math.exp(3) + 2),
        math.log(math.e + 2) - 1,
    ]
    assert found.loss == pytest.approx(sum(losses) / 4)
    assert evaluate(Lookup(), split) == found


def test_evaluation_leaves_the_mode_and_refuses_what_is_not_finite():
    model = Lookup().train()
    split = TensorDataset(torch.full((2, 3, 1, 1), float("nan")), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="test batch 0 gives values that are not finite"):
        evaluate(model, split)
    assert model.training
    model.forward = lambda images: images.flatten(1).nan_to_num() * model.scale  # as a LIF does: NaN is below threshold
    with pytest.raises(ValueError, match="test batch 0 gives values that are not finite"):
        evaluate(model, split)
    evaluate(model, TensorDataset(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1])))
    assert model.training
    with pytest.raises(ValueError, match="empty"):
        evaluate(model, TensorDataset(torch.zeros(0, 3, 1, 1), torch.zeros(0, dtype=torch.int64)))


def test_drawn_samples_are_the_same_each_time_and_of_every_class_however_the_split_is_ordered():
    assert drawn(10, 0) == drawn(10, 20) == drawn(10, 10) == list(range(10))
    chosen = np.array(drawn(1000, 100))
    assert chosen.tolist() == drawn(1000, 100) == sorted(set(chosen.tolist()))
    assert set(drawn(1000, 30)) < set(chosen.tolist())
    # Ten classes in turn, as in the parquet files of CIFAR-10 (even steps would see one of them), or one after another.
    for labels in (np.arange(1000) % 10, np.arange(1000) // 100):
        assert np.bincount(labels[chosen], minlength=10).min() >= 4


def test_firing_rates_lie_between_silence_and_every_level(tiny):
    model = build_model(tiny(), num_classes=10, in_channels=1)
    rates, mean = firing_rates(model, [(torch.randn(2, 1, 16, 16), None)])
    assert len(rates) > 10
    assert all(0 <= rate <= 1 for rate in rates.values())
    assert 0 < mean < max(rates.values())


class NoFloat64(TorchDispatchMode):
    """As on Apple's devices: whatever makes a float64 tensor fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        assert not (isinstance(found, torch.Tensor) and found.dtype == torch.float64), func
        return found


def test_firing_rates_need_no_float64(tiny):
    model = build_model(tiny(), num_classes=10, in_channels=1)
    with NoFloat64():
        rates, mean = firing_rates(model, [(torch.randn(2, 1, 16, 16), None)])
    assert min(rates.values()) <= mean <= max(rates.values())


def test_rates_of_neurons_and_the_headline_rate_come_from_the_same_images(tiny):
    recipe = override(tiny(), "testing.energy_images", "12")  # a batch of 8, and one of 4
    model, split = build_model(recipe, num_classes=10, in_channels=1), load_split(recipe.data, "test")
    found = summarise(model, recipe, split)
    rates, mean = firing_rates(model, batches_of(split, batch_size=12))
    assert found["layers"] == pytest.approx(rates)
    assert found["firing_rate"] == pytest.approx(mean)


def test_the_integer_engine_is_judged_on_the_same_images_as_the_network(tiny, monkeypatch):
    recipe = tiny()
    split = load_split(recipe.data, "test")
    labels = split.labels.tolist()
    # An engine that is right about every image, and a network that is right about the first two of those compared.
    monkeypatch.setattr(
        "spikeformers.train.evaluate.integer",
        lambda *_: lambda batch: torch.eye(10)[[labels[seen.pop(0)] for _ in batch]],
    )
    for images, compared in ((0, list(range(12))), (6, drawn(12, 6))):
        seen, right = list(compared), compared[:2]
        predictions = [label if index in right else (label + 1) % 10 for index, label in enumerate(labels)]
        found = integer_agreement(nn.Identity(), split, batch_size=5, images=images, predictions=predictions)
        count = len(compared)
        assert found == {
            "same": 2, "total": count, "different": compared[2:], "accuracy": 1.0, "float_accuracy": 2 / count
        }  # fmt: skip


def test_the_integer_engine_of_an_untrained_network_needs_no_predictions(tiny):
    model, split = build_model(tiny(), num_classes=10, in_channels=1), load_split(tiny().data, "test")
    model.eval()
    known = evaluate(model, split)
    alone = integer_agreement(model, split, batch_size=5)
    assert alone == integer_agreement(model, split, batch_size=5, predictions=known.predictions)
    assert alone["float_accuracy"] == known.accuracy

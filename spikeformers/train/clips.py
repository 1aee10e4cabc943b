"""Clips of events, step by step: what a network says, and how much it fires, after each frame of a stream."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spikeformers import energy
from spikeformers.energy.firing import neurons_of
from spikeformers.neurons import streaming
from spikeformers.train.evaluate import evaluating


@dataclass(frozen=True)
class StepByStep:
    """Of a whole split, for each step t: the share of right answers by frames 1 to t, and the mean of count / levels of
    all neurons at frame t, both 0..1; no rates for an ANN."""

    accuracy: list[float]
    firing_rate: list[float]


def stream(model: nn.Module, clip: Float[Tensor, "T B C H W"]) -> Iterator[Float[Tensor, "B L"]]:
    """Logits after each frame: the mean of those so far, which after the last are those of the whole clip.

    Until the last one was taken, or the generator is closed, `model` is streaming.  Raises ValueError in train mode.
    """
    with streaming(model):
        for frame in clip:
            with torch.no_grad():  # not around the yield: it would hold in the caller too
                logits = model(frame)
            yield logits


@torch.no_grad()
def step_by_step(model: nn.Module, loader: Iterable) -> StepByStep:
    """Stream every clip of `loader`, batches (clips [T, B, C, H, W], labels [B]) of one T, through `model`."""
    first = next(model.parameters())
    levels = {name: neuron.levels for name, neuron in neurons_of(model).items()}
    right, fired, sites, clips = [], [], [], 0
    with evaluating(model):
        for batch, labels in loader:
            clip = batch.to(first.device, first.dtype)
            if not right:
                right, fired, sites = ([0] * len(clip) for _ in range(3))
            clips += len(labels)
            with energy.record(model) if levels else nullcontext({}) as counts:
                for step, logits in enumerate(stream(model, clip)):
                    right[step] += int((logits.argmax(1) == labels.to(logits.device)).sum())
                    fired[step] += sum(int(counts[name].sum()) / levels[name] for name in counts)
                    sites[step] += sum(each.numel() for each in counts.values())
    if not clips:
        raise ValueError("there is nothing to stream: the test split is empty")
    rates = [count / number for count, number in zip(fired, sites, strict=True)] if levels else []
    return StepByStep([count / clips for count in right], rates)

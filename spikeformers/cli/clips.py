"""`predict` of recordings of events: what a whole clip shows, or what a stream decides step by step."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spikeformers.data.event_clips import EventData
    from spikeformers.data.events import Events


def check_stream(arguments: Namespace) -> None:
    """Raises ValueError for settings of a stream that cannot be."""
    if arguments.confidence is not None and not arguments.stream:
        raise ValueError("--confidence ends a stream early: add --stream")
    if arguments.confidence is not None and not 0 < arguments.confidence <= 1:
        raise ValueError(f"--confidence must lie above 0 and at most at 1, got {arguments.confidence}")


def refuse_stream(arguments: Namespace) -> None:
    """Raises ValueError for --stream where pictures are looked at, which have no steps."""
    if arguments.stream:
        raise ValueError(f"--stream is for runs on recordings of events: {arguments.model} is none, leave it out")


def predict_clips(model: "nn.Module", spec: "EventData", classes: Sequence[str], arguments: Namespace) -> None:
    """What each recording shows, and the energy that its inference takes.

    Raises ValueError, before anything is printed, for files that are no recordings, and for a recording of another
    sensor than those of the training.
    """
    from spikeformers.data.event_clips import clip_of, read_recording
    from spikeformers.data.event_files import SUFFIXES
    from spikeformers.train.saved import run_of
    from spikeformers.train.summary import read_summary

    if other := next((file for file in arguments.files if not file.lower().endswith(SUFFIXES)), None):
        raise ValueError(
            f"{other} is no recording: {arguments.model} looks at recordings of events, files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    if sensor := read_summary(run_of(Path(arguments.model))).sensor:
        spec = replace(spec, sensor=tuple(sensor))
    recordings = [read_recording(Path(file), spec=spec) for file in arguments.files]  # all first: no half answer
    for file, events in zip(arguments.files, recordings, strict=True):
        clip = clip_of(events, spec=spec)[:, None]
        print(f"{file}: {len(events):,} events in {events.duration / 1e6:.3f} s, {spec.steps} steps")
        if arguments.stream:
            show_stream(model, clip, ends=ends_of(events, spec), classes=classes, confidence=arguments.confidence)
        else:
            show_clip(model, clip, classes=classes)


def show_clip(model: "nn.Module", clip: "Tensor", *, classes: Sequence[str]) -> None:
    """The likeliest classes of a clip [T, 1, C, H, W] as a whole."""
    import torch

    from spikeformers.cli.evaluation import print_likely, spent
    from spikeformers.energy import measure

    with torch.no_grad():
        logits = model(clip)[0]
    print(f"  {spent(measure(model, clip))}")
    print_likely(logits, classes)


def show_stream(
    model: "nn.Module", clip: "Tensor", *, ends: Sequence[float], classes: Sequence[str], confidence: float | None
) -> None:
    """The likeliest class after each step of a clip [T, 1, C, H, W], until the network is as sure as `confidence`.

    `ends`: seconds of the recording at which each step ends.
    """
    from spikeformers.cli.evaluation import spent
    from spikeformers.energy import measure
    from spikeformers.neurons import set_steps
    from spikeformers.train.clips import stream

    done, sure, began = 0, confidence is None, time.perf_counter()
    for logits, end in zip(stream(model, clip), ends, strict=False):
        done, took = done + 1, 1000 * (time.perf_counter() - began)
        share, index = logits[0].softmax(-1).max(-1)
        print(f"  step {done:>3}, {end:7.3f} s  {100 * share:6.2f} %  {classes[index]}  ({took:.1f} ms)")
        if confidence is not None and share >= confidence:
            sure = True
            break
        began = time.perf_counter()
    steps = model.steps
    try:  # energy of what was looked at
        spend = spent(measure(set_steps(model, done), clip[:done]))
    finally:
        set_steps(model, steps)
    said = "decided" if sure else f"never reached {100 * confidence:g} %, not even"
    print(f"  {said} after {done} of {len(clip)} steps, {spend}")


def ends_of(events: "Events", spec: "EventData") -> list[float]:
    """When the last event that a step of a clip shows has come, in seconds from the first event."""
    from spikeformers.data.events import by_count

    if spec.representation == "voxel_grid":  # its points lie from the first event to the last, and reach to the next
        return [min(step, spec.steps - 1) / max(spec.steps - 1, 1) * events.duration / 1e6 for step in _numbers(spec)]
    if spec.split == "time":
        ends = [step * (events.duration // spec.steps) / 1e6 for step in _numbers(spec)]
        return [*ends[:-1], events.duration / 1e6]
    ends, last = [], 0
    for part in by_count(events, steps=spec.steps):
        last = int(part.t[-1]) - int(events.t[0]) if len(part) else last
        ends.append(last / 1e6)
    return ends


def _numbers(spec: "EventData") -> range:
    return range(1, spec.steps + 1)

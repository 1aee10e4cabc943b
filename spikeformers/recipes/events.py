"""Recordings of event cameras on two CPU cores: simulated moving digits, and a small part of N-MNIST.

A small Spikformer V1 of LIF neurons (T=4), whose membranes carry from frame to frame. No paper of this library trains
on either. Ours: digits_dvs_epyc-2cores_202611.json, nmnist_small_epyc-2cores_202611.json in benchmarks/results/.
Logistic regression on counts of events of whole recordings: 77 % of digits_dvs, 89 % of N-MNIST's 100 test recordings.
"""

import os
from dataclasses import replace
from pathlib import Path

from spikeformers.data.event_augment import EventAugment
from spikeformers.data.event_clips import EventData
from spikeformers.train.recipe import ModelChoice, Optim, Recipe, Testing


def nmnist_root() -> str:
    """Folder of N-MNIST: $SPIKEFORMERS_DATA/nmnist_small."""
    return str(Path(os.environ.get("SPIKEFORMERS_DATA", "../shared/data")) / "nmnist_small")


def digits_dvs() -> Recipe:
    """scikit-learn's digits, moved in front of a simulated camera: 0.11 M parameters, 95.6 % (seed 0).

    spikeformers train digits_dvs
    """
    return Recipe(
        name="digits_dvs",
        data=EventData(source="digits_dvs", steps=4),
        model=ModelChoice(
            name="spikformer_dvs_2_256",
            neuron="lif",
            options={"dim": 64, "depth": 1, "heads": 4, "patch_size": 4},
        ),
        optim=Optim(lr=6e-3, warmup_epochs=1.0, weight_decay=0.05, clip_grad=1.0),
        testing=Testing(every=4),
        epochs=28,
        batch_size=32,
        label_smoothing=0.1,
        threads=2,
    )


def nmnist_small() -> Recipe:
    """1,000 recordings of N-MNIST to train on, 100 to test, as train.npz and test.npz: 97.0 ± 1.0 % (seeds 0 to 4).

    Or all of them, as published.

    spikeformers train nmnist_small --set data.root=FOLDER     (default: $SPIKEFORMERS_DATA/nmnist_small)
    """
    return replace(
        digits_dvs(),
        name="nmnist_small",
        data=EventData(source="nmnist", root=nmnist_root(), steps=4, augment=EventAugment(wide=0.5)),
        epochs=32,
        threads=1,
    )

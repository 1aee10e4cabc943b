"""Recipes for two CPU cores: the embedded digits in minutes, and a part of CIFAR-10.

`digits` and `cifar10_small` train a small Meta-SpikeFormer with integer neurons (I-LIF, D=4) at T=1; `digits_mae` and
`digits_finetune` take a small Spikformer V2 through masked pre-training. No paper has numbers for these sizes.
"""

import os
from pathlib import Path

from spikeformers.data.augment import Augment
from spikeformers.data.images import ImageData
from spikeformers.train.recipe import ModelChoice, Optim, Pretrain, Recipe, Testing


def cifar10_root() -> str:
    """Folder of CIFAR-10 as parquet files: $SPIKEFORMERS_DATA/cifar10."""
    return str(Path(os.environ.get("SPIKEFORMERS_DATA", "../shared/data")) / "cifar10")


def digits() -> Recipe:
    """scikit-learn's 1,797 handwritten digits at 32 pixels: 0.38 M parameters, 99.7 % at the last epoch (seed 0).

    spikeformers train digits
    """
    return Recipe(
        name="digits",
        data=ImageData(source="digits", size=32, in_channels=1, augment=Augment(shift=0.08, rotate=10.0, scale=0.1)),
        model=ModelChoice(
            neuron="i_lif", levels=4, dims=(16, 32, 64, 64), strides=(1, 2, 2, 2, 1), blocks=(1, 1, 1, 2, 1)
        ),
        optim=Optim(lr=3e-3, warmup_epochs=1.0, weight_decay=0.05, clip_grad=1.0),
        epochs=14,
        batch_size=32,
        label_smoothing=0.1,
        threads=2,
    )


def cifar10_small() -> Recipe:
    """10,000 training images of CIFAR-10, all 10,000 test images: 1.2 M parameters, 60.4 % (seed 0).

    spikeformers train cifar10_small --set data.root=FOLDER     (default: $SPIKEFORMERS_DATA/cifar10)
    """
    return Recipe(
        name="cifar10_small",
        data=ImageData(
            source="parquet",
            root=cifar10_root(),
            size=32,
            train_limit=10_000,
            augment=Augment(flip=0.5),  # a crop as well wants more epochs than these
        ),
        model=ModelChoice(
            neuron="i_lif",
            levels=4,
            dims=(32, 64, 128, 128),
            strides=(2, 1, 2, 2, 1),
            blocks=(1, 1, 1, 1, 1),
            options={"conv_token_mixer": "identity"},  # at 32 pixels the 3x3 channel mixers see enough
        ),
        optim=Optim(lr=1.5e-3, warmup_epochs=0.5, weight_decay=0.05, clip_grad=1.0),
        testing=Testing(every=2, images=1_000, integer_images=500),
        epochs=8,
        batch_size=32,
        threads=2,
    )


def digits_mae() -> Recipe:
    """The digits without labels: masked pre-training of a small Spikformer V2.

    spikeformers pretrain digits_mae
    """
    return Recipe(
        name="digits_mae",
        data=ImageData(source="digits", size=32, in_channels=1, augment=Augment(shift=0.08, rotate=10.0, scale=0.1)),
        model=_V2_DIGITS,
        pretrain=Pretrain(mask_ratio=0.75, decoder_dim=64, decoder_depth=1),
        optim=Optim(lr=3e-3, warmup_epochs=1.0, weight_decay=0.05, clip_grad=1.0),
        epochs=15,
        batch_size=32,
        threads=1,
    )


def digits_finetune() -> Recipe:
    """200 labelled digits: the network of digits_mae, from init.backbone or, without it, from scratch.

    spikeformers train digits_finetune --set init.backbone=runs/digits_mae
    """
    return Recipe(
        name="digits_finetune",
        data=ImageData(
            source="digits",
            size=32,
            in_channels=1,
            train_limit=200,
            augment=Augment(shift=0.08, rotate=10.0, scale=0.1),
        ),
        model=_V2_DIGITS,
        optim=Optim(lr=2e-3, warmup_epochs=2.0, weight_decay=0.05, clip_grad=1.0),
        testing=Testing(every=10),
        epochs=80,
        batch_size=10,
        label_smoothing=0.1,
        threads=1,
    )


_V2_DIGITS = ModelChoice(
    name="spikformer_v2_8_384", neuron="lif", steps=1, options={"dim": 32, "depth": 2, "heads": 4, "patch_size": 4}
)

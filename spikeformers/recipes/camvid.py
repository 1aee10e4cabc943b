"""CamVid: street scenes of 11 classes, 367 pictures to train on, 233 to test; small enough for two CPU cores.

No paper of this library trains on it. Published test mIoU at full size: SegNet 46.4, FC-DenseNet56 58.9;
the commonest class of each pixel's place gives 17.0. Ours, seed 0, on one thread: Spike2Former small 46.84, Semantic
FPN small 47.19, 1 h 43 min each on cores that other work shared (benchmarks/results/camvid_*_small_*.json); the recipes
for one GPU were not trained. The small ones halve all pictures to 180 x 240; scores are counted at 360 x 480. The
folder is data.root, else $SPIKEFORMERS_DATA/camvid: a zip for each split, or SegNet's tree.
"""

import os
from dataclasses import replace
from pathlib import Path

from spikeformers.data.segmentation import SegmentationData
from spikeformers.data.segmentation_augment import SegmentationAugment
from spikeformers.recipes.quick import cifar10_small
from spikeformers.train.recipe import Init, ModelChoice, Optim, Recipe, Saving, Segmentation, Testing


def camvid_root() -> str:
    """Folder of CamVid: $SPIKEFORMERS_DATA/camvid."""
    return str(Path(os.environ.get("SPIKEFORMERS_DATA", "../shared/data")) / "camvid")


def _data(size: tuple[int, int] = (180, 240)) -> SegmentationData:
    return SegmentationData(
        source="camvid",
        root=camvid_root(),
        size=size,
        test_size=size,
        augment=SegmentationAugment(scale=(0.75, 1.5), flip=0.5, distort=0.5),
    )


_BACKBONE = {  # 1.1 M parameters: narrow, without the 7x7 token mixers, which a CPU is slow at
    "dims": (32, 64, 128, 192),
    "blocks": (1, 1, 1, 2, 1),
}
_BACKBONE_OPTIONS = {"conv_token_mixer": "identity", "mlp_ratio": 2, "attention": "sdsa3_learned"}
_CPU = {
    "testing": Testing(every=5, images=48, energy_images=16, integer_images=8),
    "saving": Saving(every_steps=0, keep=1),
    "batch_size": 8,
    "threads": 1,
}


def fpn_small() -> Recipe:
    """Semantic FPN of integer neurons, 1.8 M parameters, on one thread.

    spikeformers train camvid_fpn_small
    """
    return Recipe(
        name="camvid_fpn_small",
        data=_data(),
        model=ModelChoice(
            name="meta_spikeformer_15m_fpn_voc",
            neuron="i_lif",
            levels=4,
            **_BACKBONE,
            options=_BACKBONE_OPTIONS | {"neck": "batch_norm", "neck_dim": 64, "fpn_dim": 64},
        ),
        init=Init(balance=True),
        segmentation=Segmentation(class_weights=0.5),
        optim=Optim(lr=2e-3, schedule="poly", min_lr=0.0, warmup_epochs=1.0, weight_decay=0.01, clip_grad=1.0),
        epochs=60,
        **_CPU,
    )


def spike2former_small() -> Recipe:
    """Spike2Former of 1.8 M parameters, D=4, on one thread.

    spikeformers train camvid_spike2former_small
    """
    return replace(
        fpn_small(),
        name="camvid_spike2former_small",
        model=ModelChoice(
            name="spike2former_voc", neuron="ni_lif", levels=4, **_BACKBONE, options=_BACKBONE_OPTIONS | _SMALL_HEAD
        ),
        epochs=70,
    )


_SMALL_HEAD = {
    "dim": 64,
    "groups": 8,
    "queries": 24,
    "encoder_layers": 2,
    "encoder_hidden": 128,
    "decoder_layers": 3,
    "decoder_heads": 4,
    "decoder_hidden": 256,
    "attention_scale": "learnable",
    "encoder_scale": 0.1,
    "loss_resolution": "masks",
}


def backbone() -> Recipe:
    """The backbone of camvid_spike2former_small as a classifier of 10,000 CIFAR-10 images, to start from.

    spikeformers train camvid_backbone
    spikeformers train camvid_spike2former_small --set init.backbone=runs/camvid_backbone
    """
    return Recipe(
        name="camvid_backbone",
        data=cifar10_small().data,
        model=ModelChoice(
            name="meta_spikeformer_15m",
            neuron="ni_lif",
            levels=4,
            **_BACKBONE,
            strides=(1, 1, 2, 2, 1),  # strides leave weights as they are, and these pictures have 32 pixels a side
            options=_BACKBONE_OPTIONS,
        ),
        init=Init(balance=True),
        optim=Optim(lr=5e-4, warmup_epochs=0.5, weight_decay=0.05, clip_grad=1.0),  # at 2e-3 it blows up
        testing=Testing(every=2, images=1_000, integer_images=100),
        epochs=4,
        batch_size=32,
        threads=1,
    )


def smoke() -> Recipe:
    """A few pictures at 48 x 64, for some steps: does everything run?

    Hardly trained, it scores as chance does, and how many pixels the integer engine keeps says nothing either.

    spikeformers train camvid_smoke
    """
    recipe = spike2former_small()
    return replace(
        recipe,
        name="camvid_smoke",
        data=replace(_data((48, 64)), train_limit=16, test_limit=4),
        model=replace(
            recipe.model,
            dims=(8, 16, 32, 32),
            options=recipe.model.options | {"dim": 16, "groups": 4, "encoder_hidden": 32, "decoder_hidden": 32},
        ),
        testing=Testing(every=15, energy_images=2, integer_images=2),
        epochs=15,  # 60 steps: before some fifty, norms still remember that they began with a variance of 1
        batch_size=4,
    )


def fpn_gpu() -> Recipe:
    """Semantic FPN on the 15M backbone at 360 x 480, for one GPU.

    spikeformers train camvid_fpn
    """
    return replace(
        fpn_small(),
        name="camvid_fpn",
        data=replace(_data((360, 480)), augment=SegmentationAugment(scale=(0.5, 2.0), flip=0.5, distort=0.5)),
        model=ModelChoice(
            name="meta_spikeformer_15m_fpn_voc",
            neuron="i_lif",
            levels=4,
            options={"neck": "batch_norm", "attention": "sdsa3_learned"},
        ),
        optim=Optim(lr=1e-3, schedule="poly", min_lr=0.0, warmup_epochs=5.0, weight_decay=0.01, clip_grad=1.0),
        testing=Testing(every=10, energy_images=16, integer_images=8),
        epochs=200,
        precision="bfloat16",
        threads=0,
        workers=8,
    )


def spike2former_gpu() -> Recipe:
    """Spike2Former at its paper's size and 360 x 480, for one GPU.

    spikeformers train camvid_spike2former
    """
    return replace(
        fpn_gpu(),
        name="camvid_spike2former",
        model=ModelChoice(
            name="spike2former_voc",
            neuron="ni_lif",
            levels=4,
            options={"attention": "sdsa3_learned", "attention_scale": "learnable", "encoder_scale": 0.1},
        ),
    )

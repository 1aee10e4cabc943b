"""BCCD: blood cells of three classes in 205 pictures to train on, 72 to test; small enough for two CPU cores.

No paper of this library trains on it. Ours: benchmarks/results/bccd_yolo_small_epyc-2cores_202611.json, 8 minutes on
one core. The folder is data.root, else $SPIKEFORMERS_DATA/bccd: COCO's json and pictures, as they are or zipped.
"""

import os
from pathlib import Path

from spikeformers.data.detection import DetectionData
from spikeformers.data.detection_augment import DetectionAugment
from spikeformers.train.recipe import Init, ModelChoice, Optim, Recipe, Saving, Testing


def bccd_root() -> str:
    """Folder of BCCD: $SPIKEFORMERS_DATA/bccd."""
    return str(Path(os.environ.get("SPIKEFORMERS_DATA", "../shared/data")) / "bccd")


ANCHORS = (  # k-means over the training boxes at 240 x 320: heads.fit_anchors
    *(17.0, 17.0, 22.0, 21.0, 51.0, 34.0),
    *(35.0, 55.0, 46.0, 45.0, 56.0, 48.0),
    *(50.0, 54.0, 62.0, 58.0, 104.0, 95.0),
)


def yolo_small() -> Recipe:
    """YOLO of integer neurons on one thread: 0.85 M parameters, test AP50 85.8 % (seed 0).

    spikeformers train bccd_yolo_small
    """
    return Recipe(
        name="bccd_yolo_small",
        data=DetectionData(
            root=bccd_root(),
            size=(240, 320),
            augment=DetectionAugment(scale=(0.7, 1.4), flip=0.5, distort=0.5),
        ),
        model=ModelChoice(
            name="meta_spikeformer_15m_yolo",
            neuron="i_lif",
            levels=4,
            dims=(16, 32, 64, 96),
            blocks=(1, 1, 1, 2, 1),
            options={
                "conv_token_mixer": "identity",
                "mlp_ratio": 2,
                "attention": "sdsa3_learned",
                "dim": 64,
                "anchors": ANCHORS,
            },
        ),
        init=Init(balance=True),
        optim=Optim(lr=2e-3, schedule="poly", min_lr=0.0, warmup_epochs=2.0, weight_decay=0.01, clip_grad=5.0),
        testing=Testing(every=5, images=24, energy_images=16, integer_images=16),
        saving=Saving(keep=1),
        epochs=60,
        batch_size=8,
        threads=1,
    )

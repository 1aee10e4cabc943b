"""Penn-Fudan: people in streets, with masks, in 120 pictures to train on, 50 to test; small enough for two CPU cores.

No paper of this library trains on it. Ours: benchmarks/results/pennfudan_mask_rcnn_small_epyc-2cores_202611.json, 13
minutes on one core. The folder is data.root, else $SPIKEFORMERS_DATA/pennfudan: COCO's json and pictures, as they are
or zipped.
"""

import os
from dataclasses import replace
from pathlib import Path

from spikeformers.data.detection import DetectionData
from spikeformers.data.detection_augment import DetectionAugment
from spikeformers.recipes.bccd import yolo_small
from spikeformers.train.recipe import ModelChoice, Recipe


def pennfudan_root() -> str:
    """Folder of Penn-Fudan: $SPIKEFORMERS_DATA/pennfudan."""
    return str(Path(os.environ.get("SPIKEFORMERS_DATA", "../shared/data")) / "pennfudan")


def mask_rcnn_small() -> Recipe:
    """Mask R-CNN of integer neurons on one thread: 0.88 M parameters, test AP50 91.3 %, of masks 86.5 % (seed 0).

    spikeformers train pennfudan_mask_rcnn_small
    """
    cells = yolo_small()
    backbone = {name: cells.model.options[name] for name in ("conv_token_mixer", "mlp_ratio", "attention")}
    head = {
        "region_dim": 48,
        "fc_dim": 128,
        "norm": "batch_norm",
        "anchor_sizes": (16, 32, 64, 96, 160),
        "regions": 200,
        "samples": 64,
    }
    return replace(
        cells,
        name="pennfudan_mask_rcnn_small",
        data=DetectionData(
            root=pennfudan_root(),
            size=(192, 192),
            masks=True,
            augment=DetectionAugment(scale=(0.7, 1.4), flip=0.5, distort=0.5),
        ),
        model=ModelChoice(
            name="meta_spikeformer_15m_mask_rcnn",
            neuron="i_lif",
            levels=4,
            dims=cells.model.dims,
            blocks=cells.model.blocks,
            options=backbone | head,
        ),
        optim=replace(cells.optim, lr=1e-3, warmup_epochs=4.0),  # at BCCD's 2e-3 gradients grow to 1e3, and it stalls
        epochs=80,
        batch_size=4,
    )

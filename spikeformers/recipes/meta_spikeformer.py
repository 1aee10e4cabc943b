"""Meta-SpikeFormer on ImageNet-1k (directly at T=1, finetuned at T=4, from a teacher), and dense tasks on top of it.

Paper: Yao et al., ICLR 2024, Table 8 (settings), Table 1 (accuracy); step-wise schedule, optimiser and erasing from the
authors' code. Expected top-1 of the 55M network: 78.0 direct at T=1, 79.7 at T=4; distilled 79.1 and 80.0.
Ours: not trained here. The authors report 22 hours on eight A100 for the 15M network at T=1.

    accelerate launch -m spikeformers train meta_spikeformer_15m_imagenet --set data.root=IMAGENET

Batches are Table 8's over eight processes: 1568 = 8 x 196 at T=1, 336 = 8 x 42 at T=4. With another number of processes
set `accumulate`; the learning rate follows the real batch (lr_batch=256), so leave it.
Semantic FPN: Sec. 4.4 and App. C.3, Table 4 and Spike2Former's Table 1; settings of the code that its authors publish
with later papers. Expected mIoU: ADE20K 15M T=1 32.3, T=4 33.6, 55M 34.8 and 35.3; VOC, T=4, 58.1 and 61.1.
T=4 starts from the run at T=1. Not trained here. Steps are of 20 pictures: four processes with 5 each; here the rate
does not follow their number, so keep the product with `accumulate`: 4 on one card (--set accumulate=4).
Mask R-CNN: App. C.2, Table 3; expected mAP@0.5 on COCO at T=1: 15M 44.0, 55M 51.2. YOLO, trained directly: Table 9,
T=1 45.0, T=4 50.3. Not trained here. Steps are of 12 pictures, four processes with 3 each, and for YOLO of 64.
Departures: bfloat16 instead of float16 with loss scaling. The paper's code leaves batch norm unsynchronised, so do we.
Semantic FPN's rate falls in a straight line (poly of power 1, as in the code), where App. C.3 says power 0.9. Its
recipes *_voc_aug, on VOC with SBD's masks, are no runs of the paper's. The paper's "resize with a ratio of 0.5" is read
as a random size from half to the whole; of YOLO's training it tells nothing, so all its settings are ours.
"""

import dataclasses

from spikeformers.data.augment import Augment
from spikeformers.data.detection import DetectionData
from spikeformers.data.detection_augment import DetectionAugment
from spikeformers.data.event_augment import EventAugment
from spikeformers.data.event_clips import EventData
from spikeformers.data.images import ImageData
from spikeformers.data.segmentation import SegmentationData
from spikeformers.recipes.spike2former import PICTURES, WARMUP_ITERATIONS, epochs_of, standard_augment
from spikeformers.train.recipe import Distill, Init, ModelChoice, Optim, Recipe, Saving, Testing

_TEACHER = "caformer_b36.sail_in22k_ft_in1k"


def imagenet_15m() -> Recipe:
    """Table 8, direct training: T=1, 200 epochs, LAMB 6e-4 for 256 images, warm-up 10."""
    return _direct("15m")


def imagenet_31m() -> Recipe:
    """Table 8, direct training, 31M."""
    return _direct("31m")


def imagenet_55m() -> Recipe:
    """Table 8, direct training, 55M. Paper: 78.0."""
    return _direct("55m")


def imagenet_15m_t4() -> Recipe:
    """Table 8, finetuning: T=4, 20 epochs, LAMB 2e-5 for 256 images, warm-up 2; set init.backbone to the T=1 run."""
    return _finetune("15m")


def imagenet_31m_t4() -> Recipe:
    """Table 8, finetuning, 31M."""
    return _finetune("31m")


def imagenet_55m_t4() -> Recipe:
    """Table 8, finetuning, 55M. Paper: 79.7."""
    return _finetune("55m")


def imagenet_15m_t4_distilled() -> Recipe:
    """Finetuning with DeiT-style hard distillation from CAFormer-B36; set init.backbone to the T=1 run."""
    return _distilled("15m")


def imagenet_31m_t4_distilled() -> Recipe:
    """Finetuning from the teacher, 31M."""
    return _distilled("31m")


def imagenet_55m_t4_distilled() -> Recipe:
    """Finetuning from the teacher, 55M. Paper: 80.0."""
    return _distilled("55m")


def _direct(size: str) -> Recipe:
    name = f"meta_spikeformer_{size}"
    return Recipe(
        name=f"{name}_imagenet",
        data=ImageData(
            source="imagenet",
            size=224,
            eval_crop=0.875,
            augment=Augment(policy="rand-m9-mstd0.5-inc1", resized_crop=0.08, flip=0.5, erase=0.25),
        ),
        model=ModelChoice(name=name, neuron="lif", steps=1),
        optim=Optim(name="lambc", lr=6e-4, lr_batch=256, min_lr=1e-6, warmup_epochs=10.0, weight_decay=0.05),
        saving=Saving(every_steps=500),
        epochs=200,
        batch_size=196,
        label_smoothing=0.1,
        precision="bfloat16",
        workers=8,
    )


def _finetune(size: str) -> Recipe:
    direct = _direct(size)
    return dataclasses.replace(
        direct,
        name=f"{direct.name}_t4",
        model=dataclasses.replace(direct.model, steps=4),
        optim=dataclasses.replace(direct.optim, lr=2e-5, warmup_epochs=2.0),
        init=Init(backbone=f"runs/{direct.name}"),
        epochs=20,
        batch_size=42,
    )


def _distilled(size: str) -> Recipe:
    plain = _finetune(size)
    return dataclasses.replace(plain, name=f"{plain.name}_distilled", distill=Distill(teacher=_TEACHER, kind="hard"))


def har_dvs() -> Recipe:
    """HAR-DVS, direct training at T=8 (Sec. 4.2). Paper: 47.5, with 18.3 M parameters, which no size of Table 7 has.

    Nothing else is published: settings of Table 8 by ImageNet's epochs cut to 100, frames of equal numbers of events.
    """
    direct = _direct("15m")
    return dataclasses.replace(
        direct,
        name="meta_spikeformer_15m_har_dvs",
        data=EventData(
            source="har_dvs",
            disorder="sort",
            steps=8,
            size=(224, 224),
            augment=EventAugment(flip=0.5, wide=1.0),
        ),
        epochs=100,
        batch_size=16,
    )


_FPN_DATA = {  # source, train split and iterations
    "ade20k": ("ade20k", "", 160_000),
    "voc": ("voc2012", "", 80_000),
    "voc_aug": ("voc2012", "trainaug", 80_000),
}


def fpn_ade20k(size: str) -> Recipe:
    """Semantic FPN at T=1: 160,000 iterations of 20 crops of 512 x 512."""
    return _fpn(size, "ade20k")


def fpn_voc(size: str) -> Recipe:
    """Semantic FPN at T=1: 80,000 iterations of 20 crops of 512 x 512, on the 1,464 pictures of VOC alone."""
    return _fpn(size, "voc")


def fpn_voc_aug(size: str) -> Recipe:
    """Semantic FPN at T=1: 80,000 iterations on VOC's 10,582 pictures with SBD's masks (list trainaug)."""
    return _fpn(size, "voc_aug")


def _fpn(size: str, data: str) -> Recipe:
    source, train_split, iterations = _FPN_DATA[data]
    backbone, batch = f"meta_spikeformer_{size}", 20
    epochs = round(epochs_of(iterations, batch=batch, pictures=PICTURES[data]))
    return Recipe(
        name=f"{backbone}_fpn_{data}",
        data=SegmentationData(
            source=source,
            train_split=train_split,
            size=(512, 512),
            short_side=512,
            max_side=2048,
            augment=standard_augment(),
        ),
        model=ModelChoice(name=f"{backbone}_fpn_{data.removesuffix('_aug')}", neuron="lif", steps=1),
        init=Init(backbone=f"runs/{backbone}_imagenet"),
        optim=Optim(
            lr=1e-3,
            schedule="poly",
            min_lr=0.0,
            warmup_epochs=epochs_of(WARMUP_ITERATIONS, batch=batch, pictures=PICTURES[data]),
            warmup_lr=1e-6,
            weight_decay={"15m": 0.005, "55m": 0.05}[size],
            decay_1d=True,
            rates={"head": 2.0},
        ),
        saving=Saving(every_steps=500),
        testing=Testing(every=max(1, epochs // 10), integer_images=8),
        epochs=epochs,
        batch_size=batch // 4,  # four processes
        precision="bfloat16",
        workers=8,
    )


def fpn_t4(size: str, data: str) -> Recipe:
    """The recipe without _t4 at T=4 and a rate of 1e-4, from its run at T=1."""
    first = _fpn(size, data)
    return dataclasses.replace(
        first,
        name=f"{first.name}_t4",
        model=dataclasses.replace(first.model, steps=4),
        optim=dataclasses.replace(first.optim, lr=1e-4),
        init=Init(backbone=f"runs/{first.name}"),
    )


def mask_rcnn(size: str) -> Recipe:
    """Mask R-CNN at T=1 on COCO: 24 epochs of 12 pictures within 1333 x 800, AdamW 1e-4, poly 0.9 (App. C.2)."""
    return Recipe(
        name=f"meta_spikeformer_{size}_mask_rcnn_coco",
        data=DetectionData(
            size=(800, 1333), fit="sides", masks=True, augment=DetectionAugment(scale=(0.5, 1.0), flip=0.5)
        ),
        model=ModelChoice(name=f"meta_spikeformer_{size}_mask_rcnn", neuron="lif", steps=1),
        init=Init(backbone=f"runs/meta_spikeformer_{size}_imagenet"),
        optim=Optim(lr=1e-4, schedule="poly", power=0.9, min_lr=0.0, warmup_epochs=0.1, clip_grad=1.0),
        saving=Saving(every_steps=500),
        testing=Testing(every=4, images=1_000, integer_images=8),
        epochs=24,
        batch_size=3,  # four processes
        precision="bfloat16",
        workers=8,
    )


def yolo() -> Recipe:
    """YOLO on COCO from random weights at T=1: 100 epochs of 64 pictures in 640 x 640; model.steps=4 for Table 9's."""
    return Recipe(
        name="meta_spikeformer_15m_yolo_coco",
        data=DetectionData(size=(640, 640), augment=DetectionAugment(scale=(0.5, 1.5), flip=0.5, distort=0.5)),
        model=ModelChoice(name="meta_spikeformer_15m_yolo", neuron="lif", steps=1),
        optim=Optim(lr=1e-3, schedule="poly", min_lr=1e-5, warmup_epochs=3.0, clip_grad=5.0),
        saving=Saving(every_steps=500),
        testing=Testing(every=10, images=1_000, integer_images=8),
        epochs=100,
        batch_size=16,  # four processes
        precision="bfloat16",
        workers=8,
    )

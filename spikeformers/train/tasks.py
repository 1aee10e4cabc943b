"""What is learnt: classification by cross-entropy, on mixed images and from a teacher if the recipe says so.

The other tasks are in pretraining.py (masked), segmentation.py and detection.py; `Task` is what the loop asks of each.

Distillation: Touvron et al., ICML 2021 (DeiT), Eqs. 2-3, as Meta-SpikeFormer uses it.
The teacher is any network of timm.
"""

import contextlib
import copy
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from spikeformers.data.augment import mixed, mixing
from spikeformers.data.detection import DetectionData
from spikeformers.data.event_clips import EventData
from spikeformers.data.segmentation import SegmentationData
from spikeformers.data.splits import Split
from spikeformers.distill import FineGrainedDistillation, cost
from spikeformers.train.detection import ObjectDetection
from spikeformers.train.evaluate import Evaluation, batches_of, evaluate
from spikeformers.train.parallel import local_bn
from spikeformers.train.pretraining import MaskedModelling
from spikeformers.train.recipe import Distill, FineGrained, Recipe, refuse_clips, refuse_segmentation
from spikeformers.train.saved import read_trained
from spikeformers.train.segmentation import SemanticSegmentation
from spikeformers.train.summary import finish
from spikeformers.weights import load_strict, read_checkpoint


def cross_entropy(logits: Tensor, target: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [B,classes] against labels [B] or probabilities [B,classes].

    A share `smoothing` of every target is spread evenly over all classes.
    """
    if target.is_floating_point():
        target = target.to(logits.dtype)
    return F.cross_entropy(logits, target, label_smoothing=smoothing)


def distillation_loss(logits: Tensor, teacher: Tensor, *, kind: str, temperature: float = 1.0) -> Tensor:
    """How far logits [B,classes] are from those of the teacher, both un-normalised.

    hard: cross-entropy against the teacher's class. soft: Kullback-Leibler divergence at a `temperature`, times its
    square, averaged over all elements as in the DeiT code. Raises ValueError if the class counts differ.
    """
    if logits.shape != teacher.shape:
        raise ValueError(
            f"the teacher gives {teacher.shape[-1]} classes but the student {logits.shape[-1]}; "
            "choose a teacher that was trained on the same classes"
        )
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(-1))
    student = F.log_softmax(logits / temperature, -1)
    wanted = F.log_softmax(teacher.to(logits.dtype) / temperature, -1)
    return F.kl_div(student, wanted, reduction="sum", log_target=True) * temperature**2 / logits.numel()


class Result(Protocol):
    """What a test found: `score`, higher is better, and the numbers that the log keeps."""

    @property
    def score(self) -> float: ...

    def metrics(self) -> dict[str, float]: ...


class Task(Protocol):
    """What the loop needs to train something: a module around the network, its loss, its test, its last words."""

    sampled_images: int
    """How many test images the firing rate after each epoch is measured on."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """The module to train, with `network` inside."""

    def network(self, model: nn.Module) -> nn.Module:
        """The network inside the module that `wrap` gave, as it will be used."""

    def loss(self, model: Callable, images: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Scalar loss of one batch; calls `model` once."""

    def test(self, model: nn.Module, loader: DataLoader, *, accelerator: Accelerator | None = None) -> Result:
        """The result over a split; with an accelerator every process tests its share and gets the whole result."""

    def finish(
        self,
        model: nn.Module,
        recipe: Recipe,
        run: Path,
        *,
        split: Dataset,
        result: Result,
        best: float,
        seconds: float,
    ) -> None:
        """Save the trained network in `run/model` and write `run/summary.json` last. `best`: the highest score."""


class Classification:
    """Labels from images. Mixing draws from the global generators, which the loop seeds for each step."""

    sampled_images = 32

    def __init__(
        self,
        *,
        smoothing: float,
        mixer: Mixup | None = None,
        mixing_epochs: int = 0,
        teacher: nn.Module | None = None,
        distill: Distill | None = None,
        fgd_teacher: nn.Module | None = None,
        fgd: FineGrained | None = None,
    ):
        self.smoothing, self.teacher, self.distill = smoothing, teacher, distill
        self.mixer, self.mixing_epochs = mixer, mixing_epochs
        self.fgd_teacher, self.fgd = fgd_teacher, fgd
        self.fine_grained: FineGrainedDistillation | None = None

    def wrap(self, network: nn.Module) -> nn.Module:
        if self.fgd_teacher is not None:
            choices = {name: getattr(self.fgd, name) for name in ("rule", "norm", "reduction", "activation")}
            self.fine_grained = FineGrainedDistillation(network, self.fgd_teacher, **choices)
        return network

    def network(self, model: nn.Module) -> nn.Module:
        return model

    def test(self, model: nn.Module, loader: DataLoader, *, accelerator: Accelerator | None = None) -> Evaluation:
        return evaluate(model, loader, accelerator=accelerator)

    def finish(
        self,
        model: nn.Module,
        recipe: Recipe,
        run: Path,
        *,
        split: Dataset,
        result: Evaluation,
        best: float,
        seconds: float,
    ) -> None:
        measure = partial(self._distillation, model, split, recipe) if self.fine_grained else None
        finish(
            model,
            recipe,
            run,
            split=split,
            evaluation=result,
            best_accuracy=best,
            seconds=seconds,
            distillation=measure,
        )

    def _distillation(self, model: nn.Module, split: Dataset, recipe: Recipe) -> dict[str, float]:
        """What the teacher reaches on the test split, and what a step with it costs beside one without."""
        loader = batches_of(split, batch_size=recipe.batch_size, workers=recipe.workers)
        accuracy = evaluate(self.fgd_teacher, loader).accuracy
        like = next(model.parameters())
        images = next(iter(loader))[0].to(like.device, like.dtype)
        student = local_bn(copy.deepcopy(model))  # only the main process is here
        autocast = torch.bfloat16 if recipe.precision == "bfloat16" else None
        return {"teacher_accuracy": accuracy} | asdict(cost(student, self.fine_grained, images, autocast=autocast))

    def loss(self, model: Callable, images: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Scalar loss of images [B,C,H,W] with labels [B] in the given `epoch` (from 0); calls `model` once."""
        target = labels
        if self.mixer is not None and not 0 < self.mixing_epochs <= epoch:
            images, target = mixed(self.mixer, images, labels)
        with self.fine_grained.watch() if self.fine_grained else contextlib.nullcontext():
            outputs = model(images)
        loss = self._label_loss(images, outputs, target)
        return loss + self.fgd.weight * self.fine_grained.loss(images) if self.fine_grained else loss

    def _label_loss(self, images: Tensor, outputs: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        """Cross-entropy, with the share that a teacher of logits has in it."""
        if self.teacher is None:
            return cross_entropy(_wide(outputs), target, smoothing=self.smoothing)
        logits, logits_kd = map(_wide, outputs)
        with torch.no_grad():
            teacher = _wide(self.teacher(images))
        own = cross_entropy(logits, target, smoothing=self.smoothing)
        learnt = distillation_loss(logits_kd, teacher, kind=self.distill.kind, temperature=self.distill.temperature)
        return (1 - self.distill.alpha) * own + self.distill.alpha * learnt


def build_task(recipe: Recipe, *, split: Split, device: torch.device) -> Task:
    """The task of a recipe, for a training `split`. Raises ValueError for settings that cannot work together."""
    if isinstance(recipe.data, SegmentationData):
        return SemanticSegmentation(recipe, split=split, device=device)
    if isinstance(recipe.data, DetectionData):
        return ObjectDetection(recipe, split=split)
    if isinstance(recipe.data, EventData):
        refuse_clips(recipe)
    refuse_segmentation(recipe, "pre-training" if recipe.pretrain.mask_ratio else "classification")
    if recipe.pretrain.mask_ratio:
        if recipe.quantize.chosen() is not None or recipe.fgd.teacher:
            raise ValueError(
                "masked pre-training has neither low-bit weights nor a teacher of q, k and v: leave out quantize.* and "
                "fgd.*, and give them to the finetuning"
            )
        return MaskedModelling(recipe)
    sizes = {"num_classes": len(split.classes), "in_channels": split.in_channels}
    # Smoothing is left to the loss: it then acts alike on mixed and plain targets.
    share = recipe.data.augment.mixing_share if isinstance(recipe.data, EventData) else 1.0
    mixer = mixing(recipe.data.augment, num_classes=sizes["num_classes"], share=share)
    if mixer is not None and recipe.batch_size % 2:
        raise ValueError(f"mixup and cutmix pair images: batch_size must be even, got {recipe.batch_size}")
    teacher = fgd_teacher = None
    if recipe.distill.teacher:
        teacher = build_teacher(recipe.distill, group="distill", **sizes).to(device)
    if recipe.fgd.teacher:
        fgd_teacher = build_fgd_teacher(recipe.fgd, **sizes).to(device)
    return Classification(
        smoothing=recipe.label_smoothing,
        mixer=mixer,
        mixing_epochs=recipe.data.augment.mixing_epochs,
        teacher=teacher,
        distill=recipe.distill if teacher else None,
        fgd_teacher=fgd_teacher,
        fgd=recipe.fgd if fgd_teacher else None,
    )


def build_fgd_teacher(fgd: FineGrained, *, num_classes: int, in_channels: int) -> nn.Module:
    """The frozen teacher of q, k and v: a finished run or a saved model, else a network of timm.

    Raises ValueError where there is no such folder or network.
    """
    if Path(fgd.teacher).is_dir():
        return read_trained(fgd.teacher)[0].eval().requires_grad_(False)
    if os.sep in fgd.teacher or not timm.is_model(fgd.teacher):
        raise ValueError(
            f"fgd.teacher {fgd.teacher!r} is neither a folder (a run or a saved model: train the ANN twin first) nor a "
            "network of timm"
        )
    return build_teacher(fgd, group="fgd", num_classes=num_classes, in_channels=in_channels)


def build_teacher(
    distill: Distill | FineGrained, *, group: str = "distill", num_classes: int, in_channels: int
) -> nn.Module:
    """The frozen teacher in eval mode, always in float32.

    Raises ValueError for an unknown name, missing weights, or weights of other classes than `num_classes`.
    """
    if not timm.is_model(distill.teacher):
        close = timm.list_models(f"*{distill.teacher.split('_')[0]}*")[:5]
        raise ValueError(f"{group}.teacher {distill.teacher!r} is no model of timm; some like it: {', '.join(close)}")
    local = "" if distill.weights in ("pretrained", "random") else distill.weights
    if local and not Path(local).is_file():
        raise ValueError(f"{group}.weights must be 'pretrained', 'random' or a file; there is no file {local}")
    pretrained = distill.weights == "pretrained"
    if pretrained:
        _check_pretrained(distill.teacher, group=group, num_classes=num_classes)
    sizes = {"num_classes": num_classes, "in_chans": in_channels}
    teacher = timm.create_model(distill.teacher, pretrained=pretrained, **sizes)
    if local:
        weights = read_checkpoint(local)
        try:
            load_strict(teacher, weights)
        except ValueError as error:
            raise ValueError(f"{group}.weights {local} is not for {distill.teacher} with {sizes}: {error}") from None
    return teacher.eval().requires_grad_(False)


def _check_pretrained(name: str, *, group: str, num_classes: int) -> None:
    """timm gives a network a random classifier, without a word, where the classes differ in number."""
    try:
        pretrained = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*"))
        raise ValueError(f"{group}.teacher {name!r}: {error} timm has {known}") from None
    if pretrained is None or not pretrained.has_weights:
        raise ValueError(f"timm has no pretrained weights for {group}.teacher {name!r}; give {group}.weights a file")
    if pretrained.num_classes != num_classes:
        raise ValueError(
            f"the pretrained weights of {group}.teacher {name!r} know {pretrained.num_classes} classes, but the data "
            f"has {num_classes}: finetune the teacher on this data and give its file as {group}.weights"
        )


def _wide(logits: Tensor) -> Tensor:
    """Losses are taken in float32 at least: autocast hands over bfloat16."""
    return logits if logits.dtype == torch.float64 else logits.float()

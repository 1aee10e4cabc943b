"""Masked pre-training as a task of the loop: its loss, its test on hidden patches, and what a run leaves behind.

Paper: Spikformer V2, Sec. 4.2 and Fig. 8 (the pictures). The network and the masks are in pretrain/mae.py.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import make_grid, save_image

from spikeformers.data.images import statistics
from spikeformers.layers.masked import Visible
from spikeformers.pretrain import MAE
from spikeformers.train.checkpoint import write_json
from spikeformers.train.evaluate import batches_of, evaluating, firing_rates
from spikeformers.train.recipe import Recipe, to_json
from spikeformers.train.summary import PretrainSummary, circumstances

PICTURES = "reconstructions.png"
_PICTURED = 8  # test images
_GAP = 2  # pixels between pictures


@dataclass(frozen=True)
class HiddenPatches:
    """Result over a split: mean `loss` of hidden patches, with the same masks at every test."""

    loss: float

    @property
    def score(self) -> float:
        return -self.loss

    def metrics(self) -> dict[str, float]:
        return {"test_loss": self.loss}


class MaskedModelling:
    """Draw the hidden patches of an image from the visible ones; labels are not looked at."""

    sampled_images = 32

    def __init__(self, recipe: Recipe) -> None:
        """Raises ValueError for settings that only labels could use."""
        augment = recipe.data.augment
        labelled = {
            "data.augment.mixup": augment.mixup,
            "data.augment.cutmix": augment.cutmix,
            "label_smoothing": recipe.label_smoothing,
            "distill.teacher": recipe.distill.teacher,
        }
        for field, value in labelled.items():
            if value:
                raise ValueError(
                    f"{field}={value} is of no use in pre-training (pretrain.mask_ratio > 0): leave it out"
                )
        self.sizes = dataclasses.asdict(recipe.pretrain) | {"image_size": recipe.data.size}

    def wrap(self, network: nn.Module) -> MAE:
        """The autoencoder around `network`, whose classifiers are frozen: they take no part."""
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith(("head.", "head_kd.")))
        return MAE(network, **self.sizes)

    def network(self, model: MAE) -> nn.Module:
        """The encoder, whose firing on whole images is what a finetuned network starts from."""
        return model.encoder

    def loss(self, model: Callable, images: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Scalar loss of images [B,C,S,S], with masks from the global generator."""
        drawn = model(images)
        return getattr(model, "module", model).loss(images, drawn)

    @torch.no_grad()
    def test(self, model: MAE, loader: DataLoader, *, accelerator: Accelerator | None = None) -> HiddenPatches:
        """Mean loss over a split. Row i of every batch has the same mask, so that tests compare.

        Raises ValueError for an empty split or images that are not finite.
        """
        first, total, count = next(model.parameters()), 0.0, 0
        with evaluating(model):
            for images, _ in loader:
                images = images.to(first.device, first.dtype)
                drawn = model(images, model.draw_mask(images, generator=torch.Generator().manual_seed(0)))
                losses = model.image_losses(images, drawn)
                if accelerator is not None:
                    losses = accelerator.gather_for_metrics(losses)
                total, count = total + float(losses.double().sum()), count + len(losses)
        if not count:
            raise ValueError("there is nothing to test on: the test split is empty")
        if not math.isfinite(total):
            raise ValueError("the test loss is not finite; check images and weights")
        return HiddenPatches(total / count)

    def finish(
        self,
        model: MAE,
        recipe: Recipe,
        run: Path,
        *,
        split: Dataset,
        result: HiddenPatches,
        best: float,
        seconds: float,
    ) -> None:
        """Save the encoder as a dense network in `run/model`, draw pictures, and write `run/summary.json` last."""
        model = copy.deepcopy(model).cpu().float().eval()
        model.encoder.save_pretrained(run / "model")
        draw(model, split, run / PICTURES)
        loader = batches_of(split, batch_size=recipe.batch_size, images=recipe.testing.energy_images)
        rates, firing_rate = firing_rates(model.encoder, loader)
        summary = PretrainSummary(
            recipe=to_json(recipe),
            model=recipe.model.name,
            parameters=sum(each.numel() for each in model.encoder.parameters()),
            decoder_parameters=sum(each.numel() for each in model.decoder.parameters()),
            loss=result.loss,
            best_loss=-best,
            epochs=recipe.epochs,
            seconds=seconds,
            visible=model.num_visible,
            patches=model.grid[0] * model.grid[1],
            firing_rate=firing_rate,
            layers=rates,
            **circumstances(),
        )
        write_json(run / "summary.json", dataclasses.asdict(summary))


@torch.no_grad()
def draw(model: MAE, split: Dataset, path: Path) -> None:
    """Write rows of image, what the encoder saw of it, and its reconstruction, as Fig. 8 does, to a PNG file."""
    images, _ = next(iter(batches_of(split, batch_size=_PICTURED, images=_PICTURED)))
    visible = model.draw_mask(images, generator=torch.Generator().manual_seed(0))
    drawn = model(images, visible)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics(split.spec))
    shown = [(pictures * std + mean).clamp(0, 1) for pictures in (images, model.picture(images, drawn))]
    columns = [shown[0], torch.where(Visible(visible).at(images).unsqueeze(1), shown[0], 0.5), shown[1]]
    tiles = torch.stack(columns, 1).flatten(0, 1)
    partial = path.with_name(f".tmp-{path.name}")
    save_image(make_grid(tiles, nrow=len(columns), padding=_GAP, pad_value=1.0), partial, format="png")
    partial.replace(path)

"""The training loop: a recipe and a run folder in, a tested and saved network out, from any point of interruption.

All randomness is a function of the seed and of a position: the data's of (seed, epoch, sample), everything else's of
(seed, number of the batch over all processes). So nothing random needs saving, and resuming is exact.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from spikeformers.attention import balance
from spikeformers.data.augment import seed_of
from spikeformers.data.event_clips import EventData
from spikeformers.data.sampler import ResumableSampler
from spikeformers.data.splits import load_split
from spikeformers.energy.firing import neurons_of
from spikeformers.quantize import prepare
from spikeformers.train import checkpoint
from spikeformers.train.evaluate import batches_of, firing_rates
from spikeformers.train.interrupt import StopRequest
from spikeformers.train.logs import Logs
from spikeformers.train.optimise import build_optimizer, gradient_norm, learning_rate, peak_rate, set_rate
from spikeformers.train.parallel import Replicated, sync_bn
from spikeformers.train.progress import Display
from spikeformers.train.recipe import Recipe, Speed, differences, from_json, to_json
from spikeformers.train.sharded import Sharded, fsdp_asked
from spikeformers.train.silent import FIRST, cure, described, silent_neurons
from spikeformers.train.speed import apply_speed, check, force_eager, undo_speed
from spikeformers.train.summary import AnySummary, read_summary
from spikeformers.train.tasks import Result, build_task
from spikeformers.weights import load_backbone
from spikeformers.zoo import create_model, options_of

_LOG_EVERY = 10  # optimiser steps
# On resuming: none of these touches the weights.
_FREE_TO_CHANGE = (
    *("threads", "workers", "speed.", "saving.", "testing.", "data.root"),
    *("segmentation.test", "segmentation.crop", "segmentation.stride"),
)


def train(recipe: Recipe, *, run: Path, resume: bool = False, console: Console | None = None) -> AnySummary:
    """Train, test and save a network as `recipe` says, into the folder `run`.

    docs/guides/train_your_own.md lists the files in `run`.

    `resume` goes on from the newest checkpoint in `run`, within an epoch too, to the same result as without the
    interruption; a finished run is only read. Works alone and under `accelerate launch` or `torchrun`.
    Raises ValueError for a recipe, data or weights that cannot work, for a loss or inputs that are not finite (the last
    good checkpoint stays), and if `run` holds another run or has lost its model; OSError if the disk is full.
    """
    run = Path(run)
    accelerator = _accelerator()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    _check_folder(recipe, run, resume=resume)
    if resume and (run / "summary.json").is_file():
        if not (run / "model").is_dir():
            raise ValueError(
                f"{run} is finished, but its {run / 'model'} is gone: put it back, or remove {run / 'summary.json'} "
                "and --resume again, which makes both from the last checkpoint (without checkpoints/: trains anew)"
            )
        return read_summary(run)
    console = console if accelerator.is_main_process else None
    folder = checkpoint.newest(run / "checkpoints") if resume else None
    work = _Work(recipe, run, accelerator, fresh=folder is None)
    if folder:
        work.restore(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(run / "recipe.json", to_json(recipe))
        for leftovers in (run, work.checkpoints):
            checkpoint.sweep(leftovers)
    done = work.epoch * work.steps_per_epoch + work.step
    logs = Logs(run, size=work.log_bytes, step=done) if accelerator.is_main_process else None
    with (
        logs or contextlib.nullcontext(),
        Display(console, steps=recipe.epochs * work.steps_per_epoch, done=done, unit=work.unit) as show,
        StopRequest() as stop,
    ):
        for line in work.notes:
            show.line(line)
        while work.epoch < recipe.epochs:
            work.train_epoch(show, logs, stop)
            work.close_epoch(show, logs)
    return work.finish()


def build_model(recipe: Recipe, *, num_classes: int, in_channels: int) -> nn.Module:
    """The untrained network of a recipe, its weights drawn from the recipe's seed.

    Raises ValueError if clips have another number of steps than the recipe gives the network.
    """
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    if isinstance(recipe.data, EventData):
        if recipe.model.steps not in (1, recipe.data.steps):
            raise ValueError(
                f"model.steps={recipe.model.steps}, but clips have data.steps={recipe.data.steps}: leave model.steps "
                "out, the network runs as many steps as a clip has"
            )
        sizes["steps"] = recipe.data.steps
    if recipe.distill.teacher:
        sizes["distillation"] = True
    _reseed(recipe.seed, "model")
    return create_model(recipe.model.name, **(recipe.model.overrides() | sizes))


def _accelerator() -> Accelerator:
    """One process a device, in the recipe's precision whatever the launcher was told."""
    for plugin, name in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() == "true":
            raise ValueError(
                f"{name} is not supported (ACCELERATE_USE_{plugin}=true): launch without it, with `accelerate launch "
                "--multi_gpu` or `torchrun`, or with `--use_fsdp --fsdp_version 2` to cut the network over processes"
            )
    return Accelerator(mixed_precision="no")


def _check_folder(recipe: Recipe, run: Path, *, resume: bool) -> None:
    used = checkpoint.newest(run / "checkpoints") is not None or (run / "summary.json").is_file()
    if used and not resume:
        raise ValueError(f"{run} already holds a run; continue it with --resume or choose another folder with --out")
    if not used:
        return
    stored = from_json(checkpoint.read_json(run / "recipe.json"))
    changed = [each for each in differences(stored, recipe) if not each.startswith(_FREE_TO_CHANGE)]
    if changed:
        raise ValueError(f"{run} was started with another recipe, so it cannot be resumed: {'; '.join(changed)}")


def _reseed(*key: int | str) -> None:
    value = seed_of(*key)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class _Work:
    """All that changes while a run trains, and where it stands: `epoch` finished ones, `step` within the next.

    `fresh`: it starts from the beginning; else a checkpoint follows, and `init.backbone` need not be there any more.
    """

    def __init__(self, recipe: Recipe, run: Path, accelerator: Accelerator, *, fresh: bool = True):
        self.recipe, self.run, self.accelerator = recipe, run, accelerator
        self.placement = Sharded(accelerator) if fsdp_asked() else Replicated(accelerator)
        self.checkpoints = run / "checkpoints"
        self.unit = "clips" if isinstance(recipe.data, EventData) else "images"
        self.epoch = self.step = self.log_bytes = 0
        self.loss_sum = self.seconds = self.epoch_seconds = 0.0
        self.best_score: float | None = None
        self.best = ""  # name of the checkpoint with `best_score`
        self.last: Result | None = None
        self.notes: list[str] = []
        self.silent: set[str] = set()  # neurons that were said to be silent
        self.unfired: list[str] = []  # in the first step, those that have not fired yet
        self._build_data()
        self._build_network(fresh=fresh)

    def _build_data(self) -> None:
        recipe, world = self.recipe, self.accelerator.num_processes
        train_split = load_split(recipe.data, "train", seed=recipe.seed)
        self.test_split = load_split(recipe.data, "test", seed=recipe.seed)
        if train_split.classes != self.test_split.classes:
            raise ValueError(
                f"training and test split differ in their classes: {train_split.classes} and {self.test_split.classes}"
            )
        if isinstance(recipe.data, EventData) and train_split.size != self.test_split.size:
            raise ValueError(
                f"training clips have frames of {train_split.size} (height, width), test clips of "
                f"{self.test_split.size}: set data.size to the size of all frames"
            )
        for split in (train_split, self.test_split):
            if split.skipped:
                count, first = len(split.skipped), split.skipped[0]
                self.notes.append(f"images skipped because they cannot be read or used: {count}; first: {first}")
        self.train_split = train_split
        self.sampler = ResumableSampler(
            len(train_split),
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            rank=self.accelerator.process_index,
            world=world,
            shuffled=getattr(train_split, "shuffled", None),
        )
        self.steps_per_epoch = len(self.sampler) // (recipe.batch_size * recipe.accumulate)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{len(train_split)} training {self.unit} do not fill one step of batch_size={recipe.batch_size} x "
                f"accumulate={recipe.accumulate} x {world} process(es): lower them to a product of at most "
                f"{len(train_split) // world}"
            )
        self.loader = self._loader(train_split)

    def _loader(self, split: Dataset) -> DataLoader:
        return DataLoader(
            split,
            batch_size=self.recipe.batch_size,
            sampler=self.sampler,
            drop_last=True,
            collate_fn=getattr(split, "collate", None),
            num_workers=self.recipe.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=self.recipe.workers > 0,
        )

    def _build_network(self, *, fresh: bool) -> None:
        recipe, device = self.recipe, self.accelerator.device
        self.dtype = torch.float64 if recipe.precision == "float64" else torch.float32
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        split = self.train_split
        check(recipe, sharded=fsdp_asked())
        self.task = build_task(recipe, split=split, device=device)
        network = build_model(recipe, num_classes=len(split.classes), in_channels=split.in_channels)
        trained: set[nn.Parameter] = set()
        if recipe.init.backbone and fresh:
            report = load_backbone(network, recipe.init.backbone, options=options_of)
            self.notes.append(f"init.backbone: {report}")
            trained = {parameter for name, parameter in network.named_parameters() if name not in report.kept}
        if bits := recipe.quantize.chosen():  # after loading: step sizes come from the weights
            prepare(network, bits=bits, **recipe.quantize.options())
        self.plain = self.task.wrap(network)
        self.neurons = len(neurons_of(self.plain))
        self.plain.to(device, self.dtype, memory_format=self.layout)
        if recipe.init.balance and fresh:
            self.notes.append(self._balanced(trained))
        if recipe.sync_bn:
            sync_bn(self.plain)
        if recipe.speed != Speed():
            self.notes += apply_speed(self.plain, recipe.speed, self._first_images(), accumulate=recipe.accumulate)
        self.ema = ModelEmaV3(self.plain, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.model = self.placement.spread(self.plain, self.ema)
        self.optimizer = build_optimizer(self.plain, recipe.optim, fused=recipe.speed.fused_optimizer)

    def _balanced(self, trained: set[nn.Parameter]) -> str:
        """Let attention scales start where the first training images want them; every process does the same.

        Those that are `trained` stay.
        """
        images = self._first_images()
        skip = {name for name, parameter in self.plain.named_parameters() if parameter in trained}
        count, left = balance(self.plain.train(), images, skip=skip), sum(name.endswith(".scale") for name in skip)
        if not count and not left:
            raise ValueError(
                "init.balance sets learnable attention scales, and this network has none: build it with "
                "attention=sdsa3_learned and, of Spike2Former, attention_scale=learnable"
            )
        kept = f"; {left} of init.backbone stay as trained" if left else ""
        drawn = f"{self.recipe.batch_size} training images"
        return f"init.balance: {count} attention scales start where {drawn} drive one spike{kept}"

    def _first_images(self) -> Tensor:
        """A training batch, the same in every process."""
        collate = getattr(self.train_split, "collate", default_collate)
        images, _ = collate([self.train_split[0, index] for index in range(self.recipe.batch_size)])
        return self._placed(images)

    def _placed(self, images: Tensor) -> Tensor:
        """Images where the network is, in its precision and layout; clips [T, B, C, H, W] have no layout to choose."""
        layout = self.layout if images.ndim == 4 else torch.contiguous_format
        return images.to(self.accelerator.device, self.dtype, memory_format=layout, non_blocking=True)

    def restore(self, folder: Path) -> None:
        """Stand where the checkpoint was taken.

        Raises ValueError with other images, another number of processes, or a checkpoint of another version.
        """
        state = checkpoint.read_json(folder / "state.json")
        if missing := [name for name in (*_STATE, "fixed") if name not in state]:
            raise ValueError(
                f"the checkpoint {folder} was written by another version (it has no {', '.join(missing)}): finish it "
                "with that version, or start a new one from it with init.backbone"
            )
        images, processes = (state["fixed"][name] for name in ("images", "processes"))
        if processes != self.accelerator.num_processes:
            raise ValueError(
                f"{self.run} was trained by {processes} process(es), so {self.accelerator.num_processes} cannot resume "
                f"it: start {processes}, for example with `accelerate launch --num_processes {processes}`"
            )
        if images != self.sampler.length:
            raise ValueError(
                f"{self.run} was trained on {images} images, but there are {self.sampler.length} now: set data.root to "
                "a folder with the same images"
            )
        self.placement.load(folder, model=self.plain, optimizer=self.optimizer, ema=self.ema)
        for name in _STATE:
            setattr(self, name, state[name])
        if self.best and self.accelerator.is_main_process and (self.checkpoints / self.best).is_dir():
            checkpoint.point(self.checkpoints, "best", self.checkpoints / self.best)
        self.notes.append(f"resuming after {self.epoch} epochs and {self.step} steps")

    def save(self, logs: Logs | None) -> None:
        """A checkpoint of the present position, by all processes; one of them has the `logs`."""
        name = checkpoint.name_of(self.epoch, self.step)
        self.best = self.best or name
        self.log_bytes = logs.flush() if logs else 0
        fixed = {"images": self.sampler.length, "processes": self.accelerator.num_processes}
        state = {name: getattr(self, name) for name in _STATE} | {"fixed": fixed}
        parts = {"model": self.plain, "optimizer": self.optimizer, "ema": self.ema}
        folder = self.placement.save(self.checkpoints, name, **parts, state=state)
        if logs:
            checkpoint.point(self.checkpoints, "last", folder)
            checkpoint.point(self.checkpoints, "best", self.checkpoints / self.best)
            checkpoint.prune(self.checkpoints, keep=self.recipe.saving.keep)
        self.accelerator.wait_for_everyone()

    def train_epoch(self, show: Display, logs: Logs | None, stop: StopRequest) -> None:
        """The rest of the present epoch, with a checkpoint every `saving.every_steps` and one where a person stops."""
        recipe = self.recipe
        self.model.train()
        self.sampler.set_position(self.epoch, self.step * recipe.accumulate * recipe.batch_size)
        batches, began, first = iter(self.loader), time.perf_counter(), self.step
        images = recipe.batch_size * recipe.accumulate * self.accelerator.num_processes
        earlier = self.epoch_seconds
        while self.step < self.steps_per_epoch:
            rate, loss, norm = self._train_step(batches) if self.epoch or self.step else self._first_step(batches, show)
            self.step += 1
            self.loss_sum += loss
            here = time.perf_counter() - began
            self.epoch_seconds = earlier + here
            mean, speed = self.loss_sum / self.step, images * (self.step - first) / here
            show.step(epoch=f"{self.epoch + 1}/{recipe.epochs}", loss=mean, rate=rate, speed=speed)
            total = self.epoch * self.steps_per_epoch + self.step
            if logs and total % _LOG_EVERY == 0:
                values = {"loss": loss, "lr": rate, "gradient_norm": norm, "images_per_second": speed}
                logs.write("step", step=total, values=values)
            # Several processes get their signals at different steps: there only the regular checkpoints are safe.
            stopping = stop.asked and self.accelerator.num_processes == 1
            due = recipe.saving.every_steps and self.step % recipe.saving.every_steps == 0
            if stopping or (due and self.step < self.steps_per_epoch):
                self.save(logs)
            if stopping:
                raise KeyboardInterrupt(f"stopped and saved in epoch {self.epoch + 1} after step {self.step}")

    def _first_step(self, batches: Iterator[tuple[Tensor, Tensor]], show: Display) -> tuple[float, float, float]:
        """The step that starts a run; it says which neurons do not fire."""
        with force_eager(), silent_neurons(self.plain) as self.unfired:
            found = self._train_step(batches)
        self._say_silent(self.unfired, FIRST, show, neurons=self.neurons)
        self.unfired = []
        return found

    def _say_silent(self, names: Sequence[str], where: str, show: Display, *, neurons: int) -> None:
        """A line about those of all `neurons` that did not fire there; each is named once."""
        if new := [name for name in names if name not in self.silent]:
            self.silent.update(new)
            show.line(described(new, where, silent=len(names), neurons=neurons))

    def _rate(self, step: int) -> float:
        """Learning rate of the optimiser step number `step` of the run, before any layer's own scale."""
        return learning_rate(
            step,
            steps_per_epoch=self.steps_per_epoch,
            epochs=self.recipe.epochs,
            peak=peak_rate(self.recipe, processes=self.accelerator.num_processes),
            optim=self.recipe.optim,
        )

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        """One optimiser step; returns its learning rate, mean loss and gradient norm."""
        recipe, world = self.recipe, self.accelerator.num_processes
        done = self.epoch * self.steps_per_epoch + self.step
        rate = self._rate(done)
        set_rate(self.optimizer, rate)
        total, whole = torch.zeros((), device=self.accelerator.device), True
        self.placement.begin_step(self.plain)
        for part in range(recipe.accumulate):
            images, labels = next(batches)
            whole = whole and bool(torch.isfinite(images).all())
            images = self._placed(images)
            labels = send_to_device(labels, self.accelerator.device, non_blocking=True)
            _reseed(recipe.seed, "batch", (done * recipe.accumulate + part) * world + self.accelerator.process_index)
            last = part == recipe.accumulate - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                    loss = self.task.loss(self.model, images, labels, epoch=self.epoch) / recipe.accumulate
                loss.backward()
            total = total + loss.detach()
        norm = float(gradient_norm(self.plain, clip=recipe.optim.clip_grad))
        # What one process found reaches all, so that all stop and none waits for it.
        loss, share = self.accelerator.reduce(torch.stack([total, total.new_tensor(whole)]), "mean").tolist()
        if share < 1:
            raise ValueError(self._not_finite("an input image has values that are not finite"))
        if not np.isfinite([loss, norm]).all():
            raise ValueError(
                self._not_finite(f"the loss is {loss} and the gradient norm {norm}")
                + cure(self.unfired, neurons=self.neurons, recipe=recipe)
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.plain, step=done + 1)
        return rate, loss, norm

    def _not_finite(self, what: str) -> str:
        kept = checkpoint.newest(self.checkpoints)
        rest = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return (
            f"training stopped in epoch {self.epoch + 1}, step {self.step + 1}: {what}; {rest}; "
            "check the data, lower optim.lr or set optim.clip_grad"
        )

    def close_epoch(self, show: Display, logs: Logs | None) -> None:
        """Test if it is time to, log, count the epoch as done and save."""
        recipe, began, training = self.recipe, time.perf_counter(), self.epoch_seconds
        number = self.epoch + 1
        values = {"epoch": self.epoch, "train_loss": self.loss_sum / self.step}
        self.last, better = None, False
        if number % recipe.testing.every == 0 or number == recipe.epochs:
            with force_eager():
                self.last = self._test(images=0 if number == recipe.epochs else recipe.testing.images)
                sample = next(iter(batches_of(self.test_split, batch_size=self.task.sampled_images)))
                rates, values["firing_rate"] = firing_rates(self.task.network(self.tested), [sample])
            values |= self.last.metrics()
            better = self.best_score is None or self.last.score >= self.best_score
            silent = [name for name, rate in rates.items() if rate == 0]
            self._say_silent(silent, "a test batch", show, neurons=len(rates))
        seconds = training + time.perf_counter() - began
        images = self.step * recipe.batch_size * recipe.accumulate * self.accelerator.num_processes
        values |= {
            "lr": self._rate(self.epoch * self.steps_per_epoch + self.step - 1),
            "seconds": seconds,
            "images_per_second": images / training,
        }
        if logs:
            logs.write("epoch", step=number * self.steps_per_epoch, values=values)
        show.line(_line(values, recipe.epochs, unit=self.unit))
        self.seconds += seconds
        self.epoch, self.step, self.loss_sum, self.epoch_seconds = number, 0, 0.0, 0.0
        if better:
            self.best_score, self.best = self.last.score, checkpoint.name_of(self.epoch, 0)
        self.save(logs)

    def _test(self, *, images: int) -> Result:
        """Of the network that is tested and saved at the end, `tested`: the averaged one if the recipe averages."""
        recipe = self.recipe
        self.tested = self.placement.whole(self.ema.module if self.ema else self.plain)
        loader = batches_of(self.test_split, batch_size=recipe.batch_size, images=images, workers=recipe.workers)
        if self.accelerator.num_processes == 1:
            return self.task.test(self.tested, loader)
        return self.task.test(self.tested, self.accelerator.prepare_data_loader(loader), accelerator=self.accelerator)

    def finish(self) -> AnySummary:
        """Save the network and sum up, in the main process; the others wait and read."""
        with force_eager():
            last = self.last or self._test(images=0)
        undo_speed(self.tested)
        if self.accelerator.is_main_process:
            self.task.finish(
                self.tested,
                self.recipe,
                self.run,
                split=self.test_split,
                result=last,
                best=last.score if self.best_score is None else max(self.best_score, last.score),
                seconds=self.seconds,
            )
        self.accelerator.wait_for_everyone()
        return read_summary(self.run)


_STATE = ("epoch", "step", "log_bytes", "loss_sum", "seconds", "epoch_seconds", "best_score", "best")


def _line(values: dict, epochs: int, *, unit: str) -> str:
    """An epoch's record as a line for people."""
    parts = [f"epoch {values['epoch'] + 1}/{epochs}", f"loss {values['train_loss']:.4f}"]
    if "test_accuracy" in values:
        parts.append(f"test accuracy {values['test_accuracy']:.2%}")
    elif "test_miou" in values:
        parts.append(f"test mIoU {values['test_miou']:.2%}")
    elif "test_map" in values:
        parts.append(f"test mAP {values['test_map']:.2%}  AP50 {values['test_ap50']:.2%}")
    elif "test_loss" in values:
        parts.append(f"test loss {values['test_loss']:.4f}")
    if "firing_rate" in values:
        parts.append(f"firing rate {values['firing_rate']:.1%}")
    return "  ".join([*parts, f"{values['images_per_second']:.0f} {unit}/s", f"{values['seconds']:.0f} s"])

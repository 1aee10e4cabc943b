"""Several processes with the whole network each, and batch norm over all of them, on any device.

torch's SyncBatchNorm refuses CPU tensors; this one only needs an `all_reduce`, so gloo serves as well. Without it each
process normalises by its own batch and the saved running statistics are those of process 0.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spikeformers.train import checkpoint


class Replicated:
    """Where the network lives: whole in every process, or in the only one (sharded.py has the other answer)."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def spread(self, model: nn.Module, ema: ModelEmaV3 | None) -> nn.Module:
        """What to call in training, in place of `model`. Before the optimiser is built, after `ema` is."""
        return self.accelerator.prepare_model(model)

    def begin_step(self, model: nn.Module) -> None:
        """Called before each optimiser step: nothing to do, DDP lets buffers agree by itself."""

    def whole(self, model: nn.Module) -> nn.Module:
        """`model` or its average, whole and the same in every process, to be tested and saved."""
        share_buffers(model)
        return model

    def save(
        self,
        root: Path,
        name: str,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: ModelEmaV3 | None,
        state: dict,
    ) -> Path:
        """Write the checkpoint `root/name`, from every process; returns its folder. Raises OSError."""
        if self.accelerator.is_main_process:
            training = {"optimizer": optimizer.state_dict(), "ema": ema.module.state_dict() if ema else {}}
            checkpoint.save(root, name, model=model.state_dict(), training=training, state=state)
        return root / name

    def load(self, folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None) -> None:
        """Put back what `save` wrote. Raises ValueError for a damaged checkpoint, or one of FSDP."""
        if not (folder / checkpoint.WEIGHTS).is_file() and any(folder.glob("shard-*")):
            raise ValueError(
                f"{folder} was written under FSDP: resume it so, with `accelerate launch --use_fsdp --fsdp_version 2`"
            )
        weights, training, _ = checkpoint.load(folder)
        model.load_state_dict(weights)
        optimizer.load_state_dict(training["optimizer"])
        if ema:
            ema.module.load_state_dict(training["ema"])


def share_buffers(model: nn.Module) -> None:
    """Running statistics become those of process 0 in all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        groups.setdefault(buffer.dtype, []).append(buffer)
    for buffers in groups.values():  # one message for each type: they are many and small
        packed = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(packed, 0)
        for buffer, part in zip(buffers, packed.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; every process' result depends on every input, so gradients sum too."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose training statistics are those of the batches of all processes together."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B,C,H,W] -> the same shape. Raises ValueError in training if all processes have one value a channel."""
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if alone or not self.training:
            return super().forward(x)
        given, axes = x.dtype, [0, 2, 3]
        x = x if given == torch.float64 else x.float()  # bfloat16 sums would lose the statistics
        first = torch.cat([x.sum(axes), x.new_full((1,), x.numel() // x.shape[1])])
        first = _SumOverProcesses.apply(first)
        count = first[-1].detach()
        if x.numel() <= x.shape[1] and count < 2:  # read only where it may be: that waits for the device
            raise ValueError(f"expected more than 1 value per channel over all processes, got shape {tuple(x.shape)}")
        mean = first[:-1] / count
        # Squares of differences, in a second round: the one-round formula loses digits where mean >> deviation.
        centred = x - mean[:, None, None]
        variance = _SumOverProcesses.apply((centred * centred).sum(axes)) / count
        self._update_running(mean.detach(), variance.detach() * count / (count - 1))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        result = centred * scale[:, None, None]
        return (result + self.bias[:, None, None] if self.affine else result).to(given)

    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def sync_bn(model: nn.Module) -> nn.Module:
    """Turn every batch norm of `model` into one over all processes, in place; returns `model`.

    Parameters, buffers and names stay. Raises ValueError for a batch norm that it does not know.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and type(module).forward is nn.BatchNorm2d.forward:
            module.__class__ = SyncedBatchNorm2d  # also an MPRF, which differs in how it starts
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncedBatchNorm2d):
            raise ValueError(f"cannot synchronise {name or 'the model'}, a {type(module).__name__}; use nn.BatchNorm2d")
    return model


def local_bn(model: nn.Module) -> nn.Module:
    """Undo `sync_bn`, in place, so that one process can run `model` in train mode alone; returns `model`."""
    for module in model.modules():
        if isinstance(module, SyncedBatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    return model

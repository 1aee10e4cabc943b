"""FSDP2: parameters, gradients and optimiser states cut over the processes, gathered block by block while in use.

torch's `fully_shard` does the work, on GPUs and on CPUs (gloo); accelerate's own form of it needs GPUs, so only the
choice is accelerate's: ACCELERATE_USE_FSDP and FSDP_VERSION=2, as `accelerate launch` sets them. A checkpoint is
written by torch.distributed.checkpoint, a file for each process, as safetensors and not in its pickled format.

The network is tested and saved as a whole copy of it, which every process keeps beside its part: 4 bytes a parameter,
where training without FSDP keeps 16 with AdamW.
"""

import contextlib
import copy
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from spikeformers.backbones.meta_spikeformer import ConvBlock
from spikeformers.layers import TransformerBlock
from spikeformers.train import checkpoint
from spikeformers.train.parallel import share_buffers

_UNITS = (ConvBlock, TransformerBlock)  # gathered one after the other; all else stays gathered within a step
_SHARDS = "shard-*.safetensors"


def fsdp_asked() -> bool:
    """Whether the launcher asks for FSDP. Raises ValueError for a kind of it, or a setting, that is not this one."""
    if not _told("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP is there in its second version only: add --fsdp_version 2 (or FSDP_VERSION=2)")
    if _told("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("FSDP_OFFLOAD_PARAMS=true is not supported: leave it out, or set it to false")
    if _told("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError("FSDP_ACTIVATION_CHECKPOINTING=true is a setting of the recipe here: speed.recompute=true")
    return True


def _told(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


class Sharded:
    """Where the network lives: a part of every parameter in each process. The same methods as `Replicated`.

    Raises ValueError for a single process.
    """

    def __init__(self, accelerator: Accelerator):
        if accelerator.num_processes == 1:
            raise ValueError("FSDP cuts a network over several processes, and there is one: launch more, or without it")
        self.accelerator = accelerator
        self.copy: nn.Module | None = None

    def spread(self, model: nn.Module, ema: ModelEmaV3 | None) -> nn.Module:
        """Cut `model` and its average in place; returns `model`.

        Raises ValueError for a parameter that is one number without axes, which cannot be cut.
        """
        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                raise ValueError(
                    f"FSDP cannot cut {name}, a single number: leave out learnable attention scales "
                    "(attention=sdsa3_learned, attention_scale=learnable), or train without FSDP"
                )
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        self.copy = copy.deepcopy(model)
        for each in (model, ema.module) if ema else (model,):
            for parameter in each.parameters():
                parameter.data = parameter.data.contiguous()  # of weights torch cuts no other layout
            for unit in [module for module in each.modules() if isinstance(module, _UNITS)]:
                fully_shard(unit, mesh=mesh)
            fully_shard(each, mesh=mesh)
        if ema:
            ema.foreach = False  # a list of cut and uncut tensors is no input for one kernel
        return model

    def begin_step(self, model: nn.Module) -> None:
        """Running statistics become those of process 0, as DDP has it."""
        share_buffers(model)

    @torch.no_grad()
    def whole(self, model: nn.Module) -> nn.Module:
        """The whole copy with the present weights of `model` (or of its average), the same in every process."""
        share_buffers(model)
        for ours, theirs in zip(self.copy.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        return self.copy

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
        """Write the checkpoint `root/name`, from every process; returns its folder. `root` is one folder for all.

        Raises OSError in all processes if one of them cannot write; ValueError for an optimiser whose states are
        neither single numbers nor shaped like their parameter.
        """
        for each in (model, ema.module) if ema else (model,):
            share_buffers(each)  # what all have alike is written by any of them
        main = self.accelerator.is_main_process
        states, training = _states(optimizer), optimizer.state_dict()
        tensors = _weights(model, ema) | _named(states)
        training["state"] = {
            number: {key: value for key, value in each.items() if key not in states.get(number, {})}
            for number, each in training["state"].items()
        }
        with checkpoint.written(root, name) if main else contextlib.nullcontext() as hidden:
            place = [str(hidden)]
            dist.broadcast_object_list(place, device=self.accelerator.device)
            with _failure_named():
                dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(place[0], save_distributed=True))
            if main:
                shards = sorted(path.name for path in hidden.glob(_SHARDS))
                checkpoint.write_rest(hidden, training={"optimizer": training}, state=state | {"shards": shards})
        return root / name

    def load(self, folder: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None) -> None:
        """Put back what `save` wrote. Raises ValueError for a damaged checkpoint, or one without FSDP."""
        if (folder / checkpoint.WEIGHTS).is_file():
            raise ValueError(f"{folder} was written without FSDP: resume it without --use_fsdp")
        training, state = checkpoint.load_rest(folder)
        with checkpoint.damage_named(folder), _failure_named():
            if missing := [name for name in state["shards"] if not (folder / name).is_file()]:
                raise ValueError(f"it has lost {', '.join(missing)}")
            reader = HuggingFaceStorageReader(str(folder))
            states = _empty_states(reader, optimizer)
            dcp.load(_weights(model, ema) | _named(states), storage_reader=reader)
        packed = training["optimizer"]
        optimizer.load_state_dict(packed | {"state": {n: packed["state"].get(n, {}) | states[n] for n in states}})


def _weights(model: nn.Module, ema: ModelEmaV3 | None) -> dict[str, Tensor]:
    """Tensors that are the weights, not copies: loading into them is all there is to do."""
    named = {"model": model} | ({"ema": ema.module} if ema else {})
    return {f"{part}.{key}": value for part, each in named.items() for key, value in each.state_dict().items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """In the order in which `state_dict` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The tensors in an optimiser's state by the number of their parameter. Raises ValueError for other shapes."""
    parameters, states = _parameters(optimizer), {}
    for number, each in optimizer.state_dict()["state"].items():
        for key, value in each.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape != parameters[number].shape and value.numel() != 1:
                raise ValueError(f"an optimiser whose {key} is {tuple(value.shape)} does not work under FSDP")
            states.setdefault(number, {})[key] = value
    return states


def _named(states: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"optimizer.{number}.{key}": value for number, each in states.items() for key, value in each.items()}


def _empty_states(reader: HuggingFaceStorageReader, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Room for the optimiser's tensors in a checkpoint, which a new optimiser does not have before its first step."""
    parameters, states = _parameters(optimizer), {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        part, number, *key = name.split(".", 2)
        if part != "optimizer":
            continue
        like, kind = parameters[int(number)], stored.properties.dtype
        if stored.size != like.shape and stored.size.numel() != 1:
            raise ValueError(f"{name} has the shape {tuple(stored.size)}")
        room = torch.zeros_like(like, dtype=kind) if stored.size == like.shape else torch.zeros(stored.size, dtype=kind)
        states.setdefault(int(number), {})[key[0]] = room
    return states


@contextlib.contextmanager
def _failure_named() -> Iterator[None]:
    """Turns torch's collective exception, which is no Exception, into what went wrong in the first process it names."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise OSError(cause.errno or errno.EIO, cause.strerror or str(cause)) from error
        raise ValueError(str(cause)) from error

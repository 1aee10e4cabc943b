"""FSDP on two gloo processes: the network that DDP trains, resumed to the bit, and nothing half-written."""

import dataclasses
import multiprocessing
import os
import resource
import socket
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import spikeformers
from spikeformers.data.images import ImageSplit
from spikeformers.train import checkpoint
from spikeformers.train.logs import read_log
from spikeformers.train.loop import _Work, build_model, train
from spikeformers.train.parallel import Replicated
from spikeformers.train.recipe import Optim, Saving
from spikeformers.train.sharded import Sharded


def cut_power_at(place):
    """The `place`-th training image of the second epoch is never read, in this process."""
    original, seen = ImageSplit.__getitem__, []

    def getitem(self, key):
        seen.extend([key] if isinstance(key, tuple) and key[0] == 1 else [])
        if len(seen) == place:
            ImageSplit.__getitem__ = original
            raise ConnectionError("power cut")
        return original(self, key)

    ImageSplit.__getitem__ = getitem


def note_parts(folder, rank):
    """Writes down which share of the parameters and of the optimiser's states each process keeps."""
    original = _Work.finish

    def finish(self):
        kept = list(self.plain.parameters())
        kept += [each for state in self.optimizer.state.values() for each in state.values() if each.ndim]
        assert all(isinstance(each, DTensor) for each in kept)
        share = sum(each.to_local().numel() for each in kept) / sum(each.numel() for each in kept)
        (folder / f"share-{rank}").write_text(str(share))
        return original(self)

    _Work.finish = finish


def work(rank, port, recipe, folder):
    """One of two processes: trains without FSDP, with it, with it and a power cut, and on a full disk."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    train(recipe, run=folder / "replicated")
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    cut_power_at(13)
    try:
        train(recipe, run=folder / "resumed")
    except ConnectionError:
        torch.distributed.barrier()
        train(recipe, run=folder / "resumed", resume=True)
    note_parts(folder, rank)
    train(recipe, run=folder / "sharded")
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # writing fails in the middle of a file
    try:
        # LAMB takes norms of each layer, which are sums over processes too
        train(dataclasses.replace(recipe, optim=Optim(name="lamb"), saving=Saving()), run=folder / "full")
    except OSError as error:
        (folder / f"said-{rank}").write_text(str(error))
    torch.distributed.barrier()
    os._exit(0)  # after a failed write gloo's threads may outlive the interpreter, which aborts


@pytest.fixture
def trained(tiny, tmp_path):
    """Runs `replicated`, `sharded` and `resumed`, and the messages of a `full` disk; with their recipe."""
    saving = Saving(every_steps=1, keep=0)
    # SGD: Adam swells the rounding of gradients that are zero, as of biases in front of a batch norm
    optim = Optim(name="sgd", lr=0.02, clip_grad=1.0)
    recipe = tiny(precision="float64", batch_size=4, accumulate=2, saving=saving, optim=optim, ema_decay=0.9)
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    multiprocessing.set_forkserver_preload(["spikeformers.train.loop"])  # imported once for both
    torch.multiprocessing.start_processes(work, (port, recipe, tmp_path), nprocs=2, start_method="forkserver")
    return recipe, tmp_path


def saved(run):
    return load_file(run / "model" / "model.safetensors")


def test_a_network_cut_over_two_processes_learns_what_a_whole_one_learns(trained):
    recipe, folder = trained
    whole, cut, resumed = (saved(folder / name) for name in ("replicated", "sharded", "resumed"))
    for key, value in whole.items():  # the norm that clips is summed in another order
        torch.testing.assert_close(cut[key], value, rtol=1e-9, atol=1e-11, msg=key)
    losses = [[r["train_loss"] for r in read_log(folder / name, "epoch")] for name in ("replicated", "sharded")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)

    # Each process keeps half of the weights and states, but for axes that do not divide.
    assert all(0.4 < float((folder / f"share-{rank}").read_text()) < 0.6 for rank in (0, 1))

    # From the middle of an epoch, with optimiser and average, to the same end.
    assert [key for key in cut if not torch.equal(cut[key], resumed[key])] == []
    shards = sorted((folder / "resumed" / "checkpoints" / "epoch-0001-step-000001").glob("*.safetensors"))
    assert len(shards) == 2
    kinds = {path.suffix for path in (folder / "sharded" / "checkpoints").glob("*/*")}
    assert kinds == {".safetensors", ".pt", ".json"}  # none of torch's pickled metadata

    # One process alone reads and uses the result, but does not go on in another form.
    summary = train(recipe, run=folder / "sharded", resume=True)
    whole = build_model(recipe, num_classes=10, in_channels=1)
    assert summary.parameters == sum(each.numel() for each in whole.parameters())
    assert torch.isfinite(spikeformers.from_pretrained(folder / "sharded" / "model")(torch.rand(1, 1, 16, 16))).all()
    last = checkpoint.newest(folder / "sharded" / "checkpoints")
    with pytest.raises(ValueError, match="was written under FSDP: resume it so"):
        Replicated(None).load(last, model=whole, optimizer=None, ema=None)

    # A disk that is full for one process stops both, and nothing of that checkpoint stays.
    for rank in (0, 1):
        assert "File too large" in (folder / f"said-{rank}").read_text()
    assert list((folder / "full" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "second version only: add --fsdp_version 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true is not supported"),
        ({"FSDP_VERSION": "2"}, "there is one: launch more"),
    ],
)
def test_what_fsdp_cannot_do_here_is_refused(tiny, tmp_path, monkeypatch, settings, message):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(tiny(), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_single_numbers_and_lost_files_are_named(tmp_path):
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    sharded = Sharded(SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="FSDP cannot cut scale, a single number"):
        sharded.spread(model, None)
    checkpoint.write_rest(tmp_path, training={}, state={"shards": ["shard-1.safetensors"]})
    with pytest.raises(ValueError, match=r"is damaged \(it has lost shard-1.safetensors"):
        sharded.load(tmp_path, model=model, optimizer=None, ema=None)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="was written without FSDP"):
        sharded.load(tmp_path, model=model, optimizer=None, ema=None)

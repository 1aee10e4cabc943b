"""Two gloo processes against one, in float64: the same images must give the same network."""

import dataclasses
import os
import socket

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spikeformers.train.loop import train
from spikeformers.train.parallel import SyncedBatchNorm2d, sync_bn
from spikeformers.train.recipe import Optim, Saving, override


def work(rank, port, jobs):
    """One of two processes: trains every (recipe, folder) of `jobs`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for recipe, run in jobs:
        train(recipe, run=run)
    torch.distributed.destroy_process_group()


def weights_of(run, *, buffers):
    found = load_file(run / "checkpoints" / "epoch-0001" / "model.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {key: value for key, value in found.items() if buffers or not key.endswith(statistics)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


def test_two_processes_equal_one(tiny, folder):
    # SGD: Adam would hide a wrong scale of the averaged gradients
    optim = Optim(name="sgd", lr=0.02)
    base = tiny(precision="float64", epochs=1, batch_size=4, saving=Saving(keep=0), optim=optim, channels_last=False)
    free = override(override(base, "model.options.qkv", "linear"), "model.options.proj", "linear")
    synced = dataclasses.replace(base, sync_bn=True)
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    jobs = [(free, folder / "free2"), (synced, folder / "synced2")]
    torch.multiprocessing.spawn(work, (port, jobs), nprocs=2)
    train(dataclasses.replace(free, accumulate=2), run=folder / "free1")
    train(dataclasses.replace(synced, batch_size=8), run=folder / "synced1")

    # Without RepConv training never reads running statistics: each process' batch counts like an accumulated one.
    one, two = (weights_of(folder / name, buffers=False) for name in ("free1", "free2"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-11, msg=key)
    # Synchronised batch norm makes any network equal to one with twice the batch, running statistics included.
    one, two = (weights_of(folder / name, buffers=True) for name in ("synced1", "synced2"))
    assert any("running_var" in key for key in one)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-11, msg=key)


def test_alone_the_synchronised_norm_is_the_plain_one():
    plain = nn.BatchNorm2d(3).double()
    synced = sync_bn(nn.Sequential(nn.BatchNorm2d(3)).double())[0]
    assert isinstance(synced, SyncedBatchNorm2d)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(plain(x), synced(x))
    assert torch.equal(plain.running_var, synced.running_var)


def test_norms_that_cannot_be_synchronised_are_named():
    with pytest.raises(ValueError, match="cannot synchronise 0, a BatchNorm1d"):
        sync_bn(nn.Sequential(nn.BatchNorm1d(3)))

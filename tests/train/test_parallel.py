"""Two gloo processes against one, in float64: the same images must give the same network."""

import dataclasses
import os
import socket

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spikeformers.attention import MPRF
from spikeformers.backbones.qsd_transformer import ANN_TWIN
from spikeformers.data.images import ImageSplit
from spikeformers.data.splits import load_split
from spikeformers.train import checkpoint
from spikeformers.train.evaluate import batches_of
from spikeformers.train.loop import build_model, train
from spikeformers.train.parallel import SyncedBatchNorm2d, local_bn, sync_bn
from spikeformers.train.pretraining import MaskedModelling
from spikeformers.train.recipe import FineGrained, ModelChoice, Optim, Pretrain, Saving, from_json, override
from spikeformers.train.segmentation_evaluate import evaluate_segmentation
from spikeformers.train.summary import read_summary
from spikeformers.zoo import create_model


def spoil(part):
    """From now on this process gets images of NaN from the training or the test split."""
    original = ImageSplit.__getitem__

    def getitem(self, key):
        image, label = original(self, key)
        return (image * float("nan") if isinstance(key, tuple) == (part == "train") else image), label

    ImageSplit.__getitem__ = getitem
    return original


def work(rank, port, jobs, spoilt):
    """One of two processes: trains every (recipe, folder) of `jobs`, then what the second one has spoilt images for."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    for recipe, run in jobs:
        train(recipe, run=run)
    for part, (recipe, run) in spoilt.items():
        original = spoil(part) if rank == 1 else ImageSplit.__getitem__
        try:
            train(recipe, run=run)
        except ValueError as error:
            run.with_name(f"{run.name}-said-{rank}").write_text(str(error))
        ImageSplit.__getitem__ = original
    torch.distributed.destroy_process_group()


def weights_of(run, *, buffers):
    found = load_file(run / "checkpoints" / "epoch-0001" / "model.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return {key: value for key, value in found.items() if buffers or not key.endswith(statistics)}


@pytest.fixture
def trained(tiny, segmenting, tmp_path):
    """Runs of two processes in folders free2 and synced2, and messages of two that were spoilt; with their recipes."""
    # SGD: Adam would hide a wrong scale of the averaged gradients
    optim = Optim(name="sgd", lr=0.02)
    base = tiny(precision="float64", epochs=1, batch_size=4, saving=Saving(keep=0), optim=optim, channels_last=False)
    free = override(override(base, "model.options.qkv", "linear"), "model.options.proj", "linear")
    synced = dataclasses.replace(base, sync_bn=True)
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    v2 = ModelChoice(name="spikformer_v2_8_384", options={"dim": 16, "depth": 1, "heads": 2, "patch_size": 4})
    pretrain = Pretrain(mask_ratio=0.75, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    mae = dataclasses.replace(synced, model=v2, pretrain=pretrain, ema_decay=0.9)
    student = dataclasses.replace(synced.model, name="qsd_transformer_t", neuron="ie_lif", strides=(2, 2, 1, 1, 1))
    student = dataclasses.replace(student, options={"heads": 2, "layer_scale": 1.0, "qkv": "rep_conv_mprf"})
    twin = create_model("qsd_transformer_t", in_channels=1, num_classes=10, **(student.overrides() | ANN_TWIN))
    twin.save_pretrained(tmp_path / "twin")
    taught = dataclasses.replace(synced, model=student, fgd=FineGrained(teacher=str(tmp_path / "twin")))
    jobs = [(free, tmp_path / "free2"), (synced, tmp_path / "synced2"), (mae, tmp_path / "mae2")]
    jobs.append((taught, tmp_path / "taught2"))
    jobs.append((segmenting(precision="float64", epochs=1, saving=Saving(keep=0)), tmp_path / "segmented2"))
    spoilt = {part: (base, tmp_path / part) for part in ("train", "test")}
    torch.multiprocessing.spawn(work, (port, jobs, spoilt), nprocs=2)
    return free, synced, mae, taught, tmp_path


def test_two_processes_equal_one(trained):
    free, synced, mae, taught, folder = trained
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

    # So do low-bit weights, an MPRF and a teacher, whose loss is a mean over the batch; only one process measures it.
    train(dataclasses.replace(taught, batch_size=8), run=folder / "taught1")
    one, two = (weights_of(folder / name, buffers=True) for name in ("taught1", "taught2"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-11, msg=key)
    assert read_summary(folder / "taught2").distillation["kept_mb"] > 0

    # Masked pre-training: both processes train one network, and the test loss is that of one process on all images.
    model = MaskedModelling(mae).wrap(build_model(mae, num_classes=10, in_channels=1)).double()
    stored, averaged, _ = checkpoint.load(folder / "mae2" / "checkpoints" / "epoch-0001")
    assert any(not torch.equal(stored[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(averaged["ema"])
    found = MaskedModelling(mae).test(model, batches_of(load_split(mae.data, "test"), batch_size=mae.batch_size))
    assert read_summary(folder / "mae2").loss == pytest.approx(found.loss, rel=1e-9)

    # Segmentation: each process tests pictures of its own size, one by one, and both know the sum.
    summary = read_summary(folder / "segmented2")
    recipe = from_json(summary.recipe)
    model = build_model(recipe, num_classes=3, in_channels=3).double()
    model.load_state_dict(checkpoint.load(folder / "segmented2" / "checkpoints" / "epoch-0001")[0])
    found = evaluate_segmentation(model, batches_of(load_split(recipe.data, "test"), batch_size=2))
    assert found.confusion.tolist() == summary.confusion

    # What is not finite in one process only ends both, with the same words; a deadlock would be the alternative.
    for part, message in (("train", "an input image has values that are not finite"), ("test", "test batch 0 gives")):
        said = [(folder / f"{part}-said-{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert message in said[0]

    (folder / "free2" / "summary.json").unlink()  # as if it had not ended
    with pytest.raises(ValueError, match=r"trained by 2 process.*--num_processes 2"):
        train(free, run=folder / "free2", resume=True)


def test_one_value_per_channel_over_all_processes_is_refused(monkeypatch):
    norm = sync_bn(nn.Sequential(nn.BatchNorm2d(3)))[0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total)  # the other process has nothing
    norm(torch.randn(2, 3, 1, 1))
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\(1, 3, 1, 1\)"):
        norm(torch.randn(1, 3, 1, 1))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(2))  # the other has as much
    assert torch.isfinite(norm(torch.randn(1, 3, 1, 1))).all()


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


def test_an_mprf_can_be_synchronised_and_all_norms_made_local_again():
    model = sync_bn(nn.Sequential(MPRF(3), nn.BatchNorm2d(3)))
    assert all(type(norm) is SyncedBatchNorm2d for norm in model)
    assert model[0].weight.tolist() == [0.25] * 3
    assert all(type(norm) is nn.BatchNorm2d for norm in local_bn(model))

"""Sparse batch norm over two gloo processes against one, in float64: statistics are those of all visible positions."""

import os
import socket

import torch

from spikeformers import create_model
from spikeformers.pretrain import MAE
from spikeformers.train.parallel import sync_bn

SHARES = (slice(0, 3), slice(3, 4))  # of the batch: unequal, so that a mean of means would be wrong


def problem() -> tuple[MAE, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    encoder = create_model("spikformer_v2_8_384", dim=8, depth=1, heads=2, patch_size=4, num_classes=10)
    mae = MAE(sync_bn(encoder), image_size=16, decoder_dim=8, decoder_depth=1, decoder_heads=2).double().train()
    images = torch.randn(4, 3, 16, 16).double()
    return mae, images, mae.draw_mask(images)


def step(mae: MAE, images: torch.Tensor, visible: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the summed losses, and running statistics."""
    mae.image_losses(images, mae(images, visible)).sum().backward()
    found = {name: each.grad for name, each in mae.encoder.named_parameters() if each.grad is not None}
    return found | {name: each for name, each in mae.encoder.named_buffers() if "running" in name}


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    mae, images, visible = problem()
    found = step(mae, images[SHARES[rank]], visible[SHARES[rank]])
    for name, value in found.items():
        if "running" not in name:
            torch.distributed.all_reduce(value)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_statistics_and_gradients_of_two_processes_are_those_of_one(tmp_path):
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    expected = step(*problem())
    assert any("running_var" in name for name in expected)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # Sums over processes run in another order: rounding of float64.
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)

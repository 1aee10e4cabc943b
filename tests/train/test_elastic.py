"""torchrun starts a group again of which a worker was killed; it ends as one that nobody disturbed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from spikeformers.train.logs import read_log
from spikeformers.train.recipe import Saving, to_json

WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
from spikeformers.data.images import ImageSplit
from spikeformers.train.loop import train
from spikeformers.train.recipe import from_json

folder, rank, start = Path(sys.argv[1]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
recipe, read = from_json(json.loads((folder / "recipe.json").read_text())), ImageSplit.__getitem__
torch.set_num_threads(1)


def noted(name, *, deadly):
    count, keys = [0], (folder / f"{name}-{rank}-{start}").open("w")

    def getitem(self, key):
        if isinstance(key, tuple):
            print(*key, file=keys, flush=True)
            count[0] += key[0] == 1
            if deadly and count[0] == 13:
                os.kill(os.getpid(), signal.SIGKILL)
        return read(self, key)


    ImageSplit.__getitem__ = getitem


noted("whole", deadly=False)
train(recipe, run=folder / "whole", resume=True)
noted("killed", deadly=rank == "1" and start == "0")
train(recipe, run=folder / "killed", resume=True)
"""


@pytest.mark.slow
def test_a_killed_worker_is_started_again_to_the_same_order_and_result(tiny, tmp_path):
    recipe = tiny(precision="float64", batch_size=4, saving=Saving(every_steps=1, keep=0))
    (tmp_path / "recipe.json").write_text(json.dumps(to_json(recipe)))
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", "1", "--monitor-interval", "0.1", str(tmp_path / "worker.py"), str(tmp_path)]
    # With one store for all attempts, workers that start again look for those that are dead (torch 2.14).
    settings = {"ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(launch, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr

    order = {path.name: path.read_text().split("\n") for path in tmp_path.glob("*-[01]-[01]")}
    for rank in (0, 1):
        whole, before, after = (
            order[f"{name}-{rank}-{start}"] for name, start in (("whole", 0), ("killed", 0), ("killed", 1))
        )
        assert whole[: len(before) - 1] == before[:-1]
        assert 1 < len(after) < len(whole) // 2  # from the middle of the second epoch, not from its beginning
        assert whole[-len(after) :] == after
    losses = [[r["train_loss"] for r in read_log(tmp_path / name, "epoch")] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[key]) for key, value in whole.items())

import errno
import itertools
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch

from spikeformers.train import checkpoint

# Forks of a process that only imported torch: the one that runs the tests has threads of other libraries.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "spikeformers.train.checkpoint"])


def save_for_ever(root, report, full_at=0):
    """Body of a process that saves one checkpoint after the other and says so."""
    for epoch in itertools.count(1):
        if epoch == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # writing fails in the middle of a file
        value, name = torch.full((20_000,), float(epoch)), checkpoint.name_of(epoch, 0)
        try:
            folder = checkpoint.save(root, name, model={"w": value}, training={"m": value + 1}, state={"epoch": epoch})
        except OSError as error:
            report.send(str(error))
            os._exit(0)
        checkpoint.point(root, "last", folder)
        checkpoint.prune(root, keep=2)
        report.send(epoch)


def save(root, epoch, step=0, value=1.0):
    weights = {"w": torch.full((3,), value)}
    training = {"optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}}
    name = checkpoint.name_of(epoch, step)
    return checkpoint.save(root, name, model=weights, training=training, state={"epoch": epoch, "loss": 0.1 + 0.2})


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model, training, state = checkpoint.load(save(tmp_path, 3))
    assert torch.equal(model["w"], torch.ones(3))
    assert training["optimizer"]["param_groups"] == [{"betas": (0.9, 0.99)}]
    assert state == {"epoch": 3, "loss": 0.1 + 0.2}


def test_names_sort_in_time(tmp_path):
    for epoch, step in ((1, 0), (0, 20), (1, 3), (0, 3), (2, 0)):
        save(tmp_path, epoch, step)
    names = [folder.name for folder in checkpoint.complete(tmp_path)]
    assert names == [
        "epoch-0000-step-000003",
        "epoch-0000-step-000020",
        "epoch-0001",
        "epoch-0001-step-000003",
        "epoch-0002",
    ]
    assert checkpoint.newest(tmp_path).name == "epoch-0002"


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    folders = [save(tmp_path, epoch) for epoch in range(1, 6)]
    checkpoint.point(tmp_path, "best", folders[1])
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.complete(tmp_path) == [folders[1], folders[3], folders[4]]
    checkpoint.prune(tmp_path, keep=0)
    assert len(checkpoint.complete(tmp_path)) == 3


def test_saving_twice_under_one_name_replaces(tmp_path):
    save(tmp_path, 1)
    model, _, _ = checkpoint.load(save(tmp_path, 1, value=2.0))
    assert torch.equal(model["w"], torch.full((3,), 2.0))
    assert [each.name for each in tmp_path.iterdir()] == ["epoch-0001"]


def test_a_process_killed_while_saving_always_leaves_a_whole_checkpoint(tmp_path):
    for trial in range(8):
        root = tmp_path / str(trial)
        mine, its = FORK.Pipe(duplex=False)
        process = FORK.Process(target=save_for_ever, args=(root, its))
        process.start()
        saved = [mine.recv()]  # the first one is there
        time.sleep(0.0037 * (trial + 1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while mine.poll():
            saved.append(mine.recv())
        for folder in checkpoint.complete(root):  # all that are in sight, not only the newest
            model, training, state = checkpoint.load(folder)
            assert torch.equal(model["w"], torch.full((20_000,), float(state["epoch"])))
            assert torch.equal(training["m"], model["w"] + 1)
        assert checkpoint.load(checkpoint.newest(root))[2]["epoch"] >= saved[-1]
        checkpoint.sweep(root)
        assert not list(root.glob(".*"))


def test_a_full_disk_is_one_clear_error_and_the_previous_checkpoint_stays(tmp_path):
    mine, its = FORK.Pipe(duplex=False)
    process = FORK.Process(target=save_for_ever, args=(tmp_path, its, 2))
    process.start()
    process.join(timeout=60)
    assert mine.recv() == 1
    message = mine.recv()
    assert "epoch-0002: File too large; the last good checkpoint is" in message
    assert message.endswith("epoch-0001")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["epoch-0001", "last.json"]
    checkpoint.load(checkpoint.pointed(tmp_path, "last"))


def test_a_disk_that_fails_late_leaves_nothing_half_written(tmp_path, monkeypatch):
    first = save(tmp_path, 1)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; the last good checkpoint is") as caught:
        save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        checkpoint.point(tmp_path, "last", first)
    assert [each.name for each in tmp_path.iterdir()] == ["epoch-0001"]


def test_two_processes_never_write_to_the_same_hidden_file(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "_write", lambda path, content: written.append(path) or path.write_bytes(content))
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        checkpoint.write_json(tmp_path / "seeds.json", {})
    assert len(set(written)) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["seeds.json"]


def test_damage_is_named(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match=r"epoch-0001 is damaged .*; delete it"):
        checkpoint.load(folder)

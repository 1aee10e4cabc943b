"""`log.jsonl` and TensorBoard events of a run. Resuming cuts the log back to the checkpoint, so no line is doubled."""

import json
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

_NOT_CURVES = {"kind", "epoch", "step"}


class Logs:
    """Writes both; a context. Of an earlier log `size` bytes stay; TensorBoard goes on at `step`."""

    def __init__(self, run: Path, *, size: int = 0, step: int = 0):
        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        path.touch()
        os.truncate(path, min(size, path.stat().st_size))
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(run / "tensorboard", purge_step=step or None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.board.close()

    def write(self, kind: str, *, step: int, values: dict[str, float | int]) -> None:
        """Add one record of a `kind` ("step" or "epoch") after `step` optimiser steps."""
        self.file.write(json.dumps({"kind": kind, "step": step} | values) + "\n")
        for name, value in values.items():
            if name not in _NOT_CURVES:
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> int:
        """Force the log to disk; returns its length in bytes, to be stored in a checkpoint."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()
        return self.file.tell()


def read_log(run: Path, kind: str) -> list[dict]:
    """All records of a `kind`, in order. A half-written last line (a crash) is left out."""
    records = []
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["kind"] == kind:
            records.append(record)
    return records

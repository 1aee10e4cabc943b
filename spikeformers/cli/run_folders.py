"""Run folders: which one a training writes to or resumes, claimed before anything is written."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import Namespace

RUNS = Path("runs")  # where `train` puts its folders unless --out says otherwise


@contextmanager
def run_of(name: str, arguments: Namespace, *, resume: Callable[[Namespace, Path], str]) -> Iterator[Path]:
    """The folder to write to, see `run_folder`. If nothing came of it, its name is given back.

    After Ctrl-C the message says how to go on: `resume` gives the command.
    """
    run = run_folder(name, arguments)
    try:
        yield run
    except KeyboardInterrupt as stop:
        if not holds_something(run):
            raise
        where = f"{stop}; " if str(stop) else ""
        raise KeyboardInterrupt(f"{where}resume with: {resume(arguments, run)}") from None
    finally:
        if not (arguments.out or holds_something(run)):
            for folder in (run, RUNS):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def run_folder(name: str, arguments: Namespace) -> Path:
    """--out, or the next free one of runs/NAME, runs/NAME-2, ..., made; with --resume the newest of these.

    Raises ValueError if there is nothing to resume, or several processes could each choose a folder of their own.
    """
    if arguments.out:
        chosen = Path(arguments.out)
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes must agree on the run folder: name it with --out DIR")
    else:
        numbered = itertools.chain((RUNS / name,), (RUNS / f"{name}-{number}" for number in itertools.count(2)))
        if not arguments.resume:
            return next(folder for folder in numbered if claimed(folder))
        present = list(itertools.takewhile(Path.exists, numbered))
        chosen = present[-1] if present else RUNS / name
    if arguments.resume and not chosen.exists():
        raise ValueError(f"there is nothing to resume in {chosen}; start without --resume, or name the run with --out")
    return chosen


def claimed(folder: Path) -> bool:
    """Make `folder`, unless it is there: of two trainings started at once only one gets True."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())

"""Commands as a person types them, settings that train in one second, and a run that was trained with them."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from spikeformers import cli

SMALL = (  # one second of training
    "data.size=16 data.train_limit=32 data.test_limit=24 batch_size=8 epochs=1 threads=1 model.dims=8,8,8,8 "
    "model.strides=2,2,2,2,1 model.blocks=1,1,1,1,1 model.options.heads=2 testing.energy_images=8"
)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """What to write behind --set."""
    return SMALL.split()


@pytest.fixture(scope="session")
def said_by() -> Callable[..., tuple[int, str, str]]:
    """Call with the words of a command: exit code, stdout and stderr."""

    def said(*arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(each) for each in arguments])
        return code, out.getvalue(), err.getvalue()

    return said


@pytest.fixture(scope="session")
def refused(said_by) -> Callable[..., str]:
    """What a command says on stderr, which must be one line, with exit code 2 and nothing of a traceback."""

    def complaint(*arguments: object) -> str:
        code, _, err = said_by(*arguments)
        assert code == 2
        assert err.startswith("spikeformers: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        return err

    return complaint


@pytest.fixture(scope="session")
def trained(said_by, tiny, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of a tiny network, and what the command printed."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    code, out, err = said_by("train", "digits", "--out", run, "--set", *tiny)
    assert code == 0, err
    return run, out

"""The command line: runs the command that was asked for and tells mistakes; `spikeformers COMMAND --help` has examples.

What commands accept stands in `parsers.py`; what they do, one short function each, in the file of their group.

Exit codes: 0 done; 2 for a mistake of the caller or of the machine (ValueError, OSError), told in one line on stderr
(set SPIKEFORMERS_TRACEBACK=1 to see where it arose); 130 after Ctrl-C. torch is imported inside the functions that
compute, never at the top of a file here, so that help is quick.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence

from spikeformers.cli.audit import audit_model
from spikeformers.cli.energy import measure
from spikeformers.cli.evaluation import evaluate, predict, report
from spikeformers.cli.export import export
from spikeformers.cli.listing import list_names
from spikeformers.cli.parsers import build_parser
from spikeformers.cli.quantize import quantize_run
from spikeformers.cli.training import is_main_process, pretrain, train
from spikeformers.cli.weights import import_weights

COMMANDS = {
    "list": list_names,
    "train": train,
    "pretrain": pretrain,
    "eval": evaluate,
    "predict": predict,
    "energy": measure,
    "audit": audit_model,
    "quantize": quantize_run,
    "export": export,
    "report": report,
}
SHARED = ("train", "pretrain", "quantize")  # what several processes of a launcher do together; the first does the rest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    top, weights = build_parser()
    try:
        chosen = top.parse_args(arguments)
        given = chosen.get(chosen.command) if chosen.command else None
        if chosen.command is None or (chosen.command == "weights" and given.action is None):
            (weights if chosen.command else top).print_help()
        elif not is_main_process() and chosen.command not in SHARED:
            print(f"RANK={os.environ.get('RANK')}: the first process does `{chosen.command}`", file=sys.stderr)
        elif chosen.command == "weights":
            import_weights(given["import"])
        else:
            COMMANDS[chosen.command](given)
        return 0
    except argparse.ArgumentError as error:
        return complain(usage(error))
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or the interpreter complains when it flushes at exit
        return 0
    except KeyboardInterrupt as stop:
        print(f"\nspikeformers: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as error:
        if os.environ.get("SPIKEFORMERS_TRACEBACK"):
            raise
        return complain(said(error))


def complain(message: str) -> int:
    print(f"spikeformers: {' '.join(message.split())}", file=sys.stderr)
    return 2


def usage(error: argparse.ArgumentError) -> str:
    """The parser's complaint in the words of the help: no dotted keys, no class names."""
    text = re.sub(r"required: (.*)", lambda hit: "required: " + re.sub(r"(\w+\.)+", "", hit[1]), str(error))
    text = re.sub(r'Parser key "([^"]+)":\s+Expected an? <class \'(\w+)\'>\. Got value:', r"--\1 must be \2, got", text)
    hint = "; what follows --set belongs to it" if "required: recipe" in text else ""
    return f"{text.strip()}{hint} (see `spikeformers --help`)"


def said(error: Exception) -> str:
    """An exception's own words; a file system error gets its file in front instead of its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__

"""`quantize`: low-bit weights for a trained run, and which layers suffer most from them."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from spikeformers.cli.run_folders import RUNS, holds_something, run_of
from spikeformers.cli.settings import split_assignment
from spikeformers.cli.training import is_main_process, main_console

if TYPE_CHECKING:
    from spikeformers.train.quantization import Source
    from spikeformers.train.recipe import Recipe

BITS, EPOCHS = 4, 1  # without --bits; without --epochs, of every training of --sensitivity


def quantize_run(arguments: Namespace) -> None:
    """Fine-tune a run with low-bit weights, or measure which kind of layer suffers most from them."""
    check_options(arguments)
    (compare_kinds if arguments.sensitivity else fine_tune)(arguments)


def fine_tune(arguments: Namespace) -> None:
    """Train on with low-bit weights, store them packed, print what they cost and weigh."""
    from spikeformers.train.loop import train
    from spikeformers.train.quantization import fine_tuning, low_bit_facts, newest_fine_tuning, pack_run, read_source
    from spikeformers.train.report import write_report
    from spikeformers.train.results import print_facts, print_results

    source = read_source(Path(arguments.run))
    bits = arguments.bits or BITS
    changes = [("quantize.bits", str(bits)), *choices(arguments)]
    if arguments.resume and not (arguments.out or arguments.bits or arguments.layers):
        arguments.out = str(newest_fine_tuning(source, runs=RUNS) or "")
    recipe = fine_tuning(source, mark=f"w{bits}{'-mixed' if arguments.layers else ''}", changes=changes)
    with run_of(recipe.name, arguments, resume=resume_command) as run:
        recipe = resumed(run, arguments, source=source) or recipe
        summary = train(recipe, run=run, resume=arguments.resume, console=main_console())
    if is_main_process():
        print_results(summary, write_report(run))
        print_facts(f"{run}: {source.recipe.name} at few bits", low_bit_facts(source, summary, pack_run(run)))


def compare_kinds(arguments: Namespace) -> None:
    """Quantise one kind of layer at a time, then all, print and draw the accuracies."""
    from spikeformers.train.quantization import networks, sensitivity
    from spikeformers.train.results import print_table

    sources = networks(Path(arguments.run), twin=Path(arguments.twin) if arguments.twin else None)
    bits, epochs = arguments.bits or BITS, EPOCHS if arguments.epochs is None else arguments.epochs
    common = {"changes": choices(arguments), "resume": arguments.resume, "console": main_console()}
    with run_of(f"{sources['snn'].recipe.name}_sensitivity", arguments, resume=resume_command) as out:
        if holds_something(out) and not arguments.resume:
            raise ValueError(f"{out} is not empty; continue it with --resume or choose another folder with --out")
        found = sensitivity(sources, out=out, bits=bits, epochs=epochs, **common)
        if is_main_process():
            header, rows = found.table()
            print_table(header, rows, right=range(1, len(header)))
            print(f"written: {found.save(out)}, {found.plot(out)}")


def check_options(arguments: Namespace) -> None:
    """Raises ValueError for bits that no weight can have, and options of the other way to use the command."""
    from spikeformers.quantize.lsq import FEWEST_BITS, MOST_BITS

    if arguments.bits is not None and not FEWEST_BITS <= arguments.bits <= MOST_BITS:
        raise ValueError(f"--bits must be between {FEWEST_BITS} and {MOST_BITS}, got {arguments.bits}")
    if arguments.epochs is not None and arguments.epochs < 0:
        raise ValueError(f"--epochs must be at least 0 (no fine-tuning), got {arguments.epochs}")
    if any(text.startswith("quantize.bits=") for text in arguments.set):
        raise ValueError("--bits gives the bits of all layers, --layers those of some: leave out --set quantize.bits")
    if arguments.sensitivity and arguments.layers:
        raise ValueError("--sensitivity chooses the layers itself: leave out --layers")
    if arguments.sensitivity and any(text.startswith("epochs=") for text in arguments.set):
        raise ValueError("--sensitivity takes --epochs N instead of --set epochs=N")
    if not arguments.sensitivity and arguments.epochs is not None:
        raise ValueError(f"--epochs goes with --sensitivity: use --set epochs={arguments.epochs}")
    if not arguments.sensitivity and arguments.twin:
        raise ValueError("--twin goes with --sensitivity: add it, or leave out --twin")


def choices(arguments: Namespace) -> list[tuple[str, str]]:
    """What --layers, --set and --threads change in a recipe."""
    changes = []
    for text in arguments.layers:
        name, equals, bits = text.partition("=")
        if not (name and equals and bits.isdecimal()):
            raise ValueError(f"--layers takes KIND=BITS, such as attention=8 (0 keeps it in float), got {text!r}")
        changes.append((f"quantize.layers.{name}", bits))
    changes += [split_assignment(each) for each in arguments.set]
    return changes + ([] if arguments.threads is None else [("threads", str(arguments.threads))])


def resumed(run: Path, arguments: Namespace, *, source: "Source") -> "Recipe | None":
    """The recipe that the run to resume was started with, with what is given now; None if there is none."""
    from spikeformers.train.quantization import changed, stored_fine_tuning

    recipe = stored_fine_tuning(run, source=source) if arguments.resume else None
    bits = [] if arguments.bits is None else [("quantize.bits", str(arguments.bits))]
    return recipe and changed(recipe, [*bits, *choices(arguments)])


def resume_command(arguments: Namespace, run: Path) -> str:
    """What to type to go on with an interrupted run."""
    words = ["spikeformers", "quantize", arguments.run, "--resume", "--out", str(run)]
    words += ["--sensitivity"] if arguments.sensitivity else []
    words += ["--twin", arguments.twin] if arguments.twin else []
    for name in ("bits", "epochs", "threads"):
        words += [f"--{name}", str(arguments[name])] if arguments[name] is not None else []
    words += ["--layers", *arguments.layers] if arguments.layers else []
    words += ["--set", *arguments.set] if arguments.set else []
    return shlex.join(words)

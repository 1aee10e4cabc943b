"""The command line: one short function for each sub-command; `spikeformers COMMAND --help` teaches by example.

Exit codes: 0 done; 2 for a mistake of the caller or of the machine (ValueError, OSError), told in
one line on stderr (set SPIKEFORMERS_TRACEBACK=1 to see where it arose); 130 after Ctrl-C. torch is imported by the
sub-commands that compute, not here, so that help is quick.
"""

import argparse
import contextlib
import fnmatch
import itertools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from jsonargparse._subcommands import ActionSubCommands
    from rich.console import Console
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from spikeformers.train.recipe import Recipe

RUNS = Path("runs")  # where `train` puts its folders unless --out says otherwise
SEEN = 5  # classes that `predict` prints
RANDOM_IMAGES, RUN_IMAGES = 4, 64  # default number of images for `energy`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    top, weights = build_parser()
    try:
        chosen = top.parse_args(arguments)
        given = chosen.get(chosen.command) if chosen.command else None
        if chosen.command is None or (chosen.command == "weights" and given.action is None):
            (weights if chosen.command else top).print_help()
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


def list_names(arguments: Namespace) -> None:
    """Models (parameters, default sizes, paper) and recipes whose names match."""
    import torch

    from spikeformers import create_model, list_models, zoo
    from spikeformers.recipes import RECIPES
    from spikeformers.train.results import print_table

    models = []
    for name in list_models(arguments.pattern):
        with torch.device("meta"):  # sizes without memory or initialisation
            model = create_model(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        models.append((name, f"{count:,}", sizes(model.config), zoo.CATALOGUE[name].paper))
    recipes = [(name, first_line(RECIPES[name])) for name in fnmatch.filter(RECIPES, arguments.pattern)]
    if models:
        print_table(("model", "parameters", "sizes", "paper"), models, right=(1,))
    if models and recipes:
        print()
    if recipes:
        print_table(("recipe", "what it trains"), recipes)
    if not models and not recipes:
        known = ", ".join((*list_models(), *RECIPES))
        raise ValueError(f"no model and no recipe matches {arguments.pattern!r}; there are {known}")


def train(arguments: Namespace) -> None:
    """Train a recipe, once or for each seed, write the reports and print the results."""
    from spikeformers import recipes
    from spikeformers.train.loop import train as run_training
    from spikeformers.train.report import write_report
    from spikeformers.train.results import print_results, print_spread
    from spikeformers.train.seeds import train_seeds

    seeds = read_seeds(arguments.seeds)
    run = run_folder(recipes.get(arguments.recipe).name, arguments)
    if arguments.resume and not seeds and any(run.glob("seed-*")):
        raise ValueError(f"{run} holds a run for each of several seeds: name them again with --seeds")
    common = {"run": run, "resume": arguments.resume, "console": main_console()}
    try:
        recipe = configured(arguments, run)
        if seeds:
            found = train_seeds(recipe, seeds, **common)
            results = {run / f"seed-{seed}": each for seed, each in zip(seeds, found.summaries, strict=True)}
        else:
            results = {run: run_training(recipe, **common)}
    except KeyboardInterrupt as stop:
        if not holds_something(run):
            raise
        where = f"{stop}; " if str(stop) else ""
        raise KeyboardInterrupt(f"{where}resume with: {resume_command(arguments, run)}") from None
    finally:
        if not (arguments.out or holds_something(run)):  # nothing came of it: give the claimed name back
            for folder in (run, RUNS):
                with contextlib.suppress(OSError):
                    folder.rmdir()
    for folder, summary in results.items() if is_main_process() else ():
        print_results(summary, write_report(folder))
    if len(seeds) > 1 and is_main_process():
        print_spread(seeds, list(results.values()))


def evaluate(arguments: Namespace) -> None:
    """Test the final model of a run again on the whole test split."""
    import torch

    from spikeformers.data.images import load_split
    from spikeformers.train.evaluate import batches_of
    from spikeformers.train.evaluate import evaluate as run_test
    from spikeformers.train.results import print_facts
    from spikeformers.train.saved import read_run

    model, recipe, _ = read_run(Path(arguments.run))
    if recipe.threads:  # float32 sums depend on the number of threads, and one flipped spike can turn a close call
        torch.set_num_threads(recipe.threads)
    split = load_split(recipe.data, "test", seed=recipe.seed)
    found = run_test(model, batches_of(split, batch_size=recipe.batch_size, workers=recipe.workers))
    rows = [("Test accuracy", f"{100 * found.accuracy:.2f} % of {len(split):,} images"), ("Loss", f"{found.loss:.4f}")]
    if split.skipped:
        rows.append(("Unreadable", f"{len(split.skipped)} images skipped, first: {split.skipped[0]}"))
    print_facts(arguments.run, rows)


def predict(arguments: Namespace) -> None:
    """The likeliest classes of each image and the energy that its inference takes."""
    import torch

    from spikeformers import energy
    from spikeformers.data.images import read_image
    from spikeformers.train.results import short
    from spikeformers.train.saved import read_trained, run_of

    model, spec, classes = read_trained(arguments.model)
    images = [read_image(Path(file), spec=spec) for file in arguments.files]  # all of them first: no half answer
    if run_of(Path(arguments.model)) is None:
        print(f"{arguments.model}: no recipe beside it, so images are read as ImageNet's: {spec.size}x{spec.size}")
    for file, image in zip(arguments.files, images, strict=True):
        batch = image[None]
        with torch.no_grad():
            likely = model(batch)[0].softmax(-1).topk(min(SEEN, len(classes)))
        spent = energy.measure(model, batch)
        print(f"{file}: {short(spent.total_mj)} mJ ({short(spent.ann_mj)} mJ as an ANN, {spent.convention})")
        for share, index in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
            print(f"  {100 * share:6.2f} %  {classes[index]}")


def measure(arguments: Namespace) -> None:
    """The energy table of a run, a saved model or a named model."""
    from spikeformers import energy

    model, images, note = energy_subject(arguments.model, arguments.images)
    found = energy.measure(model, images, convention=arguments.convention)
    print(note)
    print(found.table())
    if arguments.json:
        print(f"written: {found.save(arguments.json)}")
    if arguments.plot:
        print(f"written: {found.plot(arguments.plot)}")


def import_weights(arguments: Namespace) -> None:
    """Turn an authors' checkpoint into a model folder and say what was dropped."""
    from spikeformers.train.recipe import literal  # so that --set reads alike everywhere
    from spikeformers.zoo import import_checkpoint

    out = Path(arguments.out)
    if holds_something(out) or out.is_file():
        raise ValueError(f"{out} is there already and not empty: choose another --out")
    overrides = {name: literal(text) for name, text in map(split_assignment, arguments.set)}
    print(import_checkpoint(arguments.file, name=arguments.model, out=out, overrides=overrides))


def report(arguments: Namespace) -> None:
    """Write the page again, for example of a run that is still going."""
    from spikeformers.train.report import write_report

    print(write_report(Path(arguments.run)))


COMMANDS = {
    "list": list_names,
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "energy": measure,
    "report": report,
}


def configured(arguments: Namespace, run: Path) -> "Recipe":
    """The named recipe, or on resuming the one that `run` was started with, with --set and --threads applied."""
    from spikeformers import recipes
    from spikeformers.train.recipe import override
    from spikeformers.train.saved import stored_recipe

    recipe = recipes.get(arguments.recipe)
    if arguments.resume:
        recipe = stored_recipe(run, name=recipe.name) or recipe
    changes = [split_assignment(each) for each in arguments.set]
    if arguments.threads is not None:
        changes.append(("threads", str(arguments.threads)))
    for path, text in changes:
        recipe = override(recipe, path, text)
    return recipe


def split_assignment(text: str) -> tuple[str, str]:
    """`a.b=c` -> (`a.b`, `c`)."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"--set takes a.b=c, got {text!r}; what follows --set belongs to it")
    return path, value


def read_seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    seeds = text.split(",") if text else []
    if not all(seed.strip().isdecimal() for seed in seeds):
        raise ValueError(f"--seeds takes whole numbers with commas between them, such as 0,1,2; got {text!r}")
    if len(set(map(int, seeds))) < len(seeds):
        raise ValueError(f"--seeds names a seed twice: {text}")
    return [int(seed) for seed in seeds]


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


def resume_command(arguments: Namespace, run: Path) -> str:
    """What to type to go on with an interrupted run."""
    words = ["spikeformers", "train", arguments.recipe, "--resume", "--out", str(run)]
    words += ["--seeds", arguments.seeds] if arguments.seeds else []
    words += ["--threads", str(arguments.threads)] if arguments.threads is not None else []
    words += ["--set", *arguments.set] if arguments.set else []
    return shlex.join(words)


def is_main_process() -> bool:
    """Only the first of several processes prints and writes reports."""
    return int(os.environ.get("RANK", "0")) == 0


def main_console() -> "Console | None":
    from rich.console import Console

    return Console() if is_main_process() else None


def energy_subject(source: str, images: int | None) -> tuple["nn.Module", "DataLoader | Tensor", str]:
    """Model, images to measure it on, and a sentence that says what both are."""
    if images is not None and images < 1:
        raise ValueError(f"--images must be at least 1, got {images}")
    import torch

    from spikeformers import create_model, list_models
    from spikeformers.data.images import load_split
    from spikeformers.train.evaluate import batches_of
    from spikeformers.train.saved import read_run, read_trained

    if (Path(source) / "recipe.json").is_file():
        model, recipe, _ = read_run(Path(source))
        split = load_split(recipe.data, "test", seed=recipe.seed)
        count = min(images or RUN_IMAGES, len(split))
        loader = batches_of(split, batch_size=recipe.batch_size, images=count)
        return model, loader, f"{source}: trained weights, {count} images of its test split"
    fresh = source in list_models() or not (Path(source).is_dir() or "/" in source)
    model, weights = (create_model(source), "RANDOM weights") if fresh else (read_trained(source)[0], "saved weights")
    count = images or RANDOM_IMAGES
    batch = torch.randn(count, model.config.in_channels, 224, 224, generator=torch.Generator().manual_seed(0))
    if fresh:
        settle_batch_norm(model, batch)
    note = f"{source}: {weights}, {count} RANDOM images of 224x224: firing rates and energy are not those of real use"
    return model, batch, note


def settle_batch_norm(model: "nn.Module", images: "Tensor") -> None:
    """Give a fresh network the statistics of `images`: with those it is built with (0 and 1) hardly a neuron fires."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    model.eval()


def first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().split("\n")[0]


def sizes(config: object) -> str:
    """The size arguments of a model's config, as `dims 64-128-256-360, blocks 1-1-2-6-2`."""
    shown = []
    for name in ("dims", "dim", "depth", "blocks", "heads", "steps"):
        value = getattr(config, name, None)
        if value is not None:
            shown.append(f"{name} {'-'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return ", ".join(shown)


def build_parser() -> tuple[ArgumentParser, ArgumentParser]:
    """The parser of the whole command line, and that of `weights`, whose help is shown when it stands alone."""
    top = new_parser(
        "Train spiking vision transformers, count their energy and run them in integers.",
        "spikeformers train digits                     # a first run: minutes on a CPU, data included",
        "spikeformers predict runs/digits seven.png    # what is it, and what did it cost",
        "spikeformers COMMAND --help                   # every command shows examples",
    )
    top.prog = "spikeformers"
    commands = top.add_subcommands(required=False, metavar="COMMAND", dest="command", title="commands")
    for add in (add_list, add_train, add_eval, add_predict, add_energy, add_report):
        add(commands)
    weights = new_parser("Weights that others trained.", "spikeformers weights import --help")
    add_command(commands, "weights", weights, "weights that others trained")
    actions = weights.add_subcommands(required=False, metavar="ACTION", dest="action", title="actions")
    add_import(actions)
    return top, weights


def new_parser(description: str, *examples: str) -> ArgumentParser:
    """A parser whose help ends with examples."""
    return ArgumentParser(
        description=description,
        epilog="\n".join(("examples:", *(f"  {example}" for example in examples))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )


def add_command(commands: "ActionSubCommands", name: str, parser: ArgumentParser, summary: str) -> None:
    commands.add_subcommand(name, parser, help=summary)
    parser.prog = parser.prog.replace(" [options]", "")


def add_setting(parser: ArgumentParser, summary: str) -> None:
    parser.add_argument("--set", nargs="+", action="extend", default=[], type=str, metavar="a.b=c", help=summary)


def add_list(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Models by name, with parameters, default sizes and paper; and recipes to train them.",
        "spikeformers list",
        "spikeformers list '*15m*'",
    )
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern (default: *)")
    add_command(commands, "list", parser, "models with sizes and papers, and recipes")


def add_train(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Train a recipe: a table of results at the end, everything else in the run folder, report.html included.",
        "spikeformers train digits",
        "spikeformers train digits --set epochs=5 optim.lr=2e-3 model.neuron=lif model.steps=4",
        "spikeformers train cifar10_small --set data.source=imagefolder data.root=photos --out runs/photos",
        "spikeformers train digits --seeds 0,1,2           # mean and deviation of three runs",
        "spikeformers train digits --resume                # go on after Ctrl-C or a crash, to the same result",
        "accelerate launch -m spikeformers train cifar10_small --out runs/two    # several processes or devices",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="name of a recipe, such as digits; `spikeformers list` shows all"
    )
    add_setting(parser, "change fields of the recipe; several at once, or --set again")
    parser.add_argument("--seeds", default="", metavar="0,1,2", help="one run for each seed, then mean and deviation")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --out, else the newest; its --set are known",
    )
    parser.add_argument(
        "--out", default="", metavar="DIR", help="run folder (default: runs/RECIPE, runs/RECIPE-2, ...)"
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads (default: the recipe's)")
    add_command(commands, "train", parser, "train a recipe and report on it")


def add_eval(commands: "ActionSubCommands") -> None:
    parser = new_parser("Test the final model of a run on its whole test split.", "spikeformers eval runs/digits")
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    add_command(commands, "eval", parser, "test a trained model again")


def add_predict(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "The five likeliest classes of each image, and the energy of its inference beside that of an ANN.",
        "spikeformers predict runs/digits seven.png",
        "spikeformers predict imported/55m photos/*.jpg",
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="folder of a finished run or of a saved model")
    parser.add_argument("files", nargs="+", metavar="FILE", help="image files")
    add_command(commands, "predict", parser, "classify image files")


def add_energy(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Operations and energy by layer and by stage, spiking and as an ANN. A bare name: random weights and images.",
        "spikeformers energy runs/digits --images 200 --json energy.json --plot energy.png",
        "spikeformers energy meta_spikeformer_15m",
    )
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="folder of a run or of a saved model, or a model's name")
    parser.add_argument("--convention", default="meta_spikeformer", help="whose way of counting (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="images to average over (default: 64, of a name 4)")
    parser.add_argument("--json", default="", metavar="FILE", help="write all numbers there")
    parser.add_argument("--plot", default="", metavar="FILE", help="write a bar chart there (png, svg, pdf)")
    add_command(commands, "energy", parser, "energy by layer and stage")


def add_report(commands: "ActionSubCommands") -> None:
    parser = new_parser(
        "Write report.html of a run again; also of a run that is going.", "spikeformers report runs/digits"
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    add_command(commands, "report", parser, "one page about a run")


def add_import(actions: "ActionSubCommands") -> None:
    parser = new_parser(
        "Turn a checkpoint of a paper's authors into a model folder; says what was dropped; never runs its code.",
        "spikeformers weights import 55M_kd.pth --model meta_spikeformer_55m --out imported/55m",
        "spikeformers weights import t4.pth --model meta_spikeformer_15m --set steps=4 --out imported/15m_t4",
    )
    parser.add_argument("file", metavar="FILE", help="the authors' .pth file")
    parser.add_argument("--model", required=True, metavar="NAME", help="what it is; see `spikeformers list`")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_setting(parser, "arguments of the model, such as num_classes=100")
    add_command(actions, "import", parser, "read an authors' checkpoint")

"""What the scripts of papers' tables share: recipes changed by fields, trainings that resume, rows printed and kept."""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from spikeformers.train.loop import train
from spikeformers.train.recipe import Recipe, override
from spikeformers.train.results import print_table
from spikeformers.train.summary import PretrainSummary, Summary, hardware

CONSOLE = Console(file=sys.stderr)


def changed(recipe: Recipe, **fields: object) -> Recipe:
    """`recipe` with dotted fields set, dots written as two underscores: optim__lr=1e-3."""
    for name, value in fields.items():
        recipe = override(recipe, name.replace("__", "."), str(value))
    return recipe


def done(recipe: Recipe, folder: Path) -> Summary | PretrainSummary:
    """The summary of `recipe` trained in `folder`, resumed if it was begun."""
    print(f"{folder.name}:", file=sys.stderr)
    return train(recipe, run=folder, resume=folder.exists(), console=CONSOLE)


def show(rows: list[dict]) -> None:
    """Rows as a table: what they vary, then the paper's and our numbers."""
    flat = []
    for row in rows:
        line = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        for side in ("paper", "ours"):
            line |= {f"{side} {name}": value for name, value in row.get(side, {}).items()}
        flat.append(line)
    header = list(dict.fromkeys(name for line in flat for name in line))

    def cell(value: object) -> str:
        return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    print_table(header, [[cell(line.get(name)) for name in header] for line in flat], right=range(1, len(header)))


def parser_of(documented: str, tables: dict[str, Callable], *, runs: str, images: int) -> argparse.ArgumentParser:
    """Arguments that every script of tables takes."""
    parser = argparse.ArgumentParser(description=documented, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=tables, help="which to make")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where trainings are kept (default: %(default)s)")
    parser.add_argument("--images", type=int, default=images, help="training images (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write rows, versions and command there")
    return parser


def runs_of(options: argparse.Namespace) -> Path:
    """Where the trainings with as many images are kept."""
    return options.runs / f"images-{options.images}"


def make(
    script: str,
    tables: dict[str, Callable[[Path, int], list[dict]]],
    options: argparse.Namespace,
    *,
    ground: dict[str, object] | None = None,
) -> None:
    """Make the tables that were asked for, print them, and write --json. `ground`: what all rows share."""
    settings = {name: value for name, value in vars(options).items() if name not in ("tables", "runs", "json")}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = ["python", f"benchmarks/{script}.py", *options.tables, *words]
    result = {
        "command": shlex.join(command),
        "hardware": hardware(),
        "threads": 1,
        "images": options.images,
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "timm", "spikeformers")},
        **(ground or {}),
        "tables": {},
    }
    for name, value in (ground or {}).items():
        print(f"{name}: {value}")
    for name in options.tables:
        rows = tables[name](runs_of(options), options.images)
        result["tables"][name] = {"what": tables[name].__doc__, "rows": rows}
        print(f"\n{name}: {tables[name].__doc__}")
        show(rows)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")

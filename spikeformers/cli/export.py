"""`export`: a finished run as one file that others run, and what it keeps of the run."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

if TYPE_CHECKING:
    from spikeformers.train.exportable import Exportable

SUFFIXES = {"spk": ".spk", "onnx": ".onnx"}
NIR_FOLDER = "nir"
ONNX_FORMS = ("integer", "qdq")  # the first without --form: onnxruntime computes it exactly
Facts = list[tuple[str, str]]


def export(arguments: Namespace) -> None:
    """Write the file that --to names, then say what it weighs, how exact and how fast it is."""
    check_options(arguments)
    import torch

    from spikeformers.train.exportable import read_exportable
    from spikeformers.train.results import print_facts

    subject = read_exportable(Path(arguments.run))
    if subject.recipe.threads:  # as the run was tested: float32 sums depend on the number of threads
        torch.set_num_threads(subject.recipe.threads)
    if Path(arguments.run) != subject.run and not arguments.out:
        raise ValueError(
            f"{arguments.run} lies in a run, whose own exported file this would replace: give {subject.run}, or name "
            "another file with --out"
        )
    out = Path(arguments.out) if arguments.out else default_out(subject.run, arguments.to)
    replaced = out.is_file()
    try:
        facts = WRITERS[arguments.to](subject, out, arguments)
    except ImportError as error:  # an extra that is not installed; the message names it
        raise ValueError(str(error)) from error
    print_facts(f"{arguments.run}: {'replaced' if replaced else 'written'} {out}", facts)


def check_options(arguments: Namespace) -> None:
    """Raises ValueError for what no file can be, before anything is computed."""
    if arguments.images < 1:
        raise ValueError(f"--images must be at least 1, got {arguments.images}")
    suffix, out = SUFFIXES.get(arguments.to), Path(arguments.out)
    if arguments.out and suffix and out.suffix != suffix:
        raise ValueError(f"--out must end in {suffix} for --to {arguments.to}, got {arguments.out}")
    if arguments.out and suffix and out.is_dir():
        raise ValueError(f"{arguments.out} is a folder; --out names a file")
    if arguments.to == "nir" and out.is_file():
        raise ValueError(f"{arguments.out} is a file; for --to nir --out names a folder")
    if arguments.license and arguments.to != "spk":
        raise ValueError("--license goes with --to spk, whose card holds it")
    if arguments.form and arguments.to != "onnx":
        raise ValueError("--form goes with --to onnx")
    if arguments.backend != "torch" and arguments.to != "spk":
        raise ValueError("--backend goes with --to spk: the other formats run elsewhere")


def default_out(run: Path, kind: str) -> Path:
    """Where a run keeps what is exported from it."""
    return run / f"model{SUFFIXES[kind]}" if kind in SUFFIXES else run / NIR_FOLDER


def write_spk(subject: "Exportable", out: Path, arguments: Namespace) -> Facts:
    """One file of this package's own."""
    from spikeformers.deploy import save
    from spikeformers.train import exporting

    backend = arguments.backend
    if backend != "torch":
        if subject.missing:
            raise ValueError(f"--backend {backend} cannot run {subject.missing}; leave --backend out")
        exporting.check_one_size(subject, images=arguments.images, what=f"--backend {backend}")
    engine = exporting.engine_of(subject)
    runner = engine if backend == "torch" else exporting.engine_of(subject, backend=backend)
    found = exporting.compared(subject, runner, images=arguments.images)
    card = exporting.card_of(subject, found, license_note=arguments.license)
    timed = exporting.latency_fact(subject, runner, backend=backend)
    save(engine, out, **subject.about(), card=card)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    kept = exporting.comparison_facts(subject, found)
    facts = [exporting.size_fact(subject, out), *kept, timed, exporting.energy_fact(subject), ("SHA-256", digest)]
    return [*facts, ("To run it", subject.by_hand)] if subject.by_hand else facts


def write_onnx(subject: "Exportable", out: Path, arguments: Namespace) -> Facts:
    """An ONNX file of the engine, compared with it in onnxruntime."""
    from spikeformers.deploy.onnx import export_onnx
    from spikeformers.train import exporting

    exporting.check_one_size(subject, images=arguments.images, what="an ONNX file")
    engine = exporting.engine_of(subject)
    found = exporting.compared(subject, engine, images=arguments.images)
    part = subject.in_graph(engine)
    export_onnx(part, subject.image(), out, form=arguments.form or ONNX_FORMS[0])
    runner = subject.completed(engine, exporting.onnx_runner(out, part(subject.image())))
    told = exporting.onnx_fact(subject, engine, runner, images=arguments.images)
    timed = exporting.latency_fact(subject, runner, backend="onnxruntime")
    kept = exporting.comparison_facts(subject, found)
    facts = [exporting.size_fact(subject, out), *missing_facts(subject), *kept]
    return [*facts, told, timed, exporting.energy_fact(subject)]


def write_nir(subject: "Exportable", out: Path, _: Namespace) -> Facts:
    """A folder with the parts that the neuromorphic intermediate representation can express."""
    from spikeformers.deploy.nir import export_nir
    from spikeformers.train.results import short

    report = export_nir(subject.in_graph(subject.model), subject.image(), out)
    print(report.table())
    written = sum(file.stat().st_size for file in out.iterdir())
    return [
        ("Parts", f"{len(report.parts)}, with {100 * report.share:.1f} % of the multiply-accumulates"),
        *missing_facts(subject),
        ("Left out", f"{len(report.left_out)} modules, listed above with the reason"),
        ("Size", f"{short(written / 1e6)} MB"),
    ]


def missing_facts(subject: "Exportable") -> Facts:
    """The line about what is not in a graph, if not all is."""
    return [("Not in the file", subject.missing)] if subject.missing else []


WRITERS = {"spk": write_spk, "onnx": write_onnx, "nir": write_nir}

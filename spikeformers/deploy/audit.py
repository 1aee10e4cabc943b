"""The audit: every product of one forward pass, whether a spike drives it, what it costs, and the papers' verdict.

Paper: Meta-SpikeFormer, App. B (energies); what "spike-driven" means stands in verdict.py, what is a product in
energy/products.py. Energy is that of the convention "as_executed", and of products for which that has no rule.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from spikeformers.deploy.verdict import (
    BINARY,
    FREE,
    INTEGER,
    MAC,
    MERGED,
    ROLES,
    AuditRow,
    Merge,
    judge,
    merging,
    offends,
    sums,
)
from spikeformers.energy.conventions import AC_PJ, MAC_PJ
from spikeformers.energy.firing import neurons_of, plain_name
from spikeformers.energy.ops import Operation, Trace
from spikeformers.energy.products import FLOAT_BITS, Product, products_of
from spikeformers.energy.report import batches_of, evaluating, placed


@dataclass(frozen=True)
class AuditReport:
    """Every product of a network, and what follows; see `audit`.

    `verdict`: "spike-driven", "integer-driven" or "neither".  `why`: its reasons, a sentence each.  `merges`: what
    merging would change.  `images`: how many were run.  `steps`: T.
    """

    rows: tuple[AuditRow, ...]
    merges: tuple[Merge, ...]
    verdict: str
    why: tuple[str, ...]
    images: int
    steps: int

    @property
    def total_mj(self) -> float:
        """Millijoules of an image."""
        return math.fsum(row.mj for row in self.rows)

    @property
    def offenders(self) -> tuple[AuditRow, ...]:
        """Products without a spike that keep a network from being driven by spikes, dearest first."""
        return tuple(sorted((row for row in self.rows if offends(row)), key=lambda row: -row.mj))

    @property
    def merging(self) -> str:
        """What merging changes, in a few lines."""
        return "\n".join(merging(self.rows, self.merges))

    def table(self) -> str:
        """The report as aligned text: a line a product, sums, what merging changes, and the verdict.

        Products that are free because they merge away are one line for each kind; `rows` has them all.
        """
        head = ("module", "kind", "how", "products", "rate", "bits", "mJ", "share", "")
        lines = [head]
        for row in self.rows:
            if row.how == FREE:
                continue
            rate, bits = (
                "" if value is None else form.format(value) for value, form in ((row.rate, "{:.4f}"), (row.bits, "{}"))
            )
            numbers = (f"{row.products:,.0f}", rate, bits, f"{row.mj:.6f}", f"{100 * row.share:.2f} %")
            lines.append((row.label, row.kind, row.how, *numbers, ROLES[row.role]))
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        aligned = [
            "  ".join(
                cell.ljust(width) if column in (0, 1, 2, 8) else cell.rjust(width) for column, (cell, width) in cells
            )
            for cells in (enumerate(zip(line, widths, strict=True)) for line in lines)
        ]
        return "\n".join(
            [
                *(line.rstrip() for line in aligned),
                *sums(self.rows, images=self.images, steps=self.steps),
                "What merging changes:",
                *(f"  {line}" for line in merging(self.rows, self.merges)),
                f"Verdict: {self.verdict}",
                *(f"  {line}" for line in self.why),
            ]
        )

    def to_json(self) -> dict:
        """Everything in the report as what `json.dumps` writes."""
        return {
            "verdict": self.verdict,
            "why": list(self.why),
            "merging": self.merging,
            "images": self.images,
            "steps": self.steps,
            "total_mj": self.total_mj,
            "rows": [asdict(row) for row in self.rows],
            "merges": [asdict(merge) | {"parts": list(merge.parts)} for merge in self.merges],
        }

    def save(self, path: str | Path) -> Path:
        """Write `to_json` to the file `path`."""
        path = Path(path)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path


def audit(model: nn.Module, images: Tensor | Iterable) -> AuditReport:
    """List every product of `model` on `images`, and say whether spikes drive it; audit `fuse(model)` beside it.

    images: one batch [B, C, H, W] or [T, B, C, H, W], or a loader of batches, or of tuples that start with a batch.
    Any torch model, in eval mode and without gradients; it comes back as it was. Only neurons of spikeformers.neurons
    spike.  An addition for each count of a spike costs 0.9 pJ, a product of real numbers 4.6 pJ; a mask by binary
    spikes, and constants that merge into weights and thresholds, cost nothing.
    Raises ValueError for no images, images that are not finite, a model with nothing to count, or an integer engine.
    """
    if hasattr(model, "compare_layers") or hasattr(model, "precisions"):
        raise ValueError("an integer engine is no network to audit: audit the network that it was built from")
    tally = _Tally()
    with evaluating(model):
        for batch in batches_of(images):
            tally.add(*products_of(model, placed(batch, model)))
    return tally.report(model)


class _Tally:
    """Sums over batches; a product that is made again in a pass, or in another batch, is one row."""

    def __init__(self) -> None:
        self.sums: dict[tuple, list[float]] = {}
        self.merges: dict[str, tuple[Operation, list[float]]] = {}
        self.images = 0
        self.steps = 1

    def add(self, found: Trace, products: Iterable[Product]) -> None:
        """Take in one forward pass."""
        self.images += found.images
        self.steps = found.steps
        for each in products:
            how = {"real": MAC, "constant": FREE}.get(each.operand, BINARY if each.most == 1 else INTEGER)
            key = (each.module, each.kind, each.function, how, each.most, each.bits, each.reads, each.into)
            sums = self.sums.setdefault(key, [0.0, 0.0, 0.0])
            sums[0] += each.products
            if each.rate is not None:
                sums[1] += each.products
                sums[2] += each.products * each.rate
        for operation in found.operations:
            if operation.kind in MERGED:
                _, sums = self.merges.setdefault(operation.name, (operation, [0.0, 0.0, 0.0]))
                parts = [_mj(part, part.macs) for part in operation.parts]
                real = math.fsum(mj for mj, part in zip(parts, operation.parts, strict=True) if part.rates is None)
                for place, mj in enumerate((math.fsum(parts), real, _mj(operation, operation.dense_macs))):
                    sums[place] += mj * found.images

    def report(self, model: nn.Module) -> AuditReport:
        if not self.images:
            raise ValueError("there are no images to audit: the loader is empty")
        rows = tuple(self.row(key, *sums) for key, sums in self.sums.items())
        total = math.fsum(row.mj for row in rows)
        rows = tuple(replace(row, share=row.mj / total if total else 0.0) for row in _with_readout(rows))
        layers = {plain_name(name): module for name, module in model.named_modules()}
        merges = tuple(self.merge(layers, *found) for found in self.merges.values())
        levels = max((neuron.levels for neuron in neurons_of(model).values()), default=0)
        verdict, why = judge(rows, merges, levels=levels)
        return AuditReport(rows, merges, verdict, why, self.images, self.steps)

    def row(self, key: tuple, products: float, rated: float, counts: float) -> AuditRow:
        name, kind, function, how, levels, bits, role, into = key
        # A mask by binary spikes adds nothing: it passes a number on, or not.
        additions = 0.0 if kind == "mask" and how == BINARY else counts
        energy = {MAC: MAC_PJ * products, FREE: 0.0}.get(how, AC_PJ * additions)
        return AuditRow(
            name=name,
            kind=kind,
            function=function,
            products=products / self.images,
            how=how,
            rate=counts / rated if rated else None,
            levels=levels,
            bits=bits,
            mj=1e-9 * energy / self.images,
            share=0.0,
            role=role,
            into=into,
        )

    def merge(self, layers: dict[str, nn.Module], operation: Operation, sums: list[float]) -> Merge:
        parts = [layers[part.name] for part in operation.parts]
        kernel = math.prod(
            1 + sum(size - 1 for size in sizes) for sizes in zip(*(p.kernel_size for p in parts), strict=True)
        )
        mj, real, dense = (each / self.images for each in sums)
        return Merge(
            name=operation.name,
            kind=operation.kind,
            parts=tuple(part.name for part in operation.parts),
            weights=sum(p.out_channels * p.in_channels // p.groups * math.prod(p.kernel_size) for p in parts),
            bits=max(getattr(part, "bits", FLOAT_BITS) for part in parts),
            mj=mj,
            real_mj=real,
            spike_fed=operation.rates is not None,
            merged_weights=parts[0].in_channels * parts[-1].out_channels * kernel,
            merged_mj=dense,
        )


def _mj(operation: Operation, macs: float) -> float:
    """Millijoules of an image if `operation` makes `macs` products in each step, mean over its images."""
    if operation.rates is None:
        return 1e-9 * MAC_PJ * macs * operation.steps
    return 1e-9 * AC_PJ * macs * operation.steps * float(operation.rates.mean())


def _with_readout(rows: tuple[AuditRow, ...]) -> tuple[AuditRow, ...]:
    """The rows, with the linear layers at the end that read averages of spikes marked as readout."""
    layers = [row for row in rows if row.kind in ("conv", "linear", "matmul")]
    last = []
    while layers and layers[-1].kind == "linear" and layers[-1].role == "average":
        last.append(layers.pop())
    return tuple(replace(row, role="readout") if row in last else row for row in rows)

"""The papers' verdict on a list of products: spike-driven, integer-driven or neither; and what merging changes.

Paper: Meta-SpikeFormer, Sec. 2 and 3 ("spike-driven": sparse additions only; sums of spikes, SEW's, are
"integer-driven") and 3.2 (re-parameterisation); QSD-Transformer, Eqs. 9-10, and Spike2Former, Eqs. 19-21 (counts 0..D
become D virtual steps of binary spikes).
Departures from the papers: they call the trained networks spike-driven; here what runs decides. The factors inside
RepConv, and the pointwise convolution behind SepConv's depthwise one, read real numbers until they are merged.
"""

import math
from collections import Counter
from dataclasses import dataclass

from spikeformers.energy.conventions import AC_PJ, MAC_PJ
from spikeformers.energy.products import FLOAT_BITS

SPIKE_DRIVEN, INTEGER_DRIVEN, NEITHER = "spike-driven", "integer-driven", "neither"
BINARY, INTEGER, MAC, FREE = "AC (binary)", "AC (integer)", "MAC", "free"
NAMED = 6  # offenders that the verdict names
ROLES = {"": "", "image": "reads the image", "average": "reads an average of spikes", "readout": "readout"}
MERGED = {"rep_conv": "RepConv", "sep_conv": "SepConv"}


@dataclass(frozen=True)
class AuditRow:
    """One product, per image and over all T steps, averaged over the images.

    `name`: the innermost module that made it ("" is the model itself).  `kind`: conv, linear, matmul, product, mask,
    scale, norm, taps, average, softmax, constant or unknown; `function`: torch's name.  `how`: "AC (binary)",
    "AC (integer)", "MAC", or "free" for what merges away.  `rate`, `levels`: mean count of its spikes, and the largest
    that they can have (0 without).  `bits` of a weight, None without.  `share` of all energy.  `role` of a product of
    real numbers: "image" if it reads the image, "average" if an average of spikes, "readout" if that also is the last
    layer.  `into`: the layer that it merges into, if that is known.
    """

    name: str
    kind: str
    function: str
    products: float
    how: str
    rate: float | None
    levels: int
    bits: int | None
    mj: float
    share: float
    role: str
    into: str

    @property
    def label(self) -> str:
        """Name and, where the module is no layer, function."""
        name = self.name or "(model)"
        return name if self.kind in ("conv", "linear", "norm") else f"{name}: {self.function}"


@dataclass(frozen=True)
class Merge:
    """One RepConv or SepConv, and the dense convolution that it would be.

    `parts`: the convolutions that merge, in order.  `weights`, `bits`, `mj`: of these as they ran; `real_mj`: of those
    that read real numbers.  `spike_fed`: whether the first reads spikes.  `merged_weights`, `merged_mj`: of the dense
    convolution on the same input, which has full precision.
    """

    name: str
    kind: str  # "rep_conv" or "sep_conv"
    parts: tuple[str, ...]
    weights: int
    bits: int
    mj: float
    real_mj: float
    spike_fed: bool
    merged_weights: int
    merged_mj: float


def offends(row: AuditRow) -> bool:
    """True if the product keeps a network from being driven by spikes."""
    return row.how == MAC and (row.kind == "unknown" or row.role not in ("image", "readout"))


def judge(rows: tuple[AuditRow, ...], merges: tuple[Merge, ...], *, levels: int) -> tuple[str, tuple[str, ...]]:
    """Verdict and reasons. `levels`: the largest count of a neuron, 0 for a network without any."""
    offenders = [row for row in rows if offends(row)]
    integer = [row for row in rows if row.how == INTEGER]
    if not levels:
        return NEITHER, ("It has no spiking neuron: every product is one of real numbers, as in any ANN.",)
    why = []
    if offenders:
        rows_of = f"{len(offenders)} of these rows" if len(offenders) > 1 else "one of these rows"
        why.append(f"No operand is spikes in {rows_of}, {_percent(offenders)} of the energy:")
        why += [f"- {line}" for line in _named(offenders, merges)]
    elif not integer:
        why.append("Every product but the first layer's has binary spikes on one side.")
    if integer:
        why += _counts(integer, levels=levels, alone=not offenders)
    verdict = NEITHER if offenders else INTEGER_DRIVEN if integer else SPIKE_DRIVEN
    return verdict, (*why, *_excused(rows))


def _named(offenders: list[AuditRow], merges: tuple[Merge, ...]) -> list[str]:
    """Offenders in lines: those inside layers that merge together, then the dearest others by name."""
    lines, rest = [], offenders
    for kind, what in MERGED.items():
        inside = {part for merge in merges if merge.kind == kind for part in merge.parts}
        found = [row for row in rest if row.name in inside]
        if found:
            ends = sorted({row.name.removesuffix(".conv").split(".")[-1] for row in found})
            many = f"{len(found)} convolutions, the first is" if len(found) > 1 else "one convolution,"
            lines.append(f"{' and '.join(ends)} inside {what} ({many} {found[0].name}): {_percent(found)}")
            rest = [row for row in rest if row.name not in inside]
    rest = sorted(rest, key=lambda row: -row.mj)
    for row in rest[:NAMED]:
        reads = f", {ROLES[row.role]}" if row.role else ""
        lines.append(f"{row.label} ({row.kind}{reads}): {_percent([row])}")
    if len(rest) > NAMED:
        lines.append(f"{len(rest) - NAMED} more: {_percent(rest[NAMED:])}")
    return lines


def _percent(rows: list[AuditRow]) -> str:
    """Share of all energy."""
    return f"{100 * math.fsum(row.share for row in rows):.1f} %"


def _counts(integer: list[AuditRow], *, levels: int, alone: bool) -> list[str]:
    """What counts above 1 mean."""
    most = max(row.levels for row in integer)
    lines = []
    if levels > 1:
        lines.append(
            f"{'It is' if alone else 'The rest is'} driven by counts 0..{levels}, an addition for each: by binary "
            f"spikes only after unrolling over {levels} virtual steps."
        )
    if most > levels:
        lines.append(
            f"Where spikes are added to spikes (SEW) or multiplied, counts reach {most}: in Meta-SpikeFormer's words "
            "that is integer-driven, not spike-driven."
        )
    return lines


def _excused(rows: tuple[AuditRow, ...]) -> list[str]:
    """What is there, and does not count against the verdict."""
    lines = []
    for role, what in (
        ("image", "the image, which no neuron has seen: the papers let the first layer multiply"),
        ("readout", "an average of spikes: as both are linear, it could add for each spike and average after"),
    ):
        found = [row for row in rows if row.role == role and row.how == MAC]
        if found:
            names = ", ".join(row.label for row in found[:NAMED])
            lines.append(f"{names} read{'s' if len(found) == 1 else ''} {what} ({_percent(found)}).")
    if any(row.kind == "average" for row in rows):
        lines.append("Averages, of spikes or of membranes, are additions and one constant.")
    if any(row.kind == "mask" and row.how == BINARY for row in rows):
        lines.append("Element-wise products with binary spikes are masks: nothing is added.")
    lines.append("Shortcuts, biases and sums only add, be it membranes (MS) or spikes (SEW).")
    return lines


def sums(rows: tuple[AuditRow, ...], *, images: int, steps: int) -> list[str]:
    """Totals by how a product is done, and what is free."""
    lines = []
    for how in (BINARY, INTEGER, MAC):
        found = [row for row in rows if row.how == how]
        if found:
            products, mj = (math.fsum(getattr(row, key) for row in found) for key in ("products", "mj"))
            lines.append(f"{how}: {len(found)} rows, {products:,.0f} products, {mj:.6f} mJ, {_percent(found)}")
    free = Counter(row.kind for row in rows if row.how == FREE)
    if free:
        kinds = ", ".join(f"{count} {kind}" for kind, count in free.items())
        lines.append(f"Free, since they merge into weights and thresholds: {kinds}")
    over = f"{images} image{'s' if images > 1 else ''}, T={steps}"
    each = f"{AC_PJ:g} pJ an addition, {MAC_PJ:g} pJ a product of real numbers"
    total = f"{math.fsum(row.mj for row in rows):.6f} mJ over {over}"
    return [*lines, f"Energy per image, as executed, nothing merged beyond this network: {total} ({each})"]


def merging(rows: tuple[AuditRow, ...], merges: tuple[Merge, ...]) -> list[str]:
    """What `fuse`, and `merge_spatial` of a SepConv, would change."""
    lines = []
    for kind, what in MERGED.items():
        found = [merge for merge in merges if merge.kind == kind]
        if found:
            lines += _merged(found, what)
    if not lines:
        lines.append("No RepConv and no SepConv is in it: only batch norms could merge.")
    inside = {part for merge in merges if merge.spike_fed for part in merge.parts}
    offenders = [row for row in rows if offends(row)]
    if offenders and inside and all(row.name in inside for row in offenders):
        verdict = INTEGER_DRIVEN if any(row.how == INTEGER for row in rows) else SPIKE_DRIVEN
        lines.append(f"All of them merged, it would be {verdict}, with weights of full precision there.")
    if any(row.bits is not None and row.bits < FLOAT_BITS for row in rows):
        lines.append("fuse makes all other low-bit weights floats too; quantize.convert and fold keep their bits.")
    return lines


def _merged(merges: list[Merge], what: str) -> list[str]:
    """One kind of layer before and after."""
    before, after = (sum(getattr(merge, key) for merge in merges) for key in ("weights", "merged_weights"))
    mj, real, dense = (math.fsum(getattr(m, key) for m in merges) for key in ("mj", "real_mj", "merged_mj"))
    bits = max(merge.bits for merge in merges)
    few, lost = (f" of {bits} bits", f", no longer of {bits} bits") if bits < FLOAT_BITS else ("", "")
    reads = "reads spikes only" if all(merge.spike_fed for merge in merges) else "still reads real numbers"
    if what == "RepConv":
        who, how = what, "fuse makes each a dense 3x3, 9 C^2 weights for 2 C^2 + 9 C, that"
    else:
        who, how = f"{what} (dw and pw2)", "fuse leaves them; merge_spatial makes each one dense convolution that"
    return [
        f"{len(merges)} {who}: {before:,} weights{few}, {mj:.6f} mJ, {real:.6f} of it on real numbers.",
        f"  {how} {reads}: {after:,} weights of full precision{lost}, {dense:.6f} mJ.",
    ]

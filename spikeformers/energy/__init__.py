"""Energy accounting: who fires how much, what every layer computes, and what that costs under a named convention."""

from spikeformers.energy.conventions import CONVENTIONS, Charge, Convention
from spikeformers.energy.firing import record
from spikeformers.energy.ops import Operation, Trace, trace
from spikeformers.energy.plots import Run, compare_runs
from spikeformers.energy.report import EnergyReport, Layer, measure

__all__ = [
    "CONVENTIONS",
    "Charge",
    "Convention",
    "EnergyReport",
    "Layer",
    "Operation",
    "Run",
    "Trace",
    "compare_runs",
    "measure",
    "record",
    "trace",
]

"""Reading weights: the authors' checkpoints, saved models and runs."""

from spikeformers.weights.load import LoadReport, load_backbone, load_official, load_strict, read_checkpoint
from spikeformers.weights.segmenter import untold

__all__ = ["LoadReport", "load_backbone", "load_official", "load_strict", "read_checkpoint", "untold"]

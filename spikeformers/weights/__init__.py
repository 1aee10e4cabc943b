"""Reading weights: the authors' checkpoints, saved models and runs."""

from spikeformers.weights.load import LoadReport, load_backbone, load_official, load_strict, read_checkpoint

__all__ = ["LoadReport", "load_backbone", "load_official", "load_strict", "read_checkpoint"]

"""Deployment: merged layers and integer inference."""

from spikeformers.deploy.fuse import fuse
from spikeformers.deploy.runtime import Agreement, IntegerModel, IntegerReport, LayerReport, integer

__all__ = ["Agreement", "IntegerModel", "IntegerReport", "LayerReport", "fuse", "integer"]

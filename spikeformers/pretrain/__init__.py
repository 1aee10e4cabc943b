"""Learning from images without labels."""

from spikeformers.pretrain.mae import MAE, Reconstruction

__all__ = ["MAE", "Reconstruction"]

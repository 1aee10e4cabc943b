"""Heads for dense prediction, each with its loss; they know the shapes of feature maps, never a backbone."""

from spikeformers.heads.detections import Detections, Target
from spikeformers.heads.detector import Detector, DetectorConfig
from spikeformers.heads.masks import IGNORE, MaskClassification
from spikeformers.heads.segmenter import Segmenter, SegmenterConfig
from spikeformers.heads.semantic_fpn import SemanticFPN, SemanticFPNConfig
from spikeformers.heads.spike2former import Spike2FormerConfig, Spike2FormerHead

__all__ = [
    "IGNORE",
    "Detections",
    "Detector",
    "DetectorConfig",
    "MaskClassification",
    "Segmenter",
    "SegmenterConfig",
    "SemanticFPN",
    "SemanticFPNConfig",
    "Spike2FormerConfig",
    "Spike2FormerHead",
    "Target",
]

"""Heads for dense prediction, each with its loss; they know the shapes of feature maps, never a backbone."""

from spikeformers.heads.detections import Detections, Target
from spikeformers.heads.detector import Detector, DetectorConfig
from spikeformers.heads.mask_rcnn import DenseStage, MaskRCNN, MaskRCNNConfig, RegionOutput
from spikeformers.heads.masks import IGNORE, MaskClassification
from spikeformers.heads.segmenter import Segmenter, SegmenterConfig
from spikeformers.heads.semantic_fpn import SemanticFPN, SemanticFPNConfig
from spikeformers.heads.spike2former import Spike2FormerConfig, Spike2FormerHead
from spikeformers.heads.yolo import YOLO, GridOutput, YOLOConfig, fit_anchors

__all__ = [
    "IGNORE",
    "YOLO",
    "DenseStage",
    "Detections",
    "Detector",
    "DetectorConfig",
    "GridOutput",
    "MaskClassification",
    "MaskRCNN",
    "MaskRCNNConfig",
    "RegionOutput",
    "Segmenter",
    "SegmenterConfig",
    "SemanticFPN",
    "SemanticFPNConfig",
    "Spike2FormerConfig",
    "Spike2FormerHead",
    "Target",
    "YOLOConfig",
    "fit_anchors",
]

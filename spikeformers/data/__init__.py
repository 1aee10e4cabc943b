"""Pictures with a label each, one for each pixel, or boxes: sources, splits, augmentation, and the order of samples."""

from spikeformers.data.augment import Augment, mixing, seed_of, seeded
from spikeformers.data.decode import UnreadablePictureError
from spikeformers.data.detection import (
    DetectionData,
    DetectionSplit,
    DetectionTarget,
    collate_detections,
    load_detection_split,
    read_picture_to_detect,
)
from spikeformers.data.detection_augment import DetectionAugment
from spikeformers.data.detection_sources import DETECTION_SOURCES, Objects
from spikeformers.data.images import SOURCES, ImageData, ImageSplit, read_image, spec_transform
from spikeformers.data.sampler import ResumableSampler
from spikeformers.data.segmentation import (
    SEGMENTATION_SOURCES,
    SegmentationData,
    SegmentationSplit,
    load_segmentation_split,
    read_picture_for,
)
from spikeformers.data.segmentation_augment import IGNORE, SegmentationAugment
from spikeformers.data.splits import load_split

__all__ = [
    "DETECTION_SOURCES",
    "IGNORE",
    "SEGMENTATION_SOURCES",
    "SOURCES",
    "Augment",
    "DetectionAugment",
    "DetectionData",
    "DetectionSplit",
    "DetectionTarget",
    "ImageData",
    "ImageSplit",
    "Objects",
    "ResumableSampler",
    "SegmentationAugment",
    "SegmentationData",
    "SegmentationSplit",
    "UnreadablePictureError",
    "collate_detections",
    "load_detection_split",
    "load_segmentation_split",
    "load_split",
    "mixing",
    "read_image",
    "read_picture_for",
    "read_picture_to_detect",
    "seed_of",
    "seeded",
    "spec_transform",
]

"""Pictures with a label each, one for each pixel, or boxes, and recordings of events: sources, splits, augmentation,
and the order of samples."""

from spikeformers.data.augment import Augment, mixing, seed_of, seeded
from spikeformers.data.decode import UnreadablePictureError, UnreadableRecordingError
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
from spikeformers.data.digits_dvs import simulate
from spikeformers.data.event_augment import EventAugment
from spikeformers.data.event_clips import ClipSplit, EventData, load_clip_split
from spikeformers.data.event_files import read_events
from spikeformers.data.event_sources import EVENT_SOURCES
from spikeformers.data.events import Events
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
    "EVENT_SOURCES",
    "IGNORE",
    "SEGMENTATION_SOURCES",
    "SOURCES",
    "Augment",
    "ClipSplit",
    "DetectionAugment",
    "DetectionData",
    "DetectionSplit",
    "DetectionTarget",
    "EventAugment",
    "EventData",
    "Events",
    "ImageData",
    "ImageSplit",
    "Objects",
    "ResumableSampler",
    "SegmentationAugment",
    "SegmentationData",
    "SegmentationSplit",
    "UnreadablePictureError",
    "UnreadableRecordingError",
    "collate_detections",
    "load_clip_split",
    "load_detection_split",
    "load_segmentation_split",
    "load_split",
    "mixing",
    "read_events",
    "read_image",
    "read_picture_for",
    "read_picture_to_detect",
    "seed_of",
    "seeded",
    "simulate",
    "spec_transform",
]

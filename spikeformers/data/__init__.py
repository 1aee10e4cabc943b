"""Pictures with a label each, or one for each pixel: sources, splits, augmentation, and the order of samples."""

from spikeformers.data.augment import Augment, mixing, seed_of, seeded
from spikeformers.data.decode import UnreadablePictureError
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
    "IGNORE",
    "SEGMENTATION_SOURCES",
    "SOURCES",
    "Augment",
    "ImageData",
    "ImageSplit",
    "ResumableSampler",
    "SegmentationAugment",
    "SegmentationData",
    "SegmentationSplit",
    "UnreadablePictureError",
    "load_segmentation_split",
    "load_split",
    "mixing",
    "read_image",
    "read_picture_for",
    "seed_of",
    "seeded",
    "spec_transform",
]

"""Pictures for training and testing: sources, splits, augmentation, and the order of samples."""

from spikeformers.data.augment import Augment, mixing, seed_of, seeded
from spikeformers.data.decode import UnreadablePictureError
from spikeformers.data.images import SOURCES, ImageData, ImageSplit, load_split, read_image, spec_transform
from spikeformers.data.sampler import ResumableSampler

__all__ = [
    "SOURCES",
    "Augment",
    "ImageData",
    "ImageSplit",
    "ResumableSampler",
    "UnreadablePictureError",
    "load_split",
    "mixing",
    "read_image",
    "seed_of",
    "seeded",
    "spec_transform",
]

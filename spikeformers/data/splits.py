"""One door to every kind of data: the kind of a spec follows from its source, and its splits from its kind."""

from spikeformers.data import images
from spikeformers.data.detection import DetectionData, DetectionSplit, load_detection_split
from spikeformers.data.detection_sources import DETECTION_SOURCES
from spikeformers.data.event_clips import ClipSplit, EventData, load_clip_split
from spikeformers.data.event_sources import EVENT_SOURCES
from spikeformers.data.images import SOURCES, ImageData, ImageSplit
from spikeformers.data.segmentation import (
    SEGMENTATION_SOURCES,
    SegmentationData,
    SegmentationSplit,
    load_segmentation_split,
)
from spikeformers.neurons import closest

Data = ImageData | SegmentationData | DetectionData | EventData
Split = ImageSplit | SegmentationSplit | DetectionSplit | ClipSplit
KINDS = (
    dict.fromkeys(SOURCES, ImageData)
    | dict.fromkeys(SEGMENTATION_SOURCES, SegmentationData)
    | dict.fromkeys(DETECTION_SOURCES, DetectionData)
    | dict.fromkeys(EVENT_SOURCES, EventData)
)
_LOADERS = {
    ImageData: images.load_split,
    SegmentationData: load_segmentation_split,
    DetectionData: load_detection_split,
    EventData: load_clip_split,
}


def kind_of(source: str) -> type[Data]:
    """The kind of spec that has `source`. Raises ValueError for a source that none has."""
    if source not in KINDS:
        raise ValueError(f"unknown data.source {source!r}; {closest(source, KINDS)}")
    return KINDS[source]


def load_split(spec: Data, split: str, *, seed: int = 0) -> Split:
    """The "train" or "test" split of a spec of any kind; raises ValueError as the kind's own function does."""
    return _LOADERS[type(spec)](spec, split, seed=seed)

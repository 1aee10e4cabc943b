"""Reading many pictures at once, to hold them in memory or to find those that cannot be read."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from spikeformers.data.decode import UnreadablePictureError

T = TypeVar("T")


def read_all(read: Callable[[int], T], count: int, *, skip_unreadable: bool) -> tuple[dict[int, T], list[str]]:
    """What `read` makes of 0..count-1, by these indices in order, and why others were skipped, sorted.

    Raises UnreadablePictureError where `read` does, unless `skip_unreadable`.
    """

    def tried(index: int) -> T | UnreadablePictureError:
        try:
            return read(index)
        except UnreadablePictureError as error:
            if not skip_unreadable:
                raise
            return error

    with ThreadPoolExecutor() as pool:
        items = list(pool.map(tried, range(count)))
    skipped = sorted(str(item) for item in items if isinstance(item, UnreadablePictureError))
    return {i: item for i, item in enumerate(items) if not isinstance(item, UnreadablePictureError)}, skipped


def spread(count: int, limit: int) -> list[int]:
    """`limit` indices spread evenly over `count`, so that each part of a video is there; all where `limit` is 0."""
    return (np.arange(limit) * count // limit if 0 < limit < count else np.arange(count)).tolist()

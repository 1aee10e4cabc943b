"""The order of training samples as a function of (seed, epoch), from any position: what bit-equal resuming needs."""

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from spikeformers.data.augment import seed_of


class ResumableSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) for an `ImageSplit`; use with DataLoader(split, batch_size=batch_size, sampler=this).

    Each rank takes whole batches in turn (batch k*world + rank), so `world` ranks see at step k what one process sees
    in `world` accumulated batches.  An incomplete last round is dropped.
    `shuffled` draws another order of all samples than a permutation, for data that can only be read in parts.
    Length and iteration count from the position; `set_position` must be called for each new epoch.

    Raises ValueError for a rank outside the world, or if there is not one whole round.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffled: Callable[[np.random.RandomState], np.ndarray] | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie between 0 and world - 1 = {world - 1}, got {rank}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if length < batch_size * world:
            cure = f"lower batch_size to at most {length // world}" if length >= world else "start fewer processes"
            raise ValueError(
                f"{length} training samples are fewer than one batch of batch_size={batch_size} in each of {world} "
                f"process(es): {cure}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.shuffled = rank, world, shuffled
        self.epoch = self.start = 0

    def set_position(self, epoch: int, start: int = 0) -> None:
        """Continue in `epoch` after this rank's first `start` samples (batches taken x batch_size)."""
        self.epoch, self.start = epoch, start

    def order(self) -> np.ndarray:
        """All of this rank's sample indices of the present epoch, int64, from the epoch's beginning."""
        # RandomState, not default_rng: its stream is frozen, so orders survive new versions of numpy.
        random = np.random.RandomState(seed_of(self.seed, self.epoch, "order"))
        everything = self.shuffled(random) if self.shuffled else random.permutation(self.length)
        whole = self.length - self.length % (self.batch_size * self.world)
        return everything[:whole].reshape(-1, self.world, self.batch_size)[:, self.rank].reshape(-1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        for index in self.order()[self.start :].tolist():
            yield epoch, index

    def __len__(self) -> int:
        return max(self.length // (self.batch_size * self.world) * self.batch_size - self.start, 0)

"""Parquet shards that do not fit into memory: the same pictures, a bounded part of them held, an order to resume."""

import io
import itertools
import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from spikeformers.data import ImageData, images, load_split, sources, streamed
from spikeformers.data.sampler import ResumableSampler
from spikeformers.data.streamed import RowGroup, StreamedPictures


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, pictures, *, group=4):
    """A file with row groups of `group` pictures; labels 0, 1, 2 take turns."""
    table = pa.table(
        {
            "image": [{"bytes": each, "path": f"{row}.png"} for row, each in enumerate(pictures)],
            "label": [row % 3 for row in range(len(pictures))],
        }
    )
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def spec(tmp_path, monkeypatch) -> ImageData:
    """Three shards of ten pictures, grey levels 0..29, of which nothing fits into memory but three row groups."""
    for number in range(3):
        shard(tmp_path / f"train-{number}.parquet", [png(10 * number + row) for row in range(10)])
    group = 4 * len(png(0)) + 40
    monkeypatch.setattr(streamed, "WINDOW", 3 * group)
    monkeypatch.setattr(sources, "ENCODED_LIMIT", 0)
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    return ImageData(source="parquet", root=str(tmp_path), size=8)


def levels(split, indices) -> list[int]:
    return [int(split.picture(index)[0, 0, 0]) for index in indices]


def test_streamed_pictures_are_those_in_memory(spec, monkeypatch):
    split = load_split(spec, "train")
    assert levels(split, range(30)) == list(range(30))
    assert levels(split, [29, 0, 13]) == [29, 0, 13]
    assert split.names[13] == f"row 3 in row group 0 of {spec.root}/train-1.parquet"
    few = load_split(ImageData(source="parquet", root=spec.root, size=8, train_limit=7), "train")
    assert levels(few, range(len(few))) == list(range(7))
    monkeypatch.setattr(sources, "ENCODED_LIMIT", 2**30)
    whole = load_split(spec, "train")
    assert whole.shuffled is None
    assert split.labels.tolist() == whole.labels.tolist()
    assert split.classes == whole.classes


def test_an_epoch_reads_each_row_group_once_and_holds_a_window(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for number in range(4):
        shard(tmp_path / f"{number}.parquet", [random.bytes(20_000) for _ in range(100)], group=10)
    monkeypatch.setattr(streamed, "WINDOW", 1_100_000)  # five row groups of 40
    groups = [RowGroup(tmp_path / f"{n}.parquet", g, "image", 10, 200_040) for n in range(4) for g in range(10)]
    pictures, reads = StreamedPictures(groups), []
    original = StreamedPictures._read
    monkeypatch.setattr(StreamedPictures, "_read", lambda self, group: reads.append(group) or original(self, group))
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    for index in pictures.shuffled(np.random.RandomState(0)):
        assert len(pictures[index]) == 20_000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(reads) == list(range(40))
    assert 800_000 < most < 1.1 * streamed.WINDOW  # of 8 000 000 bytes; a tenth for the order and the lists
    assert pa.total_allocated_bytes() - before < streamed.WINDOW  # its threads let go of row groups when they like


def test_the_order_is_a_function_of_seed_and_epoch_and_mixes_shards(spec):
    split = load_split(spec, "train")

    def drawn(epoch, seed=0, start=0, **share):
        sampler = ResumableSampler(30, batch_size=2, seed=seed, shuffled=split.shuffled, **share)
        sampler.set_position(epoch, start)
        return [index for _, index in sampler]

    assert sorted(drawn(0)) == list(range(30))
    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=1)
    assert drawn(3, start=14) == drawn(3)[14:]
    two = [drawn(2, rank=rank, world=2) for rank in (0, 1)]
    batches = [two[k % 2][2 * (k // 2) : 2 * (k // 2) + 2] for k in range(14)]
    assert [index for batch in batches for index in batch] == drawn(2)[:28]
    # Row groups come in another order each time and are mixed with their neighbours of the window.
    files = [index // 10 for index in drawn(0)]
    assert sum(a != b for a, b in itertools.pairwise(files)) > 8


def test_worker_processes_stream_the_same_batches_from_the_middle_of_an_epoch(spec):
    split = load_split(spec, "train")
    sampler = ResumableSampler(30, batch_size=5, shuffled=split.shuffled)
    sampler.set_position(1, 10)
    alone, shared = (list(DataLoader(split, batch_size=5, sampler=sampler, num_workers=w)) for w in (0, 2))
    assert len(alone) == 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(alone, shared, strict=True))
    assert levels(pickle.loads(pickle.dumps(split)), [5]) == [5]  # what spawned workers get


def test_unreadable_pictures_are_left_out_of_a_stream(spec, tmp_path):
    shard(tmp_path / "train-1.parquet", [png(10), b"no picture", png(12)])
    split = load_split(ImageData(source="parquet", root=spec.root, size=8, skip_unreadable=True), "train")
    assert levels(split, range(len(split))) == [*range(11), 12, *range(20, 30)]
    assert "row 1 in row group 0 of" in split.skipped[0]
    assert sorted(split.shuffled(np.random.RandomState(0))) == list(range(22))


def test_row_groups_larger_than_a_window_are_refused_with_the_cure(spec, tmp_path):
    shard(tmp_path / "train-2.parquet", [png(row) for row in range(40)], group=40)
    with pytest.raises(ValueError, match=r"row group 0 of .*train-2.*more than the .*row_group_size=100"):
        load_split(spec, "train")


def test_a_file_that_vanishes_is_named(spec, tmp_path):
    split = load_split(spec, "train")
    (tmp_path / "train-2.parquet").unlink()
    with pytest.raises(ValueError, match=r"train-2.parquet is no readable parquet file"):
        split.picture(25)

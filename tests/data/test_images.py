"""Splits: deterministic in (seed, epoch, index), the same in memory and from files, clear about bad files."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from spikeformers.data import Augment, ImageData, ResumableSampler, images, load_split, read_image

HEAVY = Augment(policy="rand-m9-mstd0.5-inc1", crop_padding=2, flip=0.5, erase=0.5)
IMAGENET = Augment(policy="rand-m9-mstd0.5-inc1", resized_crop=0.08, flip=0.5)
LIGHT = Augment(crop_padding=2, flip=0.5)


def spec_of(root, **changed) -> ImageData:
    return ImageData(**({"source": "imagefolder", "root": str(root), "size": 16} | changed))


def equal(left, right) -> bool:
    return all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("augment", [LIGHT, HEAVY, IMAGENET], ids=["light", "heavy", "imagenet"])
def test_a_training_picture_is_a_function_of_seed_epoch_and_index(folder, augment):
    root = folder("train")
    split = load_split(spec_of(root, augment=augment), "train", seed=3)
    first = [split[2, i] for i in range(len(split))]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    again = [split[2, i] for i in reversed(range(len(split)))][::-1]
    assert equal(first, again)
    assert equal(first, [load_split(spec_of(root, augment=augment), "train", seed=3)[2, i] for i in range(8)])
    assert not equal(first, [split[3, i] for i in range(8)])
    assert not equal(first, [load_split(spec_of(root, augment=augment), "train", seed=4)[2, i] for i in range(8)])
    assert equal([split[5]], [split[0, 5]])


@pytest.mark.parametrize("augment", [LIGHT, HEAVY, IMAGENET], ids=["light", "heavy", "imagenet"])
def test_reading_leaves_the_global_random_states_alone(folder, augment):
    split = load_split(spec_of(folder("train"), augment=augment), "train")
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    split[1, 2]
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_worker_processes_give_the_same_batches_as_none(folder):
    split = load_split(spec_of(folder("train"), augment=HEAVY), "train")
    batches = []
    for workers in (0, 2):
        sampler = ResumableSampler(len(split), batch_size=4, seed=1)
        sampler.set_position(5, 0)
        batches.append(list(DataLoader(split, batch_size=4, sampler=sampler, num_workers=workers)))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*batches, strict=True))
    assert batches[0][0][0].shape == (4, 3, 16, 16)
    assert batches[0][0][1].dtype == torch.int64


def test_test_pictures_are_never_augmented_and_equal_the_file_read_alone(folder):
    root = folder("train", "test")
    split = load_split(spec_of(root, augment=HEAVY), "test")
    assert torch.equal(split[0, 1][0], split[7, 1][0])
    assert torch.equal(split[1][0], read_image(root / "test" / "cat" / "01.png", spec=spec_of(root)))


def test_pictures_read_at_access_equal_those_held_in_memory(folder, monkeypatch):
    spec = spec_of(folder("train", "test"), augment=LIGHT)
    held = {name: load_split(spec, name) for name in ("train", "test")}
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    for name, split in held.items():
        lazy = load_split(spec, name)
        assert equal([split[1, i] for i in range(8)], [lazy[1, i] for i in range(8)])
        assert torch.equal(split.picture(3), lazy.picture(3))


def test_pictures_are_resized_by_the_short_side_and_cropped_at_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    (picture := Image.fromarray(pixels)).save(tmp_path / "wide.png")
    assert picture.size == (60, 20)
    white = read_image(tmp_path / "wide.png", spec=spec_of("", size=20))
    assert white.shape == (3, 20, 20)
    assert white.min() == white.amax(dim=(1, 2)).min()  # nothing but the white middle
    assert read_image(tmp_path / "wide.png", spec=spec_of("", size=14, eval_crop=0.7)).shape == (3, 14, 14)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["memory", "access"])
@pytest.mark.parametrize("augment", [LIGHT, IMAGENET], ids=["light", "imagenet"])
def test_an_unreadable_file_stops_by_name_or_is_skipped_and_counted(folder, monkeypatch, augment, limit):
    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    root = folder("train")
    for name in ("cat/01.png", "dog/03.png"):
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"cannot read image .*train/cat/01.png: "):
        load_split(spec_of(root), "train")[1]
    split = load_split(spec_of(root, skip_unreadable=True, augment=augment), "train")
    assert (len(split), split.labels.tolist()) == (6, [0, 0, 0, 1, 1, 1])
    assert [text.split("train/")[1].split(":")[0] for text in split.skipped] == ["cat/01.png", "dog/03.png"]
    assert all(split[i][1] == split.labels[i] for i in range(6))


def test_an_unreadable_file_met_by_a_worker_process_is_one_line_of_error(folder, monkeypatch):
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    root = folder("train")
    (root / "train" / "cat" / "00.png").write_bytes(b"")
    split = load_split(spec_of(root), "train")
    with pytest.raises(ValueError, match=r"^cannot read image .*cat/00.png: not a picture format.*") as caught:
        list(DataLoader(split, batch_size=4, num_workers=1))
    assert "\n" not in str(caught.value)


def test_decoding_a_large_set_for_its_unreadable_files_is_announced(folder, monkeypatch, caplog):
    monkeypatch.setattr(images, "MEMORY_LIMIT", 0)
    with caplog.at_level("INFO"):
        load_split(spec_of(folder("train")), "train")
        assert not caplog.messages
        root = folder("train")
        load_split(spec_of(root, skip_unreadable=True), "train")
    assert caplog.messages == [f"data.skip_unreadable: decoding all 8 pictures of {root} once"]


def test_a_set_of_unreadable_files_only_is_refused(folder):
    root = folder("train", per_class=1)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no picture of .* could be read; first: cannot read image .*cat/00.png"):
        load_split(spec_of(root, skip_unreadable=True), "train")


def test_indices_outside_the_split_are_refused():
    split = load_split(ImageData(source="digits", size=8, in_channels=1, train_limit=5), "train")
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"index {index} of a split of 5 pictures"):
            split[index]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "imagefoldr"}, "unknown data.source 'imagefoldr'; closest: imagefolder"),
        ({"source": "xyz"}, "closest: digits, imagefolder, parquet, cifar10, cifar100, imagenet"),
        ({"in_channels": 2}, r"data.in_channels must be 1 \(grey\) or 3 \(RGB\) for pictures, got 2"),
        ({"size": 0}, "data.size must be at least 1, got 0"),
        ({"train_limit": -1}, "data.train_limit must be at least 0, got -1"),
        ({"interpolation": "cubic"}, "data.interpolation must be bicubic or bilinear, got 'cubic'"),
        ({"eval_crop": 0.0}, "data.eval_crop must lie above 0 and at most at 1, got 0.0"),
    ],
)
def test_an_impossible_choice_of_data_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**wrong)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        load_split(ImageData(), "val")

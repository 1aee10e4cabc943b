"""Splits of labelled masks: deterministic in (seed, epoch, index), the same held, read late, and by workers."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from spikeformers.data import (
    ResumableSampler,
    SegmentationAugment,
    SegmentationData,
    load_segmentation_split,
    read_picture_for,
    segmentation,
)
from spikeformers.data.segmentation import spread

PAPER = SegmentationAugment(scale=(0.5, 2.0), flip=0.5, cat_max_ratio=0.75, distort=0.5)


def spec_of(root, **changed) -> SegmentationData:
    return SegmentationData(**({"source": "maskfolder", "root": str(root), "size": (16, 16)} | changed))


def equal(left, right) -> bool:
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(left, right, strict=True))


def test_a_training_item_is_a_function_of_seed_epoch_and_index_and_leaves_random_states_alone(mask_folder):
    spec = spec_of(mask_folder, augment=PAPER)
    split = load_segmentation_split(spec, "train", seed=3)
    first = [split[2, i] for i in range(8)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    before = random.getstate(), torch.get_rng_state()
    assert equal(first, [split[2, i] for i in reversed(range(8))][::-1])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert equal(first, [load_segmentation_split(spec, "train", seed=3)[2, i] for i in range(8)])
    assert not equal(first, [split[3, i] for i in range(8)])
    assert not equal(first, [load_segmentation_split(spec, "train", seed=4)[2, i] for i in range(8)])
    assert equal([split[5]], [split[0, 5]])


def test_worker_processes_give_the_same_batches_as_none(mask_folder):
    split = load_segmentation_split(spec_of(mask_folder, augment=PAPER), "train")
    batches = []
    for workers in (0, 2):
        sampler = ResumableSampler(len(split), batch_size=4, seed=1)
        sampler.set_position(5, 0)
        batches.append(list(DataLoader(split, batch_size=4, sampler=sampler, num_workers=workers)))
    assert equal(*batches)
    assert [part.shape for part in batches[0][0]] == [(4, 3, 16, 16), (4, 16, 16)]


@pytest.mark.parametrize("short_side", [0, 8], ids=["original", "shrunk"])
def test_items_read_at_access_equal_those_held_in_memory(mask_folder, monkeypatch, short_side):
    spec = spec_of(mask_folder, augment=PAPER, short_side=short_side)
    held = {name: load_segmentation_split(spec, name) for name in ("train", "test")}
    monkeypatch.setattr(segmentation, "MEMORY_LIMIT", 0)
    for name, split in held.items():
        late = load_segmentation_split(spec, name)
        assert (split._held is None, late._held is None) == (False, True)
        assert equal([split[1, i] for i in range(len(split))], [late[1, i] for i in range(len(late))])


def test_a_test_item_is_resized_and_its_labels_keep_the_size_of_the_file(mask_folder):
    split = load_segmentation_split(spec_of(mask_folder, short_side=12, augment=PAPER), "test")
    image, labels = split[2]
    assert (image.shape, labels.shape) == ((3, 12, 16), (24, 32))
    assert (image.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(labels, split.mask(2))
    assert equal([split[0, 2]], [split[7, 2]])
    picture = split.picture(2)
    assert (picture.shape, picture.dtype) == ((3, 24, 32), torch.uint8)
    red = torch.where(labels == 255, 255, 20 * labels)  # as the fixture paints it
    assert torch.equal(picture[0].long(), red)
    assert split.names[2].endswith("val/images/02.png")


def test_a_picture_is_normalised_by_imagenet_statistics_and_read_alone_as_in_the_split(mask_folder):
    spec = spec_of(mask_folder)
    split = load_segmentation_split(spec, "test")
    image, size = read_picture_for(spec, split.names[0])
    assert size == (24, 32)
    assert torch.equal(image, split[0][0])
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(image * std + mean, split.picture(0) / 255, atol=1e-6)  # float32
    grey = spec_of(mask_folder, in_channels=1, test_size=(6, 7))
    assert read_picture_for(grey, split.names[0])[0].shape == (1, 6, 7)


def test_a_split_is_uniform_unless_its_pictures_differ_in_size(mask_folder, draw_labelled):
    spec = spec_of(mask_folder, test_size=(16, 16))
    assert load_segmentation_split(spec, "test").uniform
    draw_labelled(mask_folder / "val/images/99.png", mask_folder / "val/masks/99.png", np.zeros((24, 30)))
    split = load_segmentation_split(spec, "test")
    assert not split.uniform  # the pictures agree at 16 x 16, the labels do not
    assert split[3][1].shape == (24, 30)
    assert load_segmentation_split(spec, "train").uniform


def test_limits_are_spread_over_the_split(mask_folder):
    spec = spec_of(mask_folder, train_limit=3, test_limit=9)
    names = [name[-6:] for name in load_segmentation_split(spec, "train").names]
    assert names == ["00.png", "02.png", "05.png"]
    assert len(load_segmentation_split(spec, "test")) == 3
    assert spread(10, 0) == list(range(10))


@pytest.mark.parametrize("limit", [2**30, 0], ids=["memory", "access"])
def test_a_bad_file_stops_by_name_or_is_skipped_and_counted(mask_folder, monkeypatch, limit):
    monkeypatch.setattr(segmentation, "MEMORY_LIMIT", limit)
    image, mask = mask_folder / "train/images/01.png", mask_folder / "train/masks/04.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^cannot read image .*train/images/01.png: "):
        load_segmentation_split(spec_of(mask_folder), "train")[1]
    mask.write_bytes(b"")
    split = load_segmentation_split(spec_of(mask_folder, skip_unreadable=True), "train")
    assert [name[-6:] for name in split.names] == [f"0{i}.png" for i in (0, 2, 3, 5, 6, 7)]
    assert [text.split("train/")[1].split(":")[0] for text in split.skipped] == ["images/01.png", "masks/04.png"]
    assert [split[i][0].shape for i in range(6)] == [(3, 16, 16)] * 6
    for path in (mask_folder / "val/masks").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no picture of maskfolder .* could be read; first: cannot read .*00.png"):
        load_segmentation_split(spec_of(mask_folder, skip_unreadable=True), "test")


def test_labels_in_memory_are_known_and_those_of_a_large_set_are_not(mask_folder, monkeypatch):
    assert load_segmentation_split(spec_of(mask_folder), "train").labels_in_memory() == {0, 1, 2}  # 255 is none
    monkeypatch.setattr(segmentation, "MEMORY_LIMIT", 0)
    assert load_segmentation_split(spec_of(mask_folder), "train").labels_in_memory() is None


def test_decoding_a_large_set_for_its_bad_files_is_announced(mask_folder, monkeypatch, caplog):
    monkeypatch.setattr(segmentation, "MEMORY_LIMIT", 0)
    with caplog.at_level("INFO"):
        load_segmentation_split(spec_of(mask_folder, skip_unreadable=True), "train")
    assert caplog.messages == [f"data.skip_unreadable: decoding all 8 pictures of {mask_folder} once"]


def test_indices_outside_the_split_and_unknown_splits_are_refused(mask_folder):
    split = load_segmentation_split(spec_of(mask_folder), "train")
    for index in (8, -1):
        with pytest.raises(IndexError, match=f"index {index} of a split of 8 pictures"):
            split[index]
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        load_segmentation_split(spec_of(mask_folder), "val")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "camvis"}, r"unknown data.source 'camvis'; closest: camvid \(of ade20k, .*, camvid, maskfolder\)"),
        ({"source": "camvid", "classes": ("a",)}, "data.classes are for a maskfolder: the classes of camvid are fixed"),
        ({"in_channels": 2}, r"data.in_channels must be 1 \(grey\) or 3 \(RGB\) for pictures, got 2"),
        ({"interpolation": "nearest"}, "data.interpolation must be bicubic or bilinear, got 'nearest'"),
        ({"size": (0, 5)}, r"data.size must be the height and width of the training crop, got \(0, 5\)"),
        ({"test_size": (5,)}, r"data.test_size must be a height and a width, or \(\) to keep the ratio: \(5,\)"),
        ({"test_size": (5, 5), "short_side": 9}, r"data.test_size=\(5, 5\) beside data.short_side=9"),
        ({"train_limit": -1}, "data.train_limit must be at least 0, got -1"),
        ({"max_side": -2}, "data.max_side must be at least 0, got -2"),
    ],
)
def test_an_impossible_choice_of_data_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SegmentationData(**({"source": "maskfolder"} | wrong))

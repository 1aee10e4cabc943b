"""Splits of boxes: deterministic in (seed, epoch, index), the same held, read late, and by workers; batches."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from spikeformers.data import (
    DetectionAugment,
    DetectionData,
    ResumableSampler,
    collate_detections,
    detection,
    load_detection_split,
    load_split,
    read_picture_to_detect,
)
from spikeformers.data.splits import kind_of
from spikeformers.heads.detections import check_targets, usable

RANDOM = DetectionAugment(scale=(0.5, 2.0), flip=0.5, distort=0.5)


def spec_of(root, **changed) -> DetectionData:
    return DetectionData(**({"root": str(root), "size": (32, 32), "masks": True} | changed))


def equal(left, right) -> bool:
    def same(a, b) -> bool:
        tensors = {key: value for key, value in a.items() if key != "truth"}
        return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in tensors.items())

    return all(torch.equal(a[0], b[0]) and same(a[1], b[1]) for a, b in zip(left, right, strict=True))


def test_a_training_item_is_a_function_of_seed_epoch_and_index_and_leaves_random_states_alone(coco_folder):
    spec = spec_of(coco_folder, augment=RANDOM)
    split = load_detection_split(spec, "train", seed=3)
    first = [split[2, i] for i in range(6)]
    random.seed(9)
    torch.manual_seed(9)
    before = random.getstate(), torch.get_rng_state()
    assert equal(first, [split[2, i] for i in reversed(range(6))][::-1])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert equal(first, [load_detection_split(spec, "train", seed=3)[2, i] for i in range(6)])
    assert not equal(first, [split[3, i] for i in range(6)])
    assert not equal(first, [load_detection_split(spec, "train", seed=4)[2, i] for i in range(6)])
    assert equal([split[5]], [split[0, 5]])


def test_a_test_item_is_resized_and_brings_what_the_annotations_say(coco_folder, draw_coco):
    draw_coco(coco_folder, split="test", pictures=[[([2, 4, 8, 10], 7), ([20, 0, 20, 30], 3)]], size=(24, 32))
    split = load_detection_split(spec_of(coco_folder, size=(48, 80), augment=RANDOM), "test")
    image, target = split[0]
    assert image.shape == (3, 48, 80)
    assert target["boxes"].tolist() == [[4, 8, 20, 28], [40, 0, 64, 48]]  # clipped to the picture
    assert target["labels"].tolist() == [1, 0]
    assert (target["size"].tolist(), target["original"].tolist(), int(target["index"])) == ([48, 64], [24, 32], 0)
    assert target["crowd"].tolist() == [False, False]
    assert target["masks"][0].sum() == 16 * 20
    assert target["masks"][0, 8:28, 4:20].all()
    assert target["truth"].boxes.tolist() == [[2, 4, 8, 10], [20, 0, 20, 30]]
    assert not image[:, :, 64:].any()  # padding
    assert equal([split[0]], [split[7, 0]])
    assert split.classes == ("dog", "cat")
    assert split.colours.shape == (2, 3)
    assert (split.picture(0).shape, split.picture(0).dtype) == ((3, 24, 32), torch.uint8)
    assert split.names[0].endswith("test/0.png")
    assert split.original_size(0) == (24, 32)


def test_targets_are_what_detectors_take(coco_folder):
    split = load_detection_split(spec_of(coco_folder, augment=RANDOM), "train")
    images, targets = collate_detections([split[epoch, i] for epoch in range(3) for i in range(6)])
    check_targets(targets, images=images, num_classes=2)
    assert all(len(usable(target)["labels"]) == len(target["labels"]) for target in targets)


@pytest.mark.parametrize("size", [(32, 32), (8, 8)], ids=["enlarged", "shrunk"])
@pytest.mark.parametrize("fit", ["letterbox", "sides"])
def test_items_read_at_access_equal_those_held_in_memory(coco_folder, monkeypatch, fit, size):
    spec = spec_of(coco_folder, augment=RANDOM, fit=fit, size=size)
    held = {name: load_detection_split(spec, name) for name in ("train", "test")}
    monkeypatch.setattr(detection, "MEMORY_LIMIT", 0)
    for name, split in held.items():
        late = load_detection_split(spec, name)
        assert (split._held is None, late._held is None) == (False, True)
        assert equal([split[1, i] for i in range(len(split))], [late[1, i] for i in range(len(late))])


def test_worker_processes_give_the_same_batches_as_none(coco_folder):
    split = load_detection_split(spec_of(coco_folder, augment=RANDOM), "train")
    batches = []
    for workers in (0, 2):
        sampler = ResumableSampler(len(split), batch_size=3, seed=1)
        sampler.set_position(5, 0)
        loader = DataLoader(split, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=split.collate)
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one[0], other[0])
        assert equal(zip(one[0], one[1], strict=True), zip(other[0], other[1], strict=True))


def test_a_batch_is_padded_to_a_multiple_of_32_and_every_picture_stays_at_the_top_left(coco_folder, draw_coco):
    lying, standing = ([[([0, 0, 16, 12], 3)]], (24, 48)), ([[([0, 0, 6, 8], 7)]], (40, 20))
    draw_coco(coco_folder, split="train", pictures=lying[0], size=lying[1])
    draw_coco(coco_folder, split="test", pictures=standing[0], size=standing[1])
    spec = spec_of(coco_folder, fit="sides", size=(30, 60))
    items = [load_detection_split(spec, name)[0] for name in ("train", "test")]
    assert [image.shape for image, _ in items] == [(3, 30, 60), (3, 60, 30)]
    images, targets = collate_detections(items)
    assert images.shape == (2, 3, 64, 64)
    assert [target["size"].tolist() for target in targets] == [[30, 60], [60, 30]]
    for image, whole, target in zip([item[0] for item in items], images, targets, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(whole[:, :height, :width], image)
        assert not whole[:, height:].any()
        assert not whole[:, :, width:].any()
        assert target["masks"].shape == (1, 64, 64)
        assert not target["masks"][:, height:].any()


def test_only_letterboxed_items_are_uniform(coco_folder):
    assert load_detection_split(spec_of(coco_folder), "test").uniform
    assert not load_detection_split(spec_of(coco_folder, fit="sides"), "test").uniform


def test_a_picture_is_read_alone_as_in_the_split(coco_folder):
    spec = spec_of(coco_folder, size=(20, 40))
    split = load_detection_split(spec, "test")
    image, size, pixels = read_picture_to_detect(spec.letterbox, split.names[0])
    assert torch.equal(image, collate_detections([split[0]])[0][0])
    assert list(size) == split[0][1]["size"].tolist()
    assert torch.equal(pixels, split.picture(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    whole, *_ = read_picture_to_detect(spec_of(coco_folder, size=(24, 32)).letterbox, split.names[0])
    assert torch.allclose(whole[:, :24] * std + mean, split.picture(0) / 255, atol=1e-6)  # float32
    assert read_picture_to_detect(spec_of(coco_folder, in_channels=1).letterbox, split.names[0])[0].shape == (1, 32, 32)


def test_empty_pictures_are_kept_unless_they_are_to_be_skipped_in_training(coco_folder, draw_coco):
    content = draw_coco(coco_folder, split="train", pictures=[[([1, 1, 5, 5], 3)], [], [([2, 2, 5, 5], 7)]])
    assert len(load_detection_split(spec_of(coco_folder), "train")) == 3
    assert len(load_detection_split(spec_of(coco_folder, skip_empty=True), "train")) == 2
    assert len(load_detection_split(spec_of(coco_folder, skip_empty=True), "test")) == 3
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    (coco_folder / "annotations/instances_train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"data.skip_empty leaves no picture of .*: none has an object to learn"):
        load_detection_split(spec_of(coco_folder, skip_empty=True), "train")


def test_boxes_that_cannot_be_learnt_are_dropped_in_training_and_told_of(coco_folder, draw_coco, caplog):
    draw_coco(coco_folder, split="train", pictures=[[([1, 1, 0, 5], 3), ([28, 2, 9, 5], 7)]])
    split = load_detection_split(spec_of(coco_folder, size=(24, 32)), "train")
    assert split[0][1]["boxes"].tolist() == [[28, 2, 32, 7]]
    assert caplog.messages == [f"{coco_folder}, train split: {oddity}" for oddity in split.oddities]
    assert len(split.oddities) == 2


def test_limits_are_spread_over_the_split(coco_folder):
    spec = spec_of(coco_folder, train_limit=3, test_limit=9)
    names = [name[-5:] for name in load_detection_split(spec, "train").names]
    assert names == ["0.png", "2.png", "4.png"]
    assert len(load_detection_split(spec, "test")) == 3


@pytest.mark.parametrize("limit", [2**30, 0], ids=["memory", "access"])
def test_a_bad_file_stops_by_name_or_is_skipped_and_counted(coco_folder, monkeypatch, limit):
    monkeypatch.setattr(detection, "MEMORY_LIMIT", limit)
    image = coco_folder / "train/1.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^cannot read image .*train/1.png: "):
        load_detection_split(spec_of(coco_folder), "train")[1]
    Image.fromarray(np.zeros((24, 30), dtype=np.uint8)).save(coco_folder / "train/2.png")
    (coco_folder / "train/4.png").unlink()
    with pytest.raises(ValueError, match=r"names the image 4.png, which is not there: add it, or set data.skip_unread"):
        load_detection_split(spec_of(coco_folder), "train")
    split = load_detection_split(spec_of(coco_folder, skip_unreadable=True), "train")
    assert [name[-5:] for name in split.names] == ["0.png", "3.png", "5.png"]
    absent, damaged, other_size = split.skipped
    assert "names the image 4.png" in absent
    assert "train/1.png" in damaged
    assert other_size.endswith("is 24 x 30 (height x width), its annotations are for 24 x 32: correct one of them")
    assert [len(split[i][1]["labels"]) for i in range(3)] == [len(split.truth(i).labels) for i in range(3)]
    for path in (coco_folder / "test").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no picture of coco .* could be read; first: cannot read .*0.png"):
        load_detection_split(spec_of(coco_folder, skip_unreadable=True), "test")


def test_the_door_to_all_kinds_of_data_leads_here(coco_folder):
    assert kind_of("coco") is kind_of("voc") is DetectionData
    assert isinstance(load_split(spec_of(coco_folder), "test"), detection.DetectionSplit)


def test_indices_outside_the_split_and_unknown_splits_are_refused(coco_folder):
    split = load_detection_split(spec_of(coco_folder), "train")
    for index in (6, -1):
        with pytest.raises(IndexError, match=f"index {index} of a split of 6 pictures"):
            split[index]
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        load_detection_split(spec_of(coco_folder), "val")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "koko"}, "unknown data.source 'koko'; "),
        ({"classes": ("a",)}, "data.classes are for voc: the classes of coco stand in its json file"),
        ({"annotations": ("a",)}, r"data.annotations must name training's and test's, or be \(\), got \('a',\)"),
        ({"fit": "crop"}, "data.fit must be letterbox or sides, got 'crop'"),
        ({"in_channels": 2}, r"data.in_channels must be 1 \(grey\) or 3 \(RGB\) for pictures, got 2"),
        ({"size": (0, 5)}, r"data.size must be the height and width that pictures fit into, got \(0, 5\)"),
        ({"test_limit": -1}, "data.test_limit must be at least 0, got -1"),
    ],
)
def test_an_impossible_choice_of_data_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DetectionData(**wrong)

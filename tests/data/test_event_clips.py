"""Clips: deterministic in (seed, epoch, index), the same in memory and from files, clear about bad files."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from spikeformers.data import ResumableSampler, event_clips, load_split
from spikeformers.data.event_augment import EventAugment
from spikeformers.data.event_clips import CHANNELS, EventData, clip_of, event_picture, load_clip_split, read_recording
from spikeformers.data.events import Events, frames, three_channels, time_surface, voxel_grid

FLIP = EventAugment(flip=0.5)


def spec_of(root, **changed) -> EventData:
    return EventData(**({"source": "eventfolder", "root": str(root), "steps": 3} | changed))


def equal(left, right) -> bool:
    return all(torch.equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(left, right, strict=True))


def test_clips_are_the_frames_of_the_recording_with_its_label(event_folder):
    split = load_clip_split(spec_of(event_folder), "test")
    assert len(split) == 4
    clip, label = split[2]
    assert torch.equal(clip, frames(split.recording(2), steps=3))
    assert (clip.shape, clip.dtype, clip.sum().item(), label) == ((3, 2, 34, 34), torch.float32, 80, 1)
    assert (split.classes, split.labels.tolist()) == (("left", "right"), [0, 0, 1, 1])
    assert (split.in_channels, split.steps, split.size) == (2, 3, (34, 34))
    assert split.names[3].endswith("test/right/1.bin")


@pytest.mark.parametrize("cut", ["count", "time"])
@pytest.mark.parametrize("representation", list(CHANNELS))
def test_every_representation_is_what_events_makes_of_it(representation, cut):
    spec = EventData(representation=representation, split=cut, steps=5, size=(16, 24), tau=9e4, test_limit=1)
    split = load_clip_split(spec, "test")
    events = split.recording(0)
    made = {
        "frames": lambda: frames(events, steps=5, size=(16, 24), split=cut),
        "three_channels": lambda: three_channels(events, steps=5, size=(16, 24), split=cut),
        "voxel_grid": lambda: voxel_grid(events, steps=5, size=(16, 24)),
        "time_surface": lambda: time_surface(events, steps=5, size=(16, 24), split=cut, tau=9e4),
    }[representation]()
    assert torch.equal(split[0][0], made)
    assert made.shape == (5, spec.in_channels, 16, 24)


def test_a_batch_is_time_major(event_folder):
    split = load_clip_split(spec_of(event_folder), "train")
    clips, labels = split.collate([split[0], split[4]])
    assert (clips.shape, labels.tolist(), labels.dtype) == ((3, 2, 2, 34, 34), [0, 1], torch.int64)
    assert torch.equal(clips[:, 1], split[4][0])


def test_a_training_clip_is_a_function_of_seed_epoch_and_index():
    spec = EventData(train_limit=8, augment=FLIP)
    split = load_clip_split(spec, "train", seed=3)
    first = [split[2, i] for i in range(8)]
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    again = [split[2, i] for i in reversed(range(8))][::-1]
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert equal(first, again)
    assert not equal(first, [split[3, i] for i in range(8)])
    assert not equal(first, [load_clip_split(spec, "train", seed=4)[2, i] for i in range(8)])
    assert equal([split[5]], [split[0, 5]])


def test_test_clips_are_never_augmented(event_folder):
    split = load_clip_split(spec_of(event_folder, augment=EventAugment(flip=1.0)), "test")
    assert torch.equal(split[0, 1][0], split[7, 1][0])
    assert torch.equal(split[1][0], clip_of(read_recording(split.names[1], spec=split.spec), spec=split.spec))
    flipped = load_clip_split(spec_of(event_folder, augment=EventAugment(flip=1.0)), "train")
    assert torch.equal(flipped[0][0], clip_of(flipped.recording(0), spec=flipped.spec).flip(-1))


def test_worker_processes_give_the_same_batches_as_none(event_folder):
    split = load_clip_split(spec_of(event_folder, augment=FLIP), "train")
    batches = []
    for workers in (0, 2):
        sampler = ResumableSampler(len(split), batch_size=3, seed=1)
        sampler.set_position(5, 0)
        loader = DataLoader(split, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=split.collate)
        batches.append(list(loader))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(*batches, strict=True))
    assert batches[0][0][0].shape == (3, 3, 2, 34, 34)


def test_a_set_that_is_read_at_each_access_says_what_that_costs_and_the_cure(event_folder, monkeypatch, caplog):
    held = load_clip_split(spec_of(event_folder), "train")
    assert caplog.messages == []
    monkeypatch.setattr(event_clips, "MEMORY_LIMIT", 2**20)
    monkeypatch.setattr(event_clips.Packed, "nbytes", 2**19)
    load_clip_split(spec_of(event_folder), "train")
    assert caplog.messages == [
        f"the recordings of {event_folder} take more than 1 MiB of memory, so every clip reads its whole file again: "
        "set workers=N for N processes that read ahead"
    ]
    assert len(held) == 6


def test_recordings_read_at_access_equal_those_held_in_memory(event_folder, monkeypatch):
    spec = spec_of(event_folder, augment=FLIP)
    held = load_clip_split(spec, "train")
    files = sorted((event_folder / "train").rglob("*.bin"))
    contents = [path.read_bytes() for path in files]
    monkeypatch.setattr(event_clips, "MEMORY_LIMIT", 100)
    lazy = load_clip_split(spec, "train")
    assert equal([held[1, i] for i in range(6)], [lazy[1, i] for i in range(6)])
    assert torch.equal(held.picture(3), lazy.picture(3))
    for path in files:
        path.unlink()
    assert held[0][0].any()
    with pytest.raises(ValueError, match=r"0\.bin"):
        lazy[0]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    assert equal([lazy[0]], [held[0]])


@pytest.mark.parametrize("limit", [2**30, 100], ids=["memory", "access"])
def test_an_unreadable_file_stops_by_name_or_is_skipped_and_counted(event_folder, monkeypatch, caplog, limit):
    monkeypatch.setattr(event_clips, "MEMORY_LIMIT", limit)
    for name in ("left/1.bin", "right/0.bin"):
        path = event_folder / "train" / name
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train/left/1.bin"):
        load_clip_split(spec_of(event_folder), "train")[1]
    with caplog.at_level("INFO"):
        split = load_clip_split(spec_of(event_folder, skip_unreadable=True), "train")
    announced = f"data.skip_unreadable: reading all 6 recordings of {event_folder} once"
    assert caplog.messages.count(announced) == (1 if limit == 100 else 0)
    assert (len(split), split.labels.tolist()) == (4, [0, 0, 1, 1])
    assert ["left/1.bin" in split.skipped[0], "right/0.bin" in split.skipped[1]] == [True, True]
    assert [split[i][0].sum().item() for i in range(4)] == [40, 40, 80, 80]


def test_an_unreadable_file_met_by_a_worker_process_is_one_line_of_error(event_folder, monkeypatch):
    monkeypatch.setattr(event_clips, "MEMORY_LIMIT", 100)
    (event_folder / "train" / "right" / "2.bin").write_bytes(b"123")
    split = load_clip_split(spec_of(event_folder), "train")
    with pytest.raises(ValueError, match=r"right/2.bin") as caught:
        list(DataLoader(split, batch_size=4, num_workers=1, collate_fn=split.collate))
    assert "\n" not in str(caught.value)
    assert "UnreadableRecordingError" not in str(caught.value)


def test_a_set_of_unreadable_files_only_is_refused(event_folder):
    for path in event_folder.rglob("*.bin"):
        path.write_bytes(b"123")
    with pytest.raises(ValueError, match=r"no recording of .* could be read; first: .*left/0.bin"):
        load_clip_split(spec_of(event_folder, skip_unreadable=True), "train")


@pytest.mark.parametrize("limit", [2**30, 100], ids=["memory", "access"])
def test_sensors_that_differ_are_refused_until_a_size_is_set(event_folder, record, monkeypatch, limit):
    monkeypatch.setattr(event_clips, "MEMORY_LIMIT", limit)
    path = record(event_folder / "train" / "right" / "9.aedat", [5, 9])
    message = rf"recording {path} is of a sensor of \(128, 128\) .*, the first one of \(34, 34\): set data.size"
    with pytest.raises(ValueError, match=message):
        load_clip_split(spec_of(event_folder), "train")[6]
    split = load_clip_split(spec_of(event_folder, skip_unreadable=True), "train")
    assert (len(split), split.sensor, len(split.skipped)) == (6, (34, 34), 1)
    split = load_clip_split(spec_of(event_folder, size=(32, 32)), "train")
    assert {split[i][0].shape for i in range(7)} == {(3, 2, 32, 32)}
    assert split.picture(6).shape == (3, 32, 32)
    told = spec_of(event_folder, size=(32, 32), sensor=(34, 34))
    with pytest.raises(ValueError, match=rf"{path}: its sensor has 128 x 128 pixels .* recordings of 34 x 34"):
        load_clip_split(told, "train")[6]


def test_a_split_knows_the_sensor_of_its_recordings_unless_they_are_of_several(event_folder, record):
    assert load_clip_split(spec_of(event_folder, size=(8, 8)), "train").sensor == (34, 34)
    assert load_clip_split(EventData(test_limit=1, size=(8, 8)), "test").sensor == (32, 32)
    record(event_folder / "train" / "right" / "9.aedat", [5, 9])
    assert load_clip_split(spec_of(event_folder, size=(8, 8)), "train").sensor is None


def test_files_that_tell_no_sensor_are_scaled_by_the_one_that_is_set_not_by_their_own_reach(tmp_path, record):
    for split in ("train", "test"):
        record(tmp_path / split / "left" / "0.npz", list(range(15)))  # columns 0 to 14 of row 3
    with pytest.raises(ValueError, match=r"left/0.npz: it tells no sensor: train with data.sensor=HEIGHT,WIDTH"):
        load_clip_split(spec_of(tmp_path, size=(8, 8)), "train")
    split = load_clip_split(spec_of(tmp_path, size=(8, 8), sensor=(30, 60)), "train")
    assert split.sensor == (30, 60)
    assert split[0][0].sum((0, 1)).nonzero().tolist() == [[0, 0], [0, 1]]  # 14 * 8 // 60 is 1


def test_a_missing_package_stops_with_the_way_to_install_it_and_is_no_reason_to_skip(tmp_path, record, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    record(tmp_path / "train" / "left" / "0.bin", [1])
    path = tmp_path / "train" / "left" / "1.h5"
    path.write_bytes(b"1")
    cure = r'this file needs h5py: pip install "spikeformers\[events\]"'
    with pytest.raises(ValueError, match=f"cannot read {path}: {cure}"):
        load_clip_split(spec_of(tmp_path, skip_unreadable=True), "train")
    with pytest.raises(ValueError, match=f"{path}: {cure}"):
        read_recording(path, spec=spec_of(tmp_path))


def test_clips_that_fill_the_memory_are_refused_before_training(event_folder):
    with pytest.raises(ValueError, match=r"clips of 3 x 2 x 20000 x 20000 .*: set data.size"):
        load_clip_split(spec_of(event_folder, size=(20_000, 20_000)), "train")


def test_a_recording_without_events_is_a_clip_of_zeros(tmp_path):
    one = {"x": [1], "y": [2], "p": [1], "t": [5], "offsets": [0, 0, 1], "label": [3, 4]}
    np.savez(tmp_path / "train.npz", **{name: np.array(values) for name, values in one.items()})
    for representation in CHANNELS:
        split = load_clip_split(EventData(source="nmnist", root=str(tmp_path), representation=representation), "train")
        assert not split[0][0].any()
        assert split[0][0].shape == (4, CHANNELS[representation], 34, 34)
    assert (split.picture(0) == 255).all()


def test_a_picture_shows_brighter_in_red_darker_in_blue_and_both_in_violet():
    x, p = np.array([0, 1, 2, 2, 0]), np.array([1, 0, 1, 0, 1])
    events = Events(x, np.zeros(5, dtype=int), p, np.arange(5), (2, 3))
    picture = event_picture(events)
    assert picture.dtype == torch.uint8
    red, blue, violet, white = (picture[:, 0, 0], picture[:, 0, 1], picture[:, 0, 2], picture[:, 1, 0])
    assert red.tolist() == [255, 0, 0]
    assert blue[2] == 255
    assert blue[0] == blue[1] == violet[0] == violet[2]
    assert 100 < blue[0] < 200  # one event where the busiest pixel has two
    assert violet[1] < 10
    assert white.tolist() == [255] * 3


def test_the_digits_are_simulated_in_a_few_seconds_and_come_by_every_door():
    spec = EventData(test_limit=5, size=(16, 16))
    split = load_split(spec, "test", seed=1)
    assert isinstance(split, event_clips.ClipSplit)
    assert (len(split), split.classes, split[0][0].shape) == (5, tuple("0123456789"), (4, 2, 16, 16))


def test_indices_outside_the_split_and_unknown_splits_are_refused():
    split = load_clip_split(EventData(train_limit=5), "train")
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"index {index} of a split of 5 recordings"):
            split[index]
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        load_clip_split(EventData(), "val")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "nmnit"}, "unknown data.source 'nmnit'; closest: nmnist"),
        ({"representation": "voxel"}, "unknown data.representation 'voxel'; closest: voxel_grid"),
        ({"split": "number"}, "data.split must be count or time, got 'number'"),
        ({"disorder": "drop"}, "data.disorder must be error or sort, got 'drop'"),
        ({"size": (32,)}, r"data.size must be the height and width of frames, or \(\), got \(32,\)"),
        ({"size": (0, 32)}, r"data.size must be .*, got \(0, 32\)"),
        ({"sensor": (32,)}, r"data.sensor must be the height and width of the camera's pixels, .*, got \(32,\)"),
        ({"sensor": (2**15 + 1, 1)}, r"data.sensor must be .* up to 32768, .*, got \(32769, 1\)"),
        ({"sensor": (34, 34)}, r"the sensor of digits_dvs is \(32, 32\), got data.sensor=\(34, 34\): leave it out"),
        ({"tau": 0.0}, "data.tau must be above 0 microseconds, got 0.0"),
        ({"steps": 0}, "data.steps must be at least 1, got 0"),
        ({"test_limit": -1}, "data.test_limit must be at least 0, got -1"),
    ],
)
def test_an_impossible_choice_of_data_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        EventData(**wrong)


def test_the_real_n_mnist_sample_is_held_and_looks_like_its_digits(shared_data):
    root = shared_data / "nmnist_small"
    if not root.is_dir():
        pytest.skip("no nmnist_small in $SPIKEFORMERS_DATA")
    split = load_clip_split(EventData(source="nmnist", root=str(root), steps=2), "test")
    ones = np.flatnonzero(split.labels == 1)
    zeros = np.flatnonzero(split.labels == 0)
    widths = [split[int(i)][0].sum((0, 1)).sum(0).gt(20).sum().item() for i in [*ones, *zeros]]
    assert np.mean(widths[: len(ones)]) + 3 < np.mean(widths[len(ones) :])

"""Published layouts of recordings: each is listed as its publisher or the papers split it, or refused with the cure."""

from pathlib import Path

import numpy as np
import pytest

from spikeformers.data.event_sources import EVENT_SOURCES, GESTURES, listing


def identities(found) -> list[int]:
    """The time of each recording's first event, by which the tests tell recordings apart."""
    return [int(each.read().t[0]) for each in found.sources]


def cifar(root: Path, record, *, per_class: int = 20, suffix: str = ".aedat") -> Path:
    for rank, name in enumerate(("airplane", "bird")):
        for number in range(per_class):
            record(root / name / f"cifar10_{name}_{number}{suffix}", [1000 * rank + number, 5000])
    return root


def gestures(root: Path, record) -> Path:
    """Users 1 and 2 for training, user 3 for testing; an event each 10 us."""
    for user, intervals in ((1, ["1,100,200", "11,250,300"]), (2, ["3,0,50"]), (3, ["2,10,30"])):
        record(root / f"user{user:02d}_led.aedat", list(range(0, 400, 10)))
        lines = ["class,startTime_usec,endTime_usec", *intervals, ""]
        (root / f"user{user:02d}_led_labels.csv").write_text("\n".join(lines))
    (root / "trials_to_train.txt").write_text("user01_led.aedat\nuser02_led.aedat\n\n")
    (root / "trials_to_test.txt").write_text("user03_led.aedat\n")
    return root


def actions(root: Path, record) -> Path:
    for number, name in ((1, "a"), (1, "b"), (300, "c"), (7, "d")):
        record(root / f"action_{number:03d}" / f"dvSave-2021_{name}.npz", [10 * number + ord(name), 5000])
    (root / "train_label.txt").write_text(
        "action_001/dvSave-2021_b 120 0\naction_001/dvSave-2021_a 8 0\n\naction_300/dvSave-2021_c.npz 1 299\n"
    )
    (root / "test_label.txt").write_text("action_007/dvSave-2021_d 33 6\n")
    return root


def rows(path: Path, **changed) -> Path:
    """Three recordings of 2, 0 and 3 events in one npz file."""
    arrays = {
        **{"x": [1, 2, 33, 4, 5], "y": [0, 1, 2, 33, 4], "p": [0, 1, 1, 0, 1], "t": [7, 9, 3, 3, 8]},
        **{"offsets": [0, 2, 2, 5], "label": [4, 9, 0]},
    }
    np.savez(path, **{name: np.array(values) for name, values in (arrays | changed).items()})
    return path.parent


def test_cifar10_dvs_tests_the_last_tenth_of_each_class_by_name(tmp_path, record):
    root = str(cifar(tmp_path, record))
    train, test = listing("cifar10_dvs", root, "train"), listing("cifar10_dvs", root, "test")
    assert test.classes == ("airplane", "bird")
    assert identities(test) == [8, 9, 1008, 1009]  # by name they come behind 19
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert sorted(identities(train)) == [*range(8), *range(10, 20), *range(1000, 1008), *range(1010, 1020)]
    assert train.sources[0].read().size == (128, 128)


def test_cifar10_dvs_refuses_twins_and_classes_too_small_to_split(tmp_path, record):
    cifar(tmp_path, record, per_class=9)
    with pytest.raises(ValueError, match=r"class folder .*airplane holds 9 recordings, of which no tenth is left"):
        listing("cifar10_dvs", str(tmp_path), "test")
    record(tmp_path / "bird" / "cifar10_bird_3.mat", [0])
    with pytest.raises(ValueError, match=r"bird_3.aedat and .*bird_3.mat are one recording: keep one"):
        listing("cifar10_dvs", str(tmp_path), "train")


@pytest.mark.parametrize("place", ["DvsGesture", "."])
def test_dvs128_gesture_gives_the_labelled_intervals_of_the_listed_files(tmp_path, record, place):
    gestures(tmp_path / place, record)
    train = listing("dvs128_gesture", str(tmp_path), "train")
    assert train.classes == GESTURES
    assert len(GESTURES) == 11
    assert train.labels.tolist() == [0, 10, 2]
    times = [each.read().t.tolist() for each in train.sources]
    assert times == [list(range(100, 200, 10)), list(range(250, 300, 10)), list(range(0, 50, 10))]
    assert train.sources[0].read().size == (128, 128)
    assert train.names[1].endswith("user01_led.aedat from 250 to 300 us")
    assert listing("dvs128_gesture", str(tmp_path), "test").labels.tolist() == [1]


def test_intervals_of_one_file_are_cut_from_one_reading_until_the_file_changes(tmp_path, record, monkeypatch):
    from spikeformers.data import event_sources

    root = gestures(tmp_path, record)
    read = []
    real = event_sources.read_of_sensor
    monkeypatch.setattr(
        event_sources, "read_of_sensor", lambda path, **how: read.append(path.name) or real(path, **how)
    )
    train = listing("dvs128_gesture", str(root), "train")
    assert identities(train) == [100, 250, 0]
    assert read == ["user01_led.aedat", "user02_led.aedat"]
    assert train.sources[0].read().t.base is None  # which would keep the whole file in memory
    record(root / "user02_led.aedat", [44])
    assert train.sources[2].read().t.tolist() == [44]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("trials_to_train.txt", None, r"has no trials_to_train.txt: data.root must be the folder DvsGesture, unpacked"),
        ("trials_to_train.txt", "\n", r"trials_to_train.txt names no recordings"),
        ("trials_to_train.txt", "user09_led.aedat", r"names user09_led.aedat, which is not in .*: add it or remove"),
        ("user01_led_labels.csv", None, r"has no user01_led_labels.csv: data.root must be"),
        ("user01_led_labels.csv", "h\n12,0,5", r"line 2 is '12,0,5': classes are 1 to 11, and an interval ends after"),
        ("user01_led_labels.csv", "h\n1,5,5", r"line 2 is '1,5,5': classes are 1 to 11"),
        ("user01_led_labels.csv", "h\n\n1;5;9", r"line 3 is '1;5;9': expected class,startTime_usec,endTime_usec"),
        ("user01_led_labels.csv", b"\xff\xfe\x00", r"user01_led_labels.csv is no readable text file"),
    ],
)
def test_dvs128_gesture_refuses_what_is_missing_or_wrong_by_file_and_line(tmp_path, record, file, text, message):
    path = gestures(tmp_path, record) / file
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        listing("dvs128_gesture", str(tmp_path), "train")


def test_har_dvs_takes_the_files_that_its_lists_name_and_always_has_300_classes(tmp_path, record):
    root = str(actions(tmp_path, record))
    train, test = listing("har_dvs", root, "train"), listing("har_dvs", root, "test")
    assert identities(train) == [10 + ord("b"), 10 + ord("a"), 3000 + ord("c")]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 299], [6])
    assert (len(train.classes), train.classes[6]) == (300, "action_007")
    assert train.sources[0].read().size == (260, 346)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no train_label.txt: data.root must be the folder of HAR-DVS, unpacked"),
        ("action_001/gone 1 0", r"line 1 names action_001/gone, which is not in .*: add it or remove it"),
        ("action_002/dvSave-2021_a 1 0", r"line 1 names action_002/dvSave-2021_a, which is not in"),
        ("action_001/dvSave-2021_a\nwave/x", r"line 2 is 'wave/x': expected action_001/NAME to action_300/NAME"),
        ("action_301/x", r"line 1 is 'action_301/x': expected"),
        ("", r"train_label.txt names no recordings"),
    ],
)
def test_har_dvs_refuses_lists_that_name_what_is_not_there(tmp_path, record, text, message):
    path = actions(tmp_path, record) / "train_label.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        listing("har_dvs", str(tmp_path), "train")


def test_n_mnist_has_a_folder_for_each_digit_in_train_and_test(tmp_path, record):
    for split, digit, number in (("Train", 7, 1), ("Train", 0, 2), ("Train", 0, 3), ("Test", 9, 4)):
        record(tmp_path / split / str(digit) / f"{number:05d}.bin", [number, 90])
    train, test = listing("nmnist", str(tmp_path), "train"), listing("nmnist", str(tmp_path), "test")
    assert (identities(train), train.labels.tolist()) == ([2, 3, 1], [0, 0, 7])
    assert (identities(test), test.labels.tolist(), test.classes) == ([4], [9], tuple("0123456789"))
    assert train.sources[0].read().size == (34, 34)


def test_n_mnist_may_be_two_npz_files_of_all_recordings(tmp_path):
    root = rows(tmp_path / "train.npz")
    train = listing("nmnist", str(root), "train")
    assert [each.read().t.tolist() for each in train.sources] == [[7, 9], [], [3, 3, 8]]
    assert (train.labels.tolist(), train.names[2]) == ([4, 9, 0], f"recording 2 of {root / 'train.npz'}")
    assert train.sources[2].read().p.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"has neither Test/ nor test.npz: data.root must be the folder of N-MNIST"):
        listing("nmnist", str(root), "test")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": [1, 2]}, r"must have x, y, p and t of one length and .*'x': 2, .*, 4 offsets, 3 labels"),
        ({"label": [4, 9]}, r"one offset more than labels, .* 4 offsets, 2 labels"),
        ({"offsets": [0, 3, 2, 5]}, r"offsets must rise from 0 to the 5 events, got 0 to 5"),
        ({"offsets": [0, 2, 2, 4]}, r"offsets must rise from 0 to the 5 events, got 0 to 4"),
        ({"label": [4, 10, 0]}, r"labels must be digits, got 0 to 10"),
        ({"offsets": [0.0, 2.0, 2.0, 5.0]}, r"offsets must be whole numbers in one row, is float64"),
        ({"label": 4}, r"label must be whole numbers in one row"),
        ({"x": np.array([1], dtype=object)}, r"train.npz: x.npy holds Python objects"),
        ({"offsets": [0], "label": np.zeros(0, int), **dict.fromkeys("xypt", np.zeros(0, int))}, "names no recordings"),
    ],
)
def test_n_mnist_arrays_that_do_not_fit_together_are_refused(tmp_path, changed, message):
    rows(tmp_path / "train.npz", **changed)
    with pytest.raises(ValueError, match=message):
        listing("nmnist", str(tmp_path), "train")


def test_n_mnist_refuses_folders_of_no_digit_and_broken_archives(tmp_path, record):
    record(tmp_path / "Train" / "ten" / "1.bin", [0])
    with pytest.raises(ValueError, match=r"class folder .*ten is of no digit: expected 0 to 9"):
        listing("nmnist", str(tmp_path), "train")
    (tmp_path / "train.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"train.npz"):
        listing("nmnist", str(tmp_path), "train")


def test_an_event_folder_has_train_and_test_or_holds_a_fifth_of_each_class_out(event_folder, record):
    train, test = (listing("eventfolder", str(event_folder), split) for split in ("train", "test"))
    assert (train.classes, train.labels.tolist(), test.labels.tolist()) == (
        ("left", "right"),
        [0] * 3 + [1] * 3,
        [0, 0, 1, 1],
    )
    alone = event_folder / "alone"
    for name in ("a", "b"):
        for i in range(10):
            record(alone / name / f"{i}.npz", [i, 50])
    train, test = (listing("eventfolder", str(alone), split, sensor=(34, 40)) for split in ("train", "test"))
    assert train.sources[0].read().size == (34, 40)
    assert np.bincount(test.labels).tolist() == [2, 2]
    for label in (0, 1):
        parts = [
            [i for i, at in zip(identities(each), each.labels, strict=True) if at == label] for each in (train, test)
        ]
        assert sorted(parts[0] + parts[1]) == list(range(10))


def test_an_event_folder_refuses_missing_splits_and_classes_without_recordings(event_folder):
    (event_folder / "train" / "up").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*up holds no recording \(.*\.bin.*\): add some or remove"):
        listing("eventfolder", str(event_folder), "train")
    (event_folder / "test").rename(event_folder / "other")
    with pytest.raises(ValueError, match=r"has no test/ or val/ .*folder: add it"):
        listing("eventfolder", str(event_folder), "test")
    with pytest.raises(ValueError, match=r"expected .*/CLASS/FILE for each recording \(.*\.bin .*\.npz .*\)"):
        listing("eventfolder", str(event_folder / "train" / "left"), "train")


@pytest.mark.parametrize("source", [source for source in EVENT_SOURCES if source != "digits_dvs"])
def test_a_missing_root_is_refused_with_the_cure(tmp_path, source):
    with pytest.raises(ValueError, match=f"data.source={source} needs data.root: the folder of the data"):
        listing(source, "", "train")
    with pytest.raises(ValueError, match=r"data.root: no folder .*gone; set it"):
        listing(source, str(tmp_path / "gone"), "train")


def test_time_that_goes_backwards_stops_by_name_or_is_sorted(tmp_path, record):
    root = gestures(tmp_path, record)
    record(root / "user02_led.aedat", [0, 30, 20])
    with pytest.raises(ValueError, match=r"user02_led.aedat: time goes backwards at event 2: 20 us after 30 us"):
        listing("dvs128_gesture", str(root), "train").sources[2].read()
    found = listing("dvs128_gesture", str(root), "train", disorder="sort")
    assert found.sources[2].read().t.tolist() == [0, 20, 30]


def test_a_limit_takes_from_every_class_in_turn(event_folder):
    found = listing("eventfolder", str(event_folder), "train", limit=3)
    assert (found.labels.tolist(), identities(found)) == ([0, 0, 1], [0, 1, 0])
    assert np.bincount(listing("digits_dvs", "", "test", limit=20).labels).tolist() == [2] * 10


def test_the_digits_before_the_camera_are_those_of_the_picture_splits():
    from spikeformers.data.digits import digits

    for split in ("train", "test"):
        found = listing("digits_dvs", "", split)
        assert (found.labels == digits(split)[1]).all()
        assert found.names[3] == f"digits_dvs {split} 3"
    assert (found.sources[7].pixels == digits("test")[0][7]).all()


def test_the_real_n_mnist_sample_is_listed_and_read(shared_data):
    root = shared_data / "nmnist_small"
    if not root.is_dir():
        pytest.skip("no nmnist_small in $SPIKEFORMERS_DATA")
    found = listing("nmnist", str(root), "test")
    assert np.bincount(found.labels).tolist() == [8, 14, 8, 11, 14, 7, 10, 15, 2, 11]
    assert sum(len(each.read()) for each in found.sources) == 385596

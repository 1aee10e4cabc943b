"""Where recordings of event cameras come from: published layouts of folders, listed for one split and read when wanted.

As read in each publisher's description or in the loaders of spikingjelly, which the papers' results use:
CIFAR10-DVS (Li et al. 2017): ROOT/CLASS/cifar10_CLASS_N.aedat, also as .aedat4 or .mat.  There is no published split:
the last tenth of each class in the order of names, where 10 comes before 9, is for testing, as in Spikformer's code.
DVS128 Gesture (Amir et al. 2017): DvsGesture/ with trials_to_train.txt and trials_to_test.txt, which name files
userNN_LIGHT.aedat, each with its userNN_LIGHT_labels.csv of a class and a time interval in each line.
HAR-DVS (Wang et al. 2022): ROOT/action_001/NAME.aedat4, or .npz in its compact form, to action_300, with
train_label.txt and test_label.txt whose lines begin with action_001/NAME.
N-MNIST (Orchard et al. 2015): Train/DIGIT/*.bin and Test/DIGIT/*.bin; or train.npz and test.npz with x, y, p, t of all
recordings, of which number i is offsets[i] to offsets[i + 1], and label.
eventfolder: ROOT/train/CLASS/* beside ROOT/test, or ROOT/CLASS/* alone, as an imagefolder has them (sources.py)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from spikeformers.data import digits
from spikeformers.data.digits_dvs import SENSOR, MovingDigit
from spikeformers.data.event_files import SUFFIXES, Disorder, npz_arrays, read_of_sensor
from spikeformers.data.events import Events, Size
from spikeformers.data.sources import Kind, Listing, balanced_prefix, class_folders, existing, folder, scan

TRAIN_SHARE = 0.9  # of each class of CIFAR10-DVS
SENSORS = {
    "digits_dvs": SENSOR,
    "nmnist": (34, 34),
    "cifar10_dvs": (128, 128),
    "dvs128_gesture": (128, 128),
    "har_dvs": (260, 346),
}
GESTURES = (  # by number from 1, as gesture_mapping.csv has them
    "hand_clapping",
    "right_hand_wave",
    "left_hand_wave",
    "right_arm_clockwise",
    "right_arm_counter_clockwise",
    "left_arm_clockwise",
    "left_arm_counter_clockwise",
    "arm_roll",
    "air_drums",
    "air_guitar",
    "other_gestures",
)
ACTIONS = tuple(f"action_{number:03d}" for number in range(1, 301))
RECORDINGS = Kind("recording", SUFFIXES)

Reader = Callable[[Path], Events]


@dataclass(frozen=True)
class RecordedFile:
    """A whole file, and what reads it."""

    path: Path
    reader: Reader

    def read(self) -> Events:
        """Its events.  Raises ValueError, naming the file, if it cannot be read."""
        return self.reader(self.path)


@dataclass(frozen=True)
class Interval:
    """The events of a file from `start` on and before `end`, in microseconds."""

    path: Path
    reader: Reader
    start: int
    end: int

    def read(self) -> Events:
        """Its events.  Raises ValueError, naming the file, if it cannot be read."""
        events = _lately_read(self.path, self.reader, self.path.stat().st_mtime_ns)
        part = slice(*np.searchsorted(events.t, (self.start, self.end)))
        # Copies: a view would keep the whole file in memory.
        return Events(*(getattr(events, name)[part].copy() for name in "xypt"), size=events.size)


@lru_cache(maxsize=1)
def _lately_read(path: Path, reader: Reader, modified: int) -> Events:
    """One file for the dozen intervals in it, which are neighbours in their split."""
    return reader(path)


@dataclass(frozen=True, eq=False)
class Rows:
    """Events number `start` to `end` of arrays x, y, p and t of many recordings."""

    columns: Mapping[str, np.ndarray]
    start: int
    end: int
    size: Size

    def read(self) -> Events:
        """Its events.  Raises ValueError for one outside the sensor, or time that goes backwards."""
        return Events(*(self.columns[name][self.start : self.end] for name in "xypt"), size=self.size)


def listing(
    source: str,
    root: str,
    split: str,
    *,
    limit: int = 0,
    disorder: Disorder = "error",
    sensor: Size | None = None,
) -> Listing:
    """The recordings of `split` ("train" or "test") of one of EVENT_SOURCES; a limit takes from every class in turn.

    `disorder`: what happens where time goes backwards in a file, as in `read_events`.  `sensor`: the one of all files
    of a source that has none published; without it each file must tell its own.
    Raises ValueError, naming the file or folder, for what is missing or contradicts itself.
    """
    reader = partial(read_of_sensor, sensor=SENSORS.get(source, sensor), disorder=disorder)
    if source == "digits_dvs":
        found = digits_dvs(split)
    elif source == "eventfolder":
        found = _files(folder(root, split, source=source, limit=0, kind=RECORDINGS), reader)
    else:
        found = _LAYOUTS[source](existing(root, source), split, reader)
    return found.chosen(balanced_prefix(found.labels, limit))


def _files(found: Listing, reader: Reader) -> Listing:
    return Listing(found.classes, found.labels, [RecordedFile(path, reader) for path in found.sources], found.names)


def digits_dvs(split: str) -> Listing:
    """The digits of `split`, each moved before a simulated camera."""
    pixels, labels = digits.digits(split)
    recordings = [MovingDigit(each, split, index) for index, each in enumerate(pixels)]
    return Listing(digits.CLASSES, labels, recordings, [f"digits_dvs {split} {i}" for i in range(len(labels))])


def cifar10_dvs(top: Path, split: str, reader: Reader) -> Listing:
    """The first nine tenths of each class, or its last, in the order of names, as the authors' loader has them.

    Raises ValueError for two files of one name, or too few for one to be tested.
    """
    kind = Kind("recording", (".aedat", ".aedat4", ".mat"))
    found = scan(top, class_folders(top, kind), kind)
    stems: dict[tuple[int, str], int] = {}
    for index, (path, label) in enumerate(zip(found.sources, found.labels.tolist(), strict=True)):
        other = stems.setdefault((label, path.stem), index)
        if other != index:
            raise ValueError(f"{found.names[other]} and {path} are one recording: keep one of them")
    chosen = []
    for label, name in enumerate(found.classes):
        members = [stems[key] for key in sorted(stems) if key[0] == label]
        first = math.ceil(TRAIN_SHARE * len(members))
        if first == len(members):
            raise ValueError(f"class folder {top / name} holds {first} recordings, of which no tenth is left to test")
        chosen += members[:first] if split == "train" else members[first:]
    return _files(found.chosen(np.array(chosen)), reader)


def dvs128_gesture(top: Path, split: str, reader: Reader) -> Listing:
    """The labelled intervals of the files that the list of `split` names."""
    here = top / "DvsGesture" if (top / "DvsGesture").is_dir() else top
    trials = here / f"trials_to_{split}.txt"
    labels: list[int] = []
    recordings: list[Interval] = []
    for name in filter(None, _lines(trials, "the folder DvsGesture, unpacked")):
        path = here / name
        if not path.is_file():
            raise ValueError(f"{trials} names {name}, which is not in {here}: add it or remove the line")
        for label, start, end in _intervals(path.with_name(f"{path.stem}_labels.csv")):
            labels.append(label)
            recordings.append(Interval(path, reader, start, end))
    names = [f"{each.path} from {each.start} to {each.end} us" for each in recordings]
    return _some(Listing(GESTURES, np.array(labels, dtype=np.int64), recordings, names), trials)


def _intervals(path: Path) -> list[tuple[int, int, int]]:
    """Label from 0, start and end of each line but the first, which is the heading."""
    found = []
    for number, line in enumerate(_lines(path, "the folder DvsGesture, unpacked"), start=1):
        if number == 1 or not line:
            continue
        cells = line.split(",")
        if len(cells) != 3 or not all(cell.strip().isdecimal() for cell in cells):
            raise ValueError(f"{path}, line {number} is {line!r}: expected class,startTime_usec,endTime_usec")
        gesture, start, end = map(int, cells)
        if not 1 <= gesture <= len(GESTURES) or start >= end:
            raise ValueError(
                f"{path}, line {number} is {line!r}: classes are 1 to {len(GESTURES)}, and an interval ends after its "
                "start"
            )
        found.append((gesture - 1, start, end))
    return found


def har_dvs(top: Path, split: str, reader: Reader) -> Listing:
    """The files that the list of `split` names; what else stands in its lines is not used."""
    path = top / f"{split}_label.txt"
    files: dict[str, dict[str, Path]] = {}
    labels, recordings = [], []
    for number, line in enumerate(_lines(path, "the folder of HAR-DVS, unpacked"), start=1):
        if not line:
            continue
        action, _, name = line.split()[0].rpartition("/")
        if action not in ACTIONS:
            raise ValueError(f"{path}, line {number} is {line!r}: expected {ACTIONS[0]}/NAME to {ACTIONS[-1]}/NAME")
        if action not in files:
            files[action] = _by_stem(top / action)
        file = files[action].get(name) or files[action].get(Path(name).stem)
        if file is None:
            raise ValueError(f"{path}, line {number} names {action}/{name}, which is not in {top}: add it or remove it")
        labels.append(ACTIONS.index(action))
        recordings.append(RecordedFile(file, reader))
    names = [str(each.path) for each in recordings]
    return _some(Listing(ACTIONS, np.array(labels, dtype=np.int64), recordings, names), path)


def _by_stem(here: Path) -> dict[str, Path]:
    files = sorted(here.glob("[!.]*")) if here.is_dir() else []
    return {file.stem: file for file in files if file.name.lower().endswith(SUFFIXES)}


def nmnist(top: Path, split: str, reader: Reader) -> Listing:
    """The files of Train or Test, or the rows of train.npz or test.npz."""
    if (top / f"{split}.npz").is_file():
        return nmnist_rows(top / f"{split}.npz")
    here = top / split.capitalize()
    if not here.is_dir():
        raise ValueError(f"{top} has neither {here.name}/ nor {split}.npz: data.root must be the folder of N-MNIST")
    kind = Kind("recording", (".bin",))
    if unknown := sorted(set(class_folders(here, kind)) - set(digits.CLASSES)):
        raise ValueError(f"class folder {here / unknown[0]} is of no digit: expected 0 to 9")
    return _files(scan(here, digits.CLASSES, kind), reader)


def nmnist_rows(path: Path) -> Listing:
    """The recordings in an npz file.  Raises ValueError for arrays that are missing or do not fit together."""
    arrays = _npz(path)
    if missing := [name for name in (*"xypt", "offsets", "label") if name not in arrays]:
        raise ValueError(f"{path} has no {', '.join(missing)} among its arrays {', '.join(sorted(arrays))}")
    if odd := [name for name, each in arrays.items() if each.ndim != 1 or each.dtype.kind not in "biu"]:
        raise ValueError(f"{path}: {', '.join(odd)} must be whole numbers in one row, is {arrays[odd[0]].dtype}")
    columns = {name: arrays[name] for name in "xypt"}
    offsets, labels = arrays["offsets"], arrays["label"].astype(np.int64)
    count = len(columns["t"])
    if any(len(each) != count for each in columns.values()) or len(offsets) != len(labels) + 1:
        raise ValueError(
            f"{path} must have x, y, p and t of one length and one offset more than labels, has "
            f"{ {name: len(each) for name, each in columns.items()} }, {len(offsets)} offsets, {len(labels)} labels"
        )
    if offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise ValueError(f"{path}: offsets must rise from 0 to the {count} events, got {offsets[0]} to {offsets[-1]}")
    if not set(labels.tolist()) <= set(range(len(digits.CLASSES))):
        raise ValueError(f"{path}: labels must be digits, got {labels.min()} to {labels.max()}")
    recordings = [Rows(columns, *ends, SENSORS["nmnist"]) for ends in pairwise(offsets.tolist())]
    names = [f"recording {i} of {path}" for i in range(len(labels))]
    return _some(Listing(digits.CLASSES, labels, recordings, names), path)


def _npz(path: Path) -> dict[str, np.ndarray]:
    try:
        return npz_arrays(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def _lines(path: Path, wanted: str) -> Sequence[str]:
    """Lines without the spaces around them."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: data.root must be {wanted}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable text file: {error}") from error


def _some(found: Listing, path: Path) -> Listing:
    if not len(found.labels):
        raise ValueError(f"{path} names no recordings")
    return found


_LAYOUTS: dict[str, Callable[[Path, str, Reader], Listing]] = {
    "nmnist": nmnist,
    "cifar10_dvs": cifar10_dvs,
    "dvs128_gesture": dvs128_gesture,
    "har_dvs": har_dvs,
}
EVENT_SOURCES = ("digits_dvs", *_LAYOUTS, "eventfolder")

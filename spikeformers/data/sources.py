"""Where pictures come from: a listing of one split's files, encoded bytes or decoded pixels, with labels and classes.

Folder layouts: ROOT/train/CLASS/*.jpg beside ROOT/test or ROOT/val; or ROOT/CLASS/*.jpg, which is split 80 : 20 by a
fixed permutation of each class, the same for every seed.  Parquet: Hugging Face's layout, see `parquet`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from spikeformers.data.events import Events
from spikeformers.data.streamed import RowGroup, RowNames, StreamedPictures, opened_parquet

ENCODED_LIMIT = 2**30  # bytes of encoded pictures of a split of parquet files that are held in memory
HELD_OUT = 0.2  # of each class, where a folder has no split of its own
_TESTS = ("test", "val", "valid", "validation")
FOLDERS = {"imagefolder": _TESTS, "imagenet": ("val", "validation"), "eventfolder": _TESTS}
PARQUET_TESTS = ("test", "valid", "val")
PARQUET_FOLDERS = ("data", "plain_text")  # where the hub's data sets with one configuration keep their files


class Recording(Protocol):
    """Events that are read, or made, when they are wanted."""

    def read(self) -> Events: ...


@dataclass(frozen=True)
class Kind:
    """What the files in class folders are: its name for messages, and the endings of their names in lower case."""

    name: str
    endings: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({' '.join(self.endings)})"


PICTURES = Kind("image", IMG_EXTENSIONS)


@dataclass(frozen=True)
class Listing:
    """One split, not yet decoded: `sources[i]` is a path, encoded bytes, uint8 pixels [H,W] or [H,W,3], or events."""

    classes: tuple[str, ...]
    labels: np.ndarray  # int64 [N]
    sources: Sequence[Path | bytes | np.ndarray | Recording]
    names: Sequence[str]  # of file or row, for messages

    def chosen(self, indices: np.ndarray) -> "Listing":
        """The same listing with only these samples."""
        if isinstance(self.sources, StreamedPictures):
            return _streamed(self.classes, self.labels[indices], self.sources.chosen(indices))
        kept = indices.tolist()
        return Listing(
            self.classes, self.labels[indices], [self.sources[i] for i in kept], [self.names[i] for i in kept]
        )


def balanced_prefix(labels: np.ndarray, limit: int) -> np.ndarray:
    """Indices, ascending, of `limit` samples taken class by class in turn; all of them where `limit` is 0."""
    if not 0 < limit < len(labels):
        return np.arange(len(labels))
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.arange(len(labels)) - starts
    return np.sort(by_class[np.argsort(turn, kind="stable")[:limit]])


def folder(root: str, split: str, *, source: str, limit: int, kind: Kind = PICTURES) -> Listing:
    """A split of a folder of files of `kind`; a limit takes from every class in turn.

    Raises ValueError if the root or its split is missing, or a class folder holds no such file.
    """
    top = existing(root, source)
    tests = FOLDERS[source]
    test = next((top / name for name in tests if (top / name).is_dir()), None)
    train = top / "train"
    if not train.is_dir() and test is None:
        if source == "imagenet":
            raise ValueError(f"{top} has no train/ and val/ folders: data.root must be the folder that holds them")
        return _held_out(scan(top, class_folders(top, kind), kind), split, limit)
    if not train.is_dir() or (test is None and split == "test"):
        missing = " or ".join(f"{name}/" for name in (tests if train.is_dir() else ("train",)))
        raise ValueError(f"{top} has no {missing} folder: add it, or put the class folders directly in the root")
    classes = class_folders(train, kind)
    here = train if split == "train" else test
    if unknown := sorted(set(class_folders(here, kind)) - set(classes)):
        raise ValueError(f"class folder {here / unknown[0]} has no counterpart in {train}: add or remove it")
    found = scan(here, classes, kind)
    return found.chosen(balanced_prefix(found.labels, limit))


def existing(root: str, source: str) -> Path:
    """The folder `root`.  Raises ValueError if none is named or there is none."""
    if not root:
        raise ValueError(f"data.source={source} needs data.root: the folder of the data")
    top = Path(root).expanduser()
    if not top.is_dir():
        here = "" if top.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(
            f"data.root: no folder {top}{here}; set it, or SPIKEFORMERS_DATA, the folder in which "
            "recipes of small sets (cifar10, camvid, ...) look"
        )
    return top


def class_folders(top: Path, kind: Kind) -> tuple[str, ...]:
    """Names of the folders in `top`, sorted.  Raises ValueError if there are none."""
    try:
        found = [name for name in find_classes(top)[0] if not name.startswith(".")]
    except FileNotFoundError:
        found = []
    if not found:
        raise ValueError(f"{top} has no class folders: expected {top}/CLASS/FILE for each {kind}")
    return tuple(found)


def scan(top: Path, classes: Sequence[str], kind: Kind) -> Listing:
    """Files of `kind` at any depth of the class folders in `top`.  Raises ValueError for a folder without any."""
    ranks = {name: rank for rank, name in enumerate(classes)}

    def fits(path: str) -> bool:  # "._x.jpg" are another system's notes about x.jpg
        return path.lower().endswith(kind.endings) and not Path(path).name.startswith(".")

    samples = make_dataset(top, ranks, is_valid_file=fits, allow_empty=True)
    filled = {rank for _, rank in samples}
    for name, rank in ranks.items():
        if rank not in filled and (top / name).is_dir():
            raise ValueError(f"class folder {top / name} holds no {kind}: add some or remove the folder")
    paths = [Path(path) for path, _ in samples]
    labels = np.array([rank for _, rank in samples], dtype=np.int64)
    return Listing(tuple(classes), labels, paths, [str(p) for p in paths])


def _held_out(found: Listing, split: str, limit: int) -> Listing:
    tested = np.zeros(len(found.labels), dtype=bool)
    for rank in range(len(found.classes)):
        members = np.flatnonzero(found.labels == rank)
        count = max(round(HELD_OUT * len(members)), 1) if len(members) > 1 else 0
        tested[np.random.RandomState(0).permutation(members)[:count]] = True
    found = found.chosen(np.flatnonzero(tested if split == "test" else ~tested))
    return found.chosen(balanced_prefix(found.labels, limit))


def held_out(length: int, *, test: bool) -> np.ndarray:
    """Indices, ascending, of the fifth that is for testing, or of the rest; by a fixed permutation.

    Raises ValueError for fewer than two.
    """
    count = max(round(HELD_OUT * length), 1)
    order = np.random.RandomState(0).permutation(length)
    if length <= count:
        raise ValueError(f"{length} image cannot be split into train and test: add more")
    return np.sort(order[:count] if test else order[count:])


def cifar(root: str, split: str, *, source: str, limit: int) -> Listing:
    """torchvision's CIFAR-10 or CIFAR-100 as already downloaded to `root`; a limit takes the first pictures."""
    kind = CIFAR10 if source == "cifar10" else CIFAR100
    try:
        data = kind(existing(root, source), train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{root} does not hold {kind.base_folder}, unpacked and whole: "
            f"torchvision.datasets.{kind.__name__}({root!r}, download=True) fetches it"
        ) from error
    count = limit or len(data.targets)
    pixels, labels = data.data[:count], np.array(data.targets[:count], dtype=np.int64)
    return Listing(tuple(data.classes), labels, pixels, [f"{source} {split} {i}" for i in range(len(labels))])


def parquet(root: str, split: str, *, limit: int) -> Listing:
    """ROOT/train*.parquet and ROOT/test*.parquet (or valid*, val*), or these in a folder of ROOT, as on the hub.

    Columns: see `_columns`.  `limit` takes the first rows and reads no row group behind them.  Encoded pictures stay in
    memory, unless they are more than ENCODED_LIMIT: then they are streamed.
    Raises ValueError for missing files, columns or labels, and for row groups too large to be streamed.
    """
    top = existing(root, "parquet")
    files = _parquet_files(top, ("train",) if split == "train" else PARQUET_TESTS)
    groups: list[RowGroup] = []
    for file in files:
        with opened_parquet(file) as reader:
            columns = _columns(reader.schema_arrow, file)
            names = _class_names(reader.schema_arrow, columns[1])
            for number in range(reader.num_row_groups):
                if not limit or sum(group.rows for group in groups) < limit:
                    groups.append(_row_group(reader, file, number, columns[0]))
    streams = sum(group.size for group in groups) > ENCODED_LIMIT
    table = _rows(groups, ("label",) if streams else ("image", "label")).slice(0, limit or None)
    if not table.num_rows:
        raise ValueError(f"{files[0]} holds no rows")
    classes = names or _numbered_classes(top)
    labels = _labels(table, classes, files[0])
    if streams:
        return _streamed(classes, labels, StreamedPictures(groups).chosen(np.arange(len(labels))))
    images = [image or {} for image in table.column("image").to_pylist()]
    names = [f"row {row} of {files[0]} ({image.get('path') or 'no name'})" for row, image in enumerate(images)]
    return Listing(classes, labels, [image.get("bytes") or b"" for image in images], names)


def _streamed(classes: tuple[str, ...], labels: np.ndarray, pictures: StreamedPictures) -> Listing:
    return Listing(classes, labels, pictures, RowNames(pictures))


def _row_group(reader: pq.ParquetFile, file: Path, number: int, image: str) -> RowGroup:
    described = reader.metadata.row_group(number)
    chunks = [described.column(index) for index in range(described.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == f"{image}.bytes")
    return RowGroup(file, number, image, described.num_rows, size)


def _rows(groups: Sequence[RowGroup], wanted: tuple[str, ...]) -> pa.Table:
    """Columns "image" and "label", or one of them, of all these row groups."""
    tables = []
    for file, members in groupby(groups, key=lambda group: group.file):
        with opened_parquet(file) as reader:
            named = dict(zip(("image", "label"), _columns(reader.schema_arrow, file), strict=True))
            columns = [named[name] for name in wanted]
            for group in members:
                found = reader.read_row_group(group.number, columns=columns)
                tables.append(found.select(columns).rename_columns(wanted))
    return pa.concat_tables(tables)


def _parquet_files(top: Path, prefixes: tuple[str, ...]) -> list[Path]:
    """Files of the first prefix that has any, in `top`, in a usual folder in it, or in its only one with such files."""
    inside = sorted({file.parent for file in top.glob("[!.]*/*.parquet")})
    usual = [top / name for name in PARQUET_FOLDERS if top / name in inside]
    for prefix in prefixes:
        for place in (top, *(usual or (inside if len(inside) == 1 else ()))):
            if files := sorted(place.glob(f"{prefix}*.parquet")):
                return files
    present = ", ".join(str(path.relative_to(top)) for path in sorted((*top.glob("*.parquet"), *inside)))
    wanted = " or ".join(f"{prefix}*.parquet" for prefix in prefixes)
    choose = ": set data.root to one of these folders" if len(inside) > 1 else ""
    raise ValueError(f"no {wanted} in {top}, which holds {present or 'no parquet file'}{choose}")


def _columns(schema: pa.Schema, file: Path) -> list[str]:
    """Names of the picture's column (the only struct with `bytes`, or "image") and of the label's.

    The label is "label", else "fine_label", else the only column of whole numbers.
    """

    def pick(fitting: list[str], preferred: tuple[str, ...]) -> str | None:
        return next((name for name in preferred if name in fitting), fitting[0] if len(fitting) == 1 else None)

    kinds = {each.name: each.type for each in schema}
    encoded = [name for name, kind in kinds.items() if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
    whole = [name for name, kind in kinds.items() if pa.types.is_integer(kind)]
    found = [pick(encoded, ("image",)), pick(whole, ("label", "fine_label"))]
    if None in found:
        present = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ValueError(
            f"{file} must have a column of pictures (a struct with bytes; image, if several) and one of whole-number "
            f"labels (label or fine_label, if several), has {present}"
        )
    return found


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Names from Hugging Face's metadata; () where it has none."""
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return tuple(described.get("info", {}).get("features", {}).get(label, {}).get("names") or ())


def _numbered_classes(top: Path) -> tuple[str, ...]:
    """ "0", "1", ... up to the largest label of the whole training split, so that every split and prefix agree."""
    largest = 0
    for file in _parquet_files(top, ("train", *PARQUET_TESTS)):
        with opened_parquet(file) as reader:
            label = _columns(reader.schema_arrow, file)[1]
            largest = max(largest, pc.max(reader.read(columns=[label]).column(label)).as_py() or 0)
    return tuple(map(str, range(largest + 1)))


def _labels(table: pa.Table, classes: tuple[str, ...], file: Path) -> np.ndarray:
    labels = table.column("label").fill_null(-1).to_numpy().astype(np.int64)
    if labels.min() < 0 or labels.max() >= len(classes):
        worst = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"{file} has label {worst}, outside its {len(classes)} classes: is this split unlabelled?")
    return labels

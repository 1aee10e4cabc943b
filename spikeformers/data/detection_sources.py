"""Where boxes and masks of objects come from: COCO's json files and VOC's xml files, in folders or zip archives.

Papers: Lin et al., ECCV 2014 (COCO); Everingham et al., IJCV 2010 (VOC).  Classes are numbered from 0: COCO's in the
order of their ids, VOC's by name.  VOC's corners count pixels from 1 and include both, so a box of xmin, xmax covers
xmin - 1 to xmax here; what it calls difficult is treated as COCO's crowds."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from faster_coco_eval.core import mask as rle
from torchvision.datasets.folder import IMG_EXTENSIONS

from spikeformers.data.archive import files_below
from spikeformers.data.decode import Stored, height_width
from spikeformers.data.sources import existing, held_out

DETECTION_SOURCES = ("coco", "voc")
_COCO_FILES = {
    "train": ("instances_train2017.json", "instances_train.json"),
    "test": ("instances_val2017.json", "instances_test.json", "instances_val.json"),
}
_VOC_SPLITS = {"train": ("train",), "test": ("test", "val", "valid")}  # lists, or folders
_PICTURE_FOLDERS = ("JPEGImages", "images", "")  # beside VOC's Annotations

Tree = dict[str, Stored]  # path below the root, with slashes -> file


@dataclass(frozen=True)
class Objects:
    """What is in one picture, in pixels of its file, as the annotations say it.

    `boxes` float64 [N,4]: x, y, width and height.  `labels` int64 [N].  `crowd` bool [N].  `areas` float64 [N]: by
    which COCO calls objects small, medium or large.  `masks`: run lengths as COCO compresses them, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: tuple[dict, ...] | None

    @classmethod
    def of(cls, found: Sequence[tuple[Sequence[float], int, bool, float, dict | None]], *, masks: bool) -> "Objects":
        """From a box, label, crowd, area and mask of each."""
        boxes, labels, crowd, areas, shapes = zip(*found, strict=True) if found else ((), (), (), (), ())
        return cls(
            np.array(boxes, dtype=np.float64).reshape(-1, 4),
            np.array(labels, dtype=np.int64),
            np.array(crowd, dtype=bool),
            np.array(areas, dtype=np.float64),
            tuple(shapes) if masks else None,
        )

    def corners(self, height: int, width: int) -> np.ndarray:
        """Boxes as x, y, x, y float64 [N,4], clipped to a picture of this size."""
        ends = np.concatenate([self.boxes[:, :2], self.boxes[:, :2] + self.boxes[:, 2:]], axis=1)
        return ends.clip(0, [width, height, width, height])

    def covering(self, height: int, width: int) -> np.ndarray:
        """Which of them, bool [N], have any area inside a picture of this size."""
        corners = self.corners(height, width)
        return (corners[:, 2:] > corners[:, :2]).all(1)

    def dense_masks(self, height: int, width: int) -> np.ndarray:
        """Masks uint8 [N,H,W] of a picture of this size."""
        if not self.masks:
            return np.zeros((0, height, width), dtype=np.uint8)
        return np.ascontiguousarray(rle.decode(list(self.masks)).transpose(2, 0, 1))


@dataclass(frozen=True)
class DetectionListing:
    """One split, not yet decoded.  `sizes`: height and width of each picture; `absent`: why others are not there."""

    classes: tuple[str, ...]
    images: Sequence[Stored]
    sizes: Sequence[tuple[int, int]]
    objects: Sequence[Objects]
    absent: tuple[str, ...]

    def chosen(self, indices: Iterable[int]) -> "DetectionListing":
        """The same listing with only these pictures."""
        kept = list(indices)
        parts = {name: [getattr(self, name)[i] for i in kept] for name in ("images", "sizes", "objects")}
        return replace(self, **parts)

    def oddities(self) -> list[str]:
        """A sentence about each kind of box that cannot be taken as it is."""
        outside = empty = 0
        for objects, size in zip(self.objects, self.sizes, strict=True):
            ends = objects.boxes[:, :2] + objects.boxes[:, 2:]
            beyond = (objects.boxes[:, :2] < -1).any(1) | (ends > np.array(size[::-1]) + 1).any(1)
            outside, empty = outside + int(beyond.sum()), empty + int((~objects.covering(*size)).sum())
        return [f"{outside} boxes reach more than a pixel out of their pictures and are clipped"] * bool(outside) + [
            f"{empty} boxes have no area in their pictures and are not learnt"
        ] * bool(empty)


def listing(
    source: str, root: str, split: str, *, annotations: str, classes: tuple[str, ...], masks: bool
) -> DetectionListing:
    """The pictures of `split` ("train" or "test"), in the order of the json or by name.

    `root`: a zip archive, or a folder with files, archives or both.  `annotations`: the split's own name of its json
    file or list ("" is the usual one).  `classes`: VOC's; () takes all that the xml files name.
    Raises ValueError, naming the file and the item, for what is missing, damaged or contradicts itself.
    """
    top = Path(root).expanduser()
    if not (top.suffix == ".zip" and top.is_file()):
        top = existing(root, source)
    files = files_below(top)
    if source == "coco":
        return coco(files, split, named=annotations, masks=masks, top=top)
    if masks:
        raise ValueError("data.masks: VOC's xml files hold boxes only; set data.masks to false, or take a coco json")
    return voc(files, split, named=annotations, classes=classes, top=top)


def _the_one(files: Tree, endings: Sequence[str], *, what: str, top: Path) -> str:
    """The path of the only file that ends with the first of `endings` that any ends with."""
    for ending in endings:
        found = sorted(path for path in files if f"/{path}".endswith(f"/{ending}"))
        if len(found) > 1:
            raise ValueError(f"{top} holds {found[0]} and {found[1]}: set data.annotations or data.root to choose one")
        if found:
            return found[0]
    kind = PurePosixPath(endings[0]).suffix
    present = ", ".join(sorted(path for path in files if path.endswith(kind))[:10]) or f"no {kind} file"
    raise ValueError(f"no {what} {' or '.join(endings)} in {top}, which holds {present}: set data.annotations")


def coco(files: Tree, split: str, *, named: str, masks: bool, top: Path) -> DetectionListing:
    """COCO's json of instances; pictures lie beside it or, from its folder or the one above, in `_folders`."""
    path = _the_one(files, (named,) if named else _COCO_FILES[split], what="annotations", top=top)
    where = f"{top}/{path}"
    content = _json(files[path], where)
    categories, images, annotations = (_by_id(content, key, where) for key in ("categories", "images", "annotations"))
    if not (categories and images):
        raise ValueError(f"{where} has {len(images)} images of {len(categories)} categories: both are needed")
    ids = sorted(categories)
    labels = {each: label for label, each in enumerate(ids)}
    sizes = {each: _size(image, f"{where}, image {each}") for each, image in images.items()}
    found: dict[Any, list] = {each: [] for each in images}
    for each, entry in annotations.items():
        item = f"{where}, annotation {each}"
        image, category = entry.get("image_id"), entry.get("category_id")
        if image not in images:
            raise ValueError(f"{item} is of image {image!r}, which the file does not have: add it or remove the item")
        if category not in labels:
            raise ValueError(f"{item} is of category {category!r}, which the file does not have: {ids} are there")
        box = _box(entry.get("bbox"), item)
        area = entry.get("area", box[2] * box[3])
        if not isinstance(area, int | float) or not math.isfinite(area):
            raise ValueError(f"{item} has the area {area!r}: it must be a finite number, or left out")
        shape = _mask(entry.get("segmentation"), sizes[image], item) if masks else None
        found[image].append((box, labels[category], bool(entry.get("iscrowd", 0)), area, shape))
    places = _folders(files, path, [str(image.get("file_name")) for image in images.values()])
    return _listed(
        tuple(str(categories[each].get("name", each)) for each in ids),
        [
            (files.get(f"{places}{image.get('file_name')}"), image.get("file_name"), sizes[each], found[each])
            for each, image in images.items()
        ],
        where=where,
        masks=masks,
    )


def _listed(classes: tuple[str, ...], rows: Sequence[tuple], *, where: str, masks: bool) -> DetectionListing:
    """From a file or None, its name, its size and its objects for each picture."""
    absent = tuple(
        f"{where} names the image {name}, which is not there: add it, or set data.skip_unreadable"
        for file, name, _, _ in rows
        if file is None
    )
    kept = [row for row in rows if row[0] is not None]
    if not kept:
        raise ValueError(f"none of the {len(rows)} images that {where} names is there; first: {rows[0][1]}")
    objects = [Objects.of(found, masks=masks) for _, _, _, found in kept]
    return DetectionListing(classes, [row[0] for row in kept], [row[2] for row in kept], objects, absent)


def _json(file: Stored, where: str) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except Exception as error:  # of the disk, the archive, or the text
        raise ValueError(f"{where} is no readable json file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}, not COCO's images, annotations and categories")
    return content


def _by_id(content: dict, key: str, where: str) -> dict[Any, dict]:
    entries = content.get(key)
    if not isinstance(entries, list):
        raise ValueError(f"{where} has no list {key!r}: it must be a file of instances, as COCO publishes it")
    found: dict[Any, dict] = {}
    for number, entry in enumerate(entries):
        each = entry.get("id") if isinstance(entry, dict) else None
        if type(each) is not int:
            raise ValueError(f"{where}: {key}[{number}] has no whole number as id")
        if each in found:
            raise ValueError(f"{where} has the id {each} twice in {key}: ids must differ")
        found[each] = entry
    return found


def _size(image: dict, where: str) -> tuple[int, int]:
    size = image.get("height"), image.get("width")
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{where} has the height and width {size}: they must be whole numbers above 0")
    return size


def _box(box: Any, where: str) -> list[float]:
    try:
        found = [float(each) for each in box]
    except (TypeError, ValueError):
        found = []
    if len(found) != 4 or not all(map(math.isfinite, found)) or min(found[2:]) < 0:
        raise ValueError(f"{where} has the box {box}: x, y, width and height must be finite, and the sides at least 0")
    return found


def _mask(shape: Any, size: tuple[int, int], where: str) -> dict:
    """Polygons or run lengths as compressed run lengths."""
    if isinstance(shape, list):
        if not (shape and all(map(_is_polygon, shape))):
            raise ValueError(f"{where} has polygons that are none: each needs x and y of three points or more")
        return rle.segmToRle(shape, size[1], size[0])
    try:
        found = rle.segmToRle(shape, size[1], size[0])
        covered = rle.decode(found).shape
    except Exception as error:  # whatever the run lengths are
        raise ValueError(f"{where} has a mask that cannot be read, and data.masks wants it: {error}") from error
    if covered != size:
        raise ValueError(f"{where} has a mask of {covered} (height, width), its image has {size}")
    return found


def _is_polygon(points: Any) -> bool:
    try:
        return len(points) >= 6 and len(points) % 2 == 0 and bool(np.isfinite(points).all())
    except TypeError:
        return False


def _folders(files: Tree, path: str, names: Sequence[str]) -> str:
    """Where the pictures of a json lie: the place, of the usual ones, that holds most of them, as "" or "x/y/"."""
    split = PurePosixPath(path).stem.removeprefix("instances_")
    beside = PurePosixPath(path).parent
    places = [
        f"{(top / folder).as_posix()}/".removeprefix("./")
        for top in (beside, beside.parent)
        for folder in ("", split, f"images/{split}", "images", "JPEGImages")
    ]
    return max(places, key=lambda place: sum(f"{place}{name}" in files for name in names))


def voc(files: Tree, split: str, *, named: str, classes: tuple[str, ...], top: Path) -> DetectionListing:
    """VOC's xml files, each with its picture beside it or in JPEGImages or images beside its folder.

    Those of a list ImageSets/Main/NAME.txt, or in a folder NAME; without either, a fixed fifth is for testing.
    """
    annotated = {path: file for path, file in sorted(files.items()) if path.endswith(".xml")}
    if not annotated:
        raise ValueError(f"{top} holds no xml file: data.root must lead to VOC's annotations")
    pictures: dict[str, str] = {}
    for path in sorted(path for path in files if path.lower().endswith(IMG_EXTENSIONS)):
        other = pictures.setdefault(path.rpartition(".")[0], path)
        if other != path:
            raise ValueError(f"{top} holds {other} and {path}, of one name for one xml file: remove one of them")
    chosen = _voc_chosen(files, annotated, split, named=named, top=top)
    parsed = {path: _xml(annotated[path], f"{top}/{path}") for path in (chosen if classes else annotated)}
    names = classes or tuple(sorted({name for entry in parsed.values() for name in _names(entry)}))
    rows = []
    for path in chosen:
        here = PurePosixPath(path)
        stems = [here.with_suffix(""), *(here.parent.parent / folder / here.stem for folder in _PICTURE_FOLDERS)]
        picture = next((pictures[str(stem)] for stem in stems if str(stem) in pictures), None)
        file = None if picture is None else files[picture]
        rows.append((file, here.stem, *_voc_picture(parsed[path], file, names, f"{top}/{path}")))
    return _listed(names, rows, where=f"{top}", masks=False)


def _voc_chosen(files: Tree, annotated: Tree, split: str, *, named: str, top: Path) -> list[str]:
    """The paths of the xml files of a split."""
    lists = [path for path in files if "ImageSets/Main/" in path and path.endswith(".txt")]
    wanted = (named,) if named else _VOC_SPLITS[split]
    if lists:
        ends = [f"ImageSets/Main/{name.removesuffix('.txt')}.txt" for name in wanted]
        path = _the_one(files, ends, what="list", top=top)
        home = PurePosixPath(path).parents[2] / "Annotations"
        lines = files[path].read_bytes().decode().splitlines()
        found = [str(home / f"{line.split()[0]}.xml") for line in lines if line.strip()]
        if missing := next((each for each in found if each not in annotated), None):
            raise ValueError(f"{top}/{path} names {missing}, which is not there: add it or remove the line")
        return found
    for name in wanted:
        if found := [path for path in annotated if name in PurePosixPath(path).parts[:-1]]:
            return found
    splits = {part for names in _VOC_SPLITS.values() for part in names}
    if named or any(splits & set(PurePosixPath(path).parts[:-1]) for path in annotated):
        raise ValueError(f"{top} has no folder {' or '.join(wanted)} with xml files: add it, or set data.annotations")
    paths = list(annotated)
    return [paths[i] for i in held_out(len(paths), test=split == "test")]


def _xml(file: Stored, where: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(file.read_bytes())
    except Exception as error:  # of the disk, the archive, or the text
        raise ValueError(f"{where} is no readable xml file: {error}") from error


def _names(entry: ElementTree.Element) -> list[str]:
    return [(each.findtext("name") or "").strip() for each in entry.findall("object")]


def _voc_picture(
    entry: ElementTree.Element, file: Stored | None, classes: tuple[str, ...], where: str
) -> tuple[tuple[int, int], list]:
    """Height and width, and the objects; the size comes from the picture where the xml does not know it."""
    written = entry.findtext("size/height"), entry.findtext("size/width")
    size = tuple(int(side) if (side or "").strip().isdigit() else 0 for side in written)
    if file is not None and min(size) < 1:
        size = height_width(file, name=str(file))
    found = []
    for number, (each, name) in enumerate(zip(entry.findall("object"), _names(entry), strict=True)):
        item = f"{where}, object {number}"
        if name not in classes:
            raise ValueError(f"{item} is a {name!r}, which is none of the classes {', '.join(classes)}")
        box = each.find("bndbox")
        ends = [None if box is None else box.findtext(end) for end in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = map(float, ends)
        except (TypeError, ValueError):
            raise ValueError(f"{item} has the bndbox {ends}: xmin, ymin, xmax and ymax must be numbers") from None
        inside = _box([left - 1, top - 1, right - left + 1, bottom - top + 1], item)
        difficult = (each.findtext("difficult") or "0").strip() == "1"
        found.append((inside, classes.index(name), difficult, inside[2] * inside[3], None))
    return size, found

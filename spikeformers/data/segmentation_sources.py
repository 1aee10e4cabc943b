"""Where labelled masks come from: one split of ADE20K, Cityscapes, VOC 2012, CamVid, or users' own folders.

Each is read as its makers publish it; what the pixels of its masks say becomes a label 0, 1, ... or IGNORE by a table.
Papers: Zhou et al., CVPR 2017 (ADE20K); Cordts et al., CVPR 2016 (Cityscapes); Everingham et al., IJCV 2010 (VOC);
Brostow et al., Pattern Recognition Letters 2009 (CamVid, with the 11 classes and the split of SegNet)."""

import colorsys
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from spikeformers.data.archive import ZipMember, opened_zip
from spikeformers.data.decode import Stored, UnreadablePictureError, opened
from spikeformers.data.segmentation_augment import IGNORE
from spikeformers.data.sources import existing, held_out

TEST_SPLITS = {"ade20k": "val", "cityscapes": "val", "voc2012": "val", "camvid": "test", "maskfolder": "val"}
UNKNOWN = -1  # in a table: no mask may have this value
_CLASS_LINE = re.compile(r"(?P<name>.+?)(?:\s+(?P<red>\d+)\s+(?P<green>\d+)\s+(?P<blue>\d+))?\s*")
_HALF_A_COLOUR = re.compile(r".+\s\d+\s+\d+")
_ADE20K_FOLDERS = {"train": "training", "val": "validation"}
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the 19 classes
_CITYSCAPES_LAST_ID = 33
_CAMVID_VOID = 11


@dataclass(frozen=True)
class SegmentationListing:
    """One split, not yet decoded.  `table`: int16 [256], the label of each value in a mask, IGNORE, or UNKNOWN."""

    classes: tuple[str, ...]
    colours: np.ndarray  # uint8 [N,3]
    table: np.ndarray
    images: Sequence[Stored]
    masks: Sequence[Stored]

    def chosen(self, indices: Iterable[int]) -> "SegmentationListing":
        """The same listing with only these samples."""
        kept = list(indices)
        images, masks = [self.images[i] for i in kept], [self.masks[i] for i in kept]
        return SegmentationListing(self.classes, self.colours, self.table, images, masks)

    def labels(self, index: int, *, size: tuple[int, int]) -> np.ndarray:
        """The mask as labels, uint8 [H,W].

        Raises UnreadablePictureError, naming the file, if it cannot be read, is not `size` (height, width), has colours
        instead of indices, or a value that is no class.
        """
        name = str(self.masks[index])
        mask = opened(self.masks[index], name=name)
        if mask.mode not in ("L", "P", "1"):
            raise UnreadablePictureError(
                f"mask {name} has mode {mask.mode}: save it as 8-bit grey or palette, each pixel the index of its class"
            )
        if (mask.height, mask.width) != size:
            raise UnreadablePictureError(
                f"mask {name} is {mask.height} x {mask.width} (height x width), its image {self.images[index]} is "
                f"{size[0]} x {size[1]}: give both one size"
            )
        labels = self.table[np.asarray(mask, dtype=np.uint8)]
        if labels.min() == UNKNOWN:
            present = np.unique(np.asarray(mask))
            wrong = present[self.table[present.astype(np.uint8)] == UNKNOWN]
            allowed = np.flatnonzero(self.table[:IGNORE] != UNKNOWN)
            raise UnreadablePictureError(
                f"mask {name} has the value {wrong[0]}, a class that is not there: values are 0 to {allowed[-1]}, and "
                f"{IGNORE} for pixels to ignore; correct the mask or the list of {len(self.classes)} classes"
            )
        return labels.astype(np.uint8)


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and colours uint8 [N,3] from lines `name` or `name red green blue`; colours not given are spread in hue.

    Raises ValueError for a file that is missing, empty, names a class twice or gives one a colour of two numbers.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"no readable list of classes {path}: one name a line, or set data.classes") from error
    found = [_CLASS_LINE.fullmatch(line.strip()) for line in lines]
    colours = default_colours(len(found))
    for colour, each in zip(colours, found, strict=True):
        if each["red"]:
            given = [int(each[part]) for part in ("red", "green", "blue")]
            if max(given) > 255:
                raise ValueError(f"{path} gives the class {each['name']!r} a colour above 255: {given}")
            colour[:] = given
        elif _HALF_A_COLOUR.fullmatch(each["name"]):
            raise ValueError(f"{path}: {each['name']!r} ends in two numbers; a colour has three: name red green blue")
    return checked_names([each["name"] for each in found], where=str(path)), colours


def published_classes(source: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and colours uint8 [N,3] of a public set's classes."""
    return read_classes(Path(__file__).parent / "segmentation_classes" / f"{source}.txt")


def checked_names(names: Sequence[str], *, where: str) -> tuple[str, ...]:
    """`names` as a tuple.  Raises ValueError for none, more than 255 or one twice."""
    if not 0 < len(names) <= IGNORE:
        raise ValueError(f"{where} names {len(names)} classes: 1 to {IGNORE} are possible, one a line")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{where} names the class {twice[0]!r} twice: rename one")
    return tuple(names)


def default_colours(count: int) -> np.ndarray:
    """Colours uint8 [count,3] for classes that have none: hues by the golden ratio, so that neighbours differ."""
    golden = (5**0.5 - 1) / 2
    colours = [colorsys.hsv_to_rgb(index * golden % 1, 0.65, 0.95) for index in range(count)]
    return np.rint(255 * np.array(colours)).astype(np.uint8).reshape(-1, 3)


def listing(source: str, root: str, split: str, *, classes: tuple[str, ...]) -> SegmentationListing:
    """The files of `split` ("train", "val", "test", or another that the source has), sorted by name.

    `classes`: names for a "maskfolder" without classes.txt.
    Raises ValueError for missing folders and lists, no images, and an image without a mask.  A mask without an image
    is left aside.
    """
    top = existing(root, source)
    if source != "maskfolder":
        names, colours = published_classes(source)
    elif classes:
        names, colours = checked_names(classes, where="data.classes"), default_colours(len(classes))
    else:
        names, colours = read_classes(top / "classes.txt")
    try:
        images, masks, table = _READERS[source](top, split, len(names))
    except ValueError as error:
        if source != "maskfolder" and any(each.is_dir() for each in (top / "masks", top / split / "masks")):
            raise ValueError(f"{error}; {top} looks like a folder of your own: set data.source=maskfolder") from error
        raise
    return SegmentationListing(names, colours, table, images, masks)


Found = tuple[list[Stored], list[Stored], np.ndarray]  # images, masks, table


def _table(count: int) -> np.ndarray:
    """Values 0 to count - 1 are the labels; IGNORE is allowed."""
    table = np.full(256, UNKNOWN, dtype=np.int16)
    table[:count] = np.arange(count)
    table[IGNORE] = IGNORE
    return table


def _files(folder: Path, ending: str | tuple[str, ...]) -> dict[str, Stored]:
    """Name without `ending` -> file, sorted.  Raises ValueError if the folder is missing or holds no such file."""
    endings = (ending,) if isinstance(ending, str) else ending
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: data.root and the split's name must lead to it")
    return _by_name([folder / name for name in os.listdir(folder)], endings, where=str(folder))


def _masks(folder: Path) -> dict[str, Stored]:
    """`_files` that are PNG.  Raises ValueError for masks in another form."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    pictures = [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    if pictures and not any(name.lower().endswith(".png") for name in pictures):
        raise ValueError(f"{folder} holds {pictures[0]}: masks must be PNG files, since JPEG changes their numbers")
    return _files(folder, ".png")


def _by_name(files: Iterable[Stored], endings: tuple[str, ...], *, where: str) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in sorted(files, key=str):
        name = PurePosixPath(str(file)).name
        ending = next((each for each in endings if name.lower().endswith(each.lower())), None)
        if ending is None or name.startswith("."):  # "._x.jpg" are another system's notes about x.jpg
            continue
        key = name[: -len(ending)]
        if key in found:
            raise ValueError(f"{found[key]} and {file} have one name for one mask: remove one of them")
        found[key] = file
    if not found:
        raise ValueError(f"{where} holds no file *{' *'.join(endings)}: is data.root right?")
    return found


def _paired(images: dict[str, Stored], masks: dict[str, Stored], *, where: str) -> tuple[list[Stored], list[Stored]]:
    """Raises ValueError for an image without a mask."""
    if missing := next((name for name in images if name not in masks), None):
        first, there = next((key, PurePosixPath(str(mask)).name) for key, mask in masks.items())
        raise ValueError(
            f"image {images[missing]} has no mask {missing}{there.removeprefix(first)} in {where}: add it or remove "
            f"the image (a mask has its picture's name; there is {there})"
        )
    return list(images.values()), [masks[name] for name in images]


def _folder_inside(top: Path, *names: str) -> Path:
    """The first of the folders `names` that `top` holds, else `top`."""
    return next((top / name for name in names if (top / name).is_dir()), top)


def _one_of(split: str, known: Iterable[str], *, source: str) -> str:
    if split not in known:
        raise ValueError(f"{source} has no split {split!r} with masks: it has {', '.join(known)}")
    return split


def ade20k(top: Path, split: str, count: int) -> Found:
    """ADEChallengeData2016/{images,annotations}/{training,validation}; 0 is "other", 1 to 150 are the classes."""
    top = _folder_inside(top, "ADEChallengeData2016")
    folder = _ADE20K_FOLDERS[_one_of(split, _ADE20K_FOLDERS, source="ADE20K")]
    masks = top / "annotations" / folder
    table = _table(0)
    table[: count + 1] = [IGNORE, *range(count)]
    return *_paired(_files(top / "images" / folder, ".jpg"), _masks(masks), where=str(masks)), table


def cityscapes(top: Path, split: str, count: int) -> Found:
    """leftImg8bit/SPLIT/CITY/*_leftImg8bit.png beside gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png, else ..labelIds."""
    _one_of(split, ("train", "val"), source="Cityscapes")
    pictures, truth = top / "leftImg8bit" / split, top / "gtFine" / split
    for folder in (pictures, truth):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: data.root must hold leftImg8bit/ and gtFine/, both unpacked")
    images = _by_name(pictures.glob("*/*.png"), ("_leftImg8bit.png",), where=str(pictures))
    found = list(truth.glob("*/*.png"))
    if any(file.name.endswith("_labelTrainIds.png") for file in found):
        ending, table = "_gtFine_labelTrainIds.png", _table(count)
    else:
        ending, table = "_gtFine_labelIds.png", _table(0)
        table[: _CITYSCAPES_LAST_ID + 1] = IGNORE
        table[list(_CITYSCAPES_IDS)] = np.arange(count)
    return *_paired(images, _by_name(found, (ending,), where=str(truth)), where=f"{truth}/*{ending}"), table


def voc2012(top: Path, split: str, count: int) -> Found:
    """VOCdevkit/VOC2012; ImageSets/Segmentation/SPLIT.txt names the files; SPLIT "...aug": SegmentationClassAug."""
    top = _folder_inside(top, "VOCdevkit/VOC2012", "VOC2012")
    lists = top / "ImageSets" / "Segmentation"
    file = lists / f"{split}.txt"
    if not file.is_file():
        present = ", ".join(sorted(each.stem for each in lists.glob("*.txt"))) or "none"
        raise ValueError(f"no list {file}: data.root must be VOCdevkit or VOC2012; splits present: {present}")
    # The augmented lists of some users name "/JPEGImages/x.jpg /SegmentationClassAug/x.png" instead of "x".
    chosen = [PurePosixPath(line.split()[0]).stem for line in file.read_text().splitlines() if line.strip()]
    masks = top / ("SegmentationClassAug" if split.endswith("aug") else "SegmentationClass")
    everything = _files(top / "JPEGImages", ".jpg")
    if absent := [name for name in chosen if name not in everything]:
        raise ValueError(f"{file} names {absent[0]}, but there is no {top / 'JPEGImages' / absent[0]}.jpg: add it")
    images = {name: everything[name] for name in sorted(chosen)}
    return *_paired(images, _masks(masks), where=str(masks)), _table(count)


def camvid(top: Path, split: str, count: int) -> Found:
    """SegNet's SPLIT/ and SPLITannot/, as folders or in one archive *SPLIT.zip for each split; 11 is void."""
    table = _table(count)
    table[_CAMVID_VOID] = IGNORE
    kinds = (".png", ".jpg")
    if (top / split).is_dir():
        masks = top / f"{split}annot"
        return *_paired(_files(top / split, kinds), _masks(masks), where=str(masks)), table
    archives = sorted(top.glob(f"*{split}.zip"))
    if len(archives) != 1:
        raise ValueError(f"{top} must hold a folder {split}/ or one archive *{split}.zip, has {len(archives)} of these")
    members = [ZipMember(archives[0], name) for name in opened_zip(archives[0]).namelist()]

    def inside(folder: str, endings: tuple[str, ...]) -> dict[str, Stored]:
        here = [each for each in members if PurePosixPath(each.name).parent.name == folder]
        return _by_name(here, endings, where=f"{archives[0]}/{folder}")

    masks = f"{split}annot"
    return *_paired(inside(split, kinds), inside(masks, (".png",)), where=f"{archives[0]}/{masks}"), table


def maskfolder(top: Path, split: str, count: int) -> Found:
    """SPLIT/images and SPLIT/masks; or images/SPLIT and masks/SPLIT; or images and masks, which are split 80 : 20.

    A mask has its image's name and ends in .png.  The split of 80 : 20 is a fixed permutation, the same for every seed;
    its parts are called "train", and "val" or "test".
    """
    places = [(top / split / "images", top / split / "masks"), (top / "images" / split, top / "masks" / split)]
    whole = top / "images", top / "masks"
    place = next((each for each in places if each[0].is_dir()), whole)
    if place is whole and (folders := sorted(each.name for each in whole[0].glob("[!.]*") if each.is_dir())):
        raise ValueError(f"no folder {places[1][0]}: add it, or set data.test_split to one of {', '.join(folders)}")
    if absent := next((folder for folder in place if not folder.is_dir()), None):
        present = ", ".join(sorted(each.name for each in absent.parent.glob("[!.]*") if each.is_dir())) or "none"
        raise ValueError(
            f"no folder {absent} (folders there: {present}): pictures and masks are in {split}/images and "
            f"{split}/masks, in images/{split} and masks/{split}, or in images and masks"
        )
    images, masks = _paired(_files(place[0], IMG_EXTENSIONS), _masks(place[1]), where=str(place[1]))
    if place is whole:
        _one_of(split, ("train", "val", "test"), source="a mask folder that is split 80 : 20")
        kept = held_out(len(images), test=split != "train")
        images, masks = [images[i] for i in kept], [masks[i] for i in kept]
    return images, masks, _table(count)


_READERS = {"ade20k": ade20k, "cityscapes": cityscapes, "voc2012": voc2012, "camvid": camvid, "maskfolder": maskfolder}

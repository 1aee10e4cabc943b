"""Every layout as its makers publish it: files found and paired, values of masks turned into labels, errors named."""

import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from spikeformers.data import SegmentationData, load_segmentation_split, segmentation_sources
from spikeformers.data import archive as archive_files
from spikeformers.data.segmentation_sources import default_colours, listing, read_classes

VALUES = np.arange(12, dtype=np.uint8).reshape(3, 4)


def load(source: str, root: Path, split: str = "train", **changed):
    return load_segmentation_split(SegmentationData(source=source, root=str(root), size=(3, 4), **changed), split)


def labels(split, index: int = 0) -> list[int]:
    return split.mask(index).flatten().tolist()


@pytest.fixture
def ade20k(tmp_path, draw_labelled) -> Path:
    top = tmp_path / "ADEChallengeData2016"
    for folder, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        values = np.array([[0, 1, 2, 150]] * 3)
        draw_labelled(top / f"images/{folder}/{name}.jpg", top / f"annotations/{folder}/{name}.png", values)
    return tmp_path


def test_ade20k_ignores_zero_and_counts_its_classes_from_one(ade20k):
    for root, split in ((ade20k, "train"), (ade20k / "ADEChallengeData2016", "test")):
        assert labels(load("ade20k", root, split))[:4] == [255, 0, 1, 149]
    with pytest.raises(ValueError, match=r"ADE20K has no split 'test' with masks: it has train, val"):
        load("ade20k", ade20k, "test", test_split="test")


def test_a_value_that_is_no_class_of_ade20k_is_refused(ade20k):
    mask = ade20k / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png"
    Image.fromarray(np.full((3, 4), 151, dtype=np.uint8)).save(mask)
    with pytest.raises(
        ValueError,
        match=rf"mask {re.escape(str(mask))} has the value 151, a class that is not there: values are 0 to 150, and",
    ):
        load("ade20k", ade20k)


@pytest.fixture
def cityscapes(tmp_path, draw_labelled) -> Path:
    values = np.array([[0, 6, 7, 8], [11, 29, 31, 33], [34, 34, 34, 34]])
    for city in ("aachen", "bremen"):
        stem = f"{city}/{city}_000000_000019"
        draw_labelled(
            tmp_path / f"leftImg8bit/train/{stem}_leftImg8bit.png",
            tmp_path / f"gtFine/train/{stem}_gtFine_labelIds.png",
            np.minimum(values, 33),
        )
        Image.new("RGBA", (4, 3)).save(tmp_path / f"gtFine/train/{stem}_gtFine_color.png")
    return tmp_path


def test_cityscapes_turns_its_ids_into_the_nineteen_classes(cityscapes):
    split = load("cityscapes", cityscapes)
    assert [Path(name).name for name in split.names] == [
        f"{c}_000000_000019_leftImg8bit.png" for c in ("aachen", "bremen")
    ]
    assert labels(split) == [255, 255, 0, 1, 2, 255, 16, 18, 18, 18, 18, 18]
    # the ids of the official list that count, in the order of the 19 classes
    counted = {int(label): int(value) for value, label in enumerate(split._listing.table) if 0 <= label < 19}
    named = dict(zip(split.classes, [counted[i] for i in range(19)], strict=True))
    assert (named["road"], named["sky"], named["person"], named["train"], named["bicycle"]) == (7, 23, 24, 31, 33)


def test_cityscapes_reads_training_ids_where_they_have_been_made(cityscapes):
    for city in ("aachen", "bremen"):
        path = cityscapes / f"gtFine/train/{city}/{city}_000000_000019_gtFine_labelTrainIds.png"
        Image.fromarray(np.array([[0, 18, 255, 5]] * 3, dtype=np.uint8)).save(path)
    assert labels(load("cityscapes", cityscapes))[:4] == [0, 18, 255, 5]
    path.unlink()
    with pytest.raises(
        ValueError,
        match=r"image .*bremen_000000_000019_leftImg8bit.png has no mask bremen.* in .*labelTrainIds.png: add it",
    ):
        load("cityscapes", cityscapes)
    with pytest.raises(
        ValueError, match=r"no folder .*leftImg8bit/val: data.root must hold leftImg8bit/ and gtFine/, both unpacked"
    ):
        load("cityscapes", cityscapes, "test")


@pytest.fixture
def voc(tmp_path, draw_labelled) -> Path:
    top = tmp_path / "VOCdevkit/VOC2012"
    lists = top / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    values = np.array([[0, 1, 20, 255]] * 3)
    for name in ("2007_1", "2007_2", "2007_3"):
        draw_labelled(top / f"JPEGImages/{name}.jpg", top / f"SegmentationClass/{name}.png", values, palette=True)
        draw_labelled(top / f"JPEGImages/{name}.jpg", top / f"SegmentationClassAug/{name}.png", values[:, ::-1])
    (lists / "train.txt").write_text("2007_2\n2007_1\n")
    (lists / "val.txt").write_text("2007_3\n")
    (lists / "trainaug.txt").write_text("/JPEGImages/2007_1.jpg /SegmentationClassAug/2007_1.png\n2007_2\n2007_3\n")
    return tmp_path


def test_voc_reads_the_indices_of_its_palette_pictures_and_ignores_borders(voc):
    for root in (voc, voc / "VOCdevkit", voc / "VOCdevkit/VOC2012"):
        split = load("voc2012", root)
        assert [Path(name).stem for name in split.names] == ["2007_1", "2007_2"]
        assert labels(split)[:4] == [0, 1, 20, 255]
    assert [Path(name).stem for name in load("voc2012", voc, "test").names] == ["2007_3"]


def test_voc_takes_the_augmented_masks_for_the_augmented_list(voc):
    split = load("voc2012", voc, train_split="trainaug")
    assert len(split) == 3
    assert labels(split)[:4] == [255, 20, 1, 0]


def test_voc_names_the_lists_that_are_there_and_files_that_are_not(voc):
    with pytest.raises(ValueError, match=r"no list .*/trainval.txt: .* splits present: train, trainaug, val"):
        load("voc2012", voc, train_split="trainval")
    (voc / "VOCdevkit/VOC2012/JPEGImages/2007_3.jpg").unlink()
    with pytest.raises(ValueError, match=r"val.txt names 2007_3, but there is no .*JPEGImages/2007_3.jpg: add it"):
        load("voc2012", voc, "test")


def camvid_tree(root: Path, draw_labelled) -> Path:
    for split, ending in (("train", "png"), ("val", "jpg"), ("test", "jpg")):
        for name in ("b", "a"):
            draw_labelled(root / f"{split}/{name}.{ending}", root / f"{split}annot/{name}.png", VALUES)
    return root


def zipped(tree: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(tree.rglob("*.*")):
            if archive.stem.split("_")[1] in path.parent.name:
                out.write(path, path.relative_to(tree))
        out.writestr("__MACOSX/train/._a.png", b"")


def test_camvid_is_the_same_from_folders_and_archives_and_ignores_void(tmp_path, draw_labelled):
    tree, archives = camvid_tree(tmp_path / "tree", draw_labelled), tmp_path / "zips"
    archives.mkdir()
    for split in ("train", "test"):
        zipped(tree, archives / f"camvid_{split}.zip")
    for root in (tree, archives):
        split = load("camvid", root)
        assert [Path(name).name for name in split.names] == ["a.png", "b.png"]
        assert labels(split) == [*range(11), 255]
        assert load("camvid", root, "test").names[0].endswith("test/a.jpg")  # not val
    assert load("camvid", tree, "test", test_split="val").names[0].endswith("val/a.jpg")
    with pytest.raises(ValueError, match=r"zips must hold a folder val/ or one archive \*val.zip, has 0 of these"):
        load("camvid", archives, "test", test_split="val")
    (archives / "camvid_train.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"camvid_train.zip is no readable zip file .*: fetch it again"):
        load("camvid", archives)


def test_each_process_opens_an_archive_for_itself_and_reads_the_same(tmp_path, draw_labelled, monkeypatch):
    tree, archive = tmp_path / "tree", tmp_path / "camvid_train.zip"
    for i in range(12):
        draw_labelled(tree / f"train/{i:02d}.png", tree / f"trainannot/{i:02d}.png", np.full((3, 4), i % 11))
    zipped(tree, archive)
    monkeypatch.setattr("spikeformers.data.segmentation.MEMORY_LIMIT", 0)
    split = load("camvid", tmp_path)
    split[0]  # opens the archive here, before the workers are forked
    found = [int(mask[0, 0, 0]) for _, mask in DataLoader(split, batch_size=1, num_workers=2)]
    assert found == [i % 11 for i in range(12)]
    here = archive_files.opened_zip(archive)
    assert archive_files.opened_zip(archive) is here
    # A file's position is shared after a fork: two processes reading at once would get each other's bytes.
    monkeypatch.setattr(archive_files.os, "getpid", lambda: -1)
    assert archive_files.opened_zip(archive) is not here


def test_a_mask_folder_has_its_classes_in_a_file_or_in_the_spec(mask_folder):
    split = load("maskfolder", mask_folder)
    assert split.classes == ("sky", "tree", "car")
    assert split.colours[1].tolist() == [0, 128, 0]  # as the file says
    assert split.colours[2].tolist() == default_colours(3)[2].tolist()
    assert load("maskfolder", mask_folder, classes=("a", "b", "c")).classes == ("a", "b", "c")
    (mask_folder / "classes.txt").unlink()
    with pytest.raises(
        ValueError, match=r"no readable list of classes .*classes.txt: one name a line, or set data.classes"
    ):
        load("maskfolder", mask_folder)
    with pytest.raises(
        ValueError, match=r"has the value 2, a class that is not there: values are 0 to 1, .* list of 2 classes"
    ):
        load("maskfolder", mask_folder, classes=("a", "b"))


def test_a_mask_folder_may_have_its_splits_inside_or_none_and_then_every_fifth_is_held_out(tmp_path, draw_labelled):
    for i in range(10):
        draw_labelled(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", np.full((3, 4), i % 2))
    found = {split: load("maskfolder", tmp_path, split, classes=("a", "b")).names for split in ("train", "test")}
    assert [len(names) for names in found.values()] == [8, 2]
    with pytest.raises(ValueError, match=r"split 80 : 20 has no split 'training' with masks: it has train, val, test"):
        load("maskfolder", tmp_path, "test", test_split="training", classes=("a", "b"))
    assert len({*found["train"], *found["test"]}) == 10
    for i in range(3):
        draw_labelled(tmp_path / f"in/images/train/{i}.png", tmp_path / f"in/masks/train/{i}.png", np.zeros((3, 4)))
    assert len(load("maskfolder", tmp_path / "in", classes=("a",))) == 3
    with pytest.raises(ValueError, match=r"no folder .*in/images/val: add it, or set data.test_split to one of train"):
        load("maskfolder", tmp_path / "in", "test", classes=("a",))


def test_masks_that_do_not_fit_are_refused_by_name(mask_folder):
    mask = mask_folder / "train/masks/00.png"
    Image.new("RGB", (32, 24)).save(mask)
    with pytest.raises(
        ValueError,
        match=r"mask .*masks/00.png has mode RGB: save it as 8-bit grey or palette, each pixel the index of its class",
    ):
        load("maskfolder", mask_folder)
    Image.new("L", (24, 32)).save(mask)
    with pytest.raises(
        ValueError,
        match=r"masks/00.png is 32 x 24 \(height x width\), its image .*images/00.png is 24 x 32: give both one size",
    ):
        load("maskfolder", mask_folder)
    mask.unlink()
    with pytest.raises(
        ValueError,
        match=r"image .*images/00.png has no mask 00.png in .*train/masks: add it or remove .*there is 01.png",
    ):
        load("maskfolder", mask_folder)
    Image.new("L", (32, 24)).save(mask)
    Image.new("L", (32, 24)).save(mask_folder / "train/images/00.jpg")
    with pytest.raises(
        ValueError, match=r"images/00.jpg and .*images/00.png have one name for one mask: remove one of them"
    ):
        load("maskfolder", mask_folder)


def test_masks_in_another_form_or_place_are_refused_with_the_forms_and_places_that_are_read(mask_folder):
    masks = mask_folder / "train/masks"
    for path in masks.iterdir():
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"train/masks holds 00.jpg: masks must be PNG files, since JPEG"):
        load("maskfolder", mask_folder)
    masks.rename(mask_folder / "train/labels")
    layouts = "train/images and train/masks, in images/train and masks/train, or in images and masks"
    with pytest.raises(ValueError, match=rf"no folder .*train/masks \(folders there: images, labels\): .*{layouts}"):
        load("maskfolder", mask_folder)


def test_a_folder_of_ones_own_is_told_from_a_public_set(mask_folder):
    with pytest.raises(ValueError, match=r"train holds no file \*.png \*.jpg.*of your own: set data.source=maskfolder"):
        load("camvid", mask_folder)


def test_missing_folders_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"no folder absent in {re.escape(str(tmp_path))}; set it, or SPIKEFORMERS_DATA"
    ):
        load("camvid", Path("absent"))
    with pytest.raises(ValueError, match=r"data.source=ade20k needs data.root"):
        load_segmentation_split(SegmentationData(source="ade20k"), "train")
    with pytest.raises(ValueError, match=r"no folder .*/absent"):
        load("voc2012", tmp_path / "absent")
    for source, message in (
        ("ade20k", "no folder .*images/training: data.root and the split's name must lead to it"),
        ("voc2012", "no list .*ImageSets/Segmentation/train.txt: .* splits present: none"),
    ):
        with pytest.raises(ValueError, match=message):
            load(source, tmp_path)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"images holds no file \*.jpg.*: is data.root right?"):
        load("maskfolder", tmp_path, classes=("a",))


@pytest.mark.parametrize(
    ("source", "count", "some"),
    [
        ("ade20k", 150, {0: "wall", 12: "person", 149: "flag"}),
        ("cityscapes", 19, {0: "road", 6: "traffic light", 18: "bicycle"}),
        ("voc2012", 21, {0: "background", 15: "person", 20: "tvmonitor"}),
        ("camvid", 11, {0: "sky", 10: "bicyclist"}),
    ],
)
def test_public_sets_have_their_classes_and_colours(source, count, some):
    path = Path(segmentation_sources.__file__).parent / "segmentation_classes" / f"{source}.txt"
    names, colours = read_classes(path)
    assert len(names) == count
    assert {index: names[index] for index in some} == some
    assert (colours.shape, colours.dtype) == ((count, 3), np.uint8)


def test_lists_of_classes_that_cannot_be_are_refused(tmp_path):
    path = tmp_path / "classes.txt"
    for text, message in (
        ("", "classes.txt names 0 classes: 1 to 255 are possible"),
        ("a\nb\na 1 2 3\n", "classes.txt names the class 'a' twice: rename one"),
        ("a 1 2 300\n", r"gives the class 'a' a colour above 255: \[1, 2, 300\]"),
        ("sky 1 2\n", "'sky 1 2' ends in two numbers; a colour has three: name red green blue"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_classes(path)
    path.write_text("street lamp\n\nroute 66  1 2 3\n")
    assert read_classes(path)[0] == ("street lamp", "route 66")


def test_the_real_camvid_has_its_published_sizes_and_shares_of_pixels(shared_data):
    root = shared_data / "camvid"
    if not root.is_dir():
        pytest.skip("no camvid folder in the shared data")
    sizes = {split: len(listing("camvid", str(root), split, classes=()).images) for split in ("train", "val", "test")}
    assert sizes == {"train": 367, "val": 101, "test": 233}
    split = load("camvid", root, "test", test_limit=8)
    counts = sum(np.bincount(split.mask(i).flatten(), minlength=256) for i in range(8))
    assert split.classes[int(counts[:255].argmax())] in ("road", "building")
    assert counts[11:255].sum() == 0
    assert split.uniform
    assert split[0][0].shape == (3, 360, 480)

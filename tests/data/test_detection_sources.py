"""COCO's json files and VOC's xml files: what is read, where pictures lie, and every damage named."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle

from spikeformers.data import DetectionData, load_detection_split
from spikeformers.data.detection_sources import Objects, listing


def load(root: Path, split: str = "train", *, source: str = "coco", **changed):
    return listing(source, str(root), split, **({"annotations": "", "classes": (), "masks": False} | changed))


def rewrite(root: Path, content: dict) -> None:
    (root / "annotations/instances_train.json").write_text(json.dumps(content))


def zipped(tree: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(tree.rglob("*.*")):
            file.write(path, path.relative_to(tree))


def same(left: Objects, right: Objects) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("boxes", "labels", "areas"))


def test_classes_follow_the_ids_of_the_categories_and_boxes_stay_as_they_are(tmp_path, draw_coco):
    content = draw_coco(tmp_path, split="train", pictures=[[([1, 2, 3, 4.5], 7), ([5, 6, 7, 8], 3)], []])
    content["annotations"][1] |= {"iscrowd": 1, "area": 40}
    del content["annotations"][0]["area"]
    rewrite(tmp_path, content)
    found = load(tmp_path)
    assert found.classes == ("dog", "cat")
    assert [Path(str(image)).name for image in found.images] == ["0.png", "1.png"]
    assert found.sizes == [(24, 32), (24, 32)]
    first, second = found.objects
    assert first.boxes.tolist() == [[1, 2, 3, 4.5], [5, 6, 7, 8]]
    assert first.labels.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True]
    assert first.areas.tolist() == [13.5, 40]
    assert first.masks is None
    assert (second.boxes.shape, second.labels.shape) == ((0, 4), (0,))
    assert first.corners(10, 9).tolist() == [[1, 2, 4, 6.5], [5, 6, 9, 10]]


def test_polygons_and_run_lengths_of_either_kind_are_the_same_mask(tmp_path, draw_coco):
    content = draw_coco(tmp_path, split="train", pictures=[[([2, 1, 3, 2], 3)] * 4])
    dense = np.zeros((24, 32), dtype=np.uint8, order="F")
    dense[1:3, 2:5] = 1
    packed = rle.encode(dense)
    counts = [2 * 24 + 1, 2, 22, 2, 22, 2, 24 * 32 - 99]  # down the columns: what precedes, 3 columns of 2, the rest
    for entry, shape in zip(
        content["annotations"],
        (
            {"size": [24, 32], "counts": packed["counts"].decode()},
            {"size": [24, 32], "counts": counts},
            [[2, 1, 5, 1, 5, 2, 2, 2], [2, 2, 5, 2, 5, 3, 2, 3]],  # of two parts
            [[2, 1, 5, 1, 5, 3, 2, 3]],
        ),
        strict=True,
    ):
        entry["segmentation"] = shape
    rewrite(tmp_path, content)
    masks = load(tmp_path, masks=True).objects[0].dense_masks(24, 32)
    assert masks.shape == (4, 24, 32)
    assert (masks == dense).all()


@pytest.mark.parametrize("layout", ["beside", "split", "images/split", "images", "JPEGImages"])
def test_pictures_lie_where_sets_have_them(coco_folder, tmp_path_factory, layout):
    root = tmp_path_factory.mktemp("layout")
    for split in ("train", "test"):
        shutil.copytree(coco_folder / split, root / layout.replace("split", split), dirs_exist_ok=True)
    place = root / "beside" if layout == "beside" else root
    shutil.copy(coco_folder / "annotations/instances_train.json", place)
    found = load(root)
    assert len(found.images) == 6
    assert found.images[0].read_bytes() == (root / layout.replace("split", "train") / "0.png").read_bytes()


def test_archives_equal_folders_whole_or_as_coco_publishes_them(coco_folder, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed")
    zipped(coco_folder, packed / "set.zip")
    apart = tmp_path_factory.mktemp("apart")
    for name in ("train", "annotations"):
        shutil.copytree(coco_folder / name, apart / "part" / name)
        zipped(apart / "part", apart / f"{name}.zip")
        shutil.rmtree(apart / "part")
    want = load(coco_folder)
    for root in (packed, packed / "set.zip", apart):
        found = load(root)
        assert found.sizes == want.sizes
        assert all(map(same, found.objects, want.objects))
        assert [a.read_bytes() for a in found.images] == [b.read_bytes() for b in want.images]


def test_another_json_is_chosen_by_name(coco_folder):
    assert len(load(coco_folder, "train", annotations="instances_test.json").images) == 3
    assert len(load(coco_folder, "train", annotations="annotations/instances_test.json").images) == 3
    with pytest.raises(ValueError, match=r"no annotations x.json in .*holds annotations/instances_test.json, .*set"):
        load(coco_folder, annotations="x.json")
    shutil.copy(coco_folder / "annotations/instances_train.json", coco_folder)
    with pytest.raises(ValueError, match=r"holds annotations/instances_train.json and instances_train.json: set data"):
        load(coco_folder)


def first(key: str, **values):
    return lambda content: content[key][0].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.pop("images"), r"has no list 'images': it must be a file of inst"),
        (lambda content: content["categories"].clear(), r"has 6 images of 0 categories: both are needed"),
        (lambda content: content["images"][0].pop("id"), r"images\[0\] has no whole number as id"),
        (first("images", id=11), r"has the id 11 twice in images: ids must differ"),
        (first("annotations", id=2), r"has the id 2 twice in annotations"),
        (first("categories", id=3), r"has the id 3 twice in categories"),
        (first("images", height=None), r"image 10 has the height and width \(None, 32\): they must be whole"),
        (first("annotations", image_id=99), r"annotation 1 is of image 99, which the file does not have"),
        (first("annotations", category_id=5), r"annotation 1 is of category 5, .*: \[3, 7\] are there"),
        (first("annotations", bbox=[1, 2, float("nan"), 3]), r"annotation 1 has the box \[1, 2, nan, 3\]: x, y"),
        (first("annotations", bbox=[1, 2, -1, 3]), r"annotation 1 has the box \[1, 2, -1, 3\]: .* sides at least 0"),
        (first("annotations", bbox=[1, 2, 3]), r"annotation 1 has the box \[1, 2, 3\]"),
        (first("annotations", bbox=None), r"annotation 1 has the box None"),
        (first("annotations", area="big"), r"annotation 1 has the area 'big': it must be a finite number"),
        (first("annotations", segmentation=[]), r"annotation 1 has polygons that are none: each needs x and y"),
        (first("annotations", segmentation=[[1, 2, 3, 4]]), r"annotation 1 has polygons that are"),
        (first("annotations", segmentation=[[1, 2, 3, 4, 5, float("inf")]]), r"annotation 1 has polygons that are"),
        (first("annotations", segmentation=None), r"annotation 1 has a mask that cannot be read, and data.masks wants"),
        (first("annotations", segmentation={"size": [24, 32], "counts": [1, 2]}), r"mask that cannot be read.*768"),
        (first("annotations", segmentation={"size": [2, 3], "counts": [1, 5]}), r"mask of \(2, 3\) .*has \(24, 32\)"),
    ],
)
def test_a_damaged_json_is_refused_with_the_file_and_the_item(coco_folder, damage, message):
    content = json.loads((coco_folder / "annotations/instances_train.json").read_text())
    damage(content)
    rewrite(coco_folder, content)
    with pytest.raises(ValueError, match=rf"annotations/instances_train.json.*{message}"):
        load(coco_folder, masks=True)


@pytest.mark.parametrize("text", ['{"images": [', "[]", "\x00"])
def test_what_is_no_json_of_coco_is_refused(coco_folder, text):
    (coco_folder / "annotations/instances_train.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"instances_train.json (is no readable json file: .|holds a list, not COCO's)"
    ):
        load(coco_folder)


def test_pictures_that_are_not_there_are_named(coco_folder):
    (coco_folder / "train/3.png").unlink()
    found = load(coco_folder)
    assert len(found.images) == len(found.objects) == 5
    assert len(found.absent) == 1
    assert "names the image 3.png, which is not there: add it, or set data.skip_unreadable" in found.absent[0]
    shutil.rmtree(coco_folder / "train")
    (coco_folder / "test/0.png").rename(coco_folder / "test/x.png")
    with pytest.raises(ValueError, match=r"none of the 6 images that .* names is there; first: 0.png"):
        load(coco_folder)


def test_boxes_outside_and_without_area_are_counted(tmp_path, draw_coco):
    boxes = [[1, 1, 5, 5], [30, 1, 5, 5], [-3, 2, 6, 4], [31.5, 1, 1, 1], [4, 4, 0, 6], [33, 1, 5, 5]]
    draw_coco(tmp_path, split="train", pictures=[[(box, 3) for box in boxes]])
    found = load(tmp_path)
    assert found.oddities() == [
        "3 boxes reach more than a pixel out of their pictures and are clipped",
        "2 boxes have no area in their pictures and are not learnt",
    ]
    assert found.objects[0].boxes.tolist() == boxes
    assert found.objects[0].covering(24, 32).tolist() == [True, True, True, True, False, False]


def save_xml(path: Path, *, objects: str = "", size: str = "<width>20</width><height>20</height>") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>ignored</filename><size>{size}</size>{objects}</annotation>")


def xml_object(name: str, *ends: float, difficult: int = 0) -> str:
    corners = "".join(f"<{key}>{end}</{key}>" for key, end in zip(("xmin", "ymin", "xmax", "ymax"), ends, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


@pytest.fixture
def voc(tmp_path: Path, draw) -> Path:
    """VOCdevkit/VOC2012 with training pictures a, b and a test picture c."""
    top = tmp_path / "VOC2012"
    for name, objects in (
        ("a", xml_object("dog", 3, 4, 8, 10) + xml_object("cat", 1, 1, 20, 20, difficult=1)),
        ("b", ""),
        ("c", xml_object("emu", 2, 2, 5, 5)),
    ):
        draw(top / "JPEGImages" / f"{name}.jpg", value=100)
        save_xml(top / "Annotations" / f"{name}.xml", objects=objects)
    lists = top / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    (lists / "dog_trainval.txt").write_text("a  1\nb -1\n")
    return tmp_path


def test_voc_counts_pixels_from_one_and_what_is_difficult_becomes_a_crowd(voc):
    found = load(voc, source="voc")
    assert found.classes == ("cat", "dog", "emu")
    assert [Path(str(image)).name for image in found.images] == ["a.jpg", "b.jpg"]
    objects = found.objects[0]
    assert objects.boxes.tolist() == [[2, 3, 6, 7], [0, 0, 20, 20]]  # pixels 3 to 8 and 4 to 10, both included
    assert objects.labels.tolist() == [1, 0]
    assert objects.crowd.tolist() == [False, True]
    assert objects.areas.tolist() == [42, 400]
    assert load(voc, "test", source="voc").objects[0].labels.tolist() == [2]
    assert load(voc, source="voc", classes=("dog", "cat")).objects[0].labels.tolist() == [0, 1]
    assert len(load(voc, source="voc", annotations="dog_trainval").images) == 2


def test_voc_without_lists_is_split_by_folders_or_every_fifth(tmp_path, draw):
    for split, names in (("train", "ab"), ("valid", "c")):
        for name in names:
            draw(tmp_path / "split" / split / f"{name}.png", value=100)
            save_xml(tmp_path / "split" / split / f"{name}.xml", objects=xml_object("dog", 1, 1, 5, 5))
    assert [len(load(tmp_path / "split", split, source="voc").images) for split in ("train", "test")] == [2, 1]
    with pytest.raises(ValueError, match=r"has no folder other with xml files: add it, or set data.annotations"):
        load(tmp_path / "split", source="voc", annotations="other")
    for i in range(10):
        draw(tmp_path / "plain" / "images" / f"{i}.png", value=100)
        save_xml(tmp_path / "plain" / "labels" / f"{i}.xml", objects=xml_object("dog", 1, 1, 5, 5))
    found = [{*map(str, load(tmp_path / "plain", split, source="voc").images)} for split in ("train", "test")]
    assert [len(part) for part in found] == [8, 2]
    assert not found[0] & found[1]


def test_a_size_that_the_xml_does_not_know_comes_from_the_picture(voc):
    save_xml(voc / "VOC2012/Annotations/a.xml", size="<width>0</width><height>0</height>")
    assert load(voc, source="voc", classes=("dog",)).sizes[0] == (20, 20)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (xml_object("pig", 1, 1, 5, 5), r"object 0 is a 'pig', which is none of the classes dog, cat"),
        (xml_object("dog", 6, 1, 4, 5), r"object 0 has the box \[5.0, 0.0, -1.0, 5.0\]"),
        ("<object><name>dog</name></object>", r"object 0 has the bndbox \[None, None, None, None\]: .* must be num"),
        ("<object>", r"a.xml is no readable xml file: mismatched tag"),
    ],
)
def test_a_damaged_xml_is_refused_with_the_file_and_the_item(voc, objects, message):
    save_xml(voc / "VOC2012/Annotations/a.xml", objects=objects)
    with pytest.raises(ValueError, match=message):
        load(voc, source="voc", classes=("dog", "cat"))


def test_voc_names_what_is_missing(voc):
    (voc / "VOC2012/JPEGImages/b.jpg").unlink()
    assert "names the image b, which is not there" in load(voc, source="voc").absent[0]
    (voc / "VOC2012/Annotations/b.xml").unlink()
    with pytest.raises(ValueError, match=r"Main/train.txt names VOC2012/Annotations/b.xml, which is not there: add"):
        load(voc, source="voc")
    with pytest.raises(ValueError, match=r"no list ImageSets/Main/x.txt in .*holds .*Main/dog_trainval.txt.*: set d"):
        load(voc, source="voc", annotations="x")
    with pytest.raises(ValueError, match=r"data.masks: VOC's xml files hold boxes only; set data.masks to false"):
        load(voc, source="voc", masks=True)
    with pytest.raises(ValueError, match=r"holds no xml file: data.root must lead to VOC's annotations"):
        load(voc / "VOC2012/JPEGImages", source="voc")


def test_two_pictures_for_one_xml_are_refused(voc, draw):
    draw(voc / "VOC2012/JPEGImages/a.png", value=100)
    with pytest.raises(ValueError, match=r"JPEGImages/a.jpg and .*JPEGImages/a.png, of one name for one xml file: rem"):
        load(voc, source="voc")


def real(shared_data: Path, name: str) -> Path:
    if not (shared_data / name).is_dir():
        pytest.skip(f"no {name} in {shared_data}")
    return shared_data / name


def test_the_real_blood_cells_have_their_published_numbers_by_json_and_by_xml(shared_data):
    root = real(shared_data, "bccd")
    chosen = {"train": ("instances_train.json", 205, 2804), "val": ("instances_val.json", 87, 1137)}
    for name, images, boxes in [*chosen.values(), ("instances_test.json", 72, 945)]:
        found = load(root, annotations=name)
        assert (len(found.images), sum(len(each.labels) for each in found.objects)) == (images, boxes)
        assert found.classes == ("Platelets", "RBC", "WBC")
        assert not found.oddities()
    by_xml = load(root, "test", source="voc")
    assert by_xml.classes == found.classes
    for mine, other in zip(by_xml.objects, found.objects, strict=True):
        assert mine.labels.tolist() == other.labels.tolist()
        # The json takes xmin as the left edge and xmax as the right one.
        assert np.array_equal(mine.boxes, other.boxes + np.array([-1, -1, 1, 1]))


def test_the_real_pedestrians_have_their_published_numbers_and_areas(shared_data):
    root = real(shared_data, "pennfudan")
    for split, images, people in (("train", 120, 316), ("test", 50, 107)):
        found = load(root, split, masks=True)
        assert (len(found.images), sum(len(each.labels) for each in found.objects)) == (images, people)
        for objects, size in zip(found.objects, found.sizes, strict=True):
            assert objects.dense_masks(*size).sum((1, 2)).tolist() == objects.areas.tolist()


def test_the_real_sets_are_read_into_splits(shared_data):
    spec = DetectionData(root=str(real(shared_data, "pennfudan")), masks=True, size=(64, 64), test_limit=4)
    split = load_detection_split(spec, "test")
    image, target = split[2]
    assert image.shape == (3, 64, 64)
    assert target["masks"].shape == (len(target["boxes"]), 64, 64)
    # A mask fills its box from edge to edge, to within the pixel that either may lose by rounding.
    for mask, box in zip(target["masks"], target["boxes"], strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(edges - box.numpy()).max() <= 1

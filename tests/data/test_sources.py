"""Folders, parquet and CIFAR files: found, read sparingly, and refused with the reason."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spikeformers.data import ImageData, load_split
from spikeformers.data.sources import balanced_prefix

NAMES = ["cat", "dog"]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, labels, *, names=NAMES, column="image", first=0):
    """A file in Hugging Face's layout with row groups of 4; picture i has the grey level first + i."""
    images = [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({column: images, "label": pa.array(labels, pa.int64()), "extra": ["x"] * len(labels)})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


def parquet(root, **changed):
    return ImageData(source="parquet", root=str(root), size=8, **changed)


def levels(split) -> list[int]:
    return [int(split.picture(i)[0, 0, 0]) for i in range(len(split))]


def test_parquet_gives_pictures_labels_and_class_names_over_several_files(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1, 0])
    write(tmp_path / "train-00001-of-00002.parquet", [1, 1], first=100)
    split = load_split(parquet(tmp_path), "train")
    assert split.classes == ("cat", "dog")
    assert split.labels.tolist() == [0, 1, 0, 1, 1]
    assert levels(split) == [0, 1, 2, 100, 101]


@pytest.mark.parametrize("place", ["test.parquet", "validation-00000-of-00001.parquet", "data/val.parquet"])
def test_the_parquet_test_split_may_be_called_validation_or_lie_in_data(tmp_path, place):
    write(tmp_path / place, [1, 0])
    assert load_split(parquet(tmp_path), "test").labels.tolist() == [1, 0]


@pytest.mark.parametrize("place", ["", "data", "plain_text", "cifar100"])
def test_parquet_as_the_hub_keeps_cifar(tmp_path, place):
    (tmp_path / ".cache").mkdir()  # of the download; must not count as a second folder
    write(tmp_path / ".cache" / "train.parquet", [0])
    write(tmp_path / place / "train-00000-of-00001.parquet", [1, 0], column="img")
    write(tmp_path / place / "test-00000-of-00001.parquet", [0], column="img")
    split = load_split(parquet(tmp_path), "train")
    assert (split.classes, split.labels.tolist(), levels(split)) == (("cat", "dog"), [1, 0], [0, 1])
    assert load_split(parquet(tmp_path), "test").labels.tolist() == [0]


@pytest.mark.parametrize("names", [NAMES, None])
@pytest.mark.parametrize("columns", [("img", "fine_label", "coarse_label"), ("photo", "kind", "remark")])
def test_parquet_columns_are_found_by_type_and_usual_name(tmp_path, columns, names):
    image, label, other = columns
    images = [{"bytes": png(i), "path": None} for i in range(2)]
    table = pa.table({other: [5, 6] if "label" in other else ["x", "y"], label: [1, 0], image: images})
    if names:
        features = {label: {"names": names}, other: {"names": ["wrong"] * 7}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "train.parquet")
    split = load_split(parquet(tmp_path), "train")
    assert (split.classes, split.labels.tolist()) == (("cat", "dog") if names else ("0", "1"), [1, 0])
    assert levels(split) == [0, 1]


def test_of_several_folders_of_parquet_files_one_must_be_chosen(tmp_path):
    for name in ("clean", "noisy"):
        write(tmp_path / name / "train.parquet", [0])
    with pytest.raises(ValueError, match=r"holds clean, noisy: set data.root to one of these folders"):
        load_split(parquet(tmp_path), "train")
    assert len(load_split(parquet(tmp_path / "noisy"), "train")) == 1


def test_a_parquet_prefix_reads_only_its_row_groups_and_columns(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", [0, 1] * 8)
    read, original = [], pq.ParquetFile.read_row_group

    def spy(self, group, columns):
        read.append((group, tuple(columns)))
        return original(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    assert levels(load_split(parquet(tmp_path, train_limit=6), "train")) == list(range(6))
    assert read == [(0, ("image", "label")), (1, ("image", "label"))]


def test_parquet_without_names_numbers_its_classes_alike_in_every_split_and_prefix(tmp_path):
    write(tmp_path / "train.parquet", [0, 1, 4], names=None)
    write(tmp_path / "test.parquet", [1], names=None)
    for split, limit in (("train", 0), ("train", 1), ("test", 0)):
        assert load_split(parquet(tmp_path, train_limit=limit), split).classes == ("0", "1", "2", "3", "4")


def test_parquet_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no train\*.parquet in .*, which holds no parquet file"):
        load_split(parquet(tmp_path), "train")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"train.parquet is no readable parquet file"):
        load_split(parquet(tmp_path), "train")
    with pytest.raises(ValueError, match=r"no test\*.parquet or .* which holds train.parquet"):
        load_split(parquet(tmp_path), "test")
    pq.write_table(pa.table({"picture": [b"x"], "label": ["cat"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"must have a column of pictures .*has picture \(binary\), label \(string\)"):
        load_split(parquet(tmp_path), "train")
    images = [{"bytes": png(1), "path": "1.png"}]
    pq.write_table(pa.table({"img": images, "left": [0], "right": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"one of whole-number labels \(label or fine_label, if several\), has img"):
        load_split(parquet(tmp_path), "train")
    write(tmp_path / "train.parquet", [0, -1])
    with pytest.raises(ValueError, match=r"has label -1, outside its 2 classes: is this split unlabelled"):
        load_split(parquet(tmp_path), "train")


def test_a_broken_picture_in_parquet_is_named_by_file_and_row(tmp_path):
    images = [{"bytes": png(1), "path": "good.png"}, {"bytes": png(2)[:-30], "path": "bad.png"}]
    pq.write_table(pa.table({"image": images, "label": [0, 0]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"cannot read image row 1 of .*train.parquet \(bad.png\)"):
        load_split(parquet(tmp_path), "train")
    split = load_split(parquet(tmp_path, skip_unreadable=True), "train")
    assert (len(split), len(split.skipped)) == (1, 1)


def test_real_cifar10_prefix_reads_balanced_and_quickly(shared_data):
    spec = ImageData(source="parquet", root=str(shared_data / "cifar10"), size=32, train_limit=200, test_limit=100)
    for name, count in (("train", 200), ("test", 100)):
        split = load_split(spec, name)
        assert len(split.classes) == 10
        assert split.classes[0] == "airplane"
        assert np.bincount(split.labels).tolist() == [count // 10] * 10
        image, label = split[0]
        assert image.shape == (3, 32, 32)
        assert label == split.labels[0]


def test_a_folder_with_splits_reads_each_with_the_classes_of_training(folder):
    root = folder("train", "val")
    spec = ImageData(source="imagefolder", root=str(root), size=8)
    train, test = load_split(spec, "train"), load_split(spec, "test")
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert "val" in test.names[0]


def test_test_is_preferred_over_val_except_for_imagenet(folder):
    root = folder("train", "val", "test")
    for source, name in (("imagefolder", "/test/"), ("imagenet", "/val/")):
        assert name in load_split(ImageData(source=source, root=str(root), size=8), "test").names[0]


def test_a_folder_without_splits_is_split_80_to_20_per_class_for_good(folder):
    spec = ImageData(source="imagefolder", root=str(folder(per_class=10)), size=8)
    train, test = load_split(spec, "train", seed=1), load_split(spec, "test", seed=2)
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    assert test.labels.tolist() == [0] * 2 + [1] * 2
    assert not set(train.names) & set(test.names)
    assert train.names == load_split(spec, "train", seed=7).names


def test_a_limit_takes_from_every_class_in_turn(folder):
    spec = ImageData(source="imagefolder", root=str(folder("train", "test")), size=8, train_limit=5)
    assert load_split(spec, "train").labels.tolist() == [0, 0, 0, 1, 1]
    assert balanced_prefix(np.array([2, 2, 2, 0, 1, 1]), 4).tolist() == [0, 3, 4, 5]
    assert balanced_prefix(np.array([1, 0]), 0).tolist() == [0, 1]


def test_hidden_folders_and_files_are_no_classes_and_no_pictures(folder):
    root = folder("train", "test")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "cat" / "._00.png").write_bytes(b"notes")
    split = load_split(ImageData(source="imagefolder", root=str(root), size=8), "train")
    assert (split.classes, len(split)) == (("cat", "dog"), 8)


def test_folders_that_cannot_be_used_are_refused_by_name(folder, tmp_path):
    def refused(message, *, source="imagefolder", root=tmp_path, split="train"):
        with pytest.raises(ValueError, match=message):
            load_split(ImageData(source=source, root=str(root), size=8), split)

    refused("data.source=imagefolder needs data.root", root="")
    refused("data.root: no folder .*nowhere", root=tmp_path / "nowhere")
    refused(r"has no class folders: expected .*/CLASS/FILE for each image \(.jpg .*\)")
    refused("has no train/ and val/ folders", source="imagenet")
    root = folder("train")
    refused("has no test/ or val/ or valid/ or validation/ folder: add it", split="test")
    (root / "train" / "emu").mkdir()
    refused(r"class folder .*train/emu holds no image \(.jpg .*\): add some or remove the folder")
    (root / "train" / "emu").rmdir()
    folder("test")
    (root / "test" / "owl").mkdir()
    refused("class folder .*test/owl has no counterpart in .*train", split="test")


@pytest.mark.parametrize(("source", "count"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_as_torchvision_unpacks_it(tmp_path, monkeypatch, source, count):
    import torchvision.datasets as known

    kind = {"cifar10": known.CIFAR10, "cifar100": known.CIFAR100}[source]
    base = tmp_path / kind.base_folder
    base.mkdir()
    key = "labels" if source == "cifar10" else "fine_labels"
    for name, _ in kind.train_list + kind.test_list:
        data = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, key: [0, 1]}))
    (base / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [f"c{i}" for i in range(count)]}))
    spec = ImageData(source=source, root=str(tmp_path), size=32, train_limit=1)
    with pytest.raises(ValueError, match=r"does not hold .*, unpacked and whole: .*download=True"):
        load_split(spec, "train")  # the checksums are wrong
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    train, test = load_split(spec, "train"), load_split(spec, "test")
    assert (len(train), len(test), len(train.classes)) == (1, 2, count)
    assert train.picture(0)[1, 0, :3].tolist() == [0, 1, 2]
    assert train.picture(0).shape == (3, 32, 32)

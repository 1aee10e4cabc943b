"""Files of folders and archives under one name."""

import zipfile

import pytest

from spikeformers.data.archive import files_below


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("folder")
    (tmp_path / "a" / "._x.txt").write_text("another system's note")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.mkdir("a")
        archive.writestr("a/b/x.txt", "archive")
        archive.writestr("a/y.txt", "archive")
        archive.writestr("__MACOSX/a/._y.txt", "note")
    return tmp_path


def test_a_folder_and_its_archives_are_one_tree_in_which_unpacked_files_come_first(tree):
    files = files_below(tree)
    assert sorted(files) == ["a/b/x.txt", "a/y.txt", "packed.zip"]
    assert files["a/b/x.txt"].read_bytes() == b"folder"
    assert files["a/y.txt"].read_bytes() == b"archive"
    assert str(files["a/y.txt"]) == f"{tree}/packed.zip/a/y.txt"


def test_an_archive_is_a_tree_of_its_own(tree):
    files = files_below(tree / "packed.zip")
    assert {path: file.read_bytes() for path, file in files.items()} == {"a/b/x.txt": b"archive", "a/y.txt": b"archive"}


def test_links_are_followed(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "z.txt").write_text("far")
    (tree / "link").symlink_to(elsewhere)
    assert files_below(tree)["link/z.txt"].read_bytes() == b"far"


def test_a_damaged_archive_is_named(tree):
    (tree / "packed.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"packed.zip is no readable zip file \(.*\): fetch it again"):
        files_below(tree)

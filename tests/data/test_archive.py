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


def test_hidden_folders_are_left_out_of_folders_and_of_archives(tree):
    (tree / ".cache" / "deep").mkdir(parents=True)
    (tree / ".cache" / "deep" / "x.txt").write_text("hidden")
    with zipfile.ZipFile(tree / "packed.zip", "a") as archive:
        archive.writestr(".git/a/x.txt", "hidden")
    assert sorted(files_below(tree)) == ["a/b/x.txt", "a/y.txt", "packed.zip"]


def another(tree, **texts):
    with zipfile.ZipFile(tree / "second.zip", "w") as archive:
        for name, text in texts.items():
            archive.writestr(f"a/{name}.txt", text)


def test_different_files_of_one_path_in_two_archives_are_refused_by_name(tree):
    another(tree, y="other")
    said = r"packed.zip/a/y.txt and .*second.zip/a/y.txt differ and have one path: unpack each .* or set data.root"
    with pytest.raises(ValueError, match=said):
        files_below(tree)
    (tree / "a" / "y.txt").write_text("unpacked, and so the one that counts")
    assert files_below(tree)["a/y.txt"] == tree / "a" / "y.txt"


def test_archives_may_share_a_file_and_a_folder(tree):
    another(tree, y="archive", z="new")
    files = files_below(tree)
    assert files["a/y.txt"].read_bytes() == b"archive"
    assert files["a/z.txt"].read_bytes() == b"new"


def test_an_archive_is_a_tree_of_its_own(tree):
    files = files_below(tree / "packed.zip")
    assert {path: file.read_bytes() for path, file in files.items()} == {"a/b/x.txt": b"archive", "a/y.txt": b"archive"}


def test_links_are_followed(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "z.txt").write_text("far")
    (tree / "link").symlink_to(elsewhere)
    assert files_below(tree)["link/z.txt"].read_bytes() == b"far"


def test_links_that_lead_round_in_circles_end(tree):
    (tree / "c").mkdir()
    (tree / "c" / "z.txt").write_text("once for each way there")
    (tree / "a" / "to_c").symlink_to(tree / "c")
    (tree / "c" / "to_a").symlink_to(tree / "a")
    assert sorted(files_below(tree)) == [
        *("a/b/x.txt", "a/to_c/z.txt", "a/y.txt", "c/to_a/b/x.txt", "c/z.txt", "packed.zip")
    ]


def test_a_damaged_archive_is_named(tree):
    (tree / "packed.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"packed.zip is no readable zip file \(.*\): fetch it again"):
        files_below(tree)

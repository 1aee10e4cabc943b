"""Files in folders and in zip archives, read alike, by any process."""

import os
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile, ZipInfo

from spikeformers.data.decode import Stored


@dataclass(frozen=True)
class ZipMember:
    """A file in an archive that each process opens for itself: worker processes must not share a file's position."""

    archive: Path
    name: str

    def read_bytes(self) -> bytes:
        return opened_zip(self.archive).read(self.name)

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


def opened_zip(path: Path) -> ZipFile:
    """The archive as it is now, opened once in each process.  Raises ValueError for a broken one."""
    return _archive(path, os.getpid(), path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _archive(path: Path, process: int, modified: int) -> ZipFile:
    try:
        return ZipFile(path)
    except (BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no readable zip file ({error}): fetch it again") from error


def files_below(top: Path) -> dict[str, Stored]:
    """Path, with slashes, of every file of a zip archive, or of a folder and the archives that lie in it directly.

    Hidden files and folders are left out; links are followed.  A file of the folder hides one of the same path in an
    archive, from which it was unpacked.  Raises ValueError for different files of one path in two archives.
    """
    if top.is_file():
        return _packed([top], hidden={})
    unpacked: dict[str, Stored] = {file.relative_to(top).as_posix(): file for file in _unpacked(top)}
    return _packed(sorted(top.glob("[!.]*.zip")), hidden=unpacked) | unpacked


def _packed(archives: Iterable[Path], *, hidden: Container[str]) -> dict[str, Stored]:
    """What the archives hold, but for the paths `hidden`."""
    found: dict[str, ZipInfo] = {}
    members: dict[str, Stored] = {}
    for archive in archives:
        for entry in opened_zip(archive).infolist():
            path = entry.filename
            if entry.is_dir() or path in hidden or any(part.startswith(".") for part in path.split("/")):
                continue
            if path in members and (found[path].CRC, found[path].file_size) != (entry.CRC, entry.file_size):
                raise ValueError(
                    f"{members[path]} and {archive}/{path} differ and have one path: unpack each archive into a folder "
                    "of its own, or set data.root to one of them"
                )
            found[path], members[path] = entry, ZipMember(archive, path)
    return members


def _unpacked(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Files at any depth.  `above`: folders on the way here, so that links do not lead round in circles."""
    here = folder.resolve()
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _unpacked(Path(entry.path), (*above, here))
            else:
                yield Path(entry.path)

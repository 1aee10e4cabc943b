"""Files in folders and in zip archives, read alike, by any process."""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zipfile import BadZipFile, ZipFile

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

    Hidden files are left out; links are followed.  A file of the folder hides one of the same path in an archive, from
    which it was unpacked.
    """
    archives = [top] if top.is_file() else sorted(top.glob("[!.]*.zip"))
    packed = {name: ZipMember(each, name) for each in archives for name in opened_zip(each).namelist()}
    unpacked = {
        (Path(folder) / name).relative_to(top).as_posix(): Path(folder) / name
        for folder, _, names in os.walk(top, followlinks=True)
        for name in names
    }
    # "x/" is a folder of an archive, and "._x.jpg" are another system's notes about x.jpg.
    return {path: file for path, file in (packed | unpacked).items() if re.search(r"(^|/)[^./][^/]*$", path)}

"""Checkpoints on disk: immutable, one a version, written aside, flushed, then renamed into place.

A checkpoint is a file, or a folder where several ranks write their shards. Either way it is whole or absent, whatever
dies while it is written, and once written it stays. This module knows names and retention; what is inside is the
learner's affair.
"""

import os
import re
import shutil
from collections.abc import Container, Iterable
from pathlib import Path

_NAME = re.compile(r"v(\d{8,})\.(safetensors|sharded)")


class Checkpoints:
    """The checkpoints of one lineage in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def path(self, version: int) -> Path:
        """Where a version's checkpoint is, or would be as a file."""
        sharded = self._sharded(version)
        return sharded if sharded.is_dir() else self._file(version)

    def versions(self) -> list[int]:
        """The versions on disk, ascending."""
        named = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted({int(name[1]) for name in named if name})

    def write(self, version: int, content: bytes) -> None:
        """Make a version's checkpoint durable; raises `OSError` (disk full) and leaves nothing half-written."""
        _remove(self._sharded(version))
        write_atomically(self._file(version), content)

    def aside(self, version: int) -> Path:
        """An empty folder for a version's shards, to be put in place by `place`; raises `OSError`."""
        folder = _aside(self._sharded(version))
        _remove(folder)
        folder.mkdir()
        return folder

    def place(self, version: int) -> None:
        """Make the shards written aside a version's checkpoint; raises `OSError`."""
        place = self._sharded(version)
        for file in _aside(place).iterdir():
            _flush(file)
        _flush(_aside(place))
        _remove(place)
        _aside(place).replace(place)
        _remove(self._file(version))
        _flush(self.folder)

    def discard_after(self, version: int) -> list[int]:
        """Remove checkpoints that were never published, and what was cut short; returns the former."""
        for leftover in self.folder.glob("*.tmp"):
            _remove(leftover)
        later = [other for other in self.versions() if other > version]
        for other in later:
            _remove(self.path(other))
        return later

    def prune(self, keep: int, but: Container[int] = ()) -> None:
        """Remove all but the newest `keep` and those in `but`."""
        versions = self.versions()
        for version in versions[: max(0, len(versions) - keep)]:
            if version not in but:
                _remove(self.path(version))

    def _file(self, version: int) -> Path:
        return self.folder / f"v{version:08d}.safetensors"

    def _sharded(self, version: int) -> Path:
        return self.folder / f"v{version:08d}.sharded"


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, flush to disk, rename, flush the folder: readers see the old file or the new one."""
    write_pieces_atomically(path, [content])


def write_pieces_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """The same of a content that is not in one piece."""
    aside = _aside(path)
    try:
        with aside.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _flush(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _remove(path: Path) -> None:
    """Remove a file, or a folder in one go: renamed first, so that no part of it is taken for all."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix != ".tmp":
        path = path.replace(path.with_name(f"{path.name}.removed.tmp"))
    shutil.rmtree(path)


def _flush(path: Path) -> None:
    """A file survives the machine only when its folder is on disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

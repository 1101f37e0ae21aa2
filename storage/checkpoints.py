"""Checkpoints on disk: one immutable file a version, written aside, flushed, then renamed into place.

So a checkpoint is whole or absent, whatever dies while it is written, and once written it stays. This module knows
names and retention; what is inside is the learner's affair.
"""

import os
import re
from collections.abc import Container
from pathlib import Path

_NAME = re.compile(r"v(\d{8,})\.safetensors")


class Checkpoints:
    """The checkpoints of one lineage in one folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def path(self, version: int) -> Path:
        """Where a version's checkpoint is, or would be."""
        return self.folder / f"v{version:08d}.safetensors"

    def versions(self) -> list[int]:
        """The versions on disk, ascending."""
        named = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name in named if name)

    def write(self, version: int, content: bytes) -> None:
        """Make a version's checkpoint durable; raises `OSError` (disk full) and leaves nothing half-written."""
        write_atomically(self.path(version), content)

    def discard_after(self, version: int) -> list[int]:
        """Remove checkpoints that were never published, and what was cut short; returns the former."""
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        later = [other for other in self.versions() if other > version]
        for other in later:
            self.path(other).unlink()
        return later

    def prune(self, keep: int, but: Container[int] = ()) -> None:
        """Remove all but the newest `keep` and those in `but`."""
        versions = self.versions()
        for version in versions[: max(0, len(versions) - keep)]:
            if version not in but:
                self.path(version).unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, flush to disk, rename, flush the folder: readers see the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _flush_folder(path.parent)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    """A name survives the machine only when its folder is on disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

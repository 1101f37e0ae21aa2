"""A queue on disk: ordered, bounded, and there again after a kill -9.

Notable choices
- Keys are sequence numbers, big-endian: rocksdb's order is the order of appending. Nothing but the records is kept;
  how many there are and how large is counted when the spool is opened.
- What the files survive is chosen by whoever opens the spool. Without `sync` an append has been handed to the
  operating system: it survives the death of the process. With `sync` it has been forced to the disk: it survives that
  of the machine too, at the price of a flush an append (many groups share one).
- The bound is on what is kept, keys and records. The files may be twice as large while much is appended and dropped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from storage.kv import RocksKv

_KEY_BYTES: Final = 8
_COMPACT_BYTES: Final = 16 << 20
"""So much has been dropped when an empty spool gives back its space."""


class Kept(NamedTuple):
    """One record and its place in the order."""

    number: int
    record: bytes


def spool_folder(data_dir: Path, member: str) -> Path:
    """Where the actor of this name keeps its spool."""
    return data_dir / "actor" / member / "spool"


class Spool:
    """A bounded queue of records in a folder; for one thread at a time, and one process.

    Raises `StoreError` when the folder cannot be used, or is another process's.
    """

    def __init__(self, folder: Path, most_bytes: int, sync: bool) -> None:
        self.folder: Final = folder
        self.most_bytes: Final = most_bytes
        self.count = 0
        """Records kept."""
        self.size_bytes = 0
        """Their bytes, keys included."""
        self._sync = sync
        self._next = 0
        self._oldest = 0
        self._dropped_bytes = 0
        self._kv = RocksKv(folder)
        for key, record in self._kv.scan(b""):
            if not self.count:
                self._oldest = int.from_bytes(key)
            self._next = int.from_bytes(key) + 1
            self.count += 1
            self.size_bytes += _size(record)

    def append(self, groups: Sequence[Sequence[bytes]]) -> list[bool]:
        """Append groups of records in order, each whole or not at all; for each, whether there was room.

        What was taken is durable when this returns. Raises `StoreError` (disk full), and nothing was taken.
        """
        batch: dict[bytes, bytes | None] = {}
        taken, size_bytes = [], self.size_bytes
        for group in groups:
            more = sum(map(_size, group))
            fits = not group or size_bytes + more <= self.most_bytes
            taken.append(fits)
            if fits:
                size_bytes += more
                batch |= {_key(self._next + len(batch) + n): one for n, one in enumerate(group)}
        if batch:
            self._kv.write(batch, self._sync)
            self._next += len(batch)
            self.count += len(batch)
            self.size_bytes = size_bytes
        return taken

    def oldest(self, most: int, most_bytes: int) -> list[Kept]:
        """The oldest records, at most so many and, but for the first, of so many bytes together."""
        found: list[Kept] = []
        for key, record in self._kv.scan(b"", _key(self._oldest)):
            most_bytes -= len(record)
            if found and (len(found) == most or most_bytes < 0):
                break
            found.append(Kept(int.from_bytes(key), record))
        return found

    def drop(self, upto: int) -> None:
        """Forget all records up to this number, itself included; raises `StoreError`.

        Not flushed: a record that is there again after the machine died is sent twice.
        """
        batch: dict[bytes, bytes | None] = {}
        freed = 0
        for key, record in self._kv.scan(b"", _key(self._oldest)):
            if int.from_bytes(key) > upto:
                break
            batch[key] = None
            freed += _size(record)
        self._kv.write(batch)
        self._oldest = max(self._oldest, upto + 1)
        self.count -= len(batch)
        self.size_bytes -= freed
        self._dropped_bytes += freed
        if not self.count and self._dropped_bytes >= _COMPACT_BYTES:
            self._kv.compact()
            self._dropped_bytes = 0

    def close(self) -> None:
        """Release the folder; the records stay."""
        self._kv.close()


def _key(number: int) -> bytes:
    return number.to_bytes(_KEY_BYTES)


def _size(record: bytes) -> int:
    return _KEY_BYTES + len(record)

"""Ordered bytes -> bytes on disk: rocksdict with small caches and atomic batches.

The stores of this project are small and many (one a partition), so a process has one block cache of 8 MiB for all
of them, and each two write buffers of 4 MiB, instead of rocksdb's 64 and of the 2 GiB that Faust gives a table.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    Options,
    Rdict,
    WriteBatch,
    WriteOptions,
)

_MIB = 1 << 20
_CACHE = Cache(8 * _MIB)


class StoreError(RuntimeError):
    """A store cannot be opened or written; the message says which and why in one sentence."""


class Kv(Protocol):
    """What the stream state needs of a store; a batch is applied whole or not at all."""

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""

    def write(self, batch: Mapping[bytes, bytes | None]) -> None:
        """Put all pairs, delete the keys whose value is None."""

    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All pairs whose key starts with `prefix`, from `first` on, in key order, as of the first one's reading."""

    def close(self) -> None:
        """Release the store."""


class RocksKv:
    """A `Kv` in a folder; one process at a time (rocksdb's own lock refuses a second).

    Raises `StoreError` when the folder cannot be used. A batch survives the death of the process, and that of the
    machine where it is written with `sync`; the streams do without, for they read back what was lost from the log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        blocks = BlockBasedOptions()
        blocks.set_block_cache(_CACHE)
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(4 * _MIB)
        options.set_max_write_buffer_number(2)
        options.set_block_based_table_factory(blocks)
        options.set_keep_log_file_num(2)
        options.set_max_background_jobs(2)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._db = Rdict(str(path), options, access_type=AccessType.read_write())
        except Exception as error:  # rocksdict has no class of its own
            reason = "another process uses it" if "lock" in str(error).lower() else str(error)
            raise StoreError(f"the store {path} cannot be opened: {reason}") from None

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:
            raise StoreError(f"the store {self._path} cannot be read: {error}") from None
        return value

    def write(self, batch: Mapping[bytes, bytes | None], sync: bool = False) -> None:
        """Put all pairs, delete the keys whose value is None; with `sync` they are on the disk when it returns."""
        options = WriteOptions()
        options.sync = sync
        writes = WriteBatch(raw_mode=True)
        for key, value in batch.items():
            if value is None:
                writes.delete(key)
            else:
                writes.put(key, value)
        try:
            self._db.write(writes, options)
        except Exception as error:
            raise StoreError(f"the store {self._path} cannot be written: {error}") from None

    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All pairs whose key starts with `prefix`, from `first` on, in key order."""
        pairs = iter(self._db.items(from_key=max(prefix, first)))
        while True:
            try:
                key, value = next(pairs)
            except StopIteration:
                return
            except Exception as error:
                raise StoreError(f"the store {self._path} cannot be read: {error}") from None
            assert isinstance(key, bytes)  # raw mode
            if not key.startswith(prefix):
                return
            yield key, value

    def erase(self, first: bytes, upto: bytes) -> None:
        """Delete all keys from `first` on and below `upto`."""
        try:
            self._db.delete_range(first, upto)
        except Exception as error:
            raise StoreError(f"the store {self._path} cannot be written: {error}") from None

    def compact(self) -> None:
        """Give back the space of what was deleted."""
        self._db.compact_range(None, None)

    def close(self) -> None:
        """Release the store."""
        self._db.close()


class MemoryKv:
    """A `Kv` in a dict, for the serial runner: same order, nothing kept."""

    def __init__(self) -> None:
        self._pairs: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        return self._pairs.get(key)

    def write(self, batch: Mapping[bytes, bytes | None]) -> None:
        """Put all pairs, delete the keys whose value is None."""
        for key, value in batch.items():
            if value is None:
                self._pairs.pop(key, None)
            else:
                self._pairs[key] = value

    def scan(self, prefix: bytes, first: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All pairs whose key starts with `prefix`, from `first` on, in key order."""
        yield from sorted(
            pair for pair in self._pairs.items() if pair[0].startswith(prefix) and pair[0] >= first
        )

    def close(self) -> None:
        """Nothing to release."""

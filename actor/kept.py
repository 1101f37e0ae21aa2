"""An actor's copy on the disk, to start from while Kafka is away: records of the logs it reads, and versions.

Notable choices
- Of `control` every record is kept, of `catalogue` and `histories` the newest of each key, with how far each log was
  read: written together, so the copy is always as of one moment. It is what an actor that begins at these offsets
  would have come to, not a second authority: with Kafka there it is made anew from the logs.
- Whether an item is new depends on when it came into its leaf, so that offset is kept beside the last record's.
- A sum over the digests of all records of `control` and `catalogue` stands beside: probabilities that are computed on
  a part of the catalogue would be false ones.
- A version is a file: the manifest as it was signed, then the state's bytes, block by block, so that none of it is
  held twice. It is put in place whole; its digest is checked when it is read, as that of any version.
"""

import shutil
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import numpy as np

from storage.checkpoints import write_pieces_atomically
from storage.generations import Generations
from streams.blocks import BlockState, blocked
from streams.chain import Version, checked
from streams.events import UnreadableError, decode
from streams.signing import Trust
from streams.weights import Manifest, Seal, WeightError, weights_decoder

COMMAND: Final = b"c"
ITEM: Final = b"i"
HISTORY: Final = b"h"
"""First byte of a key, by what it is a key of."""
_CUT: Final = b"m"
_OFFSET_BYTES: Final = 8
_SUM: Final = 1 << 64

Places = list[tuple[str, int, int]]
"""(topic, partition, offset to be read next)."""


class CopyError(RuntimeError):
    """The copy is of no use; the message says why."""


class Cut(msgspec.Struct, kw_only=True):
    """The moment of which a copy is."""

    cluster: str
    bootstrap: str
    partitions: int
    positions: Places
    catalogue_version: int
    complete_ms: int
    """When the catalogue was last known to be complete."""
    digest: int = 0
    """Over the records of `control` and `catalogue`."""


class Change(NamedTuple):
    """The newest record of a key."""

    offset: int
    value: bytes | None
    born: int | None = None
    """Of an item: the offset at which it came into its leaf; None: as it is kept."""


class Item(NamedTuple):
    """A record of `catalogue`."""

    born: int
    offset: int
    key: bytes
    value: bytes


class Contents(NamedTuple):
    """All records of a copy."""

    control: list[bytes]
    items: list[Item]
    histories: list[tuple[bytes, bytes]]


class _Header(msgspec.Struct):
    manifest: bytes
    signature: bytes


_cut_decoder = msgspec.msgpack.Decoder(Cut)
_header_decoder = msgspec.msgpack.Decoder(_Header)


def copy_folder(data_dir: Path, member: str) -> Path:
    """Where the actor of this name keeps its copy."""
    return data_dir / "actor" / member / "copy"


class Copy:
    """The copy in a folder; for one thread at a time, and one process. Raises `StoreError` and `OSError`."""

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        self._records = Generations(folder / "records")
        self._versions = folder / "versions"
        self._versions.mkdir(exist_ok=True)
        self._digest = 0

    def cut(self) -> Cut | None:
        """The moment of which the whole copy is; None where there is none. Raises `CopyError`."""
        value = self._records.get(_CUT) if self._records.whole else None
        if value is None:
            return None
        try:
            cut = _cut_decoder.decode(value)
        except msgspec.DecodeError as error:
            raise CopyError(f"it is damaged ({error})") from None
        self._digest = cut.digest
        return cut

    def begin(self, cluster: str) -> None:
        """Make a new copy, from a cluster; what is there counts until `adopt`, if it is of the same cluster."""
        try:
            before = self.cut()
        except CopyError:
            before = None
        if before is None or before.cluster != cluster:
            self._records.clear()
            self.keep(set())
        self._records.begin()
        self._digest = 0

    def adopt(self) -> None:
        """What has been written since `begin` is whole now."""
        self._records.adopt()

    def write(self, changes: Mapping[bytes, Change], cut: Cut) -> None:
        """Bring the copy to another moment, whole or not at all."""
        batch: dict[bytes, bytes | None] = {}
        digest = self._digest
        for key, (offset, value, born) in changes.items():
            before = None if key.startswith(HISTORY) else self._records.get(key)
            if before is not None:
                digest -= _digest(key, before)
            entry = value
            if value is not None and key.startswith(ITEM):
                if born is None:
                    born = int.from_bytes(before[:_OFFSET_BYTES]) if before else offset
                entry = _number(born) + _number(offset) + value
            if entry is not None and not key.startswith(HISTORY):
                digest += _digest(key, entry)
            batch[key] = entry
        cut.digest = digest % _SUM
        self._records.write({**batch, _CUT: msgspec.msgpack.encode(cut)})
        self._digest = cut.digest

    def read(self, cut: Cut) -> Contents:
        """All records, those of the catalogue by offset; raises `CopyError` where some are not what was written."""
        control, items, histories, digest = [], [], [], 0
        for key, entry in self._records.scan(COMMAND):
            digest += _digest(key, entry)
            control.append(entry)
        for key, entry in self._records.scan(ITEM):
            digest += _digest(key, entry)
            born, offset = entry[:_OFFSET_BYTES], entry[_OFFSET_BYTES : 2 * _OFFSET_BYTES]
            value = entry[2 * _OFFSET_BYTES :]
            items.append(Item(int.from_bytes(born), int.from_bytes(offset), key[1:], value))
        for key, value in self._records.scan(HISTORY):
            histories.append((key[1:], value))
        if digest % _SUM != cut.digest:
            raise CopyError("it is damaged: its records are not those that were written")
        return Contents(control, sorted(items, key=lambda item: item.offset), histories)

    def write_version(self, version: Version, seal: Seal) -> None:
        """Keep a version."""
        header = msgspec.msgpack.encode(_Header(seal.manifest, seal.signature))
        write_pieces_atomically(self._file(version.number), _pieces(header, version.blocks))

    def versions(self) -> list[int]:
        """The versions kept, ascending."""
        names = (path.name for path in self._versions.iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    def version(self, number: int, trust: Trust | None) -> tuple[Version, Seal]:
        """A version, checked as one from the log; raises `WeightError`."""
        content = memoryview(self._file(number).read_bytes())
        try:
            size = int.from_bytes(content[:_OFFSET_BYTES])
            header = _header_decoder.decode(content[_OFFSET_BYTES : _OFFSET_BYTES + size])
            manifest = decode(weights_decoder, header.manifest)
            if not isinstance(manifest, Manifest) or manifest.version != number:
                raise WeightError(f"version {number}: another record in its place")
            blocks = _blocks(manifest, content[_OFFSET_BYTES + size :])
        except (msgspec.DecodeError, UnreadableError, ValueError, TypeError) as error:
            raise WeightError(f"version {number} is damaged ({error})") from None
        if trust is not None and not trust.holds(header.manifest, header.signature):
            raise WeightError(f"version {number}: not signed by the learner")
        return checked(manifest, blocks), Seal(header.manifest, header.signature)

    def keep(self, versions: set[int]) -> None:
        """Forget all other versions, and what was cut short."""
        for path in self._versions.iterdir():
            if not (path.name.isdigit() and int(path.name) in versions):
                path.unlink()

    def _file(self, version: int) -> Path:
        return self._versions / f"{version:012d}"

    def close(self) -> None:
        """Release the folder; the copy stays."""
        self._records.close()


def emptied(folder: Path) -> Copy:
    """An empty copy in the place of one that cannot be opened."""
    shutil.rmtree(folder, ignore_errors=True)
    return Copy(folder)


def _pieces(header: bytes, blocks: BlockState) -> Iterator[bytes | memoryview]:
    yield _number(len(header))
    yield header
    for name in sorted(blocks):
        for block in blocks[name].blocks:
            yield block.data


def _blocks(manifest: Manifest, content: memoryview) -> BlockState:
    """The state; raises `ValueError` or `TypeError` where the bytes are not those of the manifest's tensors."""
    blocks, at = {}, 0
    for tensor in sorted(manifest.schema, key=lambda one: one.name):
        kind = np.dtype(tensor.dtype)
        many = int(np.prod(tensor.shape, dtype=np.int64))
        flat = np.frombuffer(content, kind, many, at) if many else np.zeros(0, kind)
        blocks[tensor.name] = blocked(flat.reshape(tensor.shape))
        at += flat.nbytes
    if at != len(content):
        raise ValueError(f"{len(content)} bytes where {at} should be")
    return blocks


def _number(number: int) -> bytes:
    return number.to_bytes(_OFFSET_BYTES)


def _digest(key: bytes, entry: bytes) -> int:
    return int.from_bytes(blake2b(key + entry, digest_size=8).digest())

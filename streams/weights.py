"""The weight wire format: a version is a manifest, chunks and a commit, in one Kafka transaction.

A version is whole or absent: readers at read_committed see all of its records or none, and still check the digest
of the full state against the manifest. State is compared by name, never by order. Values are safetensors bytes in
chunks below Kafka's default message limit; nothing is ever unpickled.

At this stage every version is full (an anchor); deltas, block digests and signatures will come as further record
kinds and manifest fields.
"""

from hashlib import blake2b
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from streams.events import VERSION, UnreadableError, decode, encode

CHUNK_BYTES: Final = 900_000

State = dict[str, NDArray[Any]]


class StepEntry(msgspec.Struct, kw_only=True):
    """What one learning step took: offset ranges [from, to) of `samples`, and what became of them."""

    ranges: list[tuple[int, int, int]]
    """(partition, from, to)."""
    trained: int
    control: int
    without_target: int
    condemned: int = 0
    ranks: int = 1
    """Processes that shared the step: rank r took the partitions p with p % ranks = r."""


class TensorSchema(msgspec.Struct, kw_only=True):
    """One tensor of the state."""

    name: str
    dtype: str
    shape: list[int]


class Manifest(msgspec.Struct, tag_field="type", tag="manifest", kw_only=True):
    """What a version is."""

    v: str = VERSION
    version: int
    lineage: str
    codebook: str
    preset: str
    codes: int
    user_rows: int
    schema: list[TensorSchema]
    digest: str
    size_bytes: int
    chunks: int
    journal: list[StepEntry]
    watermark_ms: int
    created_ms: int
    restored: int = 0
    """The version whose weights these are, where the learner went back: its journal was undone, its optimisers are
    fresh, and the versions between the two are condemned."""


class Chunk(msgspec.Struct, tag_field="type", tag="chunk", kw_only=True):
    """A piece of the state's safetensors bytes."""

    v: str = VERSION
    version: int
    index: int
    data: bytes


class Commit(msgspec.Struct, tag_field="type", tag="commit", kw_only=True):
    """The version's last record."""

    v: str = VERSION
    version: int


class Ack(msgspec.Struct, tag_field="type", tag="ack", kw_only=True):
    """An actor's word on a version."""

    v: str = VERSION
    actor: str
    version: int
    applied: bool
    reason: str = ""
    created_ms: int
    """The manifest's own time."""
    applied_ms: int


WeightRecord = Manifest | Chunk | Commit

weights_decoder: Final[msgspec.msgpack.Decoder[WeightRecord]] = msgspec.msgpack.Decoder(
    WeightRecord
)
ack_decoder: Final = msgspec.msgpack.Decoder(Ack)


def schema_of(state: State) -> list[TensorSchema]:
    """The state's tensors by name."""
    return [
        TensorSchema(name=name, dtype=str(state[name].dtype), shape=list(state[name].shape))
        for name in sorted(state)
    ]


def digest_of(state: State) -> str:
    """BLAKE2b over names, types, shapes and values, in the order of the names."""
    digest = blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name}:{value.dtype}:{value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def record_key(version: int, part: str | int) -> str:
    """Compaction key of one record of a version."""
    return f"{version}/{part}"


def record_keys(manifest: Manifest) -> list[str]:
    """All keys of a version, to be deleted together."""
    parts: list[str | int] = ["manifest", *range(manifest.chunks), "commit"]
    return [record_key(manifest.version, part) for part in parts]


def pack(manifest: Manifest, state: State) -> list[tuple[str, bytes]]:
    """Key and value of each record of a version; sets the manifest's size and number of chunks."""
    content = save({name: np.asarray(value, order="C") for name, value in state.items()})
    pieces = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
    manifest.size_bytes, manifest.chunks = len(content), len(pieces)
    version = manifest.version
    records = [(record_key(version, "manifest"), encode(manifest))]
    records += [
        (record_key(version, index), encode(Chunk(version=version, index=index, data=piece)))
        for index, piece in enumerate(pieces)
    ]
    records.append((record_key(version, "commit"), encode(Commit(version=version))))
    return records


class WeightError(ValueError):
    """A version that cannot be taken; what is being served stays."""


class Assembler:
    """Puts versions together from the records of the topic, in order.

    `take` returns the manifest and the state's bytes at a version's commit, unchecked: `verified_state` checks.
    A version that cannot be put together is one error; what is left of it is passed over.
    """

    def __init__(self) -> None:
        self._manifest: Manifest | None = None
        self._pieces: list[bytes] = []

    def take(self, value: bytes | None) -> tuple[Manifest, bytes] | None:
        """Take one record's value (a tombstone is None).

        Raises `WeightError` when the record cannot be read, or cannot stand where it does.
        """
        if value is None:
            return None
        try:
            record = decode(weights_decoder, value)
        except UnreadableError as error:
            self._manifest = None
            raise WeightError(str(error)) from None
        if isinstance(record, Manifest):
            self._manifest, self._pieces = record, []
            return None
        manifest = self._manifest
        if manifest is None:
            return None  # the rest of a version that was refused, or whose beginning was deleted
        wrong = self._misplaced(manifest, record)
        if wrong:
            self._manifest = None
            raise WeightError(f"version {manifest.version}: {wrong}")
        if isinstance(record, Chunk):
            self._pieces.append(record.data)
            return None
        self._manifest = None
        return manifest, b"".join(self._pieces)

    def _misplaced(self, manifest: Manifest, record: Chunk | Commit) -> str:
        """Why a record cannot come now, or nothing."""
        if record.version != manifest.version:
            return f"a record of version {record.version} stands among its own"
        count = len(self._pieces)
        if isinstance(record, Chunk):
            fits = record.index == count
            return "" if fits else f"chunk {record.index} where chunk {count} should be"
        if count != manifest.chunks:
            return f"{count} of {manifest.chunks} chunks"
        size = sum(len(piece) for piece in self._pieces)
        fits = size == manifest.size_bytes
        return "" if fits else f"{size} bytes, the manifest says {manifest.size_bytes}"


def verified_state(manifest: Manifest, content: bytes) -> State:
    """The state of a version; raises `WeightError` when it is damaged or not what the manifest says."""
    try:
        state: State = load(content)
        schema = schema_of(state)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"version {manifest.version}: unreadable ({error})") from None
    theirs = {tensor.name: tensor for tensor in manifest.schema}
    ours = {tensor.name: tensor for tensor in schema}
    differing = sorted(
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
    )
    if differing:
        raise WeightError(f"version {manifest.version}: schema differs at {differing}")
    digest = digest_of(state)
    if digest != manifest.digest:
        raise WeightError(
            f"version {manifest.version}: digest {digest}, the manifest says {manifest.digest}"
        )
    return state

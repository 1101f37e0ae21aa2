"""The weight wire format: a version is a manifest, chunks and a commit, in one Kafka transaction.

A version is whole or absent: readers at read_committed see all of its records or none, and still check the digest
of the full state against the manifest. State is compared by name, never by order. Values are safetensors bytes in
chunks below Kafka's default message limit; nothing is ever unpickled.

Every version stands on `weights` as a delta (streams/delta.py): together they are the chain, and hold the journal.
Some stand on `weights.anchors` too, in full: where a reader begins, or begins again (streams/chain.py).
"""

from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from streams.blocks import BlockState, State
from streams.events import VERSION, UnreadableError, decode, encode
from streams.signing import Signer, Trust

CHUNK_BYTES: Final = 900_000


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
    made_ms: int = 0
    """When the step was made, wall clock; for measuring only."""


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
    """Of the full state, whatever this record carries of it (streams/blocks.py)."""
    base: int = 0
    """Version that the content is a delta of; 0: it is the full state, or, without chunks, only its anchor has it."""
    anchor: int = 0
    """Newest full version at or before this one."""
    chain: int = 0
    """Offset of `weights` after which this version's delta, and all later ones, stand."""
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
    signature: bytes = b""
    """Ed25519 over the manifest's bytes; empty where the learner has no key."""


class Trial(msgspec.Struct, tag_field="type", tag="trial", kw_only=True):
    """What a learner writes when it starts, to learn at once whether it could publish; nobody reads it."""

    v: str = VERSION
    data: bytes


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


WeightRecord = Manifest | Chunk | Commit | Trial

weights_decoder: Final[msgspec.msgpack.Decoder[WeightRecord]] = msgspec.msgpack.Decoder(
    WeightRecord
)
ack_decoder: Final = msgspec.msgpack.Decoder(Ack)


def schema_of(state: State | BlockState) -> list[TensorSchema]:
    """The state's tensors by name."""
    return [
        TensorSchema(name=name, dtype=str(state[name].dtype), shape=list(state[name].shape))
        for name in sorted(state)
    ]


def record_key(version: int, part: str | int) -> str:
    """Compaction key of one record of a version."""
    return f"{version}/{part}"


def record_keys(manifest: Manifest) -> list[str]:
    """All keys of a version, to be deleted together."""
    parts: list[str | int] = ["manifest", *range(manifest.chunks), "commit"]
    return [record_key(manifest.version, part) for part in parts]


def pack(
    manifest: Manifest, content: dict[str, NDArray[Any]], signer: Signer | None = None
) -> list[tuple[str, bytes]]:
    """Key and value of each record of a version that carries `content`, a full state or a delta.

    Sets the manifest's size and number of chunks.
    """
    packed = save({name: np.asarray(value, order="C") for name, value in content.items()})
    pieces = [packed[at : at + CHUNK_BYTES] for at in range(0, len(packed), CHUNK_BYTES)]
    manifest.size_bytes, manifest.chunks = len(packed), len(pieces)
    return _records(manifest, pieces, signer)


def pack_anchored(manifest: Manifest, signer: Signer | None = None) -> list[tuple[str, bytes]]:
    """The same on the chain for a version without a delta: its anchor alone has it."""
    manifest.size_bytes = manifest.chunks = manifest.base = 0
    return _records(manifest, [], signer)


def _records(
    manifest: Manifest, pieces: list[bytes], signer: Signer | None
) -> list[tuple[str, bytes]]:
    version, sealed = manifest.version, encode(manifest)
    records = [(record_key(version, "manifest"), sealed)]
    records += [
        (record_key(version, index), encode(Chunk(version=version, index=index, data=piece)))
        for index, piece in enumerate(pieces)
    ]
    commit = Commit(version=version, signature=signer.sign(sealed) if signer else b"")
    records.append((record_key(version, "commit"), encode(commit)))
    return records


class Seal(NamedTuple):
    """What a learner signed: to be kept with a version that is kept elsewhere than in the log."""

    manifest: bytes
    """As it was written."""
    signature: bytes


class WeightError(ValueError):
    """A version that cannot be taken; what is being served stays."""


class Assembler:
    """Puts versions together from the records of the topic, in order.

    `take` returns the manifest and the content's bytes at a version's commit; of these only the signature has been
    checked, where there is a `trust`: streams/chain.py checks the rest. A version that cannot be put together is one
    error; what is left of it is passed over.
    """

    def __init__(self, trust: Trust | None = None) -> None:
        self._trust = trust
        self._manifest: Manifest | None = None
        self._sealed = b""
        self._pieces: list[bytes] = []
        self.seal = Seal(b"", b"")
        """Of the version that was returned last."""

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
            self._manifest, self._sealed, self._pieces = record, value, []
            return None
        if isinstance(record, Trial):
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
        self._manifest, self.seal = None, Seal(self._sealed, record.signature)
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
        if size != manifest.size_bytes:
            return f"{size} bytes, the manifest says {manifest.size_bytes}"
        if self._trust is not None and not self._trust.holds(self._sealed, record.signature):
            return f"{'not' if not record.signature else 'wrongly'} signed"
        return ""


def unpacked(manifest: Manifest, content: bytes) -> dict[str, NDArray[Any]]:
    """The tensors of a version's content; raises `WeightError` when it is damaged."""
    try:
        tensors: dict[str, NDArray[Any]] = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"version {manifest.version}: unreadable ({error})") from None
    return tensors


def check(manifest: Manifest, schema: list[TensorSchema], digest: str) -> None:
    """Raise `WeightError` when a full state, of this schema and digest, is not what the manifest says."""
    theirs = {tensor.name: tensor for tensor in manifest.schema}
    ours = {tensor.name: tensor for tensor in schema}
    differing = sorted(
        name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
    )
    if differing:
        raise WeightError(f"version {manifest.version}: schema differs at {differing}")
    if digest != manifest.digest:
        raise WeightError(
            f"version {manifest.version}: digest {digest}, the manifest says {manifest.digest}"
        )

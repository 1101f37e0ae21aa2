"""Following the versions: an anchor to begin with, then delta upon delta, each checked in full.

Pure: who reads the log gives what it has put together (`streams.weights.Assembler`), in the order of each topic; the
two topics need not come in step. What cannot be taken changes nothing, and says why; from then on deltas have no
base here, until the next anchor (contract of the policy, "Versions").
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from streams.blocks import BlockState, State, blocked_state, root, whole_state
from streams.delta import DeltaError, applied
from streams.weights import Manifest, WeightError, check, schema_of, unpacked

Whole = tuple[Manifest, bytes]
"""A version as it came: its manifest and its content's bytes."""


@dataclass(frozen=True)
class Version:
    """A version and its state, checked against its digest."""

    manifest: Manifest
    blocks: BlockState

    @property
    def number(self) -> int:
        """The publication number."""
        return self.manifest.version

    @property
    def state(self) -> State:
        """The tensors by name, not to be written to."""
        return whole_state(self.blocks)


def anchored(manifest: Manifest, content: bytes) -> Version:
    """A full version; raises `WeightError` when it is damaged or not what its manifest says."""
    return checked(manifest, blocked_state(unpacked(manifest, content)))


def followed(base: Version, manifest: Manifest, content: bytes) -> Version:
    """The version that a delta makes of its base; raises `WeightError`."""
    if manifest.base != base.number:
        raise WeightError(
            f"version {manifest.version}: a delta of version {manifest.base}, and version {base.number} is here"
        )
    _same_lineage(base, manifest)
    try:
        blocks = applied(base.blocks, unpacked(manifest, content))
    except DeltaError as error:
        raise WeightError(f"version {manifest.version}: {error}") from None
    return checked(manifest, blocks)


def checked(manifest: Manifest, blocks: BlockState) -> Version:
    """A full state as a version; raises `WeightError` when it is not what the manifest says."""
    check(manifest, schema_of(blocks), root(blocks))
    return Version(manifest, blocks)


class Followed(NamedTuple):
    """What came of a number of versions."""

    refused: list[tuple[Manifest, WeightError]]
    again: int | None
    """Offset of `weights` from which deltas must be read, some maybe again; None: nothing to read again."""


class Chain:
    """The newest version that could be taken; numbers only grow."""

    def __init__(self) -> None:
        self.head: Version | None = None
        self.rewind: int | None = None
        """Set when an anchor was taken: offset of `weights` from which its deltas must be read, maybe again, until
        `follow` has said so."""

    def begin(self, version: Version) -> None:
        """Go on from a version that was had elsewhere."""
        self.head, self.rewind = version, version.manifest.chain

    def follow(self, arrived: Iterable[Whole]) -> Followed:
        """Take what has come from both topics; each that is refused leaves the head where it is."""
        refused = []
        for manifest, content in in_order(arrived):
            try:
                self.take(manifest, content)
            except WeightError as error:
                refused.append((manifest, error))
        again, self.rewind = self.rewind, None
        return Followed(refused, again)

    def take(self, manifest: Manifest, content: bytes) -> bool:
        """Take a version; whether it is the new head. Raises `WeightError`, and the head stays."""
        head = self.head
        if head is not None and manifest.version <= head.number:
            if manifest.version == head.number and manifest.digest != head.manifest.digest:
                raise WeightError(f"version {manifest.version}: a second one, of other weights")
            return False
        if manifest.base:
            if head is None:
                return False  # nothing to begin with yet
            self.head = followed(head, manifest, content)
            return True
        if not manifest.chunks:
            return False  # its anchor has it
        version = anchored(manifest, content)
        if head is not None:
            _same_lineage(head, manifest)
        self.head, self.rewind = version, manifest.chain
        return True


def _same_lineage(before: Version, manifest: Manifest) -> None:
    if manifest.lineage != before.manifest.lineage:
        raise WeightError(
            f"version {manifest.version}: of lineage {manifest.lineage}, not {before.manifest.lineage}"
        )


def in_order(arrived: Iterable[Whole]) -> list[Whole]:
    """What came from both topics by its number, a delta before the anchor of the same version: cheaper to take."""
    return sorted(arrived, key=lambda whole: (whole[0].version, not whole[0].base))

"""Publishing versions: fenced, whole or absent, numbers only grow.

Notable choices
- A version's records on both topics, the tombstones of expired ones, and the dead letters of what its steps could
  not use are one transaction (learner/fenced.py).
- Every version is published as a delta of the one before. In full too: one every `anchor_every_s`, one without a
  version before it, one when the deltas since the last have taken a quarter of what their topic keeps (what leads
  from an anchor to the newest version must be there), and every one that an arm names, while it is named.
- A trial at the start writes what a version would: a wrong set-up (rights, message sizes, a missing topic) fails
  before anything has been learned.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kafka.errors import KafkaError, ProducerFencedError
from msgspec import structs
from numpy.typing import NDArray

from learner.checkpoint import Progress
from learner.fenced import Fenced, Record, why
from learner.retention import Retention
from learner.settings import LearnSettings
from streams.blocks import BlockState, State, blocked_state, not_finite, root
from streams.clients import records
from streams.delta import DeltaError, changes
from streams.events import Command, DeadLetter, UnreadableError, decode, encode
from streams.settings import KafkaSettings
from streams.signing import Signer, signer, trust_in
from streams.topics import CONTROL, DEAD_LETTERS, WEIGHTS, WEIGHTS_ANCHORS
from streams.weights import (
    CHUNK_BYTES,
    Commit,
    Manifest,
    StepEntry,
    Trial,
    WeightError,
    pack,
    pack_anchored,
    schema_of,
    weights_decoder,
)
from streams.weights_log import version_at

log = logging.getLogger("dwell.learner")

MAX_EXPIRED = 50  # anchors a publication, so that none of them takes long
TRANSACTION_S = 10.0  # and more for a large one; the broker would end it after a minute
SLOWEST_BYTES_PER_S = 20e6
PATIENCE_S = 600.0  # a broker that is away comes back; nothing is lost by waiting


class PublicationError(RuntimeError):
    """A version was not published; the message says why."""


@dataclass(frozen=True)
class Terms:
    """How a learner publishes."""

    horizon_s: float
    """Versions can be had for at least this long."""
    anchor_every_s: float
    """Between versions in full."""
    kept_bytes: int
    """Of deltas on their topic."""
    signer: Signer | None = None

    @classmethod
    def of(cls, kafka: KafkaSettings, learn: LearnSettings) -> "Terms":
        """As configured; raises `KeyFileError`."""
        key = signer(learn.signing_key)
        return cls(learn.weights_horizon_s, learn.anchor_every_s, kafka.weights_mb << 20, key)


class Publisher:
    """The one learner that may publish; opening it fences all others."""

    def __init__(self, bootstrap: str, terms: Terms) -> None:
        """Raises `PublicationError` when Kafka does not let it publish or the log cannot be understood."""
        self._bootstrap = bootstrap
        self._terms = terms
        self._horizon_ms = round(terms.horizon_s * 1000)
        self._retention = Retention()
        self._read_upto = {WEIGHTS_ANCHORS: 0, WEIGHTS: 0}
        self._fenced: Fenced | None = None
        self._blocks: BlockState | None = None
        self._lost: set[int] = set()
        self._since_anchor = 0
        self.last: Manifest | None = None
        """The newest version in the log."""
        try:
            self._open()
            self._try()
        except (KafkaError, TimeoutError) as error:
            self.close()
            raise PublicationError(
                f"Kafka at {bootstrap} does not let this learner publish: {why(error)}"
            ) from None
        except BaseException:
            self.close()
            raise

    def go_on_from(self, state: State) -> None:
        """Say what the state of `last` is, so that the next version can be a delta; raises `PublicationError`."""
        assert self.last is not None
        blocks = blocked_state(state)
        if root(blocks) != self.last.digest:
            raise PublicationError(
                f"version {self.last.version} is not published: its state has another digest"
            )
        self._blocks = blocks

    def publish(
        self,
        state: State,
        progress: Progress,
        codebook: str,
        journal: list[StepEntry],
        now_ms: int,
        named: set[int],
        letters: Sequence[DeadLetter] = (),
        commands: Sequence[Command] = (),
        restored: int = 0,
    ) -> Manifest:
        """Publish `state` as `progress.version`; versions in `named` never expire. Returns the chain's manifest.

        `commands` are written to `control` in the same transaction; `restored` is the manifest's.

        Raises `PublicationError` when the weights are not finite, this learner has been fenced, or Kafka refuses
        or has not answered for `PATIENCE_S`.
        """
        if broken := not_finite(state):
            raise PublicationError(
                f"version {progress.version}: {', '.join(broken[:3])} not finite"
            )
        delta, blocks = self._changes(state)
        full = delta is None or self._anchor_is_due(now_ms)
        manifest = Manifest(
            version=progress.version,
            lineage=progress.lineage,
            codebook=codebook,
            preset=progress.preset,
            codes=progress.codes,
            user_rows=progress.user_rows,
            schema=schema_of(state),
            digest=root(blocks),
            base=progress.version - 1 if delta is not None else 0,
            anchor=progress.version if full else max(self._retention.anchors),
            chain=self._read_upto[WEIGHTS],
            size_bytes=0,
            chunks=0,
            journal=journal,
            watermark_ms=progress.watermark_ms,
            created_ms=now_ms,
            restored=restored,
        )
        signer = self._terms.signer
        packed = pack_anchored(manifest, signer) if delta is None else pack(manifest, delta, signer)
        parts = _on(WEIGHTS, packed)
        news = []
        if full:
            news.append(anchor := _as_anchor(manifest))
            parts += _on(WEIGHTS_ANCHORS, pack(anchor, state, signer))
            self._see_to_room(anchor.size_bytes)
        for anchor, content in self._asked_for(named - {progress.version}):
            news.append(anchor)
            parts += _on(WEIGHTS_ANCHORS, pack(anchor, content, signer))
        before_ms = now_ms - self._horizon_ms
        expired = self._retention.expired(before_ms, named, MAX_EXPIRED)
        parts += [
            (WEIGHTS_ANCHORS, key.encode(), None) for keys in expired.values() for key in keys
        ]
        parts += [(DEAD_LETTERS, letter.key, encode(letter)) for letter in letters]
        parts += [(CONTROL, None, encode(command)) for command in commands]
        self._commit(manifest, parts)
        for version in expired:
            self._retention.forget(version)
        for anchor in news:
            self._retention.anchor(anchor)
        self._retention.made[manifest.version] = now_ms
        self._retention.trim(before_ms, named)
        self._since_anchor = 0 if full else self._since_anchor + manifest.size_bytes
        self.last, self._blocks = manifest, blocks
        return manifest

    def created_ms(self, version: int) -> int | None:
        """When a version was made, if it is still within the horizon."""
        return self._retention.made.get(version)

    def first_of_each(self, span_ms: int) -> set[int]:
        """Of the versions within the horizon, the first of each span of time."""
        return self._retention.first_of_each(span_ms)

    def close(self, patience_s: float = 5) -> None:
        """Leave; an open transaction is aborted by whoever comes next."""
        if self._fenced is not None:
            client, self._fenced = self._fenced, None
            client.close(patience_s)

    def _changes(self, state: State) -> tuple[dict[str, NDArray[Any]] | None, BlockState]:
        """The delta from the version before, where there is one, and the state in blocks."""
        if self._blocks is not None:
            try:
                return changes(self._blocks, state)
            except DeltaError as error:  # the policy itself is another
                log.warning("publishing in full: %s", error)
        return None, blocked_state(state)

    def _anchor_is_due(self, now_ms: int) -> bool:
        newest = max(self._retention.anchors, default=None)
        if newest is None or self._since_anchor >= self._terms.kept_bytes // 4:
            return True
        since_ms = now_ms - self._retention.anchors[newest].created_ms
        return since_ms >= self._terms.anchor_every_s * 1000

    def _see_to_room(self, full_bytes: int) -> None:
        kept_bytes = self._terms.kept_bytes
        if 8 * full_bytes > kept_bytes:
            log.warning(
                "a full version takes %d MiB, kafka.weights_mb = %d: versions leave the log before their horizon",
                *(full_bytes >> 20, kept_bytes >> 20),
            )

    def _asked_for(self, named: set[int]) -> list[tuple[Manifest, State]]:
        """The versions that an arm names and that are not there in full yet."""
        trust = trust_in(self._terms.signer)
        found = []
        for number in sorted(named - self._retention.anchors.keys() - self._lost):
            try:
                version = version_at(self._bootstrap, number, trust)
            except WeightError as error:
                log.warning("an arm names a version that cannot be kept: %s", error)
                self._lost.add(number)
                continue
            found.append((_as_anchor(version.manifest), version.state))
        return found

    def _open(self) -> None:
        """Fence whoever published until now, and read what is committed."""
        self._fenced = Fenced(self._bootstrap)
        self._read_back()

    def _try(self) -> None:
        """Write as a version would be written, and nothing that anybody takes."""
        assert self._fenced is not None
        parts: list[Record] = [
            (WEIGHTS, b"trial", encode(Trial(data=bytes(CHUNK_BYTES)))),
            (WEIGHTS_ANCHORS, b"trial", None),
        ]
        self._read_upto |= self._fenced.commit(parts, TRANSACTION_S)

    def _read_back(self) -> None:
        """The committed versions that were not read yet; `last` is the newest of all."""
        for topic in (WEIGHTS_ANCHORS, WEIGHTS):
            begun: dict[int, Manifest] = {}
            for record in records(self._bootstrap, topic, first=self._read_upto[topic]):
                self._read_upto[topic] = record.offset + 1
                if record.value is None:
                    number, _, _ = (record.key or b"").partition(b"/")
                    if number.isdigit():
                        self._retention.forget(int(number))
                    continue
                try:
                    part = decode(weights_decoder, record.value)
                except UnreadableError as error:
                    where = f"{topic} offset {record.offset}"
                    if error.reason == "unknown_major":  # a later release's, and its number counts
                        raise PublicationError(f"{where}: {error}") from None
                    log.warning("%s skipped: %s", where, error)
                    continue
                if isinstance(part, Manifest):
                    begun[part.version] = part
                elif isinstance(part, Commit) and part.version in begun:
                    self._committed(topic, begun.pop(part.version))

    def _committed(self, topic: str, manifest: Manifest) -> None:
        if topic == WEIGHTS_ANCHORS:
            self._retention.anchor(manifest)
        else:
            self._retention.made[manifest.version] = manifest.created_ms
        # of the same number the chain's, which is read last
        if self.last is None or manifest.version >= self.last.version:
            self.last = manifest

    def _commit(self, manifest: Manifest, parts: list[Record]) -> None:
        """One transaction, tried again until its outcome is known."""
        before = self.last.version if self.last else 0
        size = sum(len(value or b"") for _, _, value in parts)
        limit_s = TRANSACTION_S + size / SLOWEST_BYTES_PER_S
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self._fenced is None:
                    self._open()
                    if self.last is not None and self.last.version > before:
                        if _same(self.last, manifest):
                            return  # it had been committed after all
                        raise ProducerFencedError
                assert self._fenced is not None
                self._read_upto |= self._fenced.commit(parts, limit_s)
                return
            except ProducerFencedError:
                raise PublicationError(
                    f"version {manifest.version} was not published: another learner has started on this "
                    "cluster and taken over; there can be one at a time"
                ) from None
            except (KafkaError, TimeoutError) as error:
                self.close(0)
                passing = isinstance(error, TimeoutError) or error.retriable
                if not passing or time.monotonic() > give_up:
                    raise PublicationError(
                        f"version {manifest.version} was not published: {why(error)}"
                    ) from None
                log.warning("version %d: %s; trying again", manifest.version, why(error))
                time.sleep(0.2)


def _as_anchor(manifest: Manifest) -> Manifest:
    """The manifest of the same version in full."""
    return structs.replace(manifest, base=0, anchor=manifest.version)


def _on(topic: str, packed: list[tuple[str, bytes]]) -> list[Record]:
    return [(topic, key.encode(), value) for key, value in packed]


def _same(one: Manifest, other: Manifest) -> bool:
    return (one.version, one.digest, one.journal) == (other.version, other.digest, other.journal)

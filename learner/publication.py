"""Publishing versions: fenced, whole or absent, numbers only grow.

One transactional id for all learners of a cluster: starting a second one fences the first (Kafka transactions), so
a learner that lost its place cannot publish. A version's records, and the tombstones of expired ones, are one
transaction.
"""

from dataclasses import dataclass

from kafka import KafkaProducer
from kafka.errors import KafkaError

from learner.checkpoint import Progress
from learner.decoder import LazyDecoder
from learner.policy import state_of
from streams.clients import producer, records
from streams.events import UnreadableError, decode
from streams.topics import WEIGHTS_ANCHORS
from streams.weights import (
    Commit,
    Manifest,
    StepEntry,
    digest_of,
    pack,
    record_keys,
    schema_of,
    weights_decoder,
)

TRANSACTIONAL_ID = "dwell-learner"
MAX_TOMBSTONES = 50  # expired versions a publication, so that none of them takes long


class PublicationError(RuntimeError):
    """A version was not published; the message says why."""


@dataclass(frozen=True)
class _Kept:
    created_ms: int
    keys: list[str]


class Publisher:
    """The one learner that may publish; opening it fences all others."""

    def __init__(self, bootstrap: str, horizon_s: float) -> None:
        self._horizon_ms = round(horizon_s * 1000)
        self._producer: KafkaProducer = producer(
            bootstrap, transactional_id=TRANSACTIONAL_ID, max_request_size=1 << 20, linger_ms=0
        )
        self._producer.init_transactions()
        self._kept: dict[int, _Kept] = {}
        self.last: Manifest | None = None
        self._read_back(bootstrap)

    def _read_back(self, bootstrap: str) -> None:
        """The committed versions in the log; `last` is the newest."""
        manifests: dict[int, Manifest] = {}
        for record in records(bootstrap, WEIGHTS_ANCHORS):
            if record.value is None:
                self._kept.pop(int((record.key or b"0").partition(b"/")[0]), None)
                continue
            try:
                part = decode(weights_decoder, record.value)
            except UnreadableError as error:
                raise PublicationError(f"weights.anchors offset {record.offset}: {error}") from None
            if isinstance(part, Manifest):
                manifests[part.version] = part
            elif isinstance(part, Commit) and part.version in manifests:
                self.last = manifests[part.version]
                self._kept[part.version] = _Kept(self.last.created_ms, record_keys(self.last))

    def publish(
        self,
        model: LazyDecoder,
        progress: Progress,
        codebook: str,
        journal: list[StepEntry],
        now_ms: int,
        named: set[int],
    ) -> Manifest:
        """Publish `model` as `progress.version`; versions in `named` never expire.

        Raises `PublicationError` when the weights are not finite or this learner has been fenced.
        """
        state = state_of(model)
        for name, tensor in state.items():
            if not bool(abs(tensor).max() < float("inf")):
                raise PublicationError(f"version {progress.version}: {name} is not finite")
        manifest = Manifest(
            version=progress.version,
            lineage=progress.lineage,
            codebook=codebook,
            preset=progress.preset,
            codes=progress.codes,
            user_rows=progress.user_rows,
            schema=schema_of(state),
            digest=digest_of(state),
            size_bytes=0,
            chunks=0,
            journal=journal,
            watermark_ms=progress.watermark_ms,
            created_ms=now_ms,
        )
        parts = pack(manifest, state)
        expired = [
            version
            for version, kept in self._kept.items()
            if version not in named and kept.created_ms < now_ms - self._horizon_ms
        ][:MAX_TOMBSTONES]
        try:
            self._producer.begin_transaction()
            for key, value in parts:
                self._producer.send(WEIGHTS_ANCHORS, value, key.encode(), partition=0)
            for version in expired:
                for key in self._kept[version].keys:
                    self._producer.send(WEIGHTS_ANCHORS, None, key.encode(), partition=0)
            self._producer.commit_transaction()
        except KafkaError as error:
            raise PublicationError(
                f"version {progress.version} was not published: {error!r}"
            ) from error
        for version in expired:
            del self._kept[version]
        self._kept[manifest.version] = _Kept(now_ms, record_keys(manifest))
        self.last = manifest
        return manifest

    def close(self) -> None:
        """Leave; an open transaction is aborted by whoever comes next."""
        self._producer.close(timeout=5)

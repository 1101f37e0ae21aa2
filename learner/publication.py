"""Publishing versions: fenced, whole or absent, numbers only grow.

Notable choices
- One transactional id for all learners of a cluster: starting a second one fences the first (Kafka transactions), so
  a learner that lost its place cannot publish. A version's records, the tombstones of expired ones, and the dead
  letters of what its steps could not use are one transaction. A version's time to expire begins when its successor
  is made: after a pause the last one is still there to go back to.
- A transaction has a time limit, after which its outcome is not known: the producer is replaced by one of the same
  id, which fences it and ends what it left open, and the log says whether the version is there. (kafka-python 3.0
  waits for ever in a commit when the broker refuses its connection at that moment.)
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Thread
from typing import TypeVar

from kafka import KafkaProducer
from kafka.errors import InvalidProducerEpochError, KafkaError, ProducerFencedError

from learner.checkpoint import Progress
from streams.clients import producer, records
from streams.events import Command, DeadLetter, UnreadableError, decode, encode
from streams.topics import CONTROL, DEAD_LETTERS, WEIGHTS_ANCHORS
from streams.weights import (
    Commit,
    Manifest,
    State,
    StepEntry,
    digest_of,
    pack,
    record_keys,
    schema_of,
    weights_decoder,
)

log = logging.getLogger("dwell.learner")

TRANSACTIONAL_ID = "dwell-learner"
MAX_TOMBSTONES = 50  # expired versions a publication, so that none of them takes long
TRANSACTION_S = 10.0  # and more for a large one; the broker would end it after a minute
SLOWEST_BYTES_PER_S = 20e6
OPEN_S = 20
PATIENCE_S = 60.0
RECONNECT_MS = 1000  # the client would come to wait half a minute between attempts

T = TypeVar("T")
_Record = tuple[str, bytes | None, bytes | None]
"""Topic, key, value; all topics written here have one partition."""


class PublicationError(RuntimeError):
    """A version was not published; the message says why."""


@dataclass(frozen=True)
class _Kept:
    created_ms: int
    keys: list[str]


class Publisher:
    """The one learner that may publish; opening it fences all others."""

    def __init__(self, bootstrap: str, horizon_s: float) -> None:
        """Raises `PublicationError` when Kafka does not answer or the log cannot be understood."""
        self._bootstrap = bootstrap
        self._horizon_ms = round(horizon_s * 1000)
        self._kept: dict[int, _Kept] = {}
        self._read_upto = 0
        self._producer: KafkaProducer | None = None
        self.last: Manifest | None = None
        try:
            self._open()
        except KafkaError as error:
            self.close()
            raise PublicationError(
                f"Kafka at {bootstrap} does not let this learner publish: {_why(error)}"
            ) from None
        except BaseException:
            self.close()
            raise

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
        """Publish `state` as `progress.version`; versions in `named` never expire.

        `commands` are written to `control` in the same transaction; `restored` is the manifest's.

        Raises `PublicationError` when the weights are not finite, this learner has been fenced, or Kafka refuses
        or has not answered for `PATIENCE_S`.
        """
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
            restored=restored,
        )
        parts: list[_Record] = [
            (WEIGHTS_ANCHORS, key.encode(), value) for key, value in pack(manifest, state)
        ]
        numbers = sorted(self._kept)
        expired = [
            version
            for version, successor in pairwise(numbers)
            if version not in named and self._kept[successor].created_ms < now_ms - self._horizon_ms
        ][:MAX_TOMBSTONES]
        parts += [
            (WEIGHTS_ANCHORS, key.encode(), None)
            for version in expired
            for key in self._kept[version].keys
        ]
        parts += [(DEAD_LETTERS, letter.key, encode(letter)) for letter in letters]
        parts += [(CONTROL, None, encode(command)) for command in commands]
        self._commit(manifest, parts)
        for version in expired:
            self._kept.pop(version, None)
        self._kept[manifest.version] = _Kept(now_ms, record_keys(manifest))
        self.last = manifest
        return manifest

    def created_ms(self, version: int) -> int | None:
        """When a version was made, if it is still in the log."""
        kept = self._kept.get(version)
        return None if kept is None else kept.created_ms

    def first_of_each(self, span_ms: int) -> set[int]:
        """Of the versions still in the log, the first of each span of time."""
        first: dict[int, int] = {}
        for version, kept in sorted(self._kept.items()):
            first.setdefault(kept.created_ms // span_ms, version)
        return set(first.values())

    def close(self, patience_s: float = 5) -> None:
        """Leave; an open transaction is aborted by whoever comes next."""
        if self._producer is not None:
            client, self._producer = self._producer, None
            with suppress(KafkaError):
                client.close(timeout=patience_s)

    def _open(self) -> None:
        """Fence whoever published until now, and read what is committed."""
        self._producer = _fencing(self._bootstrap)
        self._read_back()

    def _read_back(self) -> None:
        """The committed versions that were not read yet; `last` is the newest of all."""
        begun: dict[int, Manifest] = {}
        for record in records(self._bootstrap, WEIGHTS_ANCHORS, first=self._read_upto):
            self._read_upto = record.offset + 1
            if record.value is None:
                number, _, _ = (record.key or b"").partition(b"/")
                if number.isdigit():
                    self._kept.pop(int(number), None)
                continue
            try:
                part = decode(weights_decoder, record.value)
            except UnreadableError as error:
                where = f"weights.anchors offset {record.offset}"
                if error.reason == "unknown_major":  # a later release's, and its number counts
                    raise PublicationError(f"{where}: {error}") from None
                log.warning("%s skipped: %s", where, error)
                continue
            if isinstance(part, Manifest):
                begun[part.version] = part
            elif isinstance(part, Commit) and part.version in begun:
                self.last = begun.pop(part.version)
                self._kept[part.version] = _Kept(self.last.created_ms, record_keys(self.last))

    def _commit(self, manifest: Manifest, parts: list[_Record]) -> None:
        """One transaction, tried again until its outcome is known."""
        before = self.last.version if self.last else 0
        limit_s = TRANSACTION_S + manifest.size_bytes / SLOWEST_BYTES_PER_S
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self._producer is None:
                    self._open()
                    if self.last is not None and self.last.version > before:
                        if _same(self.last, manifest):
                            return  # it had been committed after all
                        raise ProducerFencedError
                assert self._producer is not None
                self._read_upto = _within(limit_s, partial(_transaction, self._producer, parts))
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
                        f"version {manifest.version} was not published: {_why(error)}"
                    ) from None
                log.warning("version %d: %s; trying again", manifest.version, _why(error))
                time.sleep(0.2)


def _same(one: Manifest, other: Manifest) -> bool:
    return (one.version, one.digest, one.journal) == (other.version, other.digest, other.journal)


def _fencing(bootstrap: str) -> KafkaProducer:
    """A producer that has taken the place of all before it."""
    client: KafkaProducer = producer(
        bootstrap,
        transactional_id=TRANSACTIONAL_ID,
        max_request_size=1 << 20,
        linger_ms=0,
        max_block_ms=OPEN_S * 1000,
        bootstrap_timeout_ms=OPEN_S * 1000,
        reconnect_backoff_max_ms=RECONNECT_MS,
    )
    try:
        client.init_transactions()
    except BaseException:
        client.close(timeout=0)
        raise
    return client


def _transaction(client: KafkaProducer, parts: list[_Record]) -> int:
    """Write `parts` in one transaction; returns the offset after the last of `weights.anchors`."""
    sent = []
    try:
        client.begin_transaction()
        for topic, key, value in parts:
            sent.append(client.send(topic, value, key, partition=0))
        client.commit_transaction()
        written = [future.get(timeout=1) for future in sent]
        return max(int(each.offset) for each in written if each.topic == WEIGHTS_ANCHORS) + 1
    except KafkaError as error:
        causes = [error, *(future.exception for future in sent)]
        fences = (ProducerFencedError, InvalidProducerEpochError)
        if any(isinstance(cause, fences) or "ProducerFenced" in str(cause) for cause in causes):
            raise ProducerFencedError from None
        raise


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Do `work` in a thread; raises `TimeoutError` after `seconds` and leaves it to itself."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, name="publication", daemon=True).start()
    return answer.result(timeout=seconds)


def _why(error: BaseException) -> str:
    line = " ".join(str(error).split())
    return line or (
        "it does not answer" if isinstance(error, TimeoutError) else type(error).__name__
    )

"""Kafka transactions of the one learner that may publish.

Notable choices
- One transactional id for all learners of a cluster: starting a second one fences the first, so a learner that lost
  its place cannot publish.
- A transaction has a time limit, after which its outcome is not known; the caller replaces the producer by one of the
  same id, which fences it and ends what it left open, and looks. (kafka-python 3.0 waits for ever in a commit when
  the broker refuses its connection at that moment.)
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TypeVar

from kafka import KafkaProducer
from kafka.errors import InvalidProducerEpochError, KafkaError, ProducerFencedError

from streams.clients import producer
from streams.topics import TRANSACTION_MS

TRANSACTIONAL_ID = "dwell-learner"
OPEN_S = 20
RECONNECT_MS = 1000  # the client would come to wait half a minute between attempts

Record = tuple[str, bytes | None, bytes | None]
"""Topic, key, value; all topics written here have one partition."""

T = TypeVar("T")


class Fenced:
    """A producer that has taken the place of all before it."""

    def __init__(self, bootstrap: str) -> None:
        """Raises `KafkaError`."""
        self._client: KafkaProducer = producer(
            bootstrap,
            transactional_id=TRANSACTIONAL_ID,
            transaction_timeout_ms=TRANSACTION_MS,
            max_request_size=1 << 20,
            linger_ms=0,
            max_block_ms=OPEN_S * 1000,
            bootstrap_timeout_ms=OPEN_S * 1000,
            reconnect_backoff_max_ms=RECONNECT_MS,
        )
        try:
            self._client.init_transactions()
        except BaseException:
            self._client.close(timeout=0)
            raise

    def commit(self, parts: Sequence[Record], limit_s: float) -> dict[str, int]:
        """Write `parts` in one transaction; returns the offset after the last record of each topic.

        Raises `ProducerFencedError` where another took over, `TimeoutError` after `limit_s` (the outcome is not
        known then), and other `KafkaError`s.
        """
        return _within(limit_s, partial(self._transaction, parts))

    def close(self, patience_s: float = 5) -> None:
        """Leave; an open transaction is aborted by whoever comes next."""
        with suppress(KafkaError):
            self._client.close(timeout=patience_s)

    def _transaction(self, parts: Sequence[Record]) -> dict[str, int]:
        sent = []
        try:
            self._client.begin_transaction()
            for topic, key, value in parts:
                sent.append(self._client.send(topic, value, key, partition=0))
            self._client.commit_transaction()
            upto: dict[str, int] = {}
            for future in sent:
                written = future.get(timeout=1)
                upto[written.topic] = max(upto.get(written.topic, 0), int(written.offset) + 1)
            return upto
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


def why(error: BaseException) -> str:
    """An error of Kafka's in one line."""
    line = " ".join(str(error).split())
    return line or (
        "it does not answer" if isinstance(error, TimeoutError) else type(error).__name__
    )

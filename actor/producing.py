"""Records to Kafka, through a producer that is replaced when it has been given up.

Notable choices
- aiokafka retries an idempotent batch for ever, but one that has found no leader for 40 s it fails after taking its
  sequence numbers, and then Kafka refuses all that follow; and it never asks the bootstrap address again, should the
  brokers come back elsewhere. A new producer has neither trouble.
- That a new producer can start says that Kafka is back. The old one is left only after that, for then it can go; what
  it still sends is on the log a second time.
- What Kafka will not take however often it is sent (not authorised, too large) is a `RefusedError`.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    KafkaError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    UnknownProducerId,
)

from streams.aioclients import begin, leave_producer
from streams.intake import partition_of

START_S: Final = 10.0
"""A new producer that has not started by then is given up."""

_REPLACE: Final = (
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    UnknownProducerId,
)
"""Errors that no retry mends, but another producer does."""

Acks = list[asyncio.Future[Any]]
"""Of the first records of a call, in order."""


class RefusedError(RuntimeError):
    """Kafka will not take a record, however often it is sent; the message says why."""


class Record(NamedTuple):
    """A record on its way."""

    time_ms: int
    """When it came."""
    topic: str
    user: str
    value: bytes


class Producing:
    """Sends records to the partitions of their users."""

    def __init__(self, make: Callable[[], AIOKafkaProducer], partitions: int) -> None:
        self._make = make
        self._partitions = partitions
        self._leaving: set[asyncio.Task[None]] = set()
        self._producer: AIOKafkaProducer | None = None

    async def open(self) -> None:
        """Connect; raises `KafkaError`, and then there is nothing to close."""
        self._producer = await self._started()

    async def close(self) -> None:
        """Leave Kafka."""
        last = [] if self._producer is None else [leave_producer(self._producer)]
        await asyncio.gather(*last, *self._leaving)

    async def replace(self) -> None:
        """Begin, or go on with another producer; raises `KafkaError` or `OSError` while Kafka is away."""
        async with asyncio.timeout(START_S):
            fresh = await self._started()
        old, self._producer = self._producer, fresh
        if old is None:
            return
        leaving = asyncio.create_task(leave_producer(old))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def send(self, records: Sequence[Record], acks: Acks) -> None:
        """Send records in order and wait until Kafka has them; `acks` grows as they are sent.

        Raises whatever the producer does: `passes` tells what that means.
        """
        assert self._producer is not None
        for record in records:
            ack = await self._producer.send(
                record.topic,
                record.value,
                record.user.encode(),
                partition=partition_of(record.user, self._partitions),
            )
            ack.add_done_callback(heard)
            acks.append(ack)
        await asyncio.gather(*acks)

    async def _started(self) -> AIOKafkaProducer:
        producer = self._make()
        try:
            await begin(producer.start())
        except BaseException:
            await leave_producer(producer)
            raise
        return producer


class Call:
    """The records of one request on their way."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.acks: Acks = []
        self.kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def left(self) -> list[Record]:
        """What may not be on the log."""
        return [
            record
            for n, record in enumerate(self.records)
            if n >= len(self.acks) or not acknowledged(self.acks[n])
        ]

    def settle(self, error: Exception | None) -> None:
        """Tell whoever waits what became of it."""
        if self.kept.done():  # who waited has gone
            return
        if error is None:
            self.kept.set_result(None)
        else:
            self.kept.set_exception(error)


def passes(error: BaseException) -> bool:
    """Whether the same producer later, or another one, may have more luck."""
    if isinstance(error, KafkaError):
        # an error of no class of its own: aiokafka's sender has ended by a defect
        return error.retriable or isinstance(error, _REPLACE) or type(error) is KafkaError
    return isinstance(error, OSError)  # a time-out is one


def refused(what: str, error: BaseException) -> RefusedError:
    """The error for what does not pass."""
    return RefusedError(f"Kafka refused a record of {what}: {reason(error)}")


def reason(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def acknowledged(ack: asyncio.Future[Any]) -> bool:
    """Whether Kafka has the record."""
    return ack.done() and not ack.cancelled() and ack.exception() is None


def heard(done: asyncio.Future[Any]) -> None:
    """Callback: nobody waits for this one's error any more."""
    if not done.cancelled():
        done.exception()

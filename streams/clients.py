"""Kafka's clients, made and left one way.

kafka-python is for the learner, the replayer, administration and audits; actors and the join use aiokafka, which is
native to their event loops. No client resets an offset silently.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

from aiokafka import AIOKafkaProducer
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord

STOP_PATIENCE_S = 3.0


def consumer(bootstrap: str, **more: Any) -> KafkaConsumer:
    """A read-committed consumer without a group."""
    return KafkaConsumer(
        bootstrap_servers=bootstrap,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="none",
        fetch_max_wait_ms=50,
        max_partition_fetch_bytes=16 << 20,
        **more,
    )


def producer(bootstrap: str, **more: Any) -> KafkaProducer:
    """An idempotent producer that waits for all replicas."""
    return KafkaProducer(bootstrap_servers=bootstrap, acks="all", enable_idempotence=True, **more)


def records(
    bootstrap: str, topic: str, partition: int = 0, first: int = 0, last: int | None = None
) -> Iterator[ConsumerRecord]:
    """Committed records of one partition from offset `first` (or the oldest kept) up to its present end."""
    client = consumer(bootstrap)
    try:
        yield from read(client, topic, partition, first, last)
    finally:
        client.close()


def read(
    client: KafkaConsumer, topic: str, partition: int = 0, first: int = 0, last: int | None = None
) -> Iterator[ConsumerRecord]:
    """As `records`, with a consumer that has nothing else to do meanwhile."""
    place = TopicPartition(topic, partition)
    client.assign([place])
    end = client.end_offsets([place])[place] if last is None else last
    client.seek(place, max(first, client.beginning_offsets([place])[place]))
    while client.position(place) < end:
        for batch in client.poll(timeout_ms=200).values():
            for record in batch:
                if record.offset < end:
                    yield record


async def begin(start: Coroutine[Any, Any, None]) -> None:
    """Start one of aiokafka's clients; a cancellation waits for it a while.

    A start that is broken off leaves open the connection that it was making.
    """
    task = asyncio.create_task(start)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task], timeout=STOP_PATIENCE_S)
        task.cancel()
        raise


async def leave(stop: Coroutine[Any, Any, None], patience_s: float = STOP_PATIENCE_S) -> bool:
    """Stop one of aiokafka's clients; whether it could.

    In a task of its own, for `stop` swallows a cancellation that meets it. While a broker is away a consumer's ends
    in its own cancellation, and a producer's waits for ever.
    """
    task = asyncio.create_task(stop)
    await asyncio.wait([task], timeout=patience_s)
    if not task.done():
        task.cancel()
        return False
    return not task.cancelled() and task.exception() is None


async def leave_producer(producer: AIOKafkaProducer, patience_s: float = STOP_PATIENCE_S) -> None:
    """Stop a producer; what a broker that is away has not acknowledged was not promised to anybody."""
    if not await leave(producer.stop(), patience_s):
        await leave(producer.client.close(), patience_s)

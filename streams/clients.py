"""kafka-python clients, made one way: for the learner, the replayer, administration and audits.

Actors and the join use aiokafka, which is native to their event loops. No client resets an offset silently.
"""

from collections.abc import Generator
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord


def consumer(bootstrap: str, isolation_level: str = "read_committed", **more: Any) -> KafkaConsumer:
    """A consumer without a group."""
    return KafkaConsumer(
        bootstrap_servers=bootstrap,
        isolation_level=isolation_level,
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
) -> Generator[ConsumerRecord, None, None]:
    """Committed records of one partition from offset `first` (or the oldest kept) up to its present end."""
    client = consumer(bootstrap)
    try:
        yield from read(client, topic, partition, first, last)
    finally:
        client.close()


def read(
    client: KafkaConsumer, topic: str, partition: int = 0, first: int = 0, last: int | None = None
) -> Generator[ConsumerRecord, None, None]:
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

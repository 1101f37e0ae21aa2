"""Reading one older version from the log, beside the subscription."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiokafka import AIOKafkaConsumer, TopicPartition

from streams.aioclients import leave
from streams.chain import Chain, Version, Whole
from streams.signing import Trust
from streams.topics import WEIGHTS, WEIGHTS_ANCHORS
from streams.weights import Assembler, Seal, WeightError

ANCHORS_PLACE = TopicPartition(WEIGHTS_ANCHORS, 0)
CHAIN_PLACE = TopicPartition(WEIGHTS, 0)


def reader(bootstrap: str) -> AIOKafkaConsumer:
    """A consumer without a group, that an actor reads with; not started."""
    return AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed",
        fetch_max_wait_ms=50,
        max_partition_fetch_bytes=16 << 20,
    )


async def fetch(
    bootstrap: str, anchor_at: int, version: int, trust: Trust | None
) -> tuple[Version, Seal]:
    """A version with its seal, from the anchor whose manifest stands at `anchor_at`.

    Raises `WeightError` where the log does not lead to it, and `KafkaError`.
    """
    consumer = reader(bootstrap)
    try:
        await consumer.start()
        return await _fetched(consumer, anchor_at, version, trust)
    finally:
        await leave(consumer.stop())


async def _fetched(
    consumer: AIOKafkaConsumer, anchor_at: int, version: int, trust: Trust | None
) -> tuple[Version, Seal]:
    chain, seal = Chain(), Seal(b"", b"")
    async with aclosing(_wholes(consumer, ANCHORS_PLACE, anchor_at, trust)) as anchors:
        async for whole, sealed in anchors:
            chain.take(*whole)
            seal = sealed
            break
    if chain.rewind is not None and chain.head is not None and chain.head.number < version:
        async with aclosing(_wholes(consumer, CHAIN_PLACE, chain.rewind, trust)) as deltas:
            async for whole, sealed in deltas:
                chain.take(*whole)
                seal = sealed
                if whole[0].version >= version:
                    break
    if chain.head is None or chain.head.number != version:
        raise WeightError(f"version {version} is not in the log, or not whole")
    return chain.head, seal


async def _wholes(
    consumer: AIOKafkaConsumer, place: TopicPartition, first: int, trust: Trust | None
) -> AsyncGenerator[tuple[Whole, Seal], None]:
    """The versions of a topic from an offset to its present end."""
    consumer.assign([place])
    end = (await consumer.end_offsets([place]))[place]
    consumer.seek(place, max(first, (await consumer.beginning_offsets([place]))[place]))
    assembler = Assembler(trust)
    while await consumer.position(place) < end:
        for records in (await consumer.getmany(timeout_ms=200)).values():
            for record in records:
                whole = assembler.take(record.value)
                if whole is not None:
                    yield whole, assembler.seal

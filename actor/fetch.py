"""Reading one older version from the log, beside the subscription."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiokafka import AIOKafkaConsumer, TopicPartition

from streams.chain import Chain, Version
from streams.signing import Trust
from streams.topics import WEIGHTS, WEIGHTS_ANCHORS
from streams.weights import Assembler, Manifest, WeightError

ANCHORS_PLACE = TopicPartition(WEIGHTS_ANCHORS, 0)
CHAIN_PLACE = TopicPartition(WEIGHTS, 0)


async def fetch(
    consumer: AIOKafkaConsumer, anchor_at: int, version: int, trust: Trust | None
) -> Version:
    """A version, from the anchor whose manifest stands at `anchor_at`; the consumer is started and not assigned.

    Raises `WeightError` where the log does not lead to it, and `KafkaError`.
    """
    chain = Chain()
    async with aclosing(_wholes(consumer, ANCHORS_PLACE, anchor_at, trust)) as anchors:
        async for manifest, content in anchors:
            chain.take(manifest, content)
            break
    if chain.rewind is not None and chain.head is not None and chain.head.number < version:
        async with aclosing(_wholes(consumer, CHAIN_PLACE, chain.rewind, trust)) as deltas:
            async for manifest, content in deltas:
                chain.take(manifest, content)
                if manifest.version >= version:
                    break
    if chain.head is None or chain.head.number != version:
        raise WeightError(f"version {version} is not in the log, or not whole")
    return chain.head


async def _wholes(
    consumer: AIOKafkaConsumer, place: TopicPartition, first: int, trust: Trust | None
) -> AsyncGenerator[tuple[Manifest, bytes], None]:
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
                    yield whole

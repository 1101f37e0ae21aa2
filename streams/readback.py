"""Where a partition of the streams stands, and reading its logs back after a restart.

No offset is reset silently: what is needed and no longer in the log is an error that says so.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata

from streams.aioclients import begin, leave
from streams.decision import NEVER
from streams.partition import OffsetNote
from streams.topics import EXPOSURES, FEEDBACK, STREAMS_GROUP

COORDINATOR_TRIES = 100


class StreamsError(RuntimeError):
    """The streams cannot go on; the message says where and why in one sentence."""


class OwnershipLostError(StreamsError):
    """Another process took a partition over."""


class LogGapError(StreamsError):
    """Records that are still needed have been deleted from the log."""


@dataclass(frozen=True)
class Standing:
    """How far the join has committed in one partition: the next offset of each input, and the note beside."""

    exposures: int
    feedback: int
    note: OffsetNote


async def standing(bootstrap: str, partition: int) -> Standing | None:
    """What is committed for a partition, or None before its first commit.

    Offsets that somebody moved with another tool carry no note: the join begins anew there.
    """
    exposures, feedback = TopicPartition(EXPOSURES, partition), TopicPartition(FEEDBACK, partition)
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        await begin(admin.start())
        found = await _offsets(admin, [exposures, feedback])
    finally:
        await leave(admin.close())
    if found[exposures].offset < 0 or found[feedback].offset < 0:
        return None
    upto = found[exposures].offset, found[feedback].offset
    text = str(found[exposures].metadata or "")
    try:
        note = (
            msgspec.json.decode(text, type=OffsetNote) if text else OffsetNote(NEVER, NEVER, *upto)
        )
    except msgspec.DecodeError:
        raise StreamsError(
            f"{EXPOSURES} partition {partition}: the committed offset of group {STREAMS_GROUP} carries {text!r}, "
            "which is not ours; is another program using this group?"
        ) from None
    return Standing(*upto, note)


async def _offsets(
    admin: AIOKafkaAdminClient, places: list[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """The group's offsets, -1 where there is none.

    A cluster needs a moment before it has a coordinator of groups, and a coordinator one before it has read its
    log. aiokafka answers the second with nothing at all: taken for "nothing committed", it would begin anew.
    """
    found: dict[TopicPartition, OffsetAndMetadata]
    for _ in range(COORDINATOR_TRIES):
        try:
            found = await admin.list_consumer_group_offsets(STREAMS_GROUP, partitions=places)
            if found.keys() >= set(places):
                return found
        except KafkaError as error:
            if not error.retriable:
                raise
        await asyncio.sleep(0.1)
    raise GroupCoordinatorNotAvailableError("no coordinator of groups")


async def read_to_end(
    bootstrap: str, place: TopicPartition, first: int, upto: int | None = None
) -> AsyncGenerator[list[ConsumerRecord], None]:
    """Committed records of one partition from `first`, or the oldest kept, to the present end.

    With `upto`, exactly those below it; raises `LogGapError` when the log no longer has them all.
    """
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed",
        max_partition_fetch_bytes=16 << 20,
    )
    try:
        await begin(consumer.start())
        consumer.assign([place])
        begins = (await consumer.beginning_offsets([place]))[place]
        if upto is not None and first < begins:
            raise gap(place, first, begins)
        end = upto if upto is not None else (await consumer.end_offsets([place]))[place]
        consumer.seek(place, max(first, begins))
        while await consumer.position(place) < end:
            batches = await consumer.getmany(timeout_ms=200)
            records = [record for batch in batches.values() for record in batch]
            yield [record for record in records if record.offset < end]
    finally:
        await leave(consumer.stop())


def gap(place: TopicPartition, needed: int, begins: int) -> LogGapError:
    """The error of a log that lacks what is needed."""
    return LogGapError(
        f"{place.topic} partition {place.partition}: offset {needed} is still needed, but the log begins at "
        f"{begins}: records were deleted before they were joined (kafka.retention_s is how long they are kept); to "
        f"go on without them, move the offsets of group {STREAMS_GROUP} with Kafka's own kafka-consumer-groups"
    )

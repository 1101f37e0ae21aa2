"""The transactional shell of the join: consume, transform, produce, exactly once.

Notable choices (contract of the streams, "Exactly once comes from Kafka transactions")
- One task and one transactional id per input partition. Starting the producer fences a predecessor and ends its
  open transaction; only then are committed offsets read, state caught up and open requests rebuilt.
- One transaction a batch holds samples, histories, the shaping changelog, dead letters and the input offsets;
  both watermarks and the offsets still needed by open requests ride in the offset metadata.
- Local state is written after the commit. Whatever fails in between is undone by starting the partition over.
- Idle inputs get ticks from here (wall clock minus a grace), written outside the transaction like any event.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, OffsetOutOfRangeError, ProducerFenced
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata
from prometheus_client import Counter, Gauge, Histogram

from storage.kv import RocksKv
from streams.events import DeadLetter, Tick, UnreadableError, encode
from streams.intake import Intake
from streams.join import NEVER
from streams.partition import Output, Partition
from streams.settings import JoinSettings, KafkaSettings, ShapeSettings, StreamsSettings
from streams.state import CHANGELOGS, LogRecord, PartitionState, shaping_key
from streams.topics import (
    DEAD_LETTERS,
    EXPOSURES,
    FEEDBACK,
    HISTORIES,
    SAMPLES,
    SHAPING,
    STREAMS_GROUP,
)

log = logging.getLogger("dwell.streams")

EVENTS = Counter("dwell_streams_events_total", "Input records taken", ["topic"])
OUTCOMES = Counter("dwell_streams_outcomes_total", "What the join counted", ["what"])
SAMPLES_MADE = Counter("dwell_streams_samples_total", "Requests closed", ["arm"])
CENSORED = Counter("dwell_streams_censored_total", "Plays still going at the deadline", ["arm"])
DEAD = Counter("dwell_streams_dead_letters_total", "Records that could not be used", ["reason"])
OPEN = Gauge("dwell_streams_open_requests", "Requests waiting for feedback", ["partition"])
COMMIT_SECONDS = Histogram("dwell_streams_commit_seconds", "Transaction, first send to commit")

COMMIT_IDLE_S = 1.0
TICK_EVERY_S = 0.25
MAX_LATE_STARTS = 64


class OffsetNote(msgspec.Struct):
    """Rides in the metadata of the committed exposures offset (4 KiB at most)."""

    exposures_ms: int
    feedback_ms: int
    need_exposures: int
    need_feedback: int
    late_starts: dict[int, int] = {}
    other_late_start: int = NEVER


class PartitionProcessor:
    """Owns one input partition until it is fenced or cancelled."""

    def __init__(
        self,
        partition: int,
        kafka: KafkaSettings,
        join: JoinSettings,
        shape: ShapeSettings,
        streams: StreamsSettings,
        state_dir: Path,
    ) -> None:
        self._number = partition
        self._kafka = kafka
        self._join = join
        self._shape = shape
        self._streams = streams
        self._state_dir = state_dir
        self._intake = Intake(partition, kafka.partitions, round(join.max_skew_s * 1000))
        self._exposures = TopicPartition(EXPOSURES, partition)
        self._feedback = TopicPartition(FEEDBACK, partition)
        self._counted: dict[str, int] = {}

    async def run(self, ticker: AIOKafkaProducer) -> None:
        """Process until cancelled; starts over after a Kafka error, gives up when fenced."""
        while True:
            try:
                await self._own(ticker)
            except (ProducerFenced, OffsetOutOfRangeError):
                raise
            except (KafkaError, OSError) as error:
                log.warning("partition %d starts over: %r", self._number, error)
                await asyncio.sleep(0.5)

    async def _own(self, ticker: AIOKafkaProducer) -> None:
        state = PartitionState(RocksKv(self._state_dir / f"p{self._number}"))
        producer = AIOKafkaProducer(
            bootstrap_servers=self._kafka.bootstrap,
            transactional_id=f"dwell-streams-{self._number}",
            linger_ms=0,
            max_batch_size=1 << 19,
        )
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._kafka.bootstrap,
            group_id=STREAMS_GROUP,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            fetch_max_wait_ms=self._streams.batch_ms,
            max_poll_records=self._streams.batch_records,
        )
        try:
            await producer.start()
            await consumer.start()
            consumer.assign([self._exposures, self._feedback])
            await self._catch_up(state)
            core = Partition(self._join, self._shape, self._streams, state)
            await self._rebuild(core, consumer)
            log.info("partition %d: %d open requests", self._number, core.join.open)
            await self._loop(core, state, consumer, producer, ticker)
        finally:
            await asyncio.gather(consumer.stop(), producer.stop(), return_exceptions=True)
            state.close()

    async def _catch_up(self, state: PartitionState) -> None:
        """Bring local state to the end of its changelogs."""
        for topic in CHANGELOGS:
            place = TopicPartition(topic, self._number)
            async for records in read_to_end(self._kafka.bootstrap, place, state.position(topic)):
                state.apply(
                    LogRecord(topic, record.offset, record.value)
                    for record in records
                    if record.value is not None
                )

    async def _rebuild(self, core: Partition, consumer: AIOKafkaConsumer) -> None:
        """Replay what open requests still need, then stand at the committed offsets."""
        committed = await consumer.committed(self._exposures)
        if committed is None:
            for place in (self._exposures, self._feedback):
                consumer.seek(place, (await consumer.beginning_offsets([place]))[place])
            return
        upto = {
            self._exposures: committed,
            self._feedback: await consumer.committed(self._feedback),
        }
        note = msgspec.json.decode(await self._metadata(), type=OffsetNote)
        needed = {self._exposures: note.need_exposures, self._feedback: note.need_feedback}
        for place, first in needed.items():
            if first < upto[place]:
                async for records in read_to_end(self._kafka.bootstrap, place, first, upto[place]):
                    for record in records:
                        self._replay(core, record, note)
            core.join.exposures_ms = NEVER  # else feedback, replayed next, would close requests
            consumer.seek(place, upto[place])
        core.join.exposures_ms = note.exposures_ms
        core.join.feedback_ms = note.feedback_ms
        core.join.feedback_upto = upto[self._feedback]
        core.join.counts.clear()

    async def _metadata(self) -> str:
        """The note beside the committed exposures offset (the consumer gives offsets only)."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self._kafka.bootstrap)
        await admin.start()
        try:
            offsets = await admin.list_consumer_group_offsets(
                STREAMS_GROUP, partitions=[self._exposures]
            )
            return str(offsets[self._exposures].metadata)
        finally:
            await admin.close()

    def _replay(self, core: Partition, record: ConsumerRecord, note: OffsetNote) -> None:
        """Take a record a second time: it only fills open requests, since nothing closes at NEVER."""
        try:
            if record.topic == EXPOSURES:
                exposure = self._intake.exposure(record.value, record.timestamp)
                start = note.late_starts.get(record.offset, note.other_late_start)
                horizon = min(note.exposures_ms, note.feedback_ms) - core.join.times.horizon
                if isinstance(exposure, Tick) or (start == NEVER and exposure.time_ms < horizon):
                    return  # what was too late then was not opened then
                start = max(exposure.time_ms, start)
                core.join.expose(exposure, record.offset, record.timestamp, start)
            else:
                feedback = self._intake.feedback(record.value, record.timestamp)
                if not isinstance(feedback, Tick):
                    core.join.feed(feedback, record.offset, record.timestamp)
        except UnreadableError:
            return  # it is in dead-letters already

    async def _loop(
        self,
        core: Partition,
        state: PartitionState,
        consumer: AIOKafkaConsumer,
        producer: AIOKafkaProducer,
        ticker: AIOKafkaProducer,
    ) -> None:
        dead: list[DeadLetter] = []
        committed = time.monotonic()
        ticked = 0.0
        moved = False
        while True:
            batches = await consumer.getmany(timeout_ms=self._streams.batch_ms)
            records = sorted(
                (record for batch in batches.values() for record in batch),
                key=lambda record: (record.timestamp, record.topic, record.offset),
            )
            for record in records:
                self._take(core, record, dead)
            moved = moved or bool(records)
            output = core.take()
            now = time.monotonic()
            if not output.empty or dead or (moved and now - committed > COMMIT_IDLE_S):
                with COMMIT_SECONDS.time():
                    await self._commit(core, state, consumer, producer, output, dead)
                dead = []
                committed, moved = now, False
                self._instruments(core, output)
            if self._streams.tick and now - ticked > TICK_EVERY_S:
                ticked = now
                await self._tick(core, ticker)
                state.forget_closed(core.join.watermark_ms - core.join.times.horizon)

    def _take(self, core: Partition, record: ConsumerRecord, dead: list[DeadLetter]) -> None:
        """One record into the core; what cannot be used becomes a dead letter."""
        on_exposures = record.topic == EXPOSURES
        try:
            if on_exposures:
                exposure = self._intake.exposure(record.value, record.timestamp)
                if isinstance(exposure, Tick):
                    core.tick(exposure.time_ms, True, record.timestamp)
                elif core.join.too_late(exposure):
                    raise UnreadableError("too_late", "older than dedupe_horizon_s")
                else:
                    core.expose(exposure, record.offset, record.timestamp)
            else:
                feedback = self._intake.feedback(record.value, record.timestamp)
                if isinstance(feedback, Tick):
                    core.tick(feedback.time_ms, False, record.timestamp)
                else:
                    core.feed(feedback, record.offset, record.timestamp)
        except UnreadableError as error:
            DEAD.labels(error.reason).inc()
            dead.append(
                DeadLetter(
                    reason=error.reason,
                    detail=error.detail,
                    topic=record.topic,
                    partition=record.partition,
                    offset=record.offset,
                    key=record.key,
                    value=record.value or b"",
                )
            )
        EVENTS.labels(record.topic).inc()

    async def _commit(
        self,
        core: Partition,
        state: PartitionState,
        consumer: AIOKafkaConsumer,
        producer: AIOKafkaProducer,
        output: Output,
        dead: list[DeadLetter],
    ) -> None:
        """Everything this batch brought about, in one transaction; local state afterwards."""
        await producer.begin_transaction()
        sent: list[tuple[str, bytes, Any]] = []

        async def send(topic: str, key: str, value: bytes) -> None:
            future = await producer.send(topic, value, key.encode(), partition=self._number)
            sent.append((topic, value, future))

        for sample in output.samples:
            await send(SAMPLES, sample.user, encode(sample))
        for history in output.histories:
            await send(HISTORIES, history.user, encode(history))
        for shaping in output.shaping:
            await send(SHAPING, shaping_key(shaping), encode(shaping))
        for letter in dead:
            await producer.send(DEAD_LETTERS, encode(letter), letter.key)
        exposures_upto = await consumer.position(self._exposures)
        feedback_upto = await consumer.position(self._feedback)
        note = self._note(core, exposures_upto, feedback_upto)
        await producer.send_offsets_to_transaction(
            {
                self._exposures: OffsetAndMetadata(exposures_upto, note),
                self._feedback: OffsetAndMetadata(feedback_upto, ""),
            },
            STREAMS_GROUP,
        )
        await producer.commit_transaction()
        state.apply(
            LogRecord(topic, future.result().offset, value) for topic, value, future in sent
        )

    def _note(self, core: Partition, exposures_upto: int, feedback_upto: int) -> str:
        need_exposures, need_feedback = core.join.needed(exposures_upto, feedback_upto)
        late = sorted(core.join.late_starts().items())
        kept, others = late[:MAX_LATE_STARTS], late[MAX_LATE_STARTS:]
        note = OffsetNote(
            exposures_ms=core.join.exposures_ms,
            feedback_ms=core.join.feedback_ms,
            need_exposures=need_exposures,
            need_feedback=need_feedback,
            late_starts=dict(kept),
            other_late_start=max((start for _, start in others), default=NEVER),
        )
        return msgspec.json.encode(note).decode()

    async def _tick(self, core: Partition, ticker: AIOKafkaProducer) -> None:
        """Move inputs that have nothing to say; the grace allows for what is being written."""
        claim = int((time.time() - self._streams.idle_grace_s) * 1000)
        for topic, largest in (
            (EXPOSURES, core.join.exposures_ms),
            (FEEDBACK, core.join.feedback_ms),
        ):
            if largest < claim:
                tick = encode(Tick(time_ms=claim, writer=f"streams-{self._number}"))
                await ticker.send(topic, tick, partition=self._number)

    def _instruments(self, core: Partition, output: Output) -> None:
        OPEN.labels(str(self._number)).set(core.join.open)
        for what, count in core.join.counts.items():
            OUTCOMES.labels(what).inc(count - self._counted.get(what, 0))
            self._counted[what] = count
        for sample in output.samples:
            SAMPLES_MADE.labels(sample.arm).inc()
            censored = sum(item.outcome == "censored" for item in sample.items)
            CENSORED.labels(sample.arm).inc(censored)


async def read_to_end(
    bootstrap: str, place: TopicPartition, first: int, upto: int | None = None
) -> AsyncIterator[list[ConsumerRecord]]:
    """Committed records of one partition from `first` to `upto` (default: the present end)."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="none",
        isolation_level="read_committed",
        max_partition_fetch_bytes=16 << 20,
    )
    await consumer.start()
    try:
        consumer.assign([place])
        end = upto if upto is not None else (await consumer.end_offsets([place]))[place]
        start = max(first, (await consumer.beginning_offsets([place]))[place])
        consumer.seek(place, start)
        while await consumer.position(place) < end:
            batches = await consumer.getmany(timeout_ms=200)
            records = [record for batch in batches.values() for record in batch]
            yield [record for record in records if record.offset < end]
    finally:
        await consumer.stop()


async def run(
    kafka: KafkaSettings,
    join: JoinSettings,
    shape: ShapeSettings,
    streams: StreamsSettings,
    state_dir: Path,
    partitions: list[int],
) -> None:
    """Process `partitions` until cancelled; raises `ProducerFenced` when another worker took one over."""
    ticker = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, linger_ms=0)
    await ticker.start()
    try:
        async with asyncio.TaskGroup() as group:
            for partition in partitions:
                processor = PartitionProcessor(partition, kafka, join, shape, streams, state_dir)
                group.create_task(processor.run(ticker))
    finally:
        await ticker.stop()

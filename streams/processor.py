"""The transactional shell of the join: consume, transform, produce, exactly once.

Notable choices (contract of the streams, "Exactly once comes from Kafka transactions")
- One task and one transactional id per input partition. Starting the producer fences a predecessor and ends its
  open transaction; only then are committed offsets read, state caught up and open requests rebuilt.
- One transaction a batch holds samples, histories, the shaping changelog, dead letters and the input offsets;
  both watermarks and the offsets still needed by open requests ride in the offset metadata. Starts of late
  exposures are in the changelog: thousands of them, when a spool drains, do not fit beside an offset.
- Local state is written after the commit. Whatever fails in between is undone by starting the partition over.
- Idle inputs (streams/idle.py) get ticks from here (wall clock minus a grace), written outside the transaction like
  any event.
"""

import asyncio
import logging
import time
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError, ProducerFenced
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata
from prometheus_client import Counter as Metric
from prometheus_client import Gauge, Histogram

from storage.kv import RocksKv
from streams.aioclients import begin, leave, leave_producer, offsets, send_all
from streams.events import DeadLetter, Tick, UnreadableError, encode
from streams.idle import Idle
from streams.inputs import Inputs
from streams.intake import MAX_EVENT_BYTES, Intake
from streams.partition import OffsetNote, Output, Partition
from streams.readback import OwnershipLostError, StreamsError, gap, read_to_end, standing
from streams.settings import JoinSettings, KafkaSettings, ShapeSettings, StreamsSettings
from streams.state import CHANGELOGS, LogRecord, PartitionState, read_back
from streams.topics import (
    DEAD_LETTERS,
    EXPOSURES,
    FEEDBACK,
    LATE_FEEDBACK,
    STREAMS_GROUP,
    TRANSACTION_MS,
)

log = logging.getLogger("dwell.streams")

EVENTS = Metric("dwell_streams_events_total", "Input records taken", ["topic"])
OUTCOMES = Metric("dwell_streams_outcomes_total", "What the join counted", ["what"])
SAMPLES_MADE = Metric("dwell_streams_samples_total", "Requests closed", ["arm"])
CENSORED = Metric("dwell_streams_censored_total", "Plays still going at the deadline", ["arm"])
DEAD = Metric("dwell_streams_dead_letters_total", "Records that could not be used", ["reason"])
OPEN = Gauge("dwell_streams_open_requests", "Requests waiting for feedback", ["partition"])
COMMIT_SECONDS = Histogram("dwell_streams_commit_seconds", "Transaction, first send to commit")

COMMIT_IDLE_S = 1.0
TICK_EVERY_S = 0.25


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
        self._idle = {
            place: Idle(streams.idle_grace_s) for place in (self._exposures, self._feedback)
        }
        self._counted: dict[str, int] = {}

    async def run(self, ticker: AIOKafkaProducer) -> None:
        """Process until cancelled; starts over after a Kafka error, raises `StreamsError` if that cannot help."""
        for idle in self._idle.values():
            idle.answered(time.time())  # what then is long in coming comes after an absence
        while True:
            try:
                await self._own(ticker)
            except ProducerFenced:
                raise OwnershipLostError(
                    f"partition {self._number} was taken over by another streams process, or this one "
                    "stood still for longer than a transaction may last; it ends"
                ) from None
            except (KafkaError, OSError) as error:
                log.warning("partition %d starts over: %r", self._number, error)
                for idle in self._idle.values():
                    idle.lost()
                await asyncio.sleep(0.5)

    async def _own(self, ticker: AIOKafkaProducer) -> None:
        state = PartitionState(RocksKv(self._state_dir / f"p{self._number}"))
        producer = AIOKafkaProducer(
            bootstrap_servers=self._kafka.bootstrap,
            transactional_id=transactional_id(self._number),
            transaction_timeout_ms=TRANSACTION_MS,
            linger_ms=0,
            max_batch_size=1 << 19,
        )
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._kafka.bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            fetch_max_wait_ms=self._streams.batch_ms,
            max_partition_fetch_bytes=2 << 20,
            max_poll_records=self._streams.batch_records,
        )
        async with AsyncExitStack() as stack:
            stack.callback(state.close)
            stack.push_async_callback(leave_producer, producer)
            stack.push_async_callback(lambda: leave(consumer.stop()))
            await begin(producer.start())
            await begin(consumer.start())
            consumer.assign([self._exposures, self._feedback])
            await self._catch_up(state)
            core = Partition(self._join, self._shape, self._streams, state)
            self._counted.clear()
            await self._rebuild(core, consumer)
            log.info("partition %d: %d open requests", self._number, core.join.open)
            await self._loop(core, state, consumer, producer, ticker)

    async def _catch_up(self, state: PartitionState) -> None:
        """Bring local state to the end of its changelogs."""
        for topic in CHANGELOGS:
            place = TopicPartition(topic, self._number)
            try:
                rest = read_to_end(self._kafka.bootstrap, place, state.position(topic))
                async with aclosing(rest) as batches:
                    async for records in batches:
                        state.apply(
                            read_back(topic, record.offset, record.value, record.key)
                            for record in records
                        )
            except UnreadableError as error:
                raise StreamsError(f"{topic} partition {self._number}: {error}") from None

    async def _rebuild(self, core: Partition, consumer: AIOKafkaConsumer) -> None:
        """Replay what open requests still need, then stand at the committed offsets."""
        bootstrap = self._kafka.bootstrap
        places = [self._exposures, self._feedback]
        committed = await standing(bootstrap, self._number)
        begins = await consumer.beginning_offsets(places)
        if committed is None:
            for place in places:
                consumer.seek(place, begins[place])
            return
        note = committed.note
        for place, first, upto in (
            (self._exposures, note.need_exposures, committed.exposures),
            (self._feedback, note.need_feedback, committed.feedback),
        ):
            if upto < begins[place]:
                raise gap(place, upto, begins[place])
            if first < upto:
                async with aclosing(read_to_end(bootstrap, place, first, upto)) as batches:
                    async for records in batches:
                        for record in records:
                            self._replay(core, record, note)
                        core.join.settle()
            consumer.seek(place, upto)
        core.resume(note, committed.feedback)

    def _replay(self, core: Partition, record: ConsumerRecord, note: OffsetNote) -> None:
        """Take a record a second time: it only fills open requests."""
        try:
            if record.topic == EXPOSURES:
                exposure = self._intake.exposure(record.value, record.timestamp)
                if not isinstance(exposure, Tick):
                    core.reopen(exposure, record.offset, note)
            else:
                feedback = self._intake.feedback(record.value, record.timestamp)
                if not isinstance(feedback, Tick):
                    core.join.refeed(feedback, record.offset)
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
        inputs: Inputs[ConsumerRecord] = Inputs()
        while True:
            await self._read(consumer, inputs)
            records = inputs.take()
            moved = moved or bool(records)
            now_s = time.time()
            for record in records:
                self._take(core, record, dead, now_s)
            output = core.take()
            now = time.monotonic()
            if not output.empty or dead or (moved and now - committed > COMMIT_IDLE_S):
                upto = (
                    inputs.position(0, await consumer.position(self._exposures)),
                    inputs.position(1, await consumer.position(self._feedback)),
                )
                with COMMIT_SECONDS.time():
                    await self._commit(core, state, upto, producer, output, dead)
                dead = []
                committed, moved = now, False
                self._instruments(core, output)
            if now - ticked > TICK_EVERY_S:
                ticked = now
                state.forget_closed(core.join.watermark_ms - core.join.times.horizon)
                if self._streams.tick:
                    await self._tick(core, ticker)

    async def _read(self, consumer: AIOKafkaConsumer, inputs: Inputs[ConsumerRecord]) -> None:
        """The next records of whichever input is wanted."""
        places = (self._exposures, self._feedback)
        wanted = [place for which, place in enumerate(places) if inputs.wants(which)]
        try:
            batches = await consumer.getmany(*wanted, timeout_ms=self._streams.batch_ms)
        except OffsetOutOfRangeError as error:
            ((place, needed),) = error.args[0].items()
            raise gap(place, needed, (await consumer.beginning_offsets([place]))[place]) from None
        for which, place in enumerate(places):
            if place in wanted:
                records = batches.get(place, [])
                EVENTS.labels(place.topic).inc(len(records))
                end = consumer.last_stable_offset(place)
                at_end = end is not None and await consumer.position(place) >= end
                inputs.read(which, records, at_end)
            answered_ms = consumer.last_poll_timestamp(place)
            if answered_ms is not None:
                self._idle[place].answered(answered_ms / 1000)

    def _take(
        self, core: Partition, record: ConsumerRecord, dead: list[DeadLetter], now_s: float
    ) -> None:
        """One record into the core; what cannot be used becomes a dead letter."""
        on_exposures = record.topic == EXPOSURES
        try:
            if on_exposures:
                exposure = self._intake.exposure(record.value, record.timestamp)
                if isinstance(exposure, Tick):
                    core.tick(exposure.time_ms, True, record.timestamp)
                    return
                behind_s = (record.timestamp - exposure.time_ms) / 1000
                self._idle[self._exposures].heard(now_s, behind_s)
                if core.join.too_late(exposure):
                    raise UnreadableError("too_late", "older than dedupe_horizon_s")
                core.expose(exposure, record.offset, record.timestamp)
            else:
                feedback = self._intake.feedback(record.value, record.timestamp)
                if isinstance(feedback, Tick):
                    core.tick(feedback.time_ms, False, record.timestamp)
                    return
                behind_s = (record.timestamp - feedback.time_ms) / 1000
                self._idle[self._feedback].heard(now_s, behind_s)
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
                    key=record.key and record.key[:MAX_EVENT_BYTES],
                    value=(record.value or b"")[:MAX_EVENT_BYTES],
                )
            )

    async def _commit(
        self,
        core: Partition,
        state: PartitionState,
        upto: tuple[int, int],
        producer: AIOKafkaProducer,
        output: Output,
        dead: list[DeadLetter],
    ) -> None:
        """Everything this batch brought about, in one transaction; local state afterwards."""
        await producer.begin_transaction()
        sent = [
            (topic, pairs, await send_all(producer, topic, self._number, pairs))
            for topic, pairs in output.records()
        ]
        late = [(feedback.user.encode(), encode(feedback)) for feedback in output.late]
        await send_all(producer, LATE_FEEDBACK, self._number, late)
        for letter in dead:
            await producer.send(DEAD_LETTERS, encode(letter), letter.key)
        exposures_upto, feedback_upto = upto
        note = msgspec.json.encode(core.note(exposures_upto, feedback_upto)).decode()
        await producer.send_offsets_to_transaction(
            {
                self._exposures: OffsetAndMetadata(exposures_upto, note),
                self._feedback: OffsetAndMetadata(feedback_upto, ""),
            },
            STREAMS_GROUP,
        )
        await producer.commit_transaction()
        state.apply(
            LogRecord(topic, offset, value, key)
            for topic, pairs, batches in sent
            for (key, value), offset in zip(pairs, offsets(batches), strict=True)
        )

    async def _tick(self, core: Partition, ticker: AIOKafkaProducer) -> None:
        """Move inputs that have nothing to say; the grace allows for what is being written."""
        now_s = time.time()
        claim = int((now_s - self._streams.idle_grace_s) * 1000)
        for place, largest in (
            (self._exposures, core.join.exposures_ms),
            (self._feedback, core.join.feedback_ms),
        ):
            if largest < claim and self._idle[place].at(now_s):
                tick = encode(Tick(time_ms=claim, writer=f"streams-{self._number}"))
                await ticker.send(place.topic, tick, partition=self._number)

    def _instruments(self, core: Partition, output: Output) -> None:
        OPEN.labels(str(self._number)).set(core.join.open)
        for what, count in core.join.counts.items():
            OUTCOMES.labels(what).inc(count - self._counted.get(what, 0))
            self._counted[what] = count
        made: Counter[str] = Counter()
        censored: Counter[str] = Counter()
        for sample in output.samples:
            made[sample.arm] += 1
            censored[sample.arm] += sum(item.outcome == "censored" for item in sample.items)
        for arm, count in made.items():
            SAMPLES_MADE.labels(arm).inc(count)
            CENSORED.labels(arm).inc(censored[arm])


def transactional_id(partition: int) -> str:
    """Who owns a partition: starting a producer with this id ends its predecessor's ownership."""
    return f"dwell-streams-{partition}"

"""Writing to and reading from a real broker, and a streams process in a task."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from aiokafka import AIOKafkaProducer

from streams.aioclients import begin, leave_producer, tell_once
from streams.audit import disagreement
from streams.clients import records
from streams.events import (
    DeadLetter,
    Exposure,
    Feedback,
    Sample,
    Tick,
    dead_letter_decoder,
    decode,
    encode,
    sample_decoder,
)
from streams.intake import partition_of
from streams.processor import PartitionProcessor
from streams.reference import Rules, verdict
from streams.settings import JoinSettings, KafkaSettings, ShapeSettings, StreamsSettings
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK, SAMPLES
from tests.streams.shell import Arrived

LONG = JoinSettings(
    window_s=0.040, cap_s=0.090, abandon_s=0.012, lateness_s=0.008, dedupe_horizon_s=3600.0
)
"""A request lives for milliseconds of event time, and nothing is ever too late."""
RULES = Rules(window=40, cap=90, abandon=12, horizon=3_600_000)
NO_TICKS = StreamsSettings(tick=False, batch_ms=20)
PATIENCE_S = 60.0


def users_of(partition: int, partitions: int, count: int = 4) -> list[str]:
    """Users whose records belong to a partition."""
    found: list[str] = []
    number = 0
    while len(found) < count:
        user = f"user-{number}"
        number += 1
        if partition_of(user, partitions) == partition:
            found.append(user)
    return found


def settled(arrivals: Iterable[Arrived], users: list[str]) -> list[Arrived]:
    """The same arrivals with users of one partition."""
    moved = {f"u{number}": user for number, user in enumerate(users)} | {"user": users[0]}
    for event in arrivals:
        if not isinstance(event, int):
            event.user = moved.get(event.user, event.user)
    return list(arrivals)


@asynccontextmanager
async def writer(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaProducer]:
    """A plain producer."""
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, linger_ms=0)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def write(producer: AIOKafkaProducer, partition: int, arrivals: Iterable[Arrived]) -> None:
    """Append in this order; a number is a tick on both inputs."""
    sent = []
    for event in arrivals:
        if isinstance(event, int):
            tick = encode(Tick(time_ms=event, writer="test"))
            sent += [
                await producer.send(topic, tick, partition=partition)
                for topic in (EXPOSURES, FEEDBACK)
            ]
        else:
            topic = EXPOSURES if isinstance(event, Exposure) else FEEDBACK
            key = event.user.encode()
            sent.append(await producer.send(topic, encode(event), key, partition=partition))
    await asyncio.gather(*sent)


async def samples(kafka: KafkaSettings, partition: int) -> list[Sample]:
    """All committed samples of a partition."""

    def read() -> list[Sample]:
        found = records(kafka.bootstrap, SAMPLES, partition)
        return [decode(sample_decoder, record.value) for record in found]

    return await asyncio.to_thread(read)


async def dead_letters(kafka: KafkaSettings, partition: int) -> list[DeadLetter]:
    """The dead letters of a partition's records."""

    def read() -> list[DeadLetter]:
        found = records(kafka.bootstrap, DEAD_LETTERS)
        return [decode(dead_letter_decoder, record.value) for record in found]

    return [letter for letter in await asyncio.to_thread(read) if letter.partition == partition]


async def sampled(kafka: KafkaSettings, partition: int, count: int) -> list[Sample]:
    """The samples once there are `count` of them."""
    found: list[Sample] = []

    async def enough() -> bool:
        found[:] = await samples(kafka, partition)
        return len(found) >= count

    try:
        await until(enough)
    except AssertionError as error:
        raise AssertionError(f"{len(found)} of {count} samples {error}") from None
    return found


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    """Wait for it, not for ever; then say where every task stands."""
    give_up = time.monotonic() + PATIENCE_S
    while not await holds():
        if time.monotonic() > give_up:
            for task in asyncio.all_tasks():
                task.print_stack()
            raise AssertionError(f"not within {PATIENCE_S} s")
        await asyncio.sleep(0.1)


async def run(
    kafka: KafkaSettings,
    join: JoinSettings,
    streams: StreamsSettings,
    folder: Path,
    partition: int,
) -> None:
    """Own one partition, whatever a group may say, until cancelled."""
    asyncio.get_running_loop().set_exception_handler(tell_once)
    ticker = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap, linger_ms=0)
    try:
        await begin(ticker.start())
        shape = ShapeSettings()
        await PartitionProcessor(partition, kafka, join, shape, streams, folder).run(ticker)
    finally:
        await leave_producer(ticker)


@asynccontextmanager
async def running(
    kafka: KafkaSettings,
    partition: int,
    folder: Path,
    join: JoinSettings = LONG,
    streams: StreamsSettings = NO_TICKS,
) -> AsyncIterator[asyncio.Task[None]]:
    """A streams process for one partition, cancelled at the end; an error of its own is raised."""
    task = asyncio.create_task(run(kafka, join, streams, folder, partition))
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def agree_with_reference(found: list[Sample], arrivals: Iterable[Arrived]) -> None:
    """Each sample is what the reference makes of its exposure and the feedback below `feedback_upto`.

    Ticks count as records of the feedback topic.
    """
    shown = {event.request: event for event in arrivals if isinstance(event, Exposure)}
    log = [event for event in arrivals if not isinstance(event, Exposure)]
    for sample in found:
        heard = [
            event
            for event in log[: sample.feedback_upto]
            if isinstance(event, Feedback) and event.request == sample.request
        ]
        expected = verdict(shown[sample.request], sample.start_ms, heard, RULES)
        assert disagreement(sample, expected) == ""

"""aiokafka's clients, begun and left under cancellation."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path

import pytest
from aiokafka import AIOKafkaProducer

from streams.aioclients import begin, leave, offsets, send_all
from streams.clients import records
from streams.settings import KafkaSettings
from streams.topics import SAMPLES
from tests.streams.live import running


async def swallowing() -> None:
    """A stop as aiokafka's: what cancels the caller ends the wait for one of its own tasks."""
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(60)


async def test_a_cancellation_that_meets_a_stop_is_heard() -> None:
    task = asyncio.create_task(leave(swallowing()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)


async def test_a_stop_that_never_ends_is_left() -> None:
    assert not await leave(swallowing(), patience_s=0.05)


async def test_a_cancellation_waits_for_a_start() -> None:
    done = False

    async def starting() -> None:
        nonlocal done
        await asyncio.sleep(0.1)
        done = True

    task = asyncio.create_task(begin(starting()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done


async def test_a_start_that_fails_says_so() -> None:
    async def failing() -> None:
        raise OSError("refused")

    with pytest.raises(OSError, match="refused"):
        await begin(failing())


async def test_cancelled_at_any_moment_of_its_start_a_processor_ends(
    kafka: KafkaSettings, partition: int, tmp_path: Path
) -> None:
    for moment in range(25):
        async with running(kafka, partition, tmp_path):
            await asyncio.sleep(0.015 * moment)
            cancelled = time.monotonic()
        assert time.monotonic() - cancelled < 5


async def test_records_sent_as_batches_have_the_offsets_that_are_told(
    kafka: KafkaSettings, partition: int
) -> None:
    """Also where they need several batches, and one record is longer than a batch."""
    pairs: list[tuple[bytes, bytes | None]] = [
        (b"%d" % number, b"x" * (40_000 if number % 50 == 7 else number)) for number in range(400)
    ]
    pairs[3] = (b"3", None)
    producer = AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap, max_batch_size=16_384, linger_ms=0
    )
    await producer.start()
    try:
        sent = await send_all(producer, SAMPLES, partition, pairs)
        await producer.flush()
    finally:
        await producer.stop()
    assert len(sent) > 8
    by_offset = {record.offset: record for record in records(kafka.bootstrap, SAMPLES, partition)}
    found = [by_offset[offset] for offset in offsets(sent)]
    assert [(record.key, record.value) for record in found] == pairs

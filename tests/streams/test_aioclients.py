"""aiokafka's clients, begun and left under cancellation."""

import asyncio
import time
from contextlib import suppress
from pathlib import Path

import pytest

from streams.aioclients import begin, leave
from streams.settings import KafkaSettings
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

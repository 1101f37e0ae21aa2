"""`dwell streams` as its own process, killed with -9 while events flow."""

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import rmtree

import pytest
from aiokafka import AIOKafkaProducer

from ops.admin import ensure_topics
from ops.broker import EmbeddedBroker
from streams.events import Exposure, Sample
from streams.settings import JoinSettings, KafkaSettings, StreamsSettings
from tests.streams.live import (
    LONG,
    NO_TICKS,
    agree_with_reference,
    running,
    sampled,
    samples,
    settled,
    until,
    users_of,
    write,
    writer,
)
from tests.streams.makers import T0, Feed, exposure
from tests.streams.shell import busy_arrivals

ROOT = Path(__file__).parents[2]
FAR = T0 + 1_000_000


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker that a test may kill and start again."""
    with EmbeddedBroker(tmp_path_factory.mktemp("killed")) as running_broker:
        yield running_broker


@pytest.fixture(scope="module")
def few(mortal: EmbeddedBroker) -> KafkaSettings:
    """Two partitions only: the program owns all there are."""
    settings = KafkaSettings(bootstrap=mortal.bootstrap, partitions=2)
    ensure_topics(settings.bootstrap, settings)
    return settings


@asynccontextmanager
async def program(
    kafka: KafkaSettings, folder: Path, member: str = "streams"
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """`dwell streams` with the join of these tests, killed at the end."""
    keys = {
        "streams.member": member,
        "streams.session_s": 3,
        "kafka.partitions": kafka.partitions,
        "join.window_s": LONG.window_s,
        "join.cap_s": LONG.cap_s,
        "join.abandon_s": LONG.abandon_s,
        "join.lateness_s": LONG.lateness_s,
        "join.dedupe_horizon_s": LONG.dedupe_horizon_s,
        "streams.tick": "false",
        "streams.batch_ms": NO_TICKS.batch_ms,
    }
    more = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "ops.cli", "streams", "--bootstrap", kafka.bootstrap]
    folder.mkdir(exist_ok=True)
    with (folder / "stderr").open("w") as said:
        process = subprocess.Popen(
            [*command, "--data-dir", str(folder), *more],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_killed_again_and_again_it_loses_and_doubles_nothing(
    few: KafkaSettings, tmp_path: Path
) -> None:
    """Three kills while events flow in two partitions, the disk lost at the second."""
    arrivals = [settled(busy_arrivals(11 + p, 60), users_of(p, 2)) for p in range(2)]
    expected = [{e.request for e in life if isinstance(e, Exposure)} for life in arrivals]
    rng = random.Random(12)

    async def count() -> int:
        return sum([len(await samples(few, partition)) for partition in range(2)])

    async with writer(few) as producer:

        async def feed(quarter: int) -> None:
            for partition, life in enumerate(arrivals):
                part = len(life) // 4 + 1
                for first in range(quarter * part, min((quarter + 1) * part, len(life)), 5):
                    await write(
                        producer, partition, life[first : min(first + 5, (quarter + 1) * part)]
                    )

        for kill in range(3):
            before = await count()
            async with program(few, tmp_path / "data"):
                feeding = asyncio.create_task(feed(kill))

                async def further(before: int = before) -> bool:
                    return await count() > before

                await until(further)
                await asyncio.sleep(rng.uniform(0, 0.3))
            await feeding
            if kill == 1:
                rmtree(tmp_path / "data" / "streams")
        assert await count() < sum(map(len, expected)), "all was done before the last kill"
        async with program(few, tmp_path / "data"):
            await feed(3)
            found = [await sampled(few, p, len(expected[p])) for p in range(2)]
    for partition in range(2):
        assert Counter(s.request for s in found[partition]) == dict.fromkeys(expected[partition], 1)
        agree_with_reference(found[partition], arrivals[partition])


async def test_a_program_whose_partitions_were_taken_over_ends_with_one_sentence(
    few: KafkaSettings, tmp_path: Path
) -> None:
    user = users_of(0, 2)[0]
    async with writer(few) as producer, program(few, tmp_path / "one") as process:
        done = len(await samples(few, 0))
        await write(producer, 0, [exposure("taken 1", T0 + 500_000, 1, user=user), FAR])
        await sampled(few, 0, done + 1)
        async with running(few, 0, tmp_path / "two"):
            for more in range(100):  # it learns of it when it next wants to commit
                now_ms = FAR + 1000 * more
                shown = exposure(f"taken {more}", now_ms, 1, user=user)
                await write(producer, 0, [shown, now_ms + 1000])
                await asyncio.sleep(0.3)
                if process.poll() is not None:
                    break
            status = process.poll()
    assert status == 2
    said = (tmp_path / "one" / "stderr").read_text().splitlines()
    assert not any("Traceback" in line for line in said), said
    assert said[-1].startswith("dwell: partition 0 was taken over by another streams process")


async def test_a_broker_killed_and_started_again_costs_time_only(
    mortal: EmbeddedBroker, few: KafkaSettings, tmp_path: Path
) -> None:
    users = users_of(1, 2)
    arrivals = settled(busy_arrivals(17, 40), users)
    for event in arrivals:
        if not isinstance(event, int):  # another test's requests have the same names
            event.request = f"mortal {event.request}"
    arrivals.append(FAR)
    expected = {event.request for event in arrivals if isinstance(event, Exposure)}
    half = len(arrivals) // 2
    before = len(await samples(few, 1))
    async with running(few, 1, tmp_path) as task:
        async with writer(few) as producer:
            await write(producer, 1, arrivals[:half])
            await sampled(few, 1, before + 1)
        await asyncio.to_thread(mortal.kill)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(mortal.start)
        async with writer(few) as producer:
            await write(producer, 1, arrivals[half:])
            found = (await sampled(few, 1, before + len(expected)))[before:]
        assert not task.done()
    assert Counter(sample.request for sample in found) == dict.fromkeys(expected, 1)


async def test_programs_share_the_partitions_and_take_over_from_one_that_dies(
    few: KafkaSettings, tmp_path: Path
) -> None:
    users = [users_of(partition, 2)[0] for partition in range(2)]
    shown: list[set[str]] = [set(), set()]
    before = [len(await samples(few, partition)) for partition in range(2)]
    moment = FAR + 1_000_000

    async def flows(producer: AIOKafkaProducer) -> None:
        """A request in each partition becomes a sample."""
        nonlocal moment
        for partition in range(2):
            name = f"shared {moment} {partition}"
            shown[partition].add(name)
            event = exposure(name, moment, 1, user=users[partition])
            await write(producer, partition, [event, moment + 1000])
        moment += 2000
        for partition in range(2):
            await sampled(few, partition, before[partition] + len(shown[partition]))

    async def works(folder: str) -> bool:
        """Whether a program has taken a partition up."""
        return "open requests" in (tmp_path / folder / "stderr").read_text()

    async with (
        writer(few) as producer,
        program(few, tmp_path / "a", "one") as one,
        program(few, tmp_path / "b", "two"),
    ):
        await until(lambda: works("a"))
        await until(lambda: works("b"))
        await flows(producer)
        one.kill()
        await flows(producer)  # the other takes over
        async with program(few, tmp_path / "c", "one"):
            await until(lambda: works("c"))  # and gives back
            await flows(producer)
    for partition in range(2):
        found = (await samples(few, partition))[before[partition] :]
        assert Counter(sample.request for sample in found) == dict.fromkeys(shown[partition], 1)


@pytest.mark.parametrize("in_contact", [True, False], ids=["known", "starting"])
async def test_what_was_kept_while_the_broker_was_away_is_not_late(
    mortal: EmbeddedBroker, few: KafkaSettings, tmp_path: Path, in_contact: bool
) -> None:
    """An actor sees the broker's return later than we do: no tick may pass it by."""
    join = JoinSettings(window_s=5.0, cap_s=10.0, abandon_s=0.5, lateness_s=1.0)
    (user, *_) = users_of(1, 2)
    now_ms = int(time.time() * 1000)
    name = f"kept {in_contact}"
    feed = Feed(name, user)
    async with running(few, 1, tmp_path, join, StreamsSettings()):
        async with writer(few) as producer:
            await write(producer, 1, [exposure(name, now_ms, user=user, slots=1)])
        if in_contact:
            await asyncio.sleep(1.0)
        await asyncio.to_thread(mortal.kill)
        await asyncio.sleep(6.0)
        await asyncio.to_thread(mortal.start)
        await asyncio.sleep(2.0)
        seen = [
            feed("begin", 0, now_ms + 600 - T0),
            feed("end", 0, now_ms + 900 - T0, play_ms=300),
        ]
        async with writer(few) as producer:
            await write(producer, 1, seen)

        async def joined() -> list[Sample]:
            return [sample for sample in await samples(few, 1) if sample.request == name]

        await until(joined)
        (found,) = await joined()
    assert found.closed_by == "decided"
    assert [item.play_ms for item in found.items] == [300]

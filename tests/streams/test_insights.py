"""The insights application against a real broker."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from ops.admin import ensure_topics
from ops.broker import EmbeddedBroker
from streams.events import Insight, Sample, SampleItem, decode, encode, insight_decoder
from streams.insights import UNREADABLE, Insights
from streams.settings import KafkaSettings
from streams.topics import INSIGHTS, SAMPLES, topics
from streams.windows import standing
from tests.streams import makers

PARTITIONS = 2
ROOT = Path(__file__).parents[2]

NOW_MS = 1_700_000_000_000
"""Event time of the first test; each later one is an hour on."""


def sample(watermark_ms: int, arm: str) -> Sample:
    shown = SampleItem(
        item=f"item-{watermark_ms % 7}",
        sid=(0, 0, 0),
        position=0,
        duration_ms=9000,
        source="policy",
        outcome="ended",
        play_ms=1000,
        actions=0,
        advantage=1,
    )
    return makers.sample(watermark_ms, arm, [shown])


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """One of its own: other tests write samples too, and the last test here kills it."""
    with EmbeddedBroker(tmp_path_factory.mktemp("insights")) as running:
        ensure_topics(running.bootstrap, KafkaSettings(partitions=PARTITIONS))
        yield running


@pytest.fixture
def bootstrap(broker: EmbeddedBroker) -> str:
    return broker.bootstrap


@asynccontextmanager
async def writer(bootstrap: str) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id="test-insights")
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def write(producer: AIOKafkaProducer, samples: list[Sample]) -> None:
    """One committed transaction; samples go to the partitions in turn."""
    async with producer.transaction():
        for place, each in enumerate(samples):
            await producer.send(SAMPLES, encode(each), partition=place % PARTITIONS)


async def published(bootstrap: str, arm: str) -> list[Insight]:
    """What stands on `insights` for this arm."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        place = TopicPartition(INSIGHTS, 0)
        consumer.assign([place])
        end = (await consumer.end_offsets([place]))[place]
        found: list[Insight] = []
        while await consumer.position(place) < end:
            records = (await consumer.getmany(timeout_ms=100)).get(place, [])
            found += [decode(insight_decoder, record.value) for record in records]
        return [each for each in standing(found) if each.arm == arm]
    finally:
        await consumer.stop()


async def until_published(bootstrap: str, arm: str, requests: int) -> list[Insight]:
    """Waits until the windows of the arm add up to this number of requests (or more)."""
    deadline = time.monotonic() + 20
    while sum(each.requests for each in await published(bootstrap, arm)) < requests:
        assert time.monotonic() < deadline, await published(bootstrap, arm)
        await asyncio.sleep(0.2)
    return await published(bootstrap, arm)


class Worker:
    """`run` in a process of its own; given up for dead after 2 s, so that tests need not wait 6."""

    def __init__(self, bootstrap: str, folder: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from streams import insights; "
            "from streams.settings import KafkaSettings; insights.SESSION_S = 2.0; "
            "insights.run(KafkaSettings(bootstrap=sys.argv[1]), Path(sys.argv[2]), 0)"
        )
        self.log = folder / "worker.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", code, bootstrap, str(folder)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    def terminate(self) -> tuple[int, float]:
        """SIGTERM; exit status and the seconds that it took."""
        began = time.monotonic()
        self.process.terminate()
        return self.process.wait(20), time.monotonic() - began

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    """Tests append to it; whatever still runs is killed."""
    started: list[Worker] = []
    yield started
    for each in started:
        each.kill()


async def test_only_committed_samples_are_summed_and_no_topic_is_made(
    bootstrap: str, tmp_path: Path
) -> None:
    unreadable = UNREADABLE._value.get()
    async with writer(bootstrap) as producer:
        await producer.begin_transaction()
        for _ in range(5):
            await producer.send(SAMPLES, encode(sample(NOW_MS, "a")), partition=0)
        await producer.flush()
        await producer.abort_transaction()
        async with producer.transaction():
            await producer.send(SAMPLES, b"\xc1 not a sample", partition=0)
            await producer.send(SAMPLES, None, key=b"u", partition=1)
        await write(producer, [sample(NOW_MS + 1000 * i, "a") for i in range(4)])
        await producer.begin_transaction()
        await producer.send(SAMPLES, encode(sample(NOW_MS, "a")), partition=1)
        await producer.flush()  # written, undecided, and aborted only after we have looked

        insights = Insights(bootstrap, tmp_path)
        await insights.app.start()
        try:
            await until_published(bootstrap, "a", 4)
            await asyncio.sleep(1.5)  # time to sum up what should not be
            await insights.publish()
            (window,) = await published(bootstrap, "a")
        finally:
            await insights.app.stop()
        await producer.abort_transaction()
    assert (window.requests, window.positives, window.plays_ms) == (4, 4, 4000)
    assert (window.window_start_ms, window.partitions) == (NOW_MS, [0, 1])
    assert not window.final
    assert UNREADABLE._value.get() - unreadable == 2
    assert await user_topics(bootstrap) == {topic.name for topic in topics(KafkaSettings())}


async def user_topics(bootstrap: str) -> set[str]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        return {name for name in await admin.list_topics() if not name.startswith("__")}
    finally:
        await admin.close()


async def test_a_worker_that_is_killed_loses_nothing_and_nothing_is_counted_twice(
    bootstrap: str, tmp_path: Path, workers: list[Worker]
) -> None:
    start_ms = NOW_MS + 3_600_000
    samples = [sample(start_ms + 500 * i, "b") for i in range(100)]
    workers += [Worker(bootstrap, tmp_path), Worker(bootstrap, tmp_path)]
    async with writer(bootstrap) as producer:
        await write(producer, samples[:70])
        before = await until_published(bootstrap, "b", 70)
        workers[0].kill()
        await write(producer, samples[70:])
        await until_published(bootstrap, "b", 100)
    status, seconds = workers[1].terminate()
    assert (status, seconds < 5) == (0, True)
    assert "Traceback" not in workers[1].log.read_text()

    assert any(each.final for each in before)
    after = await published(bootstrap, "b")
    by_window = dict.fromkeys((each.window_start_ms for each in after), 0)
    for each in after:
        by_window[each.window_start_ms] += each.requests
    assert by_window == {start_ms + 10_000 * i: 20 for i in range(5)}


async def test_a_worker_told_to_stop_ends_in_time_although_the_broker_has_gone(
    broker: EmbeddedBroker, tmp_path: Path, workers: list[Worker]
) -> None:
    workers.append(Worker(broker.bootstrap, tmp_path))
    async with writer(broker.bootstrap) as producer:
        await write(producer, [sample(NOW_MS + 7_200_000, "c")])
        await until_published(broker.bootstrap, "c", 1)
    broker.kill()
    await asyncio.sleep(0.5)
    assert workers[0].process.poll() is None, "an outage is outlived"
    status, seconds = workers[0].terminate()
    assert (status, seconds < 5) == (0, True)
    assert "Traceback" not in workers[0].log.read_text()

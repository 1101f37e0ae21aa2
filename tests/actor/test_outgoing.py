"""What becomes of events while Kafka is there, slow, away, or will not have them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    TopicAuthorizationFailedError,
)

from actor.outgoing import Outgoing, SpoolFullError
from actor.producing import Producing, RefusedError
from storage.kv import StoreError
from storage.spool import Spool
from streams.topics import EXPOSURES, FEEDBACK
from tests.actor.world import until

PATIENCE_S = 0.1


class Kafka:
    """A log, and the producers on it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, bytes]] = []
        self.alive = True
        self.answers = True
        """False: it takes records and says nothing."""
        self.error: Exception | None = None
        self.producers: list[Producer] = []

    def make(self) -> Any:
        self.producers.append(Producer(self))
        return self.producers[-1]

    def values(self) -> list[bytes]:
        """Each value once, in the order of the first copies."""
        return list(dict.fromkeys(value for _, _, value in self.log))


class Producer:
    """As much of aiokafka's as is used."""

    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka
        self.stopped = False
        self.sent = 0
        self.client = self

    async def start(self) -> None:
        if not self.kafka.alive:
            raise KafkaConnectionError("refused")

    async def stop(self) -> None:
        self.stopped = True

    async def close(self) -> None:
        self.stopped = True

    async def send(
        self, topic: str, value: bytes, key: bytes, partition: int
    ) -> asyncio.Future[None]:
        del partition
        await asyncio.sleep(0)
        self.sent += 1
        ack: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.kafka.error is not None:
            ack.set_exception(self.kafka.error)
        elif self.kafka.alive:
            self.kafka.log.append((topic, key.decode(), value))
            if self.kafka.answers:
                ack.set_result(None)
        return ack


class Way:
    """An open way to Kafka with its two tasks."""

    def __init__(self, kafka: Kafka, folder: Path, room: int, sync: bool = False) -> None:
        self.kafka = kafka
        self.spool = Spool(folder, room, sync)
        self.outgoing = Outgoing(Producing(kafka.make, 2), self.spool, PATIENCE_S)

    async def send(self, *values: bytes, topic: str = FEEDBACK, user: str = "u") -> None:
        await self.outgoing.send(topic, [(user, value) for value in values])


@asynccontextmanager
async def way(kafka: Kafka, folder: Path, room: int = 1 << 20) -> AsyncIterator[Way]:
    made = Way(kafka, folder, room)
    try:
        await made.outgoing.open()
        tasks = [asyncio.create_task(made.outgoing.keep())]
        tasks += [asyncio.create_task(made.outgoing.drain())]
        yield made
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
        await made.outgoing.close()
    finally:
        made.spool.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actor.outgoing.RETRY_S", 0.01)
    monkeypatch.setattr("actor.outgoing.ACK_S", 0.3)


@pytest.fixture
def kafka() -> Kafka:
    return Kafka()


async def test_what_kafka_acknowledges_never_sees_the_disk(kafka: Kafka, tmp_path: Path) -> None:
    async with way(kafka, tmp_path) as one:
        one.spool.append = forbidden  # type: ignore[method-assign]
        await one.send(b"a", b"b", topic=EXPOSURES)
        await one.send(b"c")
    assert kafka.log == [(EXPOSURES, "u", b"a"), (EXPOSURES, "u", b"b"), (FEEDBACK, "u", b"c")]
    assert len(kafka.producers) == 1


def forbidden(groups: Sequence[Sequence[bytes]]) -> list[bool]:
    raise AssertionError(f"{groups} went to the spool")


async def test_events_answered_while_kafka_is_away_are_on_disk_and_come_in_order(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        await one.send(b"0")
        kafka.alive = False
        for n in range(1, 30):
            await one.send(b"%d" % n)
            assert one.spool.count == n
        kafka.alive = True
        sent = 30
        while one.outgoing.waiting:
            await one.send(b"%d" % sent)
            sent += 1
    assert kafka.values() == [b"%d" % n for n in range(sent)]
    assert len(kafka.producers) > 2, "a new one is tried until it can start"
    assert [one.stopped for one in kafka.producers] == [True] * len(kafka.producers)


async def test_only_the_first_requests_wait_to_see_that_kafka_is_away(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.alive = False
        async with asyncio.timeout(5 * PATIENCE_S):
            await one.send(b"0")
        sent = kafka.producers[0].sent
        async with asyncio.timeout(5 * PATIENCE_S):
            for n in range(20):  # would take 20 times the patience
                await one.send(b"%d" % n)
        assert kafka.producers[0].sent == sent


async def test_all_that_is_on_its_way_goes_to_the_spool_in_the_order_in_which_it_came(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.alive = False
        tasks = []
        for n in range(6):
            tasks.append(asyncio.create_task(one.send(b"%d" % n)))
            await asyncio.sleep(PATIENCE_S / 12)
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*tasks)
        assert asyncio.get_running_loop().time() - began < 0.9 * PATIENCE_S, "all with the first"
        await one.send(b"6")
        kafka.alive = True
        await until(lambda: not one.outgoing.waiting)
    assert kafka.values() == [b"%d" % n for n in range(7)]


async def test_what_comes_while_the_last_of_the_spool_is_sent_goes_after_it_and_is_not_lost_where_that_fails(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.alive = False
        await one.send(b"0")
        one.spool.oldest = then_gone(kafka, one.spool.oldest)  # type: ignore[assignment,method-assign]
        kafka.alive = True
        sent = 1
        while one.outgoing.waiting:
            await one.send(b"%d" % sent)
            sent += 1
    assert kafka.values() == [b"%d" % n for n in range(sent)]
    assert len(kafka.producers) > 3


def then_gone(kafka: Kafka, oldest: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    """The same; but Kafka says nothing for a while when the second to fourth chunks are sent."""
    calls = 0

    def read(most: int, most_bytes: int) -> Any:
        nonlocal calls
        calls += 1
        kafka.answers = not 2 <= calls <= 4
        return oldest(most, most_bytes)

    return read


async def test_what_may_have_been_written_is_written_again_and_what_was_acknowledged_is_not(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        await one.send(b"sure")
        kafka.answers = False
        await one.send(b"perhaps")
        kafka.answers = True
        await until(lambda: not one.outgoing.waiting)
    values = [value for _, _, value in kafka.log]
    assert values.count(b"sure") == 1
    assert values.count(b"perhaps") >= 2
    assert kafka.values() == [b"sure", b"perhaps"]


async def test_a_drain_that_hears_nothing_tries_another_producer_and_loses_nothing(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.answers = False
        for n in range(5):
            await one.send(b"%d" % n)
        await until(lambda: len(kafka.producers) >= 3)
        assert one.spool.count == 5
        kafka.answers = True
        await until(lambda: not one.outgoing.waiting)
    assert kafka.values() == [b"%d" % n for n in range(5)]


@pytest.mark.parametrize(
    "error",
    [
        OutOfOrderSequenceNumber(),
        LeaderNotAvailableError(),
        KafkaError("Unexpected error during batch delivery"),
        ConnectionResetError("gone"),
    ],
)
async def test_what_another_producer_mends_is_no_fault(
    kafka: Kafka, tmp_path: Path, error: Exception
) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.error = error
        await one.send(b"a")
        await one.send(b"b")
        assert one.outgoing.waiting == 2
        kafka.error = None
        await until(lambda: not one.outgoing.waiting)
        assert len(kafka.producers) > 1
    assert kafka.values() == [b"a", b"b"]


async def test_what_kafka_will_not_take_is_told_at_once_and_not_spooled(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.error = TopicAuthorizationFailedError("feedback")
        with pytest.raises(RefusedError, match=r"refused a record of feedback: .*Authorization"):
            await one.send(b"a")
        assert one.outgoing.waiting == 0


async def test_what_kafka_will_not_take_from_the_spool_ends_the_drain_and_stays_in_it(
    kafka: Kafka, tmp_path: Path
) -> None:
    made = Way(kafka, tmp_path, 1 << 20)
    await made.outgoing.open()
    keeping = asyncio.create_task(made.outgoing.keep())
    kafka.alive = False
    await made.send(b"a")
    kafka.alive, kafka.error = True, TopicAuthorizationFailedError("feedback")
    with pytest.raises(RefusedError, match=r"refused a record of the spool: .*Authorization"):
        await made.outgoing.drain()
    keeping.cancel()
    await made.outgoing.close()
    assert made.spool.count == 1
    made.spool.close()


async def test_a_record_that_no_topic_takes_is_refused_before_it_can_stop_the_others(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path) as one:
        for alive in (True, False):
            kafka.alive = alive
            with pytest.raises(MessageSizeTooLargeError):
                await one.send(b"x" * 1_000_001)
            await one.send(b"fits")
        assert one.spool.count == 1


async def test_a_full_spool_refuses_a_request_with_a_sentence_and_takes_the_next_when_drained(
    kafka: Kafka, tmp_path: Path
) -> None:
    async with way(kafka, tmp_path, room=300) as one:
        kafka.alive = False
        kept = [b"%d" % n * 50 for n in range(3)]
        for value in kept:
            await one.send(value)
        for _ in range(2):
            with pytest.raises(SpoolFullError, match=r"actor\.spool_mb = 0.*not acknowledged"):
                await one.send(b"x" * 100)
        assert one.spool.count == 3
        kafka.alive = True
        await until(lambda: not one.outgoing.waiting)
        await one.send(b"y" * 100)
    assert kafka.values() == [*kept, b"y" * 100]


async def test_a_disk_that_fails_is_the_requests_error(kafka: Kafka, tmp_path: Path) -> None:
    async with way(kafka, tmp_path) as one:
        real = one.spool.append

        def failing(groups: Sequence[Sequence[bytes]]) -> list[bool]:
            del groups
            raise StoreError("the store cannot be written: No space left on device")

        kafka.alive = False
        one.spool.append = failing  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="No space left"):
            await one.send(b"lost")
        one.spool.append = real  # type: ignore[method-assign]
        await one.send(b"kept")
        kafka.alive = True
        await until(lambda: not one.outgoing.waiting)
    assert kafka.values() == [b"kept"]


async def test_the_next_start_sends_what_the_last_one_left_before_anything_else(
    kafka: Kafka, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.alive = False
        for n in range(5):
            await one.send(b"%d" % n)
    assert kafka.log == []
    assert "5 events wait for the next start" in caplog.text
    kafka.alive = True
    async with way(kafka, tmp_path) as one:
        await one.send(b"new")
        await until(lambda: not one.outgoing.waiting)
    assert [value for _, _, value in kafka.log] == [*(b"%d" % n for n in range(5)), b"new"]
    assert "5 events of an earlier run go first" in caplog.text


async def test_a_request_that_is_broken_off_harms_no_other(kafka: Kafka, tmp_path: Path) -> None:
    async with way(kafka, tmp_path) as one:
        kafka.alive = False
        broken = asyncio.create_task(one.send(b"broken"))
        other = asyncio.create_task(one.send(b"other"))
        await asyncio.sleep(PATIENCE_S / 2)
        broken.cancel()
        await other
        kafka.alive = True
        await until(lambda: not one.outgoing.waiting)
    assert kafka.values() == [b"other"]


async def test_how_much_waits_can_be_measured(kafka: Kafka, tmp_path: Path) -> None:
    from prometheus_client import REGISTRY

    def measured(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"dwell_actor_{name}", labels) or 0.0

    def growth(name: str, **labels: str) -> Callable[[], float]:
        before = measured(name, **labels)
        return lambda: measured(name, **labels) - before

    spooled = growth("spooled_total", topic=FEEDBACK)
    drained = growth("drained_total", topic=FEEDBACK)
    async with way(kafka, tmp_path) as one:
        assert (measured("kafka_away"), measured("spool_records")) == (0, 0)
        kafka.alive = False
        await one.send(b"a", b"b")
        await until(lambda: measured("spool_records") == 2)
        assert (measured("kafka_away"), spooled(), drained()) == (1, 2, 0)
        assert measured("spool_bytes") > 2 * 8
        assert measured("spool_oldest_timestamp_seconds") > 1e9
        kafka.alive = True
        await until(lambda: measured("kafka_away") == 0)
        assert (measured("spool_records"), spooled(), drained()) == (0, 2, 2)
        assert measured("spool_oldest_timestamp_seconds") == 0

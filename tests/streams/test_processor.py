"""The streams process on a real broker: exactly once, whatever dies."""

import asyncio
import random
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from kafka import KafkaAdminClient, TopicPartition
from kafka.structs import OffsetAndMetadata
from prometheus_client import REGISTRY

from storage.kv import MemoryKv, RocksKv, StoreError
from streams.clients import consumer, records
from streams.decision import NEVER
from streams.events import Exposure, History, Sample, encode
from streams.intake import MAX_EVENT_BYTES, partition_of
from streams.partition import OffsetNote
from streams.processor import transactional_id
from streams.readback import LogGapError, OwnershipLostError, Standing, StreamsError, standing
from streams.settings import JoinSettings, KafkaSettings, StreamsSettings
from streams.state import CHANGELOGS, LogRecord, PartitionState
from streams.topics import EXPOSURES, FEEDBACK, HISTORIES, LATE_FEEDBACK, STREAMS_GROUP
from tests.streams.live import (
    LONG,
    NO_TICKS,
    agree_with_reference,
    dead_letters,
    run,
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
from tests.streams.shell import JOIN, Arrived, busy_arrivals

FAR = T0 + 1_000_000


def busy(seed: int, users: list[str], requests: int = 40) -> list[Arrived]:
    return settled(busy_arrivals(seed, requests), users)


def shown(arrivals: list[Arrived]) -> set[str]:
    return {event.request for event in arrivals if isinstance(event, Exposure)}


def counted(found: list[Sample]) -> Counter[str]:
    return Counter(sample.request for sample in found)


@pytest.fixture
def users(partition: int, kafka: KafkaSettings) -> list[str]:
    """Users of this test's partition."""
    return users_of(partition, kafka.partitions)


async def test_every_exposure_becomes_one_sample_as_the_reference_says(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    arrivals = busy(1, users)
    async with writer(kafka) as producer, running(kafka, partition, tmp_path):
        await write(producer, partition, arrivals)
        found = await sampled(kafka, partition, len(shown(arrivals)))
    assert counted(found) == dict.fromkeys(shown(arrivals), 1)
    agree_with_reference(found, arrivals)


async def test_local_state_is_what_the_changelogs_say(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    arrivals = busy(2, users)
    async with writer(kafka) as producer, running(kafka, partition, tmp_path):
        await write(producer, partition, arrivals)
        await sampled(kafka, partition, len(shown(arrivals)))
    local, fresh = RocksKv(tmp_path / f"p{partition}"), MemoryKv()
    for topic in CHANGELOGS:
        PartitionState(fresh).apply(
            LogRecord(topic, record.offset, record.value, record.key)
            for record in records(kafka.bootstrap, topic, partition)
        )
    state = PartitionState(local)
    state.forget_closed(FAR, most=10_000)
    PartitionState(fresh).forget_closed(FAR, most=10_000)
    assert list(fresh.scan(b"")) == list(local.scan(b""))
    assert state.late_starts() == {}
    assert any(state.history(user) for user in users)
    local.close()


@pytest.mark.parametrize("wiped", [False, True], ids=["disk kept", "disk lost"])
async def test_cancelled_in_the_middle_it_loses_and_doubles_nothing(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path, wiped: bool
) -> None:
    arrivals = busy(3, users)
    rng = random.Random(4)
    async with writer(kafka) as producer:
        for life, first in enumerate(range(0, len(arrivals), len(arrivals) // 4)):
            folder = tmp_path / (str(life) if wiped else "state")
            async with running(kafka, partition, folder) as task:
                before = len(await samples(kafka, partition))
                await write(producer, partition, arrivals[first : first + len(arrivals) // 4])
                await sampled(kafka, partition, before + 1)
                await asyncio.sleep(rng.uniform(0, 0.1))
                assert not task.done()
        async with running(kafka, partition, tmp_path / "state"):
            found = await sampled(kafka, partition, len(shown(arrivals)))
    assert counted(found) == dict.fromkeys(shown(arrivals), 1)
    agree_with_reference(found, arrivals)


@pytest.mark.parametrize("lost", ["the request", "the answer"])
async def test_a_commit_that_fails_is_done_over_once(
    kafka: KafkaSettings,
    partition: int,
    users: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    """Whether the broker never heard of it, or only its answer was lost."""
    arrivals = busy(5, users)
    part = len(arrivals) // 3 + 1
    commit = AIOKafkaProducer.commit_transaction
    attempts = 0

    async def failing(self: Any) -> None:
        nonlocal attempts
        attempts += 1
        fails = attempts in (2, 3)
        if not fails or lost == "the answer":
            await commit(self)
        if fails:
            raise KafkaError("the network is gone")

    monkeypatch.setattr(AIOKafkaProducer, "commit_transaction", failing)
    async with writer(kafka) as producer, running(kafka, partition, tmp_path):
        for first in range(0, len(arrivals), part):
            enough = attempts + 1
            await write(producer, partition, arrivals[first : first + part])
            while attempts < enough:
                await asyncio.sleep(0.05)
        found = await sampled(kafka, partition, len(shown(arrivals)))
    assert attempts >= 3
    assert counted(found) == dict.fromkeys(shown(arrivals), 1)
    agree_with_reference(found, arrivals)


async def test_counters_go_on_after_starting_over(
    kafka: KafkaSettings,
    partition: int,
    users: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit, fails = AIOKafkaProducer.commit_transaction, False

    async def failing(self: Any) -> None:
        nonlocal fails
        if fails:
            fails = False
            raise KafkaError("the network is gone")
        await commit(self)

    def closed() -> float:
        labels = {"what": "closed_by_deadline"}
        return REGISTRY.get_sample_value("dwell_streams_outcomes_total", labels) or 0.0

    monkeypatch.setattr(AIOKafkaProducer, "commit_transaction", failing)
    many = [exposure(f"r{number}", T0, 1, user=users[0]) for number in range(5)]
    async with writer(kafka) as producer, running(kafka, partition, tmp_path):
        before = closed()
        await write(producer, partition, [*many, T0 + 1000])
        await sampled(kafka, partition, 5)
        fails = True
        await write(producer, partition, [exposure("r5", T0 + 1000, 1, user=users[0]), FAR])
        await sampled(kafka, partition, 6)

        async def counted_all() -> bool:
            return closed() == before + 6

        await until(counted_all)


async def test_open_requests_survive_whatever_the_timestamps_of_their_records(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    """Producers' clocks differ, so timestamps need not ascend along the log as offsets do."""
    events = [exposure(f"r{number}", T0 + number, 1, user=users[0]) for number in range(6)]
    async with writer(kafka) as producer:
        await write(producer, partition, [exposure("done", T0 - 500, 1, user=users[0])])
        now_ms = int(time.time() * 1000)
        for number, event in enumerate(events):
            await producer.send_and_wait(
                EXPOSURES,
                encode(event),
                partition=partition,
                timestamp_ms=now_ms - 100 * number,
            )
        await write(producer, partition, [T0])
        async with running(kafka, partition, tmp_path):
            assert counted(await sampled(kafka, partition, 1)) == {"done": 1}
        await write(producer, partition, [FAR])
        async with running(kafka, partition, tmp_path):
            found = await sampled(kafka, partition, 7)
    assert counted(found) == dict.fromkeys([*(e.request for e in events), "done"], 1)
    assert [sample.exposure_offset for sample in found[1:]] == [1, 2, 3, 4, 5, 6]


async def test_a_transaction_that_is_open_when_the_broker_goes_outlasts_its_absence(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    arrivals = busy(8, users, requests=4)
    async with writer(kafka) as producer, running(kafka, partition, tmp_path):
        await write(producer, partition, arrivals)
        await sampled(kafka, partition, 1)

        def described() -> int:
            name = transactional_id(partition)
            with closing(KafkaAdminClient(bootstrap_servers=kafka.bootstrap)) as admin:
                return int(admin.describe_transactions([name])[name].transaction_timeout_ms)

        assert await asyncio.to_thread(described) >= 600_000


async def test_what_cannot_be_used_becomes_a_dead_letter_and_the_next_record_is_unharmed(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    foreign = next(
        f"x{n}" for n in range(99) if partition_of(f"x{n}", kafka.partitions) != partition
    )
    feed = Feed("r", users[0])
    good = exposure("r", T0 + 5000, 1, user=users[0])
    huge = b"\x93" * 900_000
    bad: list[tuple[str, bytes | None, str]] = [
        (EXPOSURES, b"\xff\x00", "malformed"),
        (FEEDBACK, None, "empty"),
        (FEEDBACK, encode(feed("begin", 0, 0, v="2.0")), "unknown_major"),
        (EXPOSURES, encode(exposure("x", T0 + 10**15, user=users[0])), "future"),
        (FEEDBACK, encode(feed("begin", -1, 0)), "bad_value"),
        (FEEDBACK, encode(feed("begin", 0, 0, user=foreign)), "wrong_partition"),
        (EXPOSURES, huge, "too_large"),
    ]
    async with writer(kafka) as producer, running(kafka, partition, tmp_path, JOIN):
        await write(producer, partition, [T0 + 5000])
        where = [
            await producer.send_and_wait(topic, value, b"key", partition=partition)
            for topic, value, _ in bad
        ]
        await write(producer, partition, [good, feed("end", 0, 5001, play_ms=7)])
        await write(producer, partition, [exposure("old", T0, user=users[0]), FAR])
        (sample,) = await sampled(kafka, partition, 1)

        async def all_there() -> bool:
            return len(await dead_letters(kafka, partition)) > len(bad)

        await until(all_there)
    assert (sample.request, sample.items[0].outcome, sample.items[0].play_ms) == ("r", "ended", 7)
    letters = {
        (letter.topic, letter.offset): letter for letter in await dead_letters(kafka, partition)
    }
    assert len(letters) == len(bad) + 1
    for (topic, value, reason), place in zip(bad, where, strict=True):
        letter = letters.pop((topic, place.offset))
        assert (letter.reason, letter.partition, letter.key) == (reason, partition, b"key")
        assert letter.value == (value or b"")[:MAX_EVENT_BYTES]
        assert letter.detail
    (too_late,) = letters.values()
    assert (too_late.reason, too_late.topic) == ("too_late", EXPOSURES)


async def test_a_second_process_takes_over_and_the_first_ends_with_a_plain_error(
    kafka: KafkaSettings,
    partition: int,
    users: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arrivals = busy(6, users)
    half = len(arrivals) // 2
    async with writer(kafka) as producer:
        first = asyncio.create_task(run(kafka, LONG, NO_TICKS, tmp_path / "one", partition))
        await write(producer, partition, arrivals[:half])
        await sampled(kafka, partition, 1)
        async with running(kafka, partition, tmp_path / "two"):
            await write(producer, partition, arrivals[half:])
            found = await sampled(kafka, partition, len(shown(arrivals)))
            later = FAR
            while not first.done():  # it learns of it when it next wants to commit
                await write(producer, partition, [later := later + 1000])
                await asyncio.sleep(0.1)
            with pytest.raises(OwnershipLostError, match=f"partition {partition} was taken over"):
                await first
    assert [log for log in caplog.records if log.name == "asyncio"] == []
    assert counted(found) == dict.fromkeys(shown(arrivals), 1)
    agree_with_reference(found, arrivals)


async def test_a_second_process_on_the_same_folder_is_refused(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    async with writer(kafka) as producer, running(kafka, partition, tmp_path) as task:
        await write(producer, partition, [exposure("a", T0, user=users[0]), FAR])
        await sampled(kafka, partition, 1)
        with pytest.raises(StoreError, match="another process"):
            await run(kafka, LONG, NO_TICKS, tmp_path, partition)
        assert not task.done()


@pytest.mark.parametrize("kept", [2, 4], ids=["open requests", "uncommitted input"])
async def test_records_deleted_before_they_were_joined_are_an_error(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path, kept: int
) -> None:
    """The exposures still needed are at offset 1; committed are 3 (see the ticks); 4 are there."""
    waiting = exposure("waiting", T0 + 3000, 1, user=users[0])
    async with writer(kafka) as producer:
        await write(producer, partition, [exposure("done", T0, 1, user=users[0]), waiting])
        await write(producer, partition, [T0 + 2000])
        async with running(kafka, partition, tmp_path):
            await sampled(kafka, partition, 1)
        await write(producer, partition, [exposure("unread", T0 + 3000, 1, user=users[0])])
    await asyncio.to_thread(delete_before, kafka, TopicPartition(EXPOSURES, partition), kept)
    work = run(kafka, LONG, NO_TICKS, tmp_path, partition)
    with pytest.raises(
        LogGapError, match=rf"exposures partition {partition}: offset .* begins at {kept}"
    ):
        await asyncio.wait_for(work, 30)


def delete_before(kafka: KafkaSettings, place: TopicPartition, offset: int) -> None:
    client = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    try:
        client.delete_records({place: offset})
    finally:
        client.close()


async def test_a_coordinator_that_is_still_loading_is_waited_for(
    kafka: KafkaSettings,
    partition: int,
    users: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aiokafka gives nothing for it; to take that for "nothing is committed" would be to begin anew."""
    async with writer(kafka) as producer, running(kafka, partition, tmp_path):
        await write(producer, partition, [exposure("a", T0, 1, user=users[0]), T0 + 1000])
        await sampled(kafka, partition, 1)
    ask, answers = AIOKafkaAdminClient.list_consumer_group_offsets, 0

    async def loading(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal answers
        answers += 1
        return {} if answers < 3 else await ask(self, *given, **named)

    monkeypatch.setattr(AIOKafkaAdminClient, "list_consumer_group_offsets", loading)
    found = await standing(kafka.bootstrap, partition)
    assert found is not None
    assert answers == 3
    assert (found.exposures, found.feedback, found.note.exposures_ms) == (2, 1, T0 + 1000)


async def test_offsets_that_were_moved_by_another_tool_are_begun_from(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    """The way out of a gap in the log; what is closed already stays closed."""
    places = [TopicPartition(topic, partition) for topic in (EXPOSURES, FEEDBACK)]
    async with writer(kafka) as producer:
        async with running(kafka, partition, tmp_path):
            await write(producer, partition, [exposure("a", T0, 1, user=users[0]), T0 + 1000])
            await sampled(kafka, partition, 1)
        await asyncio.to_thread(move_offsets, kafka, dict.fromkeys(places, 0), "")
        found = await standing(kafka.bootstrap, partition)
        assert found == Standing(0, 0, OffsetNote(NEVER, NEVER, 0, 0))
        async with running(kafka, partition, tmp_path):
            await write(producer, partition, [exposure("b", T0 + 1000, 1, user=users[0]), FAR])
            assert counted(await sampled(kafka, partition, 2)) == {"a": 1, "b": 1}
    await asyncio.to_thread(move_offsets, kafka, dict.fromkeys(places, 0), "mine")
    with pytest.raises(StreamsError, match=f"exposures partition {partition}: .* 'mine'"):
        await standing(kafka.bootstrap, partition)


def move_offsets(kafka: KafkaSettings, places: dict[TopicPartition, int], note: str) -> None:
    member = consumer(kafka.bootstrap, group_id=STREAMS_GROUP)
    try:
        member.commit(
            {place: OffsetAndMetadata(offset, note, -1) for place, offset in places.items()}
        )
    finally:
        member.close()


async def test_what_cannot_be_read_in_a_changelog_is_an_error_that_says_where(
    kafka: KafkaSettings, partition: int, tmp_path: Path
) -> None:
    async with writer(kafka) as producer:
        newer = History(v="2.0", user="u", behaviours=[], shown=[])
        await producer.send_and_wait(HISTORIES, encode(newer), b"u", partition=partition)
    work = run(kafka, LONG, NO_TICKS, tmp_path, partition)
    with pytest.raises(StreamsError, match=f"histories partition {partition}: unknown_major"):
        await asyncio.wait_for(work, 30)


@pytest.mark.parametrize("late", ["count", "side"])
async def test_late_feedback_goes_to_a_topic_of_its_own_where_that_is_wanted(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path, late: Any
) -> None:
    feed = Feed("watched", users[0])
    end, after = feed("end", 0, 5, play_ms=5), feed("like", 0, 6)
    arrivals: list[Arrived] = [exposure("watched", T0, 1, user=users[0]), end, FAR, after]
    async with (
        writer(kafka) as producer,
        running(kafka, partition, tmp_path, replace(LONG, late=late)),
    ):
        await write(producer, partition, arrivals)
        await sampled(kafka, partition, 1)
        await write(
            producer, partition, [exposure("next", FAR + 1, 1, user=users[0]), 2 * FAR - T0]
        )
        await sampled(kafka, partition, 2)
    found = records(kafka.bootstrap, LATE_FEEDBACK, partition)
    assert [record.value for record in found] == ([encode(after)] if late == "side" else [])


async def test_ticks_close_what_an_idle_partition_holds(
    kafka: KafkaSettings, partition: int, users: list[str], tmp_path: Path
) -> None:
    join = JoinSettings(window_s=0.3, cap_s=0.9, abandon_s=0.2, lateness_s=0.1)
    streams = StreamsSettings(idle_grace_s=0.1)
    now_ms = int(time.time() * 1000)
    async with writer(kafka) as producer, running(kafka, partition, tmp_path, join, streams):
        await write(producer, partition, [exposure("alone", now_ms, user=users[0])])
        (sample,) = await sampled(kafka, partition, 1)
    assert sample.closed_by == "deadline"
    assert sample.watermark_ms >= now_ms + 400
    assert sample.closable_ms - now_ms < 10_000

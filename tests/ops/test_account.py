"""The account of a log that was written by hand: what is lost, open, doubled or refused."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from ops.account import Account, account
from streams.clients import consumer, producer
from streams.events import (
    DeadLetter,
    Exposure,
    Feedback,
    Sample,
    SampleItem,
    ShownItem,
    Tick,
    encode,
)
from streams.intake import partition_of
from streams.partition import OffsetNote
from streams.settings import JoinSettings, KafkaSettings
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK, SAMPLES, STREAMS_GROUP

T0 = 1_700_000_000_000
JOIN = JoinSettings(window_s=10, cap_s=30, abandon_s=3, lateness_s=2)
DUE = T0 + 12_000
"""When a request of `T0` that nobody watched is due."""


def exposure(request: str, user: str, time_ms: int = T0, **more: Any) -> Exposure:
    shown = ShownItem(
        item="i",
        sid=(0, 0, 0),
        position=0,
        duration_ms=1,
        source="policy",
        logp_levels=(-1.0, -2.0, -6.0),
    )
    fields: dict[str, Any] = {
        "request": request,
        "user": user,
        "time_ms": time_ms,
        "arm": "learning",
        "policy_version": 1,
        "catalogue_version": 1,
        "decode_mode": "sample",
        "temperature": 1.0,
        "context": b"",
        "excluded": b"",
        "items": [shown],
    }
    return Exposure(**{**fields, **more})


def feedback(request: str, user: str, at: int, kind: Any) -> Feedback:
    return Feedback(
        event=f"{request}-{at}",
        user=user,
        request=request,
        position=-1 if kind == "left" else 0,
        time_ms=T0 + at,
        kind=kind,
    )


def sample(request: str, user: str) -> Sample:
    shown = SampleItem(
        item="i",
        sid=(0, 0, 0),
        position=0,
        duration_ms=1,
        source="policy",
        outcome="unseen",
        play_ms=0,
        actions=0,
    )
    return Sample(
        request=request,
        user=user,
        time_ms=T0,
        arm="learning",
        policy_version=1,
        catalogue_version=1,
        decode_mode="sample",
        temperature=1.0,
        context=b"",
        excluded=b"",
        items=[shown],
        threshold=0.75,
        median=0.5,
        start_ms=T0,
        decided_ms=T0,
        closed_by="decided",
        watermark_ms=T0,
        closable_ms=T0,
        exposure_offset=0,
        feedback_upto=0,
    )


@dataclass
class Log:
    """One partition of the cluster, written by hand."""

    kafka: KafkaSettings
    number: int
    client: Any
    before: Account = field(init=False)

    def __post_init__(self) -> None:
        self.user = next(
            f"user-{n}"
            for n in range(9999)
            if partition_of(f"user-{n}", self.kafka.partitions) == self.number
        )
        self.before = self.settle()

    def write(self, topic: str, *values: bytes) -> int:
        """Append; the offset after the last record."""
        sent = [self.client.send(topic, value, partition=self.number) for value in values]
        return int(sent[-1].get(timeout=30).offset) + 1

    def expose(self, *requests: str, **more: Any) -> int:
        return self.write(EXPOSURES, *(encode(exposure(r, self.user, **more)) for r in requests))

    def feed(self, request: str, at: int, kind: str) -> int:
        return self.write(FEEDBACK, encode(feedback(request, self.user, at, kind)))

    def close(self, *requests: str) -> None:
        self.write(SAMPLES, *(encode(sample(request, self.user)) for request in requests))

    def commit(self, exposures: int, feedback_: int, watermark_ms: int) -> None:
        """What the join would have committed."""
        from kafka import TopicPartition
        from kafka.structs import OffsetAndMetadata

        note = OffsetNote(watermark_ms, watermark_ms + 5, 0, 0)
        member = consumer(self.kafka.bootstrap, group_id=STREAMS_GROUP)
        try:
            member.commit(
                {
                    TopicPartition(EXPOSURES, self.number): OffsetAndMetadata(
                        exposures, msgspec.json.encode(note).decode(), -1
                    ),
                    TopicPartition(FEEDBACK, self.number): OffsetAndMetadata(feedback_, "", -1),
                }
            )
        finally:
            member.close()

    def settle(self) -> Account:
        return account(self.kafka, JOIN)

    def found(self) -> dict[str, int]:
        """What this log adds to the account."""
        now = self.settle()
        return {
            name: getattr(now, name) - getattr(self.before, name)
            for name in ("requests", "samples", "lost", "open", "duplicated")
        }


@pytest.fixture
def log(made_log: KafkaSettings) -> Iterator[Log]:
    """A partition that no other test writes to."""
    client = producer(made_log.bootstrap)
    yield Log(made_log, next(NUMBERS), client)
    client.close()


NUMBERS = iter(range(99))


def test_every_request_is_in_one_class(log: Log) -> None:
    upto = log.expose("sampled", "lost", "open")
    heard = log.feed("open", 9000, "begin")  # its deadline moves to 19 s
    log.close("sampled")
    log.commit(upto, heard, DUE)
    assert log.found() == {"requests": 3, "samples": 1, "lost": 1, "open": 1, "duplicated": 0}
    assert log.settle().lost_requests[-1:] == ["lost"]
    log.commit(upto, heard, DUE + 9000)
    assert log.found()["lost"] == 2


def test_before_the_deadline_nothing_is_lost(log: Log) -> None:
    log.commit(log.expose("waiting"), 0, DUE - 1)
    assert log.found() == {"requests": 1, "samples": 0, "lost": 0, "open": 1, "duplicated": 0}


def test_without_a_commit_everything_is_open(log: Log) -> None:
    log.expose("nobody")
    assert log.found()["open"] == 1


def test_a_second_sample_is_a_duplicate_and_a_repeated_exposure_is_not(log: Log) -> None:
    upto = log.expose("twice", "repeated", "repeated")
    log.close("twice", "twice", "twice", "repeated")
    log.commit(upto, 0, DUE)
    assert log.found() == {"requests": 2, "samples": 2, "lost": 0, "open": 0, "duplicated": 2}


def test_what_the_join_has_not_read_yet_is_open_not_lost(log: Log) -> None:
    """Also where it came so late that its deadline had passed, or its end is in feedback not yet read."""
    read = log.expose("watched")
    log.expose("unread", time_ms=T0 - 60_000)
    heard = log.feed("watched", 5000, "begin")
    log.feed("watched", 6000, "left")
    log.commit(read, heard, T0 + 9000)
    assert log.found() == {"requests": 2, "samples": 0, "lost": 0, "open": 2, "duplicated": 0}
    log.commit(read, heard + 1, T0 + 9000)
    assert log.settle().lost_requests[-1] == "watched"


def test_dead_lettered_exposures_stand_apart(log: Log) -> None:
    upto = log.expose("too late", "good")
    unreadable = log.write(EXPOSURES, b"not an exposure")
    letters = [
        DeadLetter(
            reason=reason,
            detail="",
            topic=EXPOSURES,
            partition=log.number,
            offset=offset,
            key=None,
            value=b"",
        )
        for reason, offset in (("too_late", upto - 2), ("malformed", unreadable - 1))
    ]
    for letter in letters:
        log.client.send(DEAD_LETTERS, encode(letter)).get(timeout=30)
    log.close("good")
    log.commit(unreadable, 0, DUE)
    assert log.found() == {"requests": 1, "samples": 1, "lost": 0, "open": 0, "duplicated": 0}
    added = log.settle().dead_letters - log.before.dead_letters
    assert added == {"too_late": 1, "malformed": 1}


def test_a_late_exposure_is_not_lost_before_its_window_after_arrival_has_passed(log: Log) -> None:
    """What stands before it bounds how far the watermark was when it arrived."""
    log.write(EXPOSURES, encode(Tick(time_ms=T0 + 60_000, writer="test")))
    upto = log.expose("late")
    log.commit(upto, 0, T0 + 69_999)
    assert log.found()["open"] == 1
    log.commit(upto, 0, T0 + 70_000)
    assert log.found()["lost"] == 1


def test_what_is_no_sample_is_counted_and_passed_over(log: Log) -> None:
    upto = log.expose("good")
    log.write(SAMPLES, b"not a sample")
    log.close("good")
    log.commit(upto, 0, DUE)
    assert log.found()["lost"] == 0
    assert log.settle().unreadable == log.before.unreadable + 1


def test_the_slots_of_every_exposure_are_told(log: Log) -> None:
    log.expose("told", arm="control")
    told = log.settle().slots[len(log.before.slots) :]
    assert told == [(T0, "control", ["i"], 3.0)]

"""Every exposure against its sample, from read-committed scans of the whole log.

`lost` = read by the join, past its deadline at the watermark that it committed, and without a sample; what is not
yet due, or not yet read, is `open`. Dead-lettered exposures stand apart. Nothing is taken from the processes that
are being judged but how far they say that they have come.
"""

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import RetriableError

from streams.audit import overdue
from streams.clients import consumer, read
from streams.decision import NEVER, JoinTimes
from streams.events import (
    LEVELS,
    Exposure,
    Feedback,
    Tick,
    UnreadableError,
    dead_letter_decoder,
    decode,
    sample_decoder,
)
from streams.intake import Intake
from streams.partition import OffsetNote
from streams.settings import JoinSettings, KafkaSettings
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK, SAMPLES, STREAMS_GROUP

COORDINATOR_TRIES = 100


@dataclass
class Account:
    """Counts over the whole log, and the exposures' own figures."""

    requests: int = 0
    samples: int = 0
    lost: int = 0
    duplicated: int = 0
    open: int = 0
    unreadable: int = 0
    """Records on `samples` that are none."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    lost_requests: list[str] = field(default_factory=list)
    slots: list[tuple[int, str, list[str], float | None]] = field(default_factory=list)
    """(time in ms, arm, items shown, -log p per level of the first slot) of every exposure."""


@dataclass(frozen=True)
class Standing:
    """How far the join has committed in one partition: the next offset of each input, and its watermark."""

    exposures: int = 0
    feedback: int = 0
    watermark_ms: int = -1


def account(kafka: KafkaSettings, join: JoinSettings) -> Account:
    """Read the log and settle; a few seconds per million events."""
    found = Account()
    standings = committed(kafka)
    client = consumer(kafka.bootstrap)
    try:
        client.topics()  # asked for one after the other, each costs a tenth of a second
        refused: set[tuple[int, int]] = set()
        for record in read(client, DEAD_LETTERS):
            letter = decode(dead_letter_decoder, record.value)
            found.dead_letters[letter.reason] += 1
            if letter.topic == EXPOSURES:
                refused.add((letter.partition, letter.offset))
        for partition in range(kafka.partitions):
            _settle(found, partition, kafka, join, client, refused, standings[partition])
    finally:
        client.close()
    return found


def _settle(
    found: Account,
    partition: int,
    kafka: KafkaSettings,
    join: JoinSettings,
    client: KafkaConsumer,
    refused: set[tuple[int, int]],
    standing: Standing,
) -> None:
    """One partition."""
    intake = Intake(partition, kafka.partitions, round(join.max_skew_s * 1000))
    sampled: Counter[str] = Counter()
    for record in read(client, SAMPLES, partition):
        try:
            sampled[decode(sample_decoder, record.value).request] += 1
        except UnreadableError:
            found.unreadable += 1
    found.samples += len(sampled)
    found.duplicated += sum(sampled.values()) - len(sampled)
    without: dict[str, tuple[Exposure, int]] = {}
    known: set[str] = set()
    ahead_ms = NEVER
    for record in read(client, EXPOSURES, partition):
        exposure = event_of(intake.exposure, record)
        if exposure is None or (partition, record.offset) in refused:
            continue
        before_ms, ahead_ms = ahead_ms, max(ahead_ms, exposure.time_ms)
        if not isinstance(exposure, Exposure) or exposure.request in known:
            continue
        known.add(exposure.request)
        found.requests += 1
        found.slots.append(_figures(exposure))
        if exposure.request in sampled:
            continue
        if record.offset < standing.exposures:
            without[exposure.request] = (exposure, before_ms)
        else:
            found.open += 1
    if not without:
        return
    heard: dict[str, dict[str, Feedback]] = {request: {} for request in without}
    for record in read(client, FEEDBACK, partition, last=standing.feedback):
        event = event_of(intake.feedback, record)
        if isinstance(event, Feedback) and event.request in heard:
            heard[event.request].setdefault(event.event, event)
    times = JoinTimes.of(join)
    for request, (exposure, before_ms) in without.items():
        events = heard[request].values()
        if overdue(exposure, before_ms, events, times, standing.watermark_ms):
            found.lost += 1
            found.lost_requests.append(request)
        else:
            found.open += 1


def event_of(reader: Any, record: Any) -> Exposure | Feedback | Tick | None:
    """What one of intake's readers makes of a record, or None where it is a dead letter."""
    try:
        event: Exposure | Feedback | Tick = reader(record.value, record.timestamp)
    except UnreadableError:
        return None
    return event


def _figures(exposure: Exposure) -> tuple[int, str, list[str], float | None]:
    first, surprise = exposure.items[0], None
    if first.source == "policy" and first.logp_levels is not None:  # a draw: an estimate of entropy
        surprise = -sum(first.logp_levels) / LEVELS
    return exposure.time_ms, exposure.arm, [item.item for item in exposure.items], surprise


def committed(kafka: KafkaSettings) -> dict[int, Standing]:
    """How far the join has come, by partition."""
    numbers = range(kafka.partitions)
    places = [TopicPartition(topic, n) for topic in (EXPOSURES, FEEDBACK) for n in numbers]
    offsets = _group_offsets(kafka, places)
    notes = _notes(offsets)
    standings = {}
    for number in numbers:
        exposures, feedback = (TopicPartition(topic, number) for topic in (EXPOSURES, FEEDBACK))
        standings[number] = Standing()
        if exposures in notes:
            note = notes[exposures]
            standings[number] = Standing(
                exposures=offsets[exposures].offset,
                feedback=max(0, offsets[feedback].offset),
                watermark_ms=min(note.exposures_ms, note.feedback_ms),
            )
    return standings


def committed_notes(
    kafka: KafkaSettings, places: list[TopicPartition]
) -> dict[TopicPartition, OffsetNote]:
    """What the join wrote beside its committed offsets."""
    return _notes(_group_offsets(kafka, places))


def _notes(offsets: dict[TopicPartition, Any]) -> dict[TopicPartition, OffsetNote]:
    return {
        place: msgspec.json.decode(offset.metadata, type=OffsetNote)
        for place, offset in offsets.items()
        if offset.metadata
    }


def _group_offsets(kafka: KafkaSettings, places: list[TopicPartition]) -> dict[TopicPartition, Any]:
    """The group's offsets; a cluster where nothing was joined yet makes its coordinator only now."""
    client = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    try:
        for _ in range(COORDINATOR_TRIES):
            with suppress(RetriableError):
                return dict(client.list_group_offsets({STREAMS_GROUP: places})[STREAMS_GROUP])
            time.sleep(0.1)
        return {}
    finally:
        client.close()

"""Every exposure against its sample, from read-committed scans of the whole log.

`lost` = past its deadline at the final watermark and without a sample; what is not yet due is `open`. Dead-lettered
exposures stand apart. Nothing is taken from the processes that are being judged, but the watermarks they committed.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
from kafka import KafkaAdminClient, TopicPartition

from streams.clients import records
from streams.events import (
    Exposure,
    Feedback,
    Tick,
    UnreadableError,
    dead_letter_decoder,
    decode,
    sample_decoder,
)
from streams.intake import Intake
from streams.join import JoinTimes, decide
from streams.partition import OffsetNote
from streams.settings import JoinSettings, KafkaSettings
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK, SAMPLES, STREAMS_GROUP


@dataclass
class Account:
    """Counts over the whole log, and the exposures' own figures."""

    requests: int = 0
    samples: int = 0
    lost: int = 0
    duplicated: int = 0
    open: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    lost_requests: list[str] = field(default_factory=list)
    slots: list[tuple[int, str, list[str], float | None]] = field(default_factory=list)
    """(time in ms, arm, items shown, -log p per level of the first slot) of every exposure."""


def account(kafka: KafkaSettings, join: JoinSettings) -> Account:
    """Read the log and settle; a few seconds per million events."""
    found = Account()
    for record in records(kafka.bootstrap, DEAD_LETTERS):
        found.dead_letters[decode(dead_letter_decoder, record.value).reason] += 1
    for partition in range(kafka.partitions):
        _settle(found, partition, kafka, join)
    return found


def _settle(found: Account, partition: int, kafka: KafkaSettings, join: JoinSettings) -> None:
    """One partition."""
    intake = Intake(partition, kafka.partitions, round(join.max_skew_s * 1000))
    sampled: Counter[str] = Counter()
    for record in records(kafka.bootstrap, SAMPLES, partition):
        sampled[decode(sample_decoder, record.value).request] += 1
    found.samples += len(sampled)
    found.duplicated += sum(sampled.values()) - len(sampled)
    without: dict[str, tuple[Exposure, int]] = {}
    known: set[str] = set()
    for record in records(kafka.bootstrap, EXPOSURES, partition):
        exposure = _read(intake.exposure, record)
        if not isinstance(exposure, Exposure) or exposure.request in known:
            continue
        known.add(exposure.request)
        found.requests += 1
        found.slots.append(_figures(exposure))
        if exposure.request not in sampled:
            without[exposure.request] = (exposure, record.timestamp)
    if not without:
        return
    heard: dict[str, dict[str, Feedback]] = {request: {} for request in without}
    for record in records(kafka.bootstrap, FEEDBACK, partition):
        event = _read(intake.feedback, record)
        if isinstance(event, Feedback) and event.request in heard:
            heard[event.request].setdefault(event.event, event)
    watermark = _watermark(kafka, partition)
    times = JoinTimes.of(join)
    for request, (exposure, written_ms) in without.items():
        # a late exposure starts at its arrival, which its record timestamp bounds
        start = exposure.time_ms
        if written_ms - start > times.lateness and start > written_ms - times.horizon:
            start = written_ms
        decision = decide(exposure, start, list(heard[request].values()), times)
        if decision.decided_ms + times.lateness <= watermark:
            found.lost += 1
            found.lost_requests.append(request)
        else:
            found.open += 1


def _read(reader: Any, record: Any) -> Exposure | Feedback | Tick | None:
    """The event, or None where it is a dead letter."""
    try:
        event: Exposure | Feedback | Tick = reader(record.value, record.timestamp)
    except UnreadableError:
        return None
    return event


def _figures(exposure: Exposure) -> tuple[int, str, list[str], float | None]:
    first = exposure.items[0].logp_levels
    surprise = -sum(first) / len(first) if first is not None else None
    return exposure.time_ms, exposure.arm, [item.item for item in exposure.items], surprise


def _watermark(kafka: KafkaSettings, partition: int) -> int:
    """The watermark that the join last committed for a partition."""
    place = TopicPartition(EXPOSURES, partition)
    for note in committed_notes(kafka, [place]).values():
        return min(note.exposures_ms, note.feedback_ms)
    return -1


def committed_notes(
    kafka: KafkaSettings, places: list[TopicPartition]
) -> dict[TopicPartition, OffsetNote]:
    """What the join wrote beside its committed offsets."""
    client = KafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    try:
        offsets = client.list_group_offsets({STREAMS_GROUP: places})[STREAMS_GROUP]
    finally:
        client.close()
    return {
        place: msgspec.json.decode(offset.metadata, type=OffsetNote)
        for place, offset in offsets.items()
        if offset.metadata
    }


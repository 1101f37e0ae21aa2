"""`dwell audit samples`: reads the topics of a live or past run and holds every sample against its inputs.

Notable choices
- A past run is audited with the configuration that it wrote down (`run/config.toml`), for windows and lateness
  decide what is right; an existing cluster with the one that is given.
- The journals of the published versions must name every sample offset exactly once: a sample learned twice is as
  wrong as one made twice.
- By time range: exposures written within it are judged; all is read from one `dedupe_horizon` before, for that is how
  far back a repeat or early feedback may reach. The shaping fold is replayed only over a partition's whole log, where
  the state that it began with is still there.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from rich.console import Console

from ops.account import Standing, committed, event_of
from ops.cluster import visited
from ops.config import Config
from ops.results import Check, report
from streams.audit import Entry, Findings, PartitionLogs, audit
from streams.clients import consumer, read, records
from streams.events import (
    BucketShaping,
    QuantileShaping,
    Sample,
    Shaping,
    dead_letter_decoder,
    decode,
    sample_decoder,
    shaping_decoder,
)
from streams.intake import Intake
from streams.settings import KafkaSettings
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK, SAMPLES, SHAPING, WEIGHTS
from streams.weights import Manifest, weights_decoder

MARKERS = 3
"""Transactions without a record that may stand before the first one: each leaves a marker."""

Range = tuple[datetime | None, datetime | None]


def audit_samples(
    config: Config, span: Range = (None, None), tell: Callable[[str], None] = lambda _: None
) -> Findings:
    """Audit every partition of the cluster at `kafka.bootstrap`; raises kafka-python's errors."""
    total = Findings()
    standings = committed(config.kafka)
    client = consumer(config.kafka.bootstrap)
    try:
        client.topics()  # asked for one after the other, each costs a tenth of a second
        letters: Counter[tuple[str, int, int]] = Counter()
        for record in read(client, DEAD_LETTERS):
            letter = decode(dead_letter_decoder, record.value)
            letters[(letter.topic, letter.partition, letter.offset)] += 1
            total.dead_letters[letter.reason] += 1
        for number in range(config.kafka.partitions):
            tell(f"partition {number}")
            here = Counter({(t, at): n for (t, p, at), n in letters.items() if p == number})
            logs = _logs(client, config, number, here, standings[number], span)
            _add(total, audit(logs, config.join, config.shape))
    finally:
        client.close()
    return total


def _logs(
    client: KafkaConsumer,
    config: Config,
    number: int,
    letters: Counter[tuple[str, int]],
    standing: Standing,
    span: Range,
) -> PartitionLogs:
    """One partition's topics, or the range of them that was asked for."""
    intake = Intake(number, config.kafka.partitions, round(config.join.max_skew_s * 1000))
    since_ms, until_ms = (None if at is None else int(at.timestamp() * 1000) for at in span)

    def entries(topic: str, reader: Callable[[bytes | None, int], object]) -> list[Entry]:
        return [
            Entry(record.offset, record.timestamp, event_of(reader, record))
            for record in read(client, topic, number, first[topic])
        ]

    before_ms = round(config.join.dedupe_horizon_s * 1000)
    first = {
        topic: _first_at(client, TopicPartition(topic, number), since_ms, before_ms)
        for topic in (EXPOSURES, FEEDBACK, SAMPLES)
    }
    exposures = entries(EXPOSURES, intake.exposure)
    asked = [
        entry.offset
        for entry in exposures
        if (since_ms is None or entry.written_ms >= since_ms)
        and (until_ms is None or entry.written_ms <= until_ms)
    ]
    judged = range(asked[0], asked[-1] + 1) if asked else range(0)
    samples: list[tuple[int, Sample]] = []
    began_ms = None
    for record in read(client, SAMPLES, number, first[SAMPLES]):
        began_ms = record.timestamp if began_ms is None else began_ms
        samples.append((record.offset, decode(sample_decoder, record.value)))
    return PartitionLogs(
        exposures=exposures,
        feedback=entries(FEEDBACK, intake.feedback),
        samples=samples,
        letters=letters,
        exposures_upto=standing.exposures,
        feedback_upto=standing.feedback,
        watermark_ms=standing.watermark_ms,
        judged=None if span == (None, None) else judged,
        seeds=None if span != (None, None) else seeds_of(config.kafka, number, began_ms),
    )


def _first_at(
    client: KafkaConsumer, place: TopicPartition, since_ms: int | None, before_ms: int
) -> int:
    """The first offset written `before_ms` before the range."""
    if since_ms is None:
        return 0
    found = client.offsets_for_times({place: since_ms - before_ms})[place]
    return client.end_offsets([place])[place] if found is None else int(found.offset)


def seeds_of(kafka: KafkaSettings, number: int, began_ms: int | None) -> list[Shaping] | None:
    """What `shaping` held before the partition's first sample was written; None where that is not known.

    A start writes it in one piece from the first offset on. Compaction removes what was overwritten, and every sample
    overwrites its arm's quantile: where that is missing, or nothing stands at the beginning, not even an aborted
    record, the beginning is gone.
    """
    client = consumer(kafka.bootstrap, isolation_level="read_uncommitted")
    try:
        if any(client.beginning_offsets([TopicPartition(SAMPLES, number)]).values()):
            return None
        first = next(read(client, SHAPING, number), None)
    finally:
        client.close()
    if first is not None and first.offset > MARKERS:
        return None
    seeds: list[Shaping] = []
    for record in records(kafka.bootstrap, SHAPING, number):
        if record.offset != len(seeds) or (began_ms is not None and record.timestamp >= began_ms):
            break
        seeds.append(decode(shaping_decoder, record.value))
    arms = {seed.arm for seed in seeds if isinstance(seed, BucketShaping)}
    judged = {seed.arm for seed in seeds if isinstance(seed, QuantileShaping)}
    return seeds if arms <= judged else None


def journals(kafka: KafkaSettings) -> dict[str, int]:
    """How the published versions account for the samples: offsets named twice, or passed over."""
    twice = passed_over = 0
    upto: dict[int, int] = {}
    seen: dict[int, bytes] = {}
    client = consumer(kafka.bootstrap)
    try:
        versions = 0
        for record in read(client, WEIGHTS):
            part = None if record.value is None else decode(weights_decoder, record.value)
            if not isinstance(part, Manifest) or seen.get(part.version) == record.value:
                continue  # what somebody wrote again as it was claims nothing more
            seen[part.version] = record.value
            versions += 1
            for step in part.journal:
                for partition, first, last in step.ranges:
                    before = upto.get(partition, first)
                    twice += max(0, min(before, last) - first)
                    passed_over += max(0, first - before)
                    upto[partition] = max(before, last)
    finally:
        client.close()
    return {"versions": versions, "twice": twice, "passed_over": passed_over}


def _add(total: Findings, found: Findings) -> None:
    for part in fields(Findings):
        mine, other = getattr(total, part.name), getattr(found, part.name)
        setattr(total, part.name, mine + other)


def figures(found: Findings) -> dict[str, Any]:
    """The findings under the names of the evidence contract."""
    named: dict[str, Any] = {part.name: getattr(found, part.name) for part in fields(found)}
    named["dead_letters"] = found.dead_letters.total()
    named["dead_letter_reasons"] = dict(found.dead_letters)
    return named


def checks(found: Findings, journal: dict[str, int]) -> list[Check]:
    """What must hold of any run."""
    none: dict[str, int] = {
        name: getattr(found, name) for name in ("lost", "duplicated", "wrong_label", "unaccounted")
    }
    none |= {f"journal.{name}": journal[name] for name in ("twice", "passed_over")}
    return [Check(name, value, "0", value == 0) for name, value in none.items()]


def run(config: Config, span: Range, json: Path | None) -> int:
    """Audit, print, and return the exit status; raises `UserError` where Kafka cannot be reached."""
    console = Console()
    with visited(config, console.print) as config, console.status("reading the log") as status:
        found = audit_samples(config, span, status.update)
        journal = journals(config.kafka)
    results = {**figures(found), "journal": journal}
    held_to = checks(found, journal)
    return report("dwell audit samples", config, [], results, held_to, json, console)

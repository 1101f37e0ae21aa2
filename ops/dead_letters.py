"""`dwell dead-letters list` and `replay`: what could not be used, why, and once more.

Notable choices
- Replaying is safe to repeat: the join knows requests and events by their ids, and the record goes through the same
  intake first. What would be refused again is not written, and is said so.
- A record goes where it belongs: to the partition of its user, wherever it stood before. It keeps its event time: an
  exposure that comes late starts at its arrival (contract of the streams, "Time").
- Only inputs go back. A dead letter of `samples` has its sample in that topic already.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from rich.console import Console
from rich.table import Table

from ops.config import Config
from streams.clients import producer, records
from streams.events import (
    DeadLetter,
    Exposure,
    Feedback,
    Tick,
    UnreadableError,
    dead_letter_decoder,
    decode,
    exposure_decoder,
    feedback_decoder,
)
from streams.intake import Intake, partition_of
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK


@dataclass(frozen=True)
class Wanted:
    """Which letters are meant; None is any."""

    reason: str | None = None
    topic: str | None = None
    offsets: frozenset[int] = frozenset()
    """Their own offsets in `dead-letters`; empty is any."""

    def __call__(self, offset: int, letter: DeadLetter) -> bool:
        """Whether this one is."""
        return (
            self.reason in (None, letter.reason)
            and self.topic in (None, letter.topic)
            and (not self.offsets or offset in self.offsets)
        )


@dataclass(frozen=True)
class Found:
    """A dead letter, where it stands and when it was written."""

    offset: int
    written_ms: int
    letter: DeadLetter


def letters(bootstrap: str, wanted: Wanted) -> Iterator[Found]:
    """The dead letters of a cluster, oldest first."""
    for record in records(bootstrap, DEAD_LETTERS):
        letter = decode(dead_letter_decoder, record.value)
        if wanted(record.offset, letter):
            yield Found(record.offset, record.timestamp, letter)


def placed(letter: DeadLetter, config: Config, now_ms: int) -> tuple[str, int]:
    """The user and partition that a letter's record belongs to; raises `UnreadableError` where it has no place."""
    if letter.topic not in (EXPOSURES, FEEDBACK):
        raise UnreadableError("not_an_input", f"{letter.topic} is not read by the join")
    on_exposures = letter.topic == EXPOSURES
    event: Exposure | Feedback | Tick = (
        decode(exposure_decoder, letter.value)
        if on_exposures
        else decode(feedback_decoder, letter.value)
    )
    if isinstance(event, Tick):
        raise UnreadableError("a_tick", "an old tick moves nothing")
    partition = partition_of(event.user, config.kafka.partitions)
    intake = Intake(partition, config.kafka.partitions, round(config.join.max_skew_s * 1000))
    (intake.exposure if on_exposures else intake.feedback)(letter.value, now_ms)
    if on_exposures and event.time_ms < now_ms - config.join.dedupe_horizon_s * 1000:
        raise UnreadableError("too_late", "older than join.dedupe_horizon_s")
    return event.user, partition


def show(config: Config, wanted: Wanted, most: int) -> int:
    """Print the newest `most` letters and the count of each reason; exit status 0."""
    console = Console()
    found = list(letters(config.kafka.bootstrap, wanted))
    table = Table("offset", "written", "reason", "from", "bytes", "detail")
    for each in found[-most:]:
        letter = each.letter
        written = datetime.fromtimestamp(each.written_ms / 1000).isoformat(" ", "seconds")
        origin = f"{letter.topic} {letter.partition}:{letter.offset}"
        row = (str(each.offset), written, letter.reason, origin, str(len(letter.value)))
        table.add_row(*row, letter.detail)
    console.print(table)
    for reason, count in Counter(each.letter.reason for each in found).most_common():
        console.print(f"{reason}: {count}")
    console.print(f"{len(found)} dead letters" + (f", the last {most} shown" * (len(found) > most)))
    return 0


def replay(config: Config, wanted: Wanted) -> int:
    """Write the inputs among them once more; exit status 1 when some would be refused again."""
    console = Console()
    written: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    client = producer(config.kafka.bootstrap)
    try:
        sent = []
        for each in letters(config.kafka.bootstrap, wanted):
            letter = each.letter
            try:
                user, partition = placed(letter, config, int(time.time() * 1000))
            except UnreadableError as error:
                refused[f"{error.reason}: {error.detail}"] += 1
                continue
            sent.append(client.send(letter.topic, letter.value, user.encode(), partition=partition))
            written[letter.topic] += 1
        for future in sent:
            future.get(timeout=60)
    finally:
        client.close()
    for topic, count in sorted(written.items()):
        console.print(f"{count} written to {topic}")
    for why, count in refused.most_common():
        console.print(f"{count} left, they would be refused again: {why}", markup=False)
    if not written and not refused:
        console.print("no such dead letters")
    return 1 if refused else 0

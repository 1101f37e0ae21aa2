"""A processor without Kafka: commits, crashes and comes back like `streams.processor`, over logs in lists."""

import random
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field

from storage.kv import Kv, MemoryKv
from streams.decision import NEVER
from streams.events import Exposure, Feedback, Sample
from streams.partition import OffsetNote, Partition
from streams.settings import JoinSettings, ShapeSettings, StreamsSettings
from streams.state import LogRecord, PartitionState
from streams.topics import EXPOSURES, FEEDBACK, HISTORIES, SAMPLES, SHAPING
from tests.streams.makers import T0, Feed, exposure

Arrived = Exposure | Feedback | int
"""An arrival at the partition; a number is a tick on both inputs."""

JOIN = JoinSettings(
    window_s=0.040, cap_s=0.090, abandon_s=0.012, lateness_s=0.008, dedupe_horizon_s=0.3
)


@dataclass
class Shell:
    """One partition's inputs, changelogs and committed offsets; only `partition` and `state` die."""

    arrivals: list[Arrived]
    join: JoinSettings = JOIN
    streams: StreamsSettings = field(default_factory=StreamsSettings)
    logs: dict[str, list[tuple[str, bytes | None]]] = field(
        default_factory=lambda: {SAMPLES: [], HISTORIES: [], SHAPING: []}
    )
    samples: list[Sample] = field(default_factory=list)
    dead: Counter[str] = field(default_factory=Counter)
    note: OffsetNote = field(default_factory=lambda: OffsetNote(NEVER, NEVER, 0, 0))
    committed: int = 0
    """Arrivals whose offsets are committed."""

    def __post_init__(self) -> None:
        self.kv: Kv = MemoryKv()
        self.begin()

    def run(
        self, commits: Container[int], crashes: Container[int] = (), wipes: Container[int] = ()
    ) -> "Shell":
        """Take all arrivals; at the given counts of arrivals commit, then die, then lose the disk."""
        at, died = 0, set()
        while at < len(self.arrivals):
            self.take(at)
            at += 1
            if at in commits:
                self.commit(at, applied=at not in crashes)
            if at in crashes and at not in died:
                died.add(at)
                self.begin(wiped=at in wipes)
                at = self.committed
        self.commit(at)
        return self

    def take(self, at: int) -> None:
        """One record into the core, as the processor does."""
        event, core = self.arrivals[at], self.partition
        if isinstance(event, Exposure):
            if core.join.too_late(event):
                self.dead[event.request] += 1
            else:
                core.expose(event, self.offset(EXPOSURES, at), T0 + at)
        elif isinstance(event, Feedback):
            core.feed(event, self.offset(FEEDBACK, at), T0 + at)
        else:
            core.tick(event, True, T0 + at)
            core.tick(event, False, T0 + at)

    def commit(self, at: int, applied: bool = True) -> None:
        """Write changelogs and offsets; the local state follows unless it dies in between."""
        output = self.partition.take()
        records = [
            self._append(topic, key.decode(), value)
            for topic, pairs in output.records()
            for key, value in pairs
        ]
        self.samples += output.samples
        self.note = self.partition.note(self.offset(EXPOSURES, at), self.offset(FEEDBACK, at))
        self.committed = at
        if applied:
            self.state.apply(records)
            join = self.partition.join
            self.state.forget_closed(join.watermark_ms - join.times.horizon)

    def begin(self, wiped: bool = False) -> None:
        """What a start does: catch up, take needed records again, resume."""
        if wiped:
            self.kv = MemoryKv()
        self.state = PartitionState(self.kv)
        for topic, log in self.logs.items():
            first = self.state.position(topic)
            self.state.apply(
                LogRecord(topic, offset, value, key.encode())
                for offset, (key, value) in enumerate(log[first:], first)
            )
        self.partition = Partition(self.join, ShapeSettings(), self.streams, self.state)
        if not self.committed:
            return
        before = self.arrivals[: self.committed]
        exposures = [event for event in before if isinstance(event, Exposure)]
        feedback = [event for event in before if isinstance(event, Feedback)]
        for offset, shown in enumerate(exposures):
            if offset >= self.note.need_exposures:
                self.partition.reopen(shown, offset, self.note)
        for offset, event in enumerate(feedback):
            if offset >= self.note.need_feedback:
                self.partition.join.refeed(event, offset)
        self.partition.resume(self.note, len(feedback))

    def offset(self, topic: str, at: int) -> int:
        """How many records of a topic stand before an arrival."""
        kind = Exposure if topic == EXPOSURES else Feedback
        return sum(isinstance(event, kind) for event in self.arrivals[:at])

    def compacted(self, topic: str) -> dict[str, bytes]:
        """What compaction would leave of a changelog."""
        latest = dict(self.logs[topic])
        return {key: value for key, value in latest.items() if value is not None}

    def _append(self, topic: str, key: str, value: bytes | None) -> LogRecord:
        self.logs[topic].append((key, value))
        return LogRecord(topic, len(self.logs[topic]) - 1, value, key.encode())


def busy_arrivals(seed: int, requests: int = 30) -> list[Arrived]:
    """A partition's life: disorder, repeats, late exposures with and without feedback, orphans, idle times."""
    rng = random.Random(seed)
    timed: list[tuple[float, Arrived]] = []
    for number in range(requests):
        name, user = f"r{number}", f"u{rng.randrange(4)}"
        time_ms = T0 + rng.randrange(40 * requests)
        shown = exposure(name, time_ms, rng.randint(1, 3), user=user)
        late = rng.choice([0, 0, 0, 30, 120, 500])
        if rng.random() < 0.9:
            timed.append((time_ms + late + rng.uniform(0, 7.9), shown))
        if rng.random() < 0.2:
            timed.append((time_ms + late + rng.choice([5.0, 60.0, 600.0]), shown))
        feed = Feed(name, user)
        for _ in range(rng.randrange(9)):
            kind = rng.choice(["begin", "heartbeat", "heartbeat", "end", "like", "dislike"])
            after = time_ms - T0 + rng.randrange(60)
            event = feed(kind, rng.randrange(3), after, play_ms=rng.randrange(40_000))  # type: ignore[arg-type]
            delay = rng.choice([0, 0, 0, 0, late, 50])
            timed.append((event.time_ms + delay + rng.uniform(0, 7.9), event))
            if rng.random() < 0.1:
                timed.append((event.time_ms + delay + rng.choice([9.0, 100.0]), event))
        if rng.random() < 0.4:
            left = feed.left(time_ms - T0 + rng.randrange(80))
            timed.append((left.time_ms + late + rng.uniform(0, 7.9), left))
    for _ in range(requests):
        tick = T0 + rng.randrange(40 * requests)
        timed.append((tick + rng.uniform(0, 5), tick))
    timed.sort(key=lambda entry: entry[0])
    return [*(event for _, event in timed), T0 + 40 * requests + 2000]

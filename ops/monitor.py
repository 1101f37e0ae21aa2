"""Watches the loop from its log: samples, versions and acknowledgements become label wait and freshness.

Freshness of a sample = the moment it could be closed -> the acknowledgement of a version that contains it
(contract of the evidence). Everything is read from Kafka, nothing from the processes themselves. The core takes
records; a thread feeds it in live runs.
"""

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from kafka import TopicPartition

from streams.clients import consumer
from streams.control import LEARNING_ARM
from streams.events import Sample, UnreadableError, decode, sample_decoder
from streams.settings import KafkaSettings
from streams.topics import SAMPLES, WEIGHTS, WEIGHTS_ACKS
from streams.weights import Ack, Manifest, ack_decoder, weights_decoder

SECONDS_KEPT = 20_000
VERSIONS_KEPT = 1000


@dataclass
class Observed:
    """What has been seen since the monitor began."""

    samples: Counter[str] = field(default_factory=Counter)
    """Requests closed, by arm."""
    closed_by: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    trained: int = 0
    versions: int = 0
    version: int = 0
    published_ms: int = 0
    applied: int = 0
    refused: int = 0
    freshness_s: deque[float] = field(default_factory=lambda: deque(maxlen=SECONDS_KEPT))
    label_wait_s: deque[float] = field(default_factory=lambda: deque(maxlen=SECONDS_KEPT))
    pending: int = 0
    """Learning samples not yet in an applied version."""
    unpublished: int = 0
    """Partitions whose last sample is in no version yet."""
    unreadable: int = 0
    """Records that were passed over."""


class Monitor:
    """The core: takes records of the three topics, each partition in its order, the topics at any pace."""

    def __init__(self) -> None:
        self.seen = Observed()
        self._waiting: dict[int, deque[tuple[int, int]]] = {}
        self._covered: dict[int, dict[int, int]] = {}
        self._cover: dict[int, int] = {}
        self._early: dict[int, Ack] = {}
        self._last: dict[int, int] = {}
        self._applied: dict[int, deque[tuple[int, int]]] = {}
        """(covered up to, applied at) of the latest versions, by partition."""

    @property
    def kept(self) -> int:
        """Versions that are remembered."""
        return len(self._covered) + sum(len(applied) for applied in self._applied.values())

    def sample(self, partition: int, offset: int, sample: Sample) -> None:
        """A closed request."""
        seen = self.seen
        seen.samples[sample.arm] += 1
        seen.closed_by[sample.closed_by] += 1
        seen.outcomes.update(item.outcome for item in sample.items)
        seen.label_wait_s.append((sample.closable_ms - sample.time_ms) / 1000)
        self._last[partition] = offset
        self._count_unpublished()
        if sample.arm != LEARNING_ARM:
            return
        applied = self._applied.get(partition)
        if applied and offset < applied[-1][0]:  # the topics were read at different paces
            first_ms = next(at_ms for upto, at_ms in applied if offset < upto)
            seen.freshness_s.append((first_ms - sample.closable_ms) / 1000)
            return
        self._waiting.setdefault(partition, deque()).append((offset, sample.closable_ms))
        seen.pending += 1

    def manifest(self, manifest: Manifest) -> None:
        """A published version: what its steps took is what it contains."""
        for entry in manifest.journal:
            self.seen.trained += entry.trained
            for partition, _, upto in entry.ranges:
                self._cover[partition] = upto
        self._count_unpublished()
        self.seen.versions += 1
        self.seen.version = manifest.version
        self.seen.published_ms = manifest.created_ms
        self._covered[manifest.version] = dict(self._cover)
        early = self._early.pop(manifest.version, None)
        if early is not None:
            self.ack(early)

    def ack(self, ack: Ack) -> None:
        """An actor's word; the first to apply a version counts, and one that is before its version is kept."""
        if not ack.applied:
            self.seen.refused += 1
            return
        if ack.version not in self._covered:
            if ack.version > self.seen.version:
                self._early.setdefault(ack.version, ack)
            return
        self.seen.applied += 1
        covered = self._covered[ack.version]
        for version in [version for version in self._covered if version <= ack.version]:
            del self._covered[version]  # what skipped versions contained is in this one
        for partition, upto in covered.items():
            applied = self._applied.setdefault(partition, deque(maxlen=VERSIONS_KEPT))
            applied.append((upto, ack.applied_ms))
            waiting = self._waiting.get(partition, deque())
            while waiting and waiting[0][0] < upto:
                _, closable_ms = waiting.popleft()
                self.seen.freshness_s.append((ack.applied_ms - closable_ms) / 1000)
                self.seen.pending -= 1

    def _count_unpublished(self) -> None:
        """Partitions whose last sample no version contains yet."""
        self.seen.unpublished = sum(
            last >= self._cover.get(partition, 0) for partition, last in self._last.items()
        )


class MonitorThread(threading.Thread):
    """Feeds a `Monitor` with what is appended from now on (or from `since`), until stopped."""

    def __init__(self, kafka: KafkaSettings, since: Mapping[TopicPartition, int] | None = None):
        super().__init__(name="monitor", daemon=True)
        self.monitor = Monitor()
        self.lock = threading.Lock()
        self._stopping = threading.Event()
        self._consumer = consumer(kafka.bootstrap, max_poll_records=5000)
        places = monitored(kafka)
        self._consumer.assign(places)
        for place, end in (since or self._consumer.end_offsets(places)).items():
            self._consumer.seek(place, end)

    def run(self) -> None:
        """Poll until `finish`; then once more, so that nothing written before is missed."""
        while not self._stopping.is_set():
            self._poll(200)
        while self._poll(1000):
            pass
        self._consumer.close()

    def finish(self) -> Observed:
        """Stop, and return all that was seen."""
        self._stopping.set()
        self.join()
        return self.monitor.seen

    def _poll(self, timeout_ms: int) -> int:
        batches = self._consumer.poll(timeout_ms=timeout_ms)
        with self.lock:
            for place, records in batches.items():
                for record in records:
                    self._take(
                        place.topic, record.partition, record.offset, record.key, record.value
                    )
        return len(batches)

    def _take(
        self, topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None
    ) -> None:
        if value is None:
            return
        try:
            if topic == SAMPLES:
                self.monitor.sample(partition, offset, decode(sample_decoder, value))
            elif topic == WEIGHTS_ACKS:
                self.monitor.ack(decode(ack_decoder, value))
            elif key is not None and key.endswith(b"/manifest"):
                part = decode(weights_decoder, value)
                if isinstance(part, Manifest):
                    self.monitor.manifest(part)
        except UnreadableError:
            self.monitor.seen.unreadable += 1


def monitored(kafka: KafkaSettings) -> list[TopicPartition]:
    """The partitions that a monitor reads."""
    samples = [TopicPartition(SAMPLES, number) for number in range(kafka.partitions)]
    return [*samples, TopicPartition(WEIGHTS, 0), TopicPartition(WEIGHTS_ACKS, 0)]

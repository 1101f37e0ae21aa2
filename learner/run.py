"""The learner's shell: samples in, versions out.

Notable choices (contract of the policy, "Versions")
- A step takes `batch` learning requests, or what is there `batch_wait_s` after the first waiting one.
- Checkpoint n is on disk before version n's transaction. A start fences, reads the last committed version, loads
  its checkpoint (a later one is discarded) and goes on at last + 1, from the offsets in the checkpoint.
- Every sample is accounted for in a journal entry, the control arm's too; nothing is discarded for being stale.
"""

import logging
import threading
import time
from pathlib import Path

import torch
from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from prometheus_client import Counter, Gauge, Histogram

from learner.batch import assemble
from learner.catalogue import Catalogue, CatalogueError
from learner.checkpoint import Progress, fits, load, to_bytes
from learner.journal import Journal, Polled
from learner.publication import Publisher
from learner.settings import LearnSettings, PolicySettings
from learner.step import StepMetrics, Trainer
from storage.checkpoints import Checkpoints
from streams.clients import consumer
from streams.control import ControlState
from streams.events import Sample, command_decoder, decode, sample_decoder
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE, CONTROL, SAMPLES

log = logging.getLogger("dwell.learner")

VERSION = Gauge("dwell_learner_version", "Newest published version")
STEPS = Counter("dwell_learner_steps_total", "Updates made")
TAKEN = Counter("dwell_learner_samples_total", "Samples accounted for", ["disposition"])
STALENESS = Histogram(
    "dwell_learner_staleness_versions",
    "Versions between serving and learning, per trained request",
    buckets=(0, 1, 2, 4, 8, 16, 32, 64),
)
STEP_SECONDS = Histogram("dwell_learner_step_seconds", "Time of one update")
PUBLISH_SECONDS = Histogram("dwell_learner_publish_seconds", "Checkpoint and transaction")
LAG = Histogram(
    "dwell_learner_publish_lag_seconds", "Newest watermark of a version to its publication"
)
TERMS = Gauge("dwell_learner_step", "Terms and figures of the last update", ["what"])

POLL_MS = 50


class LearnerError(RuntimeError):
    """The learner cannot go on; the message says what would help."""


class Learner:
    """One learner on one cluster; `start` before `run`."""

    def __init__(
        self, kafka: KafkaSettings, policy: PolicySettings, learn: LearnSettings, data_dir: Path
    ) -> None:
        self._kafka = kafka
        self._policy = policy
        self._learn = learn
        self._checkpoints = Checkpoints(data_dir / "learner" / "checkpoints")
        self._control = ControlState()
        torch.set_num_threads(policy.threads)

    def start(self, start_from: Path | None) -> None:
        """Fence, restore and, in a new lineage, publish version 1 from `start_from`.

        Raises `LearnerError` or `CheckpointError` when there is nothing to start from.
        """
        self._publisher = Publisher(self._kafka.bootstrap, self._learn.weights_horizon_s)
        last = self._publisher.last
        if last is None:
            if start_from is None:
                raise LearnerError("there is no version yet: name a checkpoint to start from")
            path, version = start_from, 0
        else:
            version = last.version
            path = self._checkpoints.path(version)
            self._checkpoints.discard_after(version)
            if not path.exists():
                raise LearnerError(
                    f"version {version} is published but its checkpoint {path} is missing: restore "
                    "it, or start a new lineage in an empty data directory"
                )
        self.trainer, self.progress, self._codebooks = load(path, self._learn, self._learn.lr)
        fits(path, self.progress, self._policy)
        self._catalogue = Catalogue(self.progress.codes)
        self._journal = Journal(self.progress.offsets)
        self._journal.watermark_ms = self.progress.watermark_ms
        self._consumer = self._open_consumer()
        if last is None:
            self.progress.version = 0
            self._publish()
        VERSION.set(self.progress.version)
        log.info("at version %d, lineage %s", self.progress.version, self.progress.lineage)

    def _open_consumer(self) -> KafkaConsumer:
        client = consumer(self._kafka.bootstrap, max_poll_records=2000)
        samples = [TopicPartition(SAMPLES, number) for number in range(self._kafka.partitions)]
        logs = [TopicPartition(CATALOGUE, 0), TopicPartition(CONTROL, 0)]
        client.assign([*samples, *logs])
        for place, first in client.beginning_offsets([*samples, *logs]).items():
            taken = self._journal.offsets.get(place.partition, 0) if place in samples else 0
            if place in samples and taken < first:
                raise LearnerError(
                    f"samples partition {place.partition}: offset {taken} is next, but the log begins "
                    f"at {first}: retention deleted samples before they were learned"
                )
            client.seek(place, max(first, taken))
        return client

    def run(self, stop: threading.Event) -> None:
        """Learn and publish until `stop`; what was learned but not published is learned again."""
        first_waiting: float | None = None
        published = time.monotonic()
        while not stop.is_set():
            for batch in self._consumer.poll(timeout_ms=POLL_MS).values():
                for record in batch:
                    self._take(record)
            now = time.monotonic()
            if self._journal.waiting and first_waiting is None:
                first_waiting = now
            overdue = first_waiting is not None and now - first_waiting >= self._learn.batch_wait_s
            if self._journal.trainable >= self._learn.batch or overdue:
                self._step(self._journal.cut(self._learn.batch))
                first_waiting = now if self._journal.waiting else None
            if self._journal.entries and now - published >= self._learn.publish_every_s:
                self._publish()
                published = time.monotonic()

    def close(self) -> None:
        """Leave the cluster."""
        self._consumer.close()
        self._publisher.close()

    def _take(self, record: ConsumerRecord) -> None:
        if record.topic == SAMPLES:
            sample = decode(sample_decoder, record.value)
            self._journal.add(Polled(record.partition, record.offset, sample))
        elif record.topic == CONTROL:
            self._control.apply(decode(command_decoder, record.value))
        else:
            try:
                self._catalogue.take(record.offset, record.key, record.value)
            except CatalogueError as error:
                log.warning("%s", error)

    def _step(self, samples: list[Sample]) -> None:
        entry = self._journal.entries[-1]
        for disposition in ("trained", "control", "without_target"):
            TAKEN.labels(disposition).inc(getattr(entry, disposition))
        if not samples:
            return
        self._catch_up(max(sample.catalogue_version for sample in samples))
        with STEP_SECONDS.time():
            metrics = train(self.trainer, samples, self._catalogue)
        self.progress.steps += 1
        STEPS.inc()
        for sample in samples:
            STALENESS.observe(self.progress.version - sample.policy_version)
        if metrics is not None:
            for what in StepMetrics.__dataclass_fields__:
                TERMS.labels(what).set(getattr(metrics, what))

    def _catch_up(self, version: int) -> None:
        """The catalogue as far as the samples' actors had read it."""
        deadline = time.monotonic() + 30
        while self._catalogue.version < version:
            for batch in self._consumer.poll(timeout_ms=POLL_MS).values():
                for record in batch:
                    self._take(record)
            if time.monotonic() > deadline:
                raise LearnerError(
                    f"samples name catalogue version {version}, the topic `catalogue` ends at "
                    f"{self._catalogue.version}: it was written by another cluster, or deleted"
                )

    def _publish(self) -> None:
        with PUBLISH_SECONDS.time():
            self.progress.version += 1
            self.progress.offsets = dict(self._journal.offsets)
            self.progress.watermark_ms = self._journal.watermark_ms
            self.progress.catalogue_version = self._catalogue.version
            content = to_bytes(self.trainer, self.progress, self._codebooks)
            self._checkpoints.write(self.progress.version, content)
            manifest = self._publisher.publish(
                self.trainer.model,
                self.progress,
                self._codebooks.digest(),
                self._journal.take_entries(),
                int(time.time() * 1000),
                set(self._control.pinned.values()),
            )
            self._checkpoints.prune(self._learn.keep_checkpoints)
        VERSION.set(manifest.version)
        if manifest.watermark_ms:
            LAG.observe(max(0.0, (manifest.created_ms - manifest.watermark_ms) / 1000))


def train(trainer: Trainer, samples: list[Sample], catalogue: Catalogue) -> StepMetrics | None:
    """One update on `samples`: the pure path that live, serial and audit share."""
    preset = trainer.model.preset
    batch = assemble(samples, catalogue.valid, preset.context, trainer.model.user_rows)
    return trainer.step(batch)


def initial_progress(policy: PolicySettings, lineage: str) -> Progress:
    """Where a new lineage stands."""
    return Progress(
        version=0,
        lineage=lineage,
        preset=policy.preset,
        codes=policy.codes,
        user_rows=policy.user_rows,
    )

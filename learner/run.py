"""The learner's shell: samples in, versions out.

Notable choices (contract of the policy, "Versions")
- A step takes `batch` learning requests, or what is there `batch_wait_s` after the first waiting one.
- Checkpoint n is on disk before version n's transaction. A start fences, reads the last committed version, loads
  its checkpoint (a later one is discarded) and goes on at last + 1, from the offsets in the checkpoint. Where that
  one is damaged, an older one and the journals lead there (learner/recovery.py).
- Besides the newest checkpoints, one of each quarter of `weights_horizon_s` is kept: the journals of about as long
  can be followed again from it, by a start or by an audit.
- Every sample is accounted for in a journal entry, the control arm's too; nothing is discarded for being stale.
- A sample that cannot be learned from counts as without target and becomes a dead letter, in the transaction of
  the version whose journal accounts for it.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from kafka.errors import KafkaError
from prometheus_client import Counter, Gauge, Histogram

from learner.batch import fault
from learner.checkpoint import fits, load, to_bytes
from learner.journal import Journal, Polled
from learner.publication import Publisher
from learner.recovery import RecoveryError, resume
from learner.settings import LearnSettings, PolicySettings
from learner.source import Source, SourceError
from learner.step import StepMetrics
from learner.update import train
from learner.watch import Watch
from storage.checkpoints import Checkpoints
from streams.events import Sample
from streams.settings import KafkaSettings
from streams.weights import Manifest

log = logging.getLogger("dwell.learner")

VERSION = Gauge("dwell_learner_version", "Newest published version")
STEPS = Counter("dwell_learner_steps_total", "Updates made")
TAKEN = Counter("dwell_learner_samples_total", "Samples accounted for", ["disposition"])
STALENESS = Histogram(
    "dwell_learner_staleness_versions",
    "Versions between serving and learning, per trained request",
    buckets=(0, 1, 2, 4, 8, 16, 32, 64),
)
AGE = Histogram(
    "dwell_learner_staleness_seconds",
    "Publication of the version that served to learning, per trained request of a version still in the log",
    buckets=(0.5, 1, 2, 5, 10, 20, 60, 300, 900),
)
STEP_SECONDS = Histogram("dwell_learner_step_seconds", "Time of one update")
PUBLISH_SECONDS = Histogram("dwell_learner_publish_seconds", "Checkpoint and transaction")
LAG = Histogram(
    "dwell_learner_publish_lag_seconds", "Newest watermark of a version to its publication"
)
TERMS = Gauge("dwell_learner_step", "Terms and figures of the last update", ["what"])


CHECKPOINTS: Final = Path("learner") / "checkpoints"
"""Below the data directory."""


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
        self._watch = Watch(learn)
        self._checkpoints = Checkpoints(data_dir / CHECKPOINTS)
        self._publisher: Publisher | None = None
        self._source: Source | None = None
        torch.set_num_threads(policy.threads)

    def start(self, start_from: Path | None) -> None:
        """Fence, restore and, in a new lineage, publish version 1 from `start_from`.

        Raises `LearnerError`, `PublicationError` or `CheckpointError` when there is nothing to start from.
        """
        with self._or_leaves():
            self._publisher = Publisher(self._kafka.bootstrap, self._learn.weights_horizon_s)
            last = self._publisher.last
            self._restore(last, start_from)
            self._journal = Journal(self.progress.offsets)
            self._journal.watermark_ms = self.progress.watermark_ms
            self._source = Source(self._kafka, self._journal, self.progress.codes)
            self._source.open(self._codebooks.digest())
            if last is None:
                self.progress.version = 0
                self._publish(self._source)
        VERSION.set(self.progress.version)
        log.info("at version %d, lineage %s", self.progress.version, self.progress.lineage)

    def run(self, stop: threading.Event) -> None:
        """Learn and publish until `stop`; what was learned but not published is learned again.

        Raises `LearnerError` or `PublicationError` when it cannot go on, and has left the cluster then.
        """
        source = self._source
        if source is None:
            raise RuntimeError("the learner has not been started")
        first_waiting: float | None = None
        published = time.monotonic()
        with self._or_leaves():
            while not stop.is_set():
                source.poll()
                now = time.monotonic()
                if self._journal.waiting and first_waiting is None:
                    first_waiting = now
                overdue = (
                    first_waiting is not None and now - first_waiting >= self._learn.batch_wait_s
                )
                if self._journal.trainable >= self._learn.batch or overdue:
                    self._step(source, self._journal.cut_polled(self._learn.batch))
                    first_waiting = now if self._journal.waiting else None
                if self._journal.entries and now - published >= self._learn.publish_every_s:
                    self._publish(source)
                    published = time.monotonic()

    def close(self) -> None:
        """Leave the cluster; may be repeated."""
        if self._source is not None:
            self._source.close()
        if self._publisher is not None:
            self._publisher.close()

    @contextmanager
    def _or_leaves(self) -> Iterator[None]:
        """Leave the cluster on any error; Kafka's become sentences."""
        try:
            yield
        except BaseException as error:
            self.close()
            if isinstance(error, KafkaError):
                why = " ".join(str(error).split()) or type(error).__name__
                raise LearnerError(f"Kafka at {self._kafka.bootstrap}: {why}") from None
            if isinstance(error, SourceError | RecoveryError):
                raise LearnerError(str(error)) from None
            raise

    def _restore(self, last: Manifest | None, start_from: Path | None) -> None:
        """Weights, optimisers, random state and offsets of the last version, or of the start."""
        if last is None:
            path = self._checked_start(start_from)
            self.trainer, self.progress, self._codebooks = load(path, self._learn, self._learn.lr)
        else:
            path = self._checkpoints.path(last.version)
            found = resume(self._checkpoints, last, self._kafka, self._learn)
            self.trainer, self.progress = found.trainer, found.progress
            self._codebooks = found.codebooks
        fits(path, self.progress, self._policy)

    def _checked_start(self, start_from: Path | None) -> Path:
        if start_from is None:
            raise LearnerError("there is no version yet: name a checkpoint to start from")
        newest = max(self._checkpoints.versions(), default=0)
        if newest > 1:  # 1 may be left by a start that was cut short
            raise LearnerError(
                f"there are checkpoints up to version {newest}, but no version in the topic `weights.anchors`: "
                "it was deleted, or the data directory is another cluster's; use an empty data directory"
            )
        return start_from

    def _step(self, source: Source, chosen: list[Polled]) -> None:
        samples = [polled.sample for polled in chosen if polled.sample is not None]
        if samples:
            source.catch_up(max(sample.catalogue_version for sample in samples))
            with STEP_SECONDS.time():
                samples = self._train(source, chosen, samples)
        entry = self._journal.entries[-1]
        for disposition in ("trained", "control", "without_target"):
            TAKEN.labels(disposition).inc(getattr(entry, disposition))
        if not samples:
            return
        self.progress.steps += 1
        STEPS.inc()
        assert self._publisher is not None
        now_ms = time.time() * 1000
        for sample in samples:
            STALENESS.observe(self.progress.version - sample.policy_version)
            created_ms = self._publisher.created_ms(sample.policy_version)
            if created_ms is not None:
                AGE.observe(max(0.0, (now_ms - created_ms) / 1000))

    def _train(self, source: Source, chosen: list[Polled], samples: list[Sample]) -> list[Sample]:
        """One update on what can be learned from; the rest (imports may hold anything) become dead letters."""
        try:
            metrics = train(self.trainer, samples, source.catalogue)
        except (ValueError, LookupError):  # raised before anything has changed
            faults = [fault(sample, source.catalogue.valid) for sample in samples]
            if not any(faults):
                raise
            for polled, why in zip(chosen, faults, strict=True):
                if why:
                    source.bury(polled, why)
            samples = [sample for sample, why in zip(samples, faults, strict=True) if not why]
            self._journal.set_aside(len(chosen) - len(samples))
            metrics = train(self.trainer, samples, source.catalogue) if samples else None
        if metrics is not None:
            for what in StepMetrics.__dataclass_fields__:
                TERMS.labels(what).set(getattr(metrics, what))
            for warning in self._watch.see(metrics):
                log.warning("%s", warning)
        return samples

    def _publish(self, source: Source) -> None:
        assert self._publisher is not None
        with PUBLISH_SECONDS.time():
            self.progress.version += 1
            self.progress.offsets = dict(self._journal.offsets)
            self.progress.watermark_ms = self._journal.watermark_ms
            self.progress.catalogue_version = source.catalogue.version
            content = to_bytes(self.trainer, self.progress, self._codebooks)
            self._keep(content)
            manifest = self._publisher.publish(
                self.trainer.model,
                self.progress,
                self._codebooks.digest(),
                self._journal.take_entries(),
                int(time.time() * 1000),
                set(source.control.pinned.values()),
                source.take_letters(),
            )
            self._prune(self._publisher, set(source.control.pinned.values()))
        VERSION.set(manifest.version)
        if manifest.watermark_ms:
            LAG.observe(max(0.0, (manifest.created_ms - manifest.watermark_ms) / 1000))

    def _keep(self, content: bytes) -> None:
        try:
            self._checkpoints.write(self.progress.version, content)
        except OSError as error:
            raise LearnerError(
                f"checkpoint {self._checkpoints.path(self.progress.version)} cannot be written "
                f"({error.strerror}): version {self.progress.version} is not published; once that is put "
                "right, a start learns it again from the log"
            ) from None

    def _prune(self, publisher: Publisher, named: set[int]) -> None:
        """Keep the newest checkpoints, those that arms name, and some from which journals can be followed."""
        quarter_ms = max(1, round(self._learn.weights_horizon_s * 250))
        spread = publisher.first_of_each(quarter_ms)
        self._checkpoints.prune(self._learn.keep_checkpoints, named | spread)

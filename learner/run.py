"""The learner's shell: samples in, versions out.

Notable choices (contract of the policy, "Versions")
- A step takes `batch` learning requests, or what is there `batch_wait_s` after the first waiting one.
- It goes on from the offsets in the checkpoint (learner/versions.py says which): what was learned but not published
  is learned again.
- Every sample is accounted for in a journal entry, the control arm's too; nothing is discarded for being stale.
- A sample that cannot be learned from counts as without target and becomes a dead letter, in the transaction of
  the version whose journal accounts for it.
- Several ranks take their turns together: each says what it has, and all step, publish or end by the same rule.
- What would do harm is not published, and a roll-back is followed (learner/keeper.py): all ranks go back to the same
  weights.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from kafka.errors import KafkaError
from prometheus_client import Counter, Gauge, Histogram

from learner.batch import fault
from learner.journal import Journal, Polled, merged, undo
from learner.keeper import Keeper, Return
from learner.ranks import Ranks, RanksError, gathered
from learner.recovery import RecoveryError
from learner.settings import LearnSettings, PolicySettings
from learner.source import Source, SourceError
from learner.step import StepMetrics
from learner.update import train
from learner.versions import StartError, Versions
from learner.watch import Watch
from streams.blocks import State
from streams.control import condemned_by
from streams.events import Sample
from streams.settings import KafkaSettings

log = logging.getLogger("dwell.learner")

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
TERMS = Gauge("dwell_learner_step", "Terms and figures of the last update", ["what"])


class LearnerError(RuntimeError):
    """The learner cannot go on; the message says what would help."""


class Turn(NamedTuple):
    """What a rank has to say when all decide what to do next."""

    trainable: int
    overdue: bool
    due: bool
    """Whether it is time to publish; the first rank's word counts."""
    back: bool
    """Whether a roll-back must be followed; the first rank's word counts."""
    stop: bool


class Learner:
    """One learner on one cluster, or one rank of it; `start` before `run`."""

    def __init__(
        self,
        kafka: KafkaSettings,
        policy: PolicySettings,
        learn: LearnSettings,
        data_dir: Path,
        ranks: Ranks | None = None,
    ) -> None:
        self._kafka = kafka
        self._policy = policy
        self._learn = learn
        self._ranks = ranks or Ranks()
        if self._ranks.world > kafka.partitions:
            raise LearnerError(
                f"{self._ranks.world} ranks share {kafka.partitions} partitions: start at most as many ranks as "
                "kafka.partitions"
            )
        self._watch = Watch(learn)
        self._versions = Versions(kafka, learn, data_dir, self._ranks)
        self._source: Source | None = None
        self._keeper: Keeper | None = None
        torch.set_num_threads(policy.threads)

    def start(self, start_from: Path | None) -> None:
        """Fence, restore and, in a new lineage, publish version 1 from `start_from`.

        Raises `LearnerError`, `PublicationError` or `CheckpointError` when there is nothing to start from.
        """
        with self._or_leaves():
            self._state = self._versions.open(self._policy, start_from)
            self.trainer, self.progress = self._state.trainer, self._state.progress
            self._journal = Journal(self._owned(self.progress.offsets), self.progress.condemned)
            self._journal.watermark_ms = self.progress.watermark_ms
            self._source = Source(self._kafka, self._journal, self.progress.codes, self._ranks)
            self._source.open(self._state.codebooks.digest())
            state = self._weights()
            if self.progress.version == 0:
                self._publish(self._source)
            if state is not None and self._ranks.rank == 0:
                where = self._kafka.bootstrap
                more = self._ranks, self._state.lost
                self._keeper = Keeper(where, self._learn, self.progress, state, *more)
                self._keeper.listen(self._source)
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
            while True:
                source.poll()
                now = time.monotonic()
                if self._journal.waiting and first_waiting is None:
                    first_waiting = now
                waited_s = 0.0 if first_waiting is None else now - first_waiting
                overdue = first_waiting is not None and waited_s >= self._learn.batch_wait_s
                due = now - published >= self._learn.publish_every_s
                back = self._keeper is not None and self._keeper.called_back(source)
                mine = Turn(self._journal.trainable, overdue, due, back, stop.is_set())
                turns: list[Turn] = self._ranks.everyone(mine)
                if any(turn.stop for turn in turns):
                    return
                has = [turn.trainable for turn in turns]
                if sum(has) >= self._learn.batch or any(turn.overdue for turn in turns):
                    most = share_out(has, self._learn.batch)[self._ranks.rank]
                    self._step(source, self._journal.cut_polled(most))
                    first_waiting = now if self._journal.waiting else None
                if turns[0].back or (self._journal.entries and turns[0].due):
                    self._publish(source)
                    published = time.monotonic()

    def close(self) -> None:
        """Leave the cluster; may be repeated."""
        if self._source is not None:
            self._source.close()
        self._versions.close()

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
            if isinstance(error, SourceError | RecoveryError | StartError | RanksError):
                raise LearnerError(str(error)) from None
            if self._ranks.lost(error):
                raise LearnerError(str(self._ranks.alone_again())) from None
            raise

    def _owned(self, offsets: dict[int, int]) -> dict[int, int]:
        return {partition: at for partition, at in offsets.items() if self._ranks.owns(partition)}

    def _step(self, source: Source, chosen: list[Polled]) -> None:
        samples = [polled.sample for polled in chosen if polled.sample is not None]
        if samples:
            source.catch_up(max(sample.catalogue_version for sample in samples))
        if samples or self._ranks.world > 1:
            with STEP_SECONDS.time():
                samples = self._train(source, chosen, samples)
        entry = self._journal.entries[-1]
        now_ms = int(time.time() * 1000)
        entry.made_ms = now_ms
        for disposition in ("trained", "control", "without_target", "condemned"):
            TAKEN.labels(disposition).inc(getattr(entry, disposition))
        if not samples:
            return
        STEPS.inc()
        for sample in samples:
            STALENESS.observe(self.progress.version - sample.policy_version)
            created_ms = self._versions.created_ms(sample.policy_version)
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
            alone = self._ranks.world == 1
            metrics = (
                train(self.trainer, samples, source.catalogue) if samples or not alone else None
            )
        if metrics is not None:
            for what in StepMetrics.__dataclass_fields__:
                TERMS.labels(what).set(getattr(metrics, what))
            for warning in self._watch.see(metrics):
                log.warning("%s", warning)
        if self._keeper is not None:
            self._keeper.guard.saw(samples)
        return samples

    def _weights(self) -> State | None:
        """All weights, where this rank has to do with publishing; all must ask."""
        first, sharded = self._ranks.rank == 0, self._learn.shard and self._ranks.world > 1
        return gathered(self.trainer.model) if first or sharded else None

    def _gone_back(self, source: Source, candidate: State | None) -> Return | None:
        """Go back if what was learned must not be published, all ranks to the same weights; all must ask."""
        back = None
        if self._keeper is not None and candidate is not None:
            back = self._keeper.decide(source, candidate, self.progress.version)
        back = cast("Return | None", self._ranks.everyone(back)[0])
        if back is not None:
            self.trainer.go_back(back.state)
        return back

    def _publish(self, source: Source) -> None:
        """Bring together what the ranks took, and make it a version."""
        everyone = self._ranks.everyone(
            (
                self._journal.take_entries(),
                self._journal.offsets,
                self._journal.watermark_ms,
                source.take_letters(),
            )
        )
        entries = merged([entries for entries, *_ in everyone])
        progress = self.progress
        state = self._weights()
        back = self._gone_back(source, state)
        named = set(source.control.pinned.values())
        progress.version += 1
        if back is not None:
            TAKEN.labels("condemned").inc(sum(entry.trained for entry in entries))
            undo(entries)
            progress.condemned += condemned_by(back.restored, progress.version)
        progress.steps += sum(entry.trained > 0 for entry in entries)
        progress.offsets = {
            partition: offset
            for _, offsets, *_ in everyone
            for partition, offset in offsets.items()
        }
        progress.watermark_ms = max(watermark_ms for _, _, watermark_ms, _ in everyone)
        progress.catalogue_version = source.catalogue.version
        letters = [letter for *_, letters in everyone for letter in letters]
        if back is None:
            self._versions.publish(self._state, state, entries, letters, named)
            return
        said = [back.command(progress.version, int(time.time() * 1000))]
        self._versions.publish(
            self._state, back.state, entries, letters, named, said, back.restored
        )


def share_out(has: Sequence[int], most: int) -> list[int]:
    """At most how many requests each rank takes of a step of `most`, by what each has: as even as that allows.

    At least 1, so that a rank that has only samples of the control arm can account for them.
    """
    if sum(has) <= most:
        return [most] * len(has)
    shares = [0] * len(has)
    left = most
    for place, rank in enumerate(sorted(range(len(has)), key=lambda rank: (has[rank], rank))):
        shares[rank] = min(has[rank], left // (len(has) - place))
        left -= shares[rank]
    return [max(1, share) for share in shares]

"""A learner's versions: where it starts from, and how what it learned becomes the next one.

Notable choices (contract of the policy, "Versions")
- Checkpoint n is on disk before version n's transaction. A start fences, reads the last committed version, loads its
  checkpoint (a later one is discarded) and goes on at last + 1. Where that one is damaged, an older one and the
  journals lead there (learner/recovery.py).
- Besides the newest checkpoints, and those that arms name, one of each quarter of `weights_horizon_s` is kept: the
  journals of about as long can be followed again from it, by a start or by an audit.
- Of several ranks the first alone has the publisher and the checkpoints; the others are told.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from prometheus_client import Gauge, Histogram

from learner.checkpoint import fits, load, load_shards, shared, to_bytes, to_folder
from learner.policy import state_of
from learner.publication import Publisher, Terms
from learner.ranks import Ranks
from learner.recovery import Resumed, resume
from learner.settings import LearnSettings, PolicySettings
from storage.checkpoints import Checkpoints
from streams.blocks import State
from streams.events import Command, DeadLetter
from streams.settings import KafkaSettings
from streams.weights import StepEntry

log = logging.getLogger("dwell.learner")

VERSION = Gauge("dwell_learner_version", "Newest published version")
PUBLISH_SECONDS = Histogram("dwell_learner_publish_seconds", "Checkpoint and transaction")
LAG = Histogram(
    "dwell_learner_publish_lag_seconds", "Newest watermark of a version to its publication"
)

CHECKPOINTS: Final = Path("learner") / "checkpoints"
"""Below the data directory."""


class StartError(RuntimeError):
    """There is nothing to start from, or it cannot be kept; the message says what would help."""


class Versions:
    """The versions of one lineage; opening them fences whoever published until now."""

    def __init__(
        self, kafka: KafkaSettings, learn: LearnSettings, data_dir: Path, ranks: Ranks
    ) -> None:
        self._kafka = kafka
        self._learn = learn
        self._ranks = ranks
        self._checkpoints = Checkpoints(data_dir / CHECKPOINTS)
        self._publisher: Publisher | None = None

    def open(self, policy: PolicySettings, start_from: Path | None) -> Resumed:
        """The learner at the last published version, or at a start, as version 0.

        Raises `StartError`, `RecoveryError`, `PublicationError` or `CheckpointError`.
        """
        found = self._first(policy, start_from) if self._ranks.rank == 0 else None
        if self._ranks.world > 1:
            found = self._told(found)
        assert found is not None
        VERSION.set(found.progress.version)
        return found

    def publish(
        self,
        learner: Resumed,
        state: State | None,
        entries: list[StepEntry],
        letters: Sequence[DeadLetter],
        named: set[int],
        commands: Sequence[Command] = (),
        restored: int = 0,
    ) -> None:
        """Keep and publish the learner as `progress.version`, all ranks must ask; versions in `named` are kept.

        `state` is all of the learner's weights, which the rank that publishes must bring;
        `commands` are written with it; `restored` is the version that it went back to, if it did.

        Raises `StartError` when the disk is full, and `PublicationError`.
        """
        with PUBLISH_SECONDS.time():
            sharded = self._learn.shard and self._ranks.world > 1
            if self._publisher is None and not sharded:
                return
            self._keep(learner, sharded)
            if self._publisher is None:
                return
            assert state is not None
            codebook, now_ms = learner.codebooks.digest(), int(time.time() * 1000)
            manifest = self._publisher.publish(
                *(state, learner.progress, codebook, entries, now_ms, named),
                letters,
                commands,
                restored,
            )
            quarter_ms = max(1, round(self._learn.weights_horizon_s * 250))
            spread = self._publisher.first_of_each(quarter_ms)
            self._checkpoints.prune(self._learn.keep_checkpoints, named | spread)
        VERSION.set(manifest.version)
        if manifest.watermark_ms:
            LAG.observe(max(0.0, (manifest.created_ms - manifest.watermark_ms) / 1000))

    def created_ms(self, version: int) -> int | None:
        """When a version was made, if it is still in the log and this rank publishes."""
        return None if self._publisher is None else self._publisher.created_ms(version)

    def close(self) -> None:
        """Leave the cluster; may be repeated."""
        if self._publisher is not None:
            self._publisher.close()

    def _first(self, policy: PolicySettings, start_from: Path | None) -> Resumed:
        """What the first rank finds, alone."""
        terms = Terms.of(self._kafka, self._learn)
        self._publisher = Publisher(self._kafka.bootstrap, terms)
        last, alone = self._publisher.last, self._ranks.alone()
        if last is None:
            path = self._checked(start_from)
            found = Resumed(*load(path, self._learn, self._learn.lr, alone))
            found.progress.version = 0  # its own number is of no lineage yet
        else:
            path = self._checkpoints.path(last.version)
            found = resume(self._checkpoints, last, self._kafka, self._learn, alone)
            if found.lost is None:  # else the next is published in full
                self._publisher.go_on_from(state_of(found.trainer.model))
        fits(path, found.progress, policy)
        return found

    def _checked(self, start_from: Path | None) -> Path:
        if start_from is None:
            raise StartError("there is no version yet: name a checkpoint to start from")
        newest = max(self._checkpoints.versions(), default=0)
        if newest > 1:  # 1 may be left by a start that was cut short
            raise StartError(
                f"there are checkpoints up to version {newest}, but no version in the topic `weights.anchors`: "
                "it was deleted, or the data directory is another cluster's; use an empty data directory"
            )
        return start_from

    def _told(self, found: Resumed | None) -> Resumed:
        """What the first rank found, on each of several: read from its shards, or as the first tells it."""
        message: Path | bytes | None = None
        if found is not None:
            in_shards = found.path is not None and found.path.is_dir()
            whole = None if in_shards else to_bytes(found.trainer, found.progress, found.codebooks)
            message = found.path if in_shards else whole
        message = self._ranks.everyone(message)[0]
        settings, lr = self._learn, self._learn.lr
        lost = None if found is None else found.lost
        if isinstance(message, Path):
            return Resumed(*load_shards(message, settings, lr, self._ranks), lost=lost)
        assert message is not None
        return Resumed(*shared(message, settings, lr, self._ranks), lost=lost)

    def _keep(self, learner: Resumed, sharded: bool) -> None:
        """Write the checkpoint, each rank its shards where they have some; all must ask."""
        version, first = learner.progress.version, self._ranks.rank == 0
        parts = learner.trainer, learner.progress, learner.codebooks
        try:
            if sharded:
                mine = self._checkpoints.aside(version) if first else None
                folder = self._ranks.everyone(mine)[0]
                to_folder(folder, *parts, self._ranks)
                self._ranks.everyone(None)  # all shards are written
                if first:
                    self._checkpoints.place(version)
            else:
                self._checkpoints.write(version, to_bytes(*parts))
        except OSError as error:
            raise StartError(
                f"checkpoint {self._checkpoints.path(version)} cannot be written ({error.strerror}): version "
                f"{version} is not published; once that is put right, a start learns it again from the log"
            ) from None

"""Following the journals again: how a learner resumes where its newest checkpoint is of no use, and how an audit
re-executes a run.

Notable choices (contract of the policy, "Versions")
- A checkpoint that cannot be read, or is not what was published, is skipped with a warning; from an older one the
  journals are followed up to the last published version, whose digest must come out.
- Where it does not (another machine, other threads, samples deleted), the published weights are adopted with fresh
  optimisers; said, and counted.
- Weights are adopted only from a version that is one: its digest holds, it is finite and, where the learner has a
  key, signed with it, for the next version would be signed too. Where the last on the log is none, the newest that is
  becomes the next version (`Resumed.lost`).
- Samples that became dead letters say so in the transaction of their version: a catalogue that has grown since would
  let them pass.
"""

import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kafka import TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from prometheus_client import Counter

from learner.catalogue import Catalogue, CatalogueError
from learner.checkpoint import CheckpointError, Progress, load
from learner.journal import Polled
from learner.policy import load_state, state_of
from learner.ranks import Ranks
from learner.semantic_ids import Codebooks
from learner.settings import LearnSettings
from learner.step import Trainer
from learner.update import JournalError, train_again
from storage.checkpoints import Checkpoints
from streams.blocks import State, digest_of, not_finite
from streams.clients import consumer, records
from streams.control import condemned_by
from streams.events import UnreadableError, dead_letter_decoder, decode, sample_decoder
from streams.settings import KafkaSettings
from streams.signing import Trust, signer, trust_in
from streams.topics import CATALOGUE, DEAD_LETTERS, SAMPLES
from streams.weights import Manifest, StepEntry, WeightError
from streams.weights_log import manifests_after, version_at, walk

log = logging.getLogger("dwell.learner")

ADOPTED = Counter("dwell_learner_adopted_total", "Starts from published weights, not re-executed")
AGAIN = Counter("dwell_learner_steps_again_total", "Updates made again at a start")


class RecoveryError(RuntimeError):
    """No checkpoint leads to the last published version; the message says what would help."""


@dataclass
class Resumed:
    """The learner as it was at a published version."""

    trainer: Trainer
    progress: Progress
    codebooks: Codebooks
    path: Path | None = None
    """The checkpoint that holds just this."""
    lost: "Lost | None" = None
    """Set where the last version on the log is none; the weights are of an older one."""


class Lost(NamedTuple):
    """Why there is no going on from the last version."""

    restored: int
    """The version whose weights are taken instead."""
    why: str


@dataclass
class RunLog:
    """What Kafka holds of a run: the journals' samples, read once and in order, and the catalogue."""

    kafka: KafkaSettings
    catalogue: Catalogue
    buried: set[tuple[int, int]]
    _readers: dict[int, Generator[ConsumerRecord, None, None]] = field(default_factory=dict)
    _next: dict[int, ConsumerRecord | None] = field(default_factory=dict)

    @classmethod
    def of(cls, kafka: KafkaSettings, progress: Progress) -> "RunLog":
        """Open the log at a checkpoint; raises `JournalError` when samples after it were deleted."""
        bootstrap = kafka.bootstrap
        catalogue = catalogue_in_log(bootstrap, progress.codes)
        buried = set()
        for record in records(bootstrap, DEAD_LETTERS):
            letter = decode(dead_letter_decoder, record.value)
            if letter.topic == SAMPLES:
                buried.add((letter.partition, letter.offset))
        found = cls(kafka, catalogue, buried)
        found._open(progress.offsets)
        return found

    def _open(self, offsets: dict[int, int]) -> None:
        places = [TopicPartition(SAMPLES, number) for number in range(self.kafka.partitions)]
        client = consumer(self.kafka.bootstrap)
        try:
            begins = client.beginning_offsets(places)
        finally:
            client.close()
        for place in places:
            first = offsets.get(place.partition, 0)
            if first < begins[place]:
                raise JournalError(
                    f"samples partition {place.partition}: offset {first} is next, {begins[place]} the first"
                )
        for number in range(self.kafka.partitions):
            reader = records(self.kafka.bootstrap, SAMPLES, number, offsets.get(number, 0))
            self._readers[number] = reader
            self._next[number] = next(reader, None)

    def close(self) -> None:
        """Leave the cluster."""
        for reader in self._readers.values():
            reader.close()

    def take(self, entry: StepEntry) -> list[Polled]:
        """The samples of a step's ranges; steps must be asked for in their order."""
        taken: list[Polled] = []
        for partition, _, upto in entry.ranges:
            record = self._next[partition]
            while record is not None and record.offset < upto:
                try:
                    sample = decode(sample_decoder, record.value)
                except UnreadableError:
                    sample = None
                taken.append(Polled(partition, record.offset, sample))
                record = next(self._readers[partition], None)
            self._next[partition] = record
        return taken


def catalogue_in_log(bootstrap: str, codes: int) -> Catalogue:
    """The catalogue up to the log's present end."""
    catalogue = Catalogue(codes)
    with closing(records(bootstrap, CATALOGUE)) as entries:
        for record in entries:
            try:
                catalogue.take(record.offset, record.key, record.value)
            except CatalogueError as error:
                log.warning("%s", error)
    return catalogue


def follow(
    trainer: Trainer, progress: Progress, manifests: list[Manifest], run: RunLog
) -> Iterator[tuple[Manifest, str]]:
    """Make the steps of `manifests` again, from the state of a checkpoint on: each version and its digest now.

    Both arguments advance. Raises `JournalError` where a version is missing or a step cannot be made again.
    """
    wanted = {manifest.restored for manifest in manifests}
    passed: dict[int, State] = {}
    if progress.version in wanted:
        passed[progress.version] = state_of(trainer.model)
    for manifest in manifests:
        if manifest.version != progress.version + 1:
            raise JournalError(
                f"version {manifest.version} follows version {progress.version} in the log"
            )
        for entry in manifest.journal:
            train_again(
                *(trainer, entry, run.take(entry), run.buried, run.catalogue),
                condemned=progress.condemned,
                undone=manifest.restored > 0,
            )
            progress.steps += entry.trained > 0
            for partition, _, upto in entry.ranges:
                progress.offsets[partition] = upto
        progress.version = manifest.version
        progress.watermark_ms = manifest.watermark_ms
        if manifest.restored:
            trainer.go_back(passed.get(manifest.restored) or _again(run, manifest.restored))
            progress.condemned += condemned_by(manifest.restored, manifest.version)
        state = state_of(trainer.model)
        if manifest.version in wanted:
            passed[manifest.version] = state
        yield manifest, digest_of(state)


def _again(run: RunLog, version: int) -> State:
    """A version that was restored, and made before the following began."""
    try:
        return published_state(run.kafka.bootstrap, version)
    except RecoveryError as error:
        raise JournalError(f"it was restored later, but {error}") from None


def resume(
    checkpoints: Checkpoints,
    last: Manifest,
    kafka: KafkaSettings,
    settings: LearnSettings,
    ranks: Ranks,
) -> Resumed:
    """The learner at version `last`, in one process, from the newest checkpoint that leads there.

    Raises `RecoveryError` when none does, and `UnreadableError` where the log cannot be understood.
    """
    checkpoints.discard_after(last.version)
    for version in reversed(checkpoints.versions()):
        path = checkpoints.path(version)
        try:
            found = Resumed(*load(path, settings, settings.lr, ranks), path)
        except CheckpointError as error:
            log.warning("checkpoint skipped: %s", error)
            continue
        if (found.progress.version, found.progress.lineage) != (version, last.lineage):
            log.warning("checkpoint skipped: %s is not of lineage %s", path, last.lineage)
            continue
        if version < last.version:
            return _caught_up(found, last, kafka, settings)
        if digest_of(state_of(found.trainer.model)) == last.digest:
            return found
        log.warning(
            "checkpoint skipped: %s does not hold version %d as it was published", path, version
        )
    raise RecoveryError(
        f"version {last.version} is published but no checkpoint in {checkpoints.folder} leads to it: restore one, "
        "or start a new lineage in an empty data directory"
    )


def _caught_up(
    found: Resumed, last: Manifest, kafka: KafkaSettings, settings: LearnSettings
) -> Resumed:
    """From an older checkpoint to `last`, by its journals or by its weights."""
    found.path = None
    began, state = found.progress.version, state_of(found.trainer.model)
    manifests = manifests_after(kafka.bootstrap, began)
    before = found.progress.steps
    try:
        with closing(RunLog.of(kafka, found.progress)) as run:
            versions = list(follow(found.trainer, found.progress, manifests, run))
        _, digest = versions[-1]
        if digest == last.digest:
            AGAIN.inc(found.progress.steps - before)
            log.warning(
                "went from checkpoint %d to version %d by %d steps made again",
                *(began, last.version, found.progress.steps - before),
            )
            return found
        why = f"the steps made again give digest {digest}, version {last.version} has {last.digest}"
    except JournalError as error:
        why = str(error)
    ADOPTED.inc()
    number, state, fault = _newest_that_is_one(kafka.bootstrap, settings, last, (began, state))
    lost = Lost(number, fault) if fault else None
    if lost is None:
        log.warning("%s: adopting the published weights, with fresh optimisers", why)
    else:
        log.error("%s: going back to version %d, with fresh optimisers", fault, number)
    progress = _at(found.progress, began, manifests, last)
    load_state(found.trainer.model, state)
    trainer = Trainer(found.trainer.model, settings, settings.lr, found.trainer.ranks)
    return Resumed(trainer, progress, found.codebooks, lost=lost)


def _newest_that_is_one(
    bootstrap: str, settings: LearnSettings, last: Manifest, known: tuple[int, State]
) -> tuple[int, State, str]:
    """The newest version up to `last` whose weights may be taken, and why that is not `last`; empty where it is.

    `known` is a checkpoint's, which are this learner's own.
    """
    number, state = known
    trust = trust_in(signer(settings.signing_key))
    fault = f"version {last.version} is not whole in the log"
    if trust is not None:
        fault += ", or not signed with learn.signing_key"
    with closing(walk(bootstrap, trust, number)) as versions:
        for manifest, version in versions:
            if isinstance(version, WeightError):
                wrong = str(version)
            else:
                broken = not_finite(version.state)
                wrong = f"version {manifest.version}: not finite: {', '.join(broken[:3])}"
                if not broken:
                    number, state = manifest.version, version.state
                    continue
            fault = wrong if manifest.version == last.version else fault
    return number, state, "" if number == last.version else fault


def _at(progress: Progress, began: int, manifests: list[Manifest], last: Manifest) -> Progress:
    """Where learning stood at `last`, by the journals alone."""
    there = {manifest.version for manifest in manifests}
    missing = [number for number in range(began + 1, last.version) if number not in there]
    if missing:
        raise RecoveryError(
            f"the journals of {len(missing)} versions after checkpoint {began} have expired, so nobody knows which "
            "samples they took: restore a newer checkpoint, or start a new lineage in an empty data directory"
        )
    for manifest in manifests:
        for entry in manifest.journal:
            for partition, _, upto in entry.ranges:
                before = progress.offsets.get(partition, 0)
                progress.offsets[partition] = max(before, upto)
        between = condemned_by(manifest.restored, manifest.version)
        progress.condemned += [each for each in between if each not in progress.condemned]
    progress.version, progress.watermark_ms = last.version, last.watermark_ms
    return progress


def published_state(bootstrap: str, version: int, trust: Trust | None = None) -> State:
    """The state of a version, from the log; raises `RecoveryError` where that does not lead to it."""
    try:
        return version_at(bootstrap, version, trust).state
    except WeightError as error:
        raise RecoveryError(str(error)) from None

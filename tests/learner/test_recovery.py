"""A learner whose newest checkpoint is of no use comes to the same state by the journals, or says why not."""

import errno
import logging
import os
import re
import shutil
from dataclasses import replace

import pytest
from kafka import KafkaAdminClient, TopicPartition

from learner.checkpoint import differing, to_bytes
from learner.journal import Polled
from learner.policy import state_of
from learner.recovery import ADOPTED, manifests_after
from learner.run import Learner, LearnerError
from learner.update import JournalError, train_again
from learner.versions import CHECKPOINTS
from storage.checkpoints import Checkpoints
from streams.topics import SAMPLES
from streams.weights import Manifest, StepEntry, digest_of
from tests.learner.cluster import PARTITIONS, published
from tests.learner.lineage import (
    STEPWISE,
    Lineage,
    accounted,
    learn,
    one_line,
    running,
    until,
)


def checkpoints_of(lineage: Lineage) -> Checkpoints:
    return Checkpoints(lineage.data_dir / CHECKPOINTS)


def learned(lineage: Lineage, steps: int = 4) -> Manifest:
    """A run of some steps, a version each; its last."""
    lineage.write(lineage.samples(4 * steps, seed=4))
    with lineage.started() as learner:
        return learn(learner, lineage, 4 * steps)[-1]


def damage(checkpoints: Checkpoints, version: int) -> None:
    path = checkpoints.path(version)
    path.write_bytes(path.read_bytes()[:-100])


def goes_on(learner: Learner, lineage: Lineage, before: int) -> None:
    lineage.write(lineage.samples(8, seed=5))
    manifests = learn(learner, lineage, before + 8)
    assert [manifest.version for manifest in manifests] == list(range(1, len(manifests) + 1))
    assert accounted(manifests)["trained"] == before + 8


@pytest.mark.parametrize("left", ["the one before", "the first"])
def test_where_the_newest_checkpoint_is_damaged_the_journals_lead_to_the_same_state(
    lineage: Lineage, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    last = learned(lineage)
    checkpoints = checkpoints_of(lineage)
    whole = lineage.start.with_name("whole")
    shutil.copy(checkpoints.path(last.version), whole)
    if left == "the first":
        for version in checkpoints.versions()[1:-1]:
            checkpoints.path(version).unlink()
    damage(checkpoints, last.version)
    before = ADOPTED._value.get()
    with caplog.at_level(logging.WARNING, "dwell.learner"), lineage.started() as learner:
        assert learner.progress.version == last.version
        assert sum(learner.progress.offsets.values()) == 16
        content = to_bytes(learner.trainer, learner.progress, lineage.codebooks)
        assert differing(whole, content) == []
        goes_on(learner, lineage, 16)
    assert str(checkpoints.path(last.version)) in caplog.text
    assert "made again" in caplog.text
    assert ADOPTED._value.get() == before


def test_a_checkpoint_that_is_not_what_was_published_is_skipped(lineage: Lineage) -> None:
    last = learned(lineage)
    checkpoints = checkpoints_of(lineage)
    other = checkpoints.path(last.version - 1).read_bytes()
    checkpoints.path(last.version).write_bytes(other)
    with lineage.started() as learner:
        assert digest_of(state_of(learner.trainer.model)) == last.digest
        goes_on(learner, lineage, 16)


def test_where_samples_were_deleted_the_published_weights_are_adopted_and_counted(
    lineage: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    last = learned(lineage)
    damage(checkpoints_of(lineage), last.version)
    ((_, state),) = [(m, s) for m, s in published(lineage.kafka) if m.version == last.version]
    with KafkaAdminClient(bootstrap_servers=lineage.kafka.bootstrap) as admin:
        admin.delete_records({TopicPartition(SAMPLES, n): 8 for n in range(PARTITIONS)})
    before = ADOPTED._value.get()
    with caplog.at_level(logging.WARNING, "dwell.learner"), lineage.started() as learner:
        assert ADOPTED._value.get() == before + 1
        assert digest_of(state_of(learner.trainer.model)) == digest_of(state) == last.digest
        assert learner.progress.offsets == {0: 8, 1: 8}
        goes_on(learner, lineage, 16)
    assert "adopting the published weights" in caplog.text


def test_journals_that_have_expired_are_missed_in_one_sentence(lineage: Lineage) -> None:
    hasty = replace(STEPWISE, weights_horizon_s=0.0, keep_checkpoints=20)
    lineage.write(lineage.samples(16, seed=4))
    with lineage.started(hasty) as learner:
        last = learn(learner, lineage, 16)[-1]
    checkpoints = checkpoints_of(lineage)
    kept = {manifest.version for manifest in manifests_after(lineage.kafka.bootstrap, 0)}
    assert last.version in kept and len(kept) < last.version
    for version in checkpoints.versions()[1:]:
        checkpoints.path(version).unlink()
    with pytest.raises(
        LearnerError, match=r"journals of \d+ versions after .* have expired"
    ) as caught:
        lineage.learner(hasty).start(lineage.start)
    one_line(caught.value)


def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage.write(lineage.samples(8, seed=4))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with lineage.started() as learner, monkeypatch.context() as patched:
        patched.setattr("storage.checkpoints.os.fsync", full)
        with running(learner) as ended:
            until(lambda: bool(ended))
    (error,) = ended
    assert isinstance(error, LearnerError)
    assert re.search(r"v00000002.*No space left on device", one_line(error))
    assert [manifest.version for manifest, _ in published(lineage.kafka)] == [1]
    with lineage.started() as learner:
        goes_on(learner, lineage, 8)


def test_checkpoints_are_kept_from_which_the_journals_can_be_followed(lineage: Lineage) -> None:
    last = learned(lineage, steps=6)
    newest = list(range(last.version - 2, last.version + 1))
    kept = checkpoints_of(lineage).versions()
    assert kept[-3:] == newest
    assert kept[0] == 1, "the first of the horizon"
    assert len(kept) <= 5


# --- one step again -------------------------------------------------------------------------------


def test_a_step_that_the_log_does_not_hold_as_journalled_is_refused(lineage: Lineage) -> None:
    with lineage.started() as learner:
        samples = lineage.samples(3, seed=1)
        taken = [Polled(0, number, sample) for number, sample in enumerate(samples)]
        entry = StepEntry(ranges=[(0, 0, 3)], trained=3, control=0, without_target=0)
        before = digest_of(state_of(learner.trainer.model))
        for wrong in (taken[:2], [*taken, Polled(1, 0, None)]):
            with pytest.raises(JournalError, match=re.escape("the step over [(0, 0, 3)]")):
                train_again(learner.trainer, entry, wrong, set(), lineage.catalogue)
        with pytest.raises(JournalError):
            train_again(learner.trainer, entry, taken, {(0, 1)}, lineage.catalogue)
        assert digest_of(state_of(learner.trainer.model)) == before
        train_again(learner.trainer, entry, taken, set(), lineage.catalogue)
        assert digest_of(state_of(learner.trainer.model)) != before

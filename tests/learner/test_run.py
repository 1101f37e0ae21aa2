"""The learner on a real broker: what it publishes, and what it does after whatever went wrong."""

import copy
import logging
import re
import threading
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from learner import fenced, publication
from learner.checkpoint import load, to_bytes
from learner.policy import state_of
from learner.publication import PublicationError
from learner.run import Learner, LearnerError
from learner.semantic_ids import fit
from learner.update import train
from ops.broker import EmbeddedBroker
from storage.checkpoints import Checkpoints
from streams.blocks import digest_of
from streams.clients import records
from streams.events import (
    SampleItem,
    encode,
)
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE, CONTROL, SAMPLES, WEIGHTS_ANCHORS
from streams.weights import record_keys
from streams.weights_log import anchors
from tests.learner.cluster import published, refused, writing
from tests.learner.lineage import (
    CODES,
    HASTY,
    ITEMS,
    ROWS,
    STEPWISE,
    Lineage,
    accounted,
    counts,
    expected_digest,
    learn,
    one_line,
    pin,
    running,
    until,
)
from tests.learner.makers import NOW_MS, learnable, upsert


def test_a_start_is_published_as_version_one(lineage: Lineage) -> None:
    with lineage.started():
        ((manifest, state),) = published(lineage.kafka)
    trainer, _, codebooks = load(lineage.start, STEPWISE, STEPWISE.lr)
    expected = state_of(trainer.model)
    assert manifest.version == 1
    assert (manifest.lineage, manifest.preset, manifest.codes, manifest.user_rows) == (
        "abc",
        "tiny",
        CODES,
        ROWS,
    )
    assert manifest.codebook == codebooks.digest()
    assert manifest.journal == []
    assert state.keys() == expected.keys()
    assert all(np.array_equal(state[name], expected[name]) for name in expected)
    assert abs(manifest.created_ms / 1000 - time.time()) < 60
    assert Checkpoints(lineage.data_dir / "learner" / "checkpoints").versions() == [1]


def test_numbers_only_grow_and_every_sample_is_accounted_for(lineage: Lineage) -> None:
    samples = lineage.samples(14, seed=1)
    for number in (2, 3, 9):
        samples[number].arm = "control"
    for item in samples[5].items:
        item.advantage, item.supervised = None, False
    samples[13].watermark_ms = NOW_MS + 17
    lineage.write(samples)
    with lineage.started(HASTY) as learner:
        manifests = learn(learner, lineage, 14)
        steps = learner.progress.steps
    assert [manifest.version for manifest in manifests] == list(range(1, len(manifests) + 1))
    assert accounted(manifests) == counts(trained=10, control=3, without_target=1)
    assert manifests[-1].watermark_ms == NOW_MS + 17
    assert all(entry.trained <= 4 for manifest in manifests for entry in manifest.journal)
    assert steps == sum(entry.trained > 0 for m in manifests for entry in m.journal)
    assert steps >= 3


def test_the_control_arm_does_not_train(lineage: Lineage) -> None:
    samples = lineage.samples(8, seed=1)
    for sample in samples:
        sample.arm = "control"
    lineage.write(samples)
    with lineage.started(HASTY) as learner:
        manifests = learn(learner, lineage, 8)
    assert accounted(manifests) == counts(trained=0, control=8, without_target=0)
    assert {manifest.digest for manifest in manifests} == {manifests[0].digest}


def test_a_learner_that_was_stopped_goes_on_exactly_where_it_was(lineage: Lineage) -> None:
    samples = lineage.samples(16, seed=2)
    one_partition = [copy.copy(sample) for sample in samples]
    with writing(lineage.kafka) as client:
        for sample in one_partition[:8]:
            client.send(SAMPLES, encode(sample), partition=1)
    with lineage.started() as learner:
        first = learn(learner, lineage, 8)
    with writing(lineage.kafka) as client:
        for sample in one_partition[8:]:
            client.send(SAMPLES, encode(sample), partition=1)
    with lineage.started() as learner:
        manifests = learn(learner, lineage, 16)
    assert manifests[: len(first)] == first
    assert [manifest.version for manifest in manifests] == list(range(1, len(manifests) + 1))
    assert accounted(manifests)["trained"] == 16
    groups = [samples[at : at + 4] for at in range(0, 16, 4)]
    assert manifests[-1].digest == expected_digest(lineage, groups)
    assert manifests[-1].digest != expected_digest(lineage, groups[::-1])


def test_a_checkpoint_whose_version_was_never_committed_is_discarded(lineage: Lineage) -> None:
    """As after a death between the checkpoint and the transaction: nothing is lost or learned twice."""
    samples = lineage.samples(12, seed=3)
    with writing(lineage.kafka) as client:
        for sample in samples:
            client.send(SAMPLES, encode(sample), partition=0)
    checkpoints = Checkpoints(lineage.data_dir / "learner" / "checkpoints")
    with lineage.started(replace(STEPWISE, publish_every_s=1.0)) as learner:
        learn(learner, lineage, 8)
        last = learner.progress.version
        ahead = replace(learner.progress, version=last + 1, offsets={0: 12})
        train(learner.trainer, lineage.samples(4, seed=99), lineage.catalogue)
        checkpoints.write(last + 1, to_bytes(learner.trainer, ahead, lineage.codebooks))
    with lineage.started() as learner:
        assert learner.progress.version == last
        assert checkpoints.versions()[-1] == last
        manifests = learn(learner, lineage, 12)
    assert [manifest.version for manifest in manifests] == list(range(1, len(manifests) + 1))
    assert accounted(manifests)["trained"] == 12
    groups = [samples[at : at + 4] for at in range(0, 12, 4)]
    assert manifests[-1].digest == expected_digest(lineage, groups)


def test_a_second_learner_fences_the_first(lineage: Lineage) -> None:
    with lineage.started() as first, lineage.started() as second:
        lineage.write(lineage.samples(4, seed=4))
        with running(first) as ended:
            until(lambda: bool(ended))
        assert isinstance(ended[0], PublicationError)
        assert "another learner has started" in one_line(ended[0])
        manifests = learn(second, lineage, 4)
    assert [manifest.version for manifest in manifests] == [1, 2]
    assert accounted(manifests)["trained"] == 4


def test_a_learner_fenced_in_the_midst_of_a_publication_leaves_the_other_alone(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client speaks of a stale epoch or a wrong state: taking that for a passing fault would fence the other."""
    lineage.write(lineage.samples(4, seed=4))
    others: list[Learner] = []
    sent = KafkaProducer.send

    def send(self: KafkaProducer, *args: object, **more: object) -> object:
        future = sent(self, *args, **more)
        with suppress(KafkaError):
            future.get(timeout=20)
        if not others:
            others.append(lineage.learner())
            others[0].start(None)
        return future

    with lineage.started() as first:
        monkeypatch.setattr(KafkaProducer, "send", send)
        with running(first) as ended:
            until(lambda: bool(ended))
        assert isinstance(ended[0], PublicationError)
        assert "another learner has started" in one_line(ended[0])
    (other,) = others
    try:
        assert other.progress.version == 1
        manifests = learn(other, lineage, 4)
    finally:
        other.close()
    assert [manifest.version for manifest in manifests] == [1, 2]


def test_a_start_without_a_checkpoint_says_what_is_needed(lineage: Lineage) -> None:
    with pytest.raises(LearnerError, match="name a checkpoint to start from"):
        lineage.learner().start(None)


def test_a_published_version_without_its_checkpoint_is_refused(lineage: Lineage) -> None:
    with lineage.started():
        pass
    path = Checkpoints(lineage.data_dir / "learner" / "checkpoints").path(1)
    path.unlink()
    with pytest.raises(LearnerError, match=re.escape(f"no checkpoint in {path.parent}")) as caught:
        lineage.learner().start(lineage.start)
    one_line(caught.value)
    assert len(published(lineage.kafka)) == 1


def test_a_checkpoint_that_is_not_what_was_published_is_refused(lineage: Lineage) -> None:
    with lineage.started() as learner:
        train(learner.trainer, lineage.samples(4, seed=5), lineage.catalogue)
        content = to_bytes(learner.trainer, learner.progress, lineage.codebooks)
    Checkpoints(lineage.data_dir / "learner" / "checkpoints").write(1, content)
    with pytest.raises(LearnerError, match="version 1 is published but no checkpoint"):
        lineage.learner().start(lineage.start)


def test_checkpoints_of_a_lineage_that_the_log_does_not_know_are_not_overwritten(
    lineage: Lineage,
) -> None:
    checkpoints = Checkpoints(lineage.data_dir / "learner" / "checkpoints")
    for version in (6, 7):
        checkpoints.write(version, lineage.start.read_bytes())
    with pytest.raises(LearnerError, match="checkpoints up to version 7"):
        lineage.learner().start(lineage.start)
    assert checkpoints.versions() == [6, 7]


def test_a_catalogue_of_another_codebook_is_refused_by_name(lineage: Lineage) -> None:
    ours = lineage.codebooks.digest()
    other = fit(np.random.default_rng(2).normal(size=(50, 4)), CODES, 2)
    trainer, progress, _ = load(lineage.start, STEPWISE, STEPWISE.lr)
    lineage.start.write_bytes(to_bytes(trainer, progress, other))
    wrong = f"catalogue is of codebook {ours}.*{other.digest()}"
    with pytest.raises(LearnerError, match=wrong) as caught:
        lineage.learner().start(lineage.start)
    one_line(caught.value)
    assert published(lineage.kafka) == []


def test_an_entry_of_another_codebook_is_passed_over(lineage: Lineage) -> None:
    with writing(lineage.kafka) as client:
        client.send(CATALOGUE, upsert("i0", (0, 0, 0), "other"), b"i0", partition=0)
    lineage.write(lineage.samples(4, seed=1))
    with lineage.started() as learner:
        assert learn(learner, lineage, 4)[-1].version == 2


def test_expired_versions_are_deleted_but_never_one_that_an_arm_names(lineage: Lineage) -> None:
    settings = replace(STEPWISE, weights_horizon_s=0.0, anchor_every_s=0.0)
    lineage.command(pin("control", 1), pin("learning", 3), pin("learning", 2))
    with lineage.started(settings) as learner:
        for number in range(1, 5):
            lineage.write(lineage.samples(4, seed=number))
            learn(learner, lineage, 4 * number)
    assert kept(lineage.kafka) == {1, 2, 4, 5}  # 4 leads to what was newest a moment ago


def test_what_leads_from_an_anchor_to_the_newest_version_fits_what_is_kept(
    lineage: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    """A version of this size has 365 kB: one delta after an anchor is more than a quarter of a megabyte."""
    little = replace(lineage, kafka=replace(lineage.kafka, weights_mb=1))
    with little.started(replace(STEPWISE, anchor_every_s=3600.0)) as learner:
        for number in range(1, 5):
            little.write(little.samples(4, seed=number))
            learn(learner, little, 4 * number)
    assert kept(little.kafka) == {1, 3, 5}
    assert "kafka.weights_mb = 1: versions leave the log before their horizon" in caplog.text


def kept(kafka: KafkaSettings) -> set[int]:
    """Full versions of which compaction would leave something; none may be there in part."""
    values: dict[str, bytes | None] = {}
    manifests = anchors(kafka.bootstrap).manifests
    for record in records(kafka.bootstrap, WEIGHTS_ANCHORS):
        values[record.key.decode()] = record.value
    there = {key for key, value in values.items() if value is not None}
    versions = {int(key.partition("/")[0]) for key in there}
    for version in versions:
        assert set(record_keys(manifests[version])) <= there
    return versions


def test_what_an_arm_names_is_known_before_anything_expires(lineage: Lineage) -> None:
    """A learner that starts with many samples waiting must not publish before it has read `control`."""
    with lineage.started():
        lineage.command(*[pin("other", number + 1) for number in range(3000)], pin("control", 1))
    lineage.write(lineage.samples(4, seed=1))
    with lineage.started(replace(STEPWISE, weights_horizon_s=0.0)) as learner:
        learn(learner, lineage, 4)
    assert 1 in kept(lineage.kafka)


def test_versions_that_expired_while_no_learner_ran_are_deleted_by_the_next(
    lineage: Lineage,
) -> None:
    settings = replace(STEPWISE, anchor_every_s=0.0)
    with lineage.started(settings) as learner:
        for number in (1, 2):
            lineage.write(lineage.samples(4, seed=number))
            learn(learner, lineage, 4 * number)
    assert kept(lineage.kafka) == {1, 2, 3}
    lineage.write(lineage.samples(4, seed=3))
    with lineage.started(replace(settings, weights_horizon_s=0.0)) as learner:
        learn(learner, lineage, 12)
    assert kept(lineage.kafka) == {3, 4}


def test_a_version_that_an_arm_names_comes_to_stand_in_full(lineage: Lineage) -> None:
    """The chain expires by time; what is served must not."""
    lineage.write(lineage.samples(8, seed=1))
    with lineage.started() as learner:
        learn(learner, lineage, 8)
        assert kept(lineage.kafka) == {1}
        lineage.command(pin("control", 2))
        lineage.write(lineage.samples(4, seed=2))
        last = learn(learner, lineage, 12)[-1]
    assert kept(lineage.kafka) == {1, 2}
    states = {manifest.version: state for manifest, state in published(lineage.kafka)}
    place = anchors(lineage.kafka.bootstrap).manifests[2]
    assert digest_of(states[2]) == place.digest
    assert (place.base, place.anchor, last.anchor) == (0, 2, 1)


def test_a_restarted_learner_goes_on_with_deltas(lineage: Lineage) -> None:
    lineage.write(lineage.samples(8, seed=1))
    with lineage.started() as learner:
        learn(learner, lineage, 8)
    lineage.write(lineage.samples(4, seed=2))
    with lineage.started() as learner:
        last = learn(learner, lineage, 12)[-1]
    assert (last.base, last.anchor) == (last.version - 1, 1)
    assert last.size_bytes < anchors(lineage.kafka.bootstrap).manifests[1].size_bytes


def test_a_sample_that_cannot_be_used_becomes_a_dead_letter_and_costs_nothing_else(
    lineage: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    good = lineage.samples(6, seed=6)
    foreign, future = copy.deepcopy(good[4]), copy.deepcopy(good[5])
    living = lineage.catalogue.valid.tree(lineage.catalogue.version)
    dead = next(key for key in range(CODES**3) if key not in living.leaves())
    foreign.items[1] = SampleItem(
        item="elsewhere",
        sid=(dead // CODES**2, dead // CODES % CODES, dead % CODES),
        position=1,
        duration_ms=1,
        source="other",
        outcome="ended",
        play_ms=1,
        actions=0,
        advantage=1,
    )
    future.catalogue_version = 10_000
    values = [encode(sample) for sample in (*good[:2], foreign, future, *good[2:4])]
    values.insert(3, b"rubbish")
    values.insert(5, encode(good[0]).replace(b"1.0", b"7.0"))
    with writing(lineage.kafka) as client:
        for value in values:
            client.send(SAMPLES, value, b"u", partition=0)
    with (
        caplog.at_level(logging.WARNING, "dwell.learner"),
        lineage.started(HASTY) as learner,
    ):
        manifests = learn(learner, lineage, 8)
    assert accounted(manifests) == counts(trained=4, control=0, without_target=4)
    letters = {letter.offset: letter for letter in lineage.letters()}
    assert sorted(letters) == [2, 3, 4, 5]
    assert [letters[offset].reason for offset in (2, 3, 4, 5)] == [
        "bad_value",
        "malformed",
        "bad_value",
        "unknown_major",
    ]
    assert "'elsewhere'" in letters[2].detail
    assert "10000" in letters[4].detail
    assert letters[3].value == b"rubbish"
    assert all((letter.topic, letter.partition) == (SAMPLES, 0) for letter in letters.values())
    assert "elsewhere" in caplog.text
    trained = {m.digest for m in manifests} - {manifests[0].digest}
    assert trained, "the good samples of the step were lost with the bad"


def test_a_command_that_cannot_be_read_is_passed_over(lineage: Lineage) -> None:
    with writing(lineage.kafka) as client:
        client.send(CONTROL, b"rubbish", partition=0)
    lineage.command(pin("control", 1))
    lineage.write(lineage.samples(4, seed=1))
    with lineage.started(replace(STEPWISE, weights_horizon_s=0.0)) as learner:
        learn(learner, lineage, 4)
    assert 1 in kept(lineage.kafka)


def test_samples_wait_for_the_catalogue_that_they_name(lineage: Lineage) -> None:
    with lineage.started() as learner:
        newer = copy.deepcopy(lineage.catalogue)
        value = upsert("new", (0, 0, 0), lineage.codebooks.digest())
        newer.take(ITEMS, b"new", upsert("new", (0, 0, 0)))
        samples = learnable(newer, 4, seed=1)
        assert samples[0].catalogue_version == ITEMS
        with writing(lineage.kafka) as client:
            client.send(CATALOGUE, value, b"new", partition=0)
        lineage.write(samples)
        manifests = learn(learner, lineage, 4)
    assert accounted(manifests)["trained"] == 4


def test_a_sample_whose_catalogue_is_past_the_logs_retention_becomes_a_dead_letter(
    lineage: Lineage,
) -> None:
    brief = replace(lineage, kafka=replace(lineage.kafka, retention_s=1.0))
    with brief.started() as learner:
        codebook = lineage.codebooks.digest()
        with writing(lineage.kafka) as client:
            for item in ("new", "newer"):
                client.send(CATALOGUE, upsert(item, (0, 0, 0), codebook), item.encode())
        time.sleep(1.5)
        newer = copy.deepcopy(lineage.catalogue)
        for offset, key in ((ITEMS, b"new"), (ITEMS + 1, b"newer")):
            newer.take(offset, key, upsert(key.decode(), (0, 0, 0)))
        old, fresh = lineage.samples(4, seed=1), learnable(newer, 4, seed=2)
        assert old[0].catalogue_version == ITEMS - 1
        assert fresh[0].catalogue_version == ITEMS + 1
        lineage.write(old)
        learn(learner, brief, 4)
        lineage.write(fresh)
        manifests = learn(learner, brief, 8)
    assert accounted(manifests) == counts(trained=4, control=0, without_target=4)
    letters = lineage.letters()
    assert len(letters) == 4
    assert {letter.reason for letter in letters} == {"bad_value"}
    pruned = f"catalogue version {ITEMS - 1} is pruned, the oldest kept is {ITEMS + 1}"
    assert all(pruned in letter.detail for letter in letters)


def test_samples_deleted_before_they_were_learned_are_missed_aloud(lineage: Lineage) -> None:
    with lineage.started():
        pass
    lineage.write(lineage.samples(8, seed=1))
    admin = KafkaAdminClient(bootstrap_servers=lineage.kafka.bootstrap)
    admin.delete_records({TopicPartition(SAMPLES, 1): 3})
    admin.close()
    with pytest.raises(LearnerError, match="partition 1: offset 0 is next, 3 the first") as caught:
        lineage.learner().start(None)
    assert "kafka.retention_s" in one_line(caught.value)


def test_a_learner_far_behind_holds_only_so_much_and_takes_all(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.source.MOST_WAITING", 20)
    samples = lineage.samples(4, seed=1) * 50
    for sample in samples:
        sample.arm = "control"
    lineage.write(samples)
    with lineage.started(replace(STEPWISE, batch_wait_s=0.2)) as learner:
        manifests = learn(learner, lineage, 200)
    assert accounted(manifests)["control"] == 200


@refused
def test_a_broker_that_restarts_is_waited_for(lineage: Lineage, own_broker: EmbeddedBroker) -> None:
    with lineage.started(HASTY) as learner, running(learner) as ended:
        lineage.write(lineage.samples(8, seed=1))
        until(lambda: learner.progress.version >= 2)
        own_broker.stop()
        time.sleep(1.0)
        own_broker.start()
        lineage.write(lineage.samples(8, seed=2))

        def settled() -> bool:
            assert not ended, ended
            return sum(accounted([m for m, _ in published(lineage.kafka)]).values()) == 16

        until(settled)
    manifests = [manifest for manifest, _ in published(lineage.kafka)]
    assert [manifest.version for manifest in manifests] == list(range(1, len(manifests) + 1))
    assert accounted(manifests)["trained"] == 16


@refused
def test_a_broker_killed_in_the_midst_of_a_publication_costs_no_version(
    lineage: Lineage, own_broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits for ever for such a commit; the outcome is read from the log."""
    monkeypatch.setattr(publication, "TRANSACTION_S", 3.0)
    lineage.write(lineage.samples(4, seed=1))
    flushed = threading.Event()
    commit = KafkaProducer.commit_transaction

    def killed(self: KafkaProducer) -> None:
        if not flushed.is_set():
            self.flush()
            flushed.set()
            until(lambda: not own_broker.alive)
        commit(self)

    with lineage.started() as learner:
        monkeypatch.setattr(KafkaProducer, "commit_transaction", killed)
        with running(learner) as ended:
            until(flushed.is_set)
            own_broker.kill()
            time.sleep(0.5)
            own_broker.start()
            until(lambda: bool(ended) or len(published(lineage.kafka)) == 2)
            assert not ended, ended
            lineage.write(lineage.samples(4, seed=2))
            until(lambda: bool(ended) or len(published(lineage.kafka)) == 3)
    manifests = [manifest for manifest, _ in published(lineage.kafka)]
    assert [manifest.version for manifest in manifests] == [1, 2, 3]
    assert accounted(manifests)["trained"] == 8


def test_a_commit_whose_answer_was_lost_is_not_repeated(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publication, "TRANSACTION_S", 1.0)
    lineage.write(lineage.samples(4, seed=1))
    commit, lost = KafkaProducer.commit_transaction, threading.Event()

    def silent(self: KafkaProducer) -> None:
        commit(self)
        if not lost.is_set():
            lost.set()
            time.sleep(3.0)

    with lineage.started() as learner:
        monkeypatch.setattr(KafkaProducer, "commit_transaction", silent)
        learn(learner, lineage, 4)
        lineage.write(lineage.samples(4, seed=2))
        manifests = learn(learner, lineage, 8)
    assert lost.is_set()
    assert [manifest.version for manifest in manifests] == [1, 2, 3]
    assert accounted(manifests)["trained"] == 8


@refused
def test_a_broker_that_does_not_answer_ends_the_learner_in_one_sentence(
    lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fenced, "OPEN_S", 1)
    nowhere = replace(lineage, kafka=replace(lineage.kafka, bootstrap="127.0.0.1:9"))
    with pytest.raises(PublicationError, match=r"Kafka at 127\.0\.0\.1:9") as caught:
        nowhere.learner().start(lineage.start)
    one_line(caught.value)

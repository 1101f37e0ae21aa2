"""A learner on a real broker that goes back: by its guard, and because `control` says so."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from learner.checkpoint import load
from learner.decoder import LazyDecoder
from learner.keeper import RETURNS
from learner.policy import state_of
from learner.recovery import RunLog, follow
from learner.run import Learner
from learner.source import Source
from learner.valid_tree import Tree
from learner.versions import CHECKPOINTS
from storage.checkpoints import Checkpoints
from streams.blocks import digest_of
from streams.clients import records
from streams.control import ControlState
from streams.events import Command, Sample, command_decoder, decode
from streams.signing import make_pair
from streams.topics import CONTROL
from streams.weights import Manifest
from streams.weights_log import manifests_after
from tests.learner.cluster import published
from tests.learner.lineage import (
    HASTY,
    STEPWISE,
    Lineage,
    accounted,
    counts,
    learn,
    pin,
    running,
    until,
)
from tests.learner.makers import Shown, sample
from tests.learner.poison import POISONS

WITHIN_S = 10.0


def commands(lineage: Lineage) -> list[Command]:
    return [
        decode(command_decoder, record.value)
        for record in records(lineage.kafka.bootstrap, CONTROL)
    ]


def control(lineage: Lineage) -> ControlState:
    state = ControlState()
    for command in commands(lineage):
        assert state.apply(command)
    return state


def rollback(version: int, upto: int) -> Command:
    """As an actor or an operator says it."""
    return Command(
        id=f"{version}-{upto}",
        time_ms=0,
        who="t",
        why="it is harmful",
        action="rollback",
        arm="learning",
        version=version,
        upto=upto,
    )


def made_again(lineage: Lineage, path: Path) -> int:
    """How many versions come out again from a checkpoint and the journals after it."""
    trainer, progress, _ = load(path, STEPWISE, STEPWISE.lr)
    after = manifests_after(lineage.kafka.bootstrap, progress.version)
    with closing(RunLog.of(lineage.kafka, progress)) as run:
        for manifest, digest in follow(trainer, progress, after, run):
            assert digest == manifest.digest
    return len(after)


def learned(learner: Learner, lineage: Lineage) -> list[Manifest]:
    """Enough requests for a guard that has something to compare: five steps, a version each or fewer."""
    lineage.write(lineage.samples(20, seed=4))
    return learn(learner, lineage, 20)


def went_back(learner: Learner, lineage: Lineage, count: int) -> Manifest:
    """Run until there are `count` versions; the last."""
    with running(learner) as ended:
        until(lambda: bool(ended) or len(published(lineage.kafka)) >= count)
    assert not ended, ended
    manifests = [manifest for manifest, _ in published(lineage.kafka)]
    assert [manifest.version for manifest in manifests] == list(range(1, count + 1))
    return manifests[-1]


def polled(source: Source, true: Callable[[], bool]) -> None:
    def tried() -> bool:
        source.poll()
        return true()

    until(tried)


def served_by(version: int, samples: list[Sample]) -> list[Sample]:
    for each in samples:
        each.policy_version = version
    return samples


# --- the guard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_update_is_refused_and_learning_goes_on(
    lineage: Lineage, poison: Callable[[LazyDecoder, Tree], None]
) -> None:
    before = RETURNS.labels("guard")._value.get()
    with lineage.started() as learner:
        last = learned(learner, lineage)[-1]
        poison(learner.trainer.model, lineage.catalogue.valid.tree(lineage.catalogue.version))
        began = time.monotonic()
        lineage.write(lineage.samples(4, seed=5))
        manifests = learn(learner, lineage, 24)
        assert time.monotonic() - began < WITHIN_S
        refused = manifests[-1]
        assert (refused.version, refused.restored) == (last.version + 1, last.version)
        assert refused.digest == last.digest == digest_of(state_of(learner.trainer.model))
        assert accounted(manifests) == counts(trained=20, condemned=4)
        lineage.write(lineage.samples(4, seed=6))
        manifests = learn(learner, lineage, 28)
    assert (manifests[-1].restored, manifests[-1].version) == (0, refused.version + 1)
    assert manifests[-1].digest != last.digest
    assert accounted(manifests) == counts(trained=24, condemned=4)
    assert RETURNS.labels("guard")._value.get() == before + 1
    (said,) = commands(lineage)
    assert (said.action, said.arm, said.who) == ("refuse", "learning", "learner")
    assert (said.version, said.restored) == (refused.version, last.version)
    assert said.why.startswith("refused ")
    assert control(lineage) == ControlState()
    assert made_again(lineage, lineage.start) == len(manifests)


def test_a_start_after_a_refusal_goes_on_from_what_was_restored(lineage: Lineage) -> None:
    with lineage.started() as learner:
        last = learned(learner, lineage)[-1]
        POISONS[1](learner.trainer.model, lineage.catalogue.valid.tree(59))
        lineage.write(lineage.samples(4, seed=5))
        learn(learner, lineage, 24)
    checkpoints = Checkpoints(lineage.data_dir / CHECKPOINTS)
    checkpoints.path(last.version + 1).write_bytes(b"damaged")
    with lineage.started() as learner:
        assert learner.progress.version == last.version + 1
        assert digest_of(state_of(learner.trainer.model)) == last.digest
        lineage.write(lineage.samples(4, seed=6))
        manifests = learn(learner, lineage, 28)
    assert accounted(manifests) == counts(trained=24, condemned=4)
    assert made_again(lineage, lineage.start) == len(manifests)


# --- roll-backs -------------------------------------------------------------------------------------


def test_a_rollback_is_followed_and_what_the_condemned_served_is_dropped(lineage: Lineage) -> None:
    with lineage.started(replace(STEPWISE, keep_checkpoints=20)) as learner:
        manifests = learned(learner, lineage)
        last = manifests[-1].version
        assert last > 3
        lineage.command(rollback(2, last))
        back = went_back(learner, lineage, last + 1)
        assert (back.restored, back.digest, back.journal) == (2, manifests[1].digest, [])
        assert commands(lineage)[-1].restored == 2
        assert control(lineage) == ControlState(condemned=[(3, last)])
        lineage.write(served_by(3, lineage.samples(4, seed=5)))
        lineage.write(served_by(2, lineage.samples(2, seed=6)))
        lineage.write(served_by(last + 1, lineage.samples(2, seed=7)))
        manifests = learn(learner, lineage, 28)
    assert accounted(manifests) == counts(trained=24, condemned=4)
    assert len(manifests) > last + 1
    assert made_again(lineage, lineage.start) == len(manifests)
    with lineage.started(
        replace(STEPWISE, keep_checkpoints=20)
    ) as learner:  # and it still knows after a start
        lineage.write(served_by(last, lineage.samples(2, seed=8)))
        lineage.write(served_by(last + 1, lineage.samples(2, seed=9)))
        manifests = learn(learner, lineage, 32)
    assert accounted(manifests) == counts(trained=26, condemned=6)
    checkpoints = Checkpoints(lineage.data_dir / CHECKPOINTS)
    after = [version for version in checkpoints.versions() if 2 < version < last + 1]
    assert after, "a checkpoint between, from which the restored version must be read in the log"
    assert made_again(lineage, checkpoints.path(after[0])) == len(manifests) - after[0]


def test_what_was_learned_since_the_last_version_is_undone_by_a_rollback(lineage: Lineage) -> None:
    with lineage.started() as learner:
        last = learned(learner, lineage)[-1].version
        lineage.write(lineage.samples(4, seed=5))
        source = learner._source
        assert source is not None
        polled(source, lambda: learner._journal.trainable == 4)
        learner._step(source, learner._journal.cut_polled(4))
        lineage.command(rollback(2, last))
        polled(source, lambda: bool(source.control.rollbacks))
        back = went_back(learner, lineage, last + 1)
    assert [(entry.trained, entry.condemned) for entry in back.journal] == [(0, 4)]
    assert made_again(lineage, lineage.start) == last + 1


def test_the_same_rollback_asked_for_by_several_is_followed_once(lineage: Lineage) -> None:
    with lineage.started() as learner:
        last = learned(learner, lineage)[-1].version
        lineage.command(rollback(3, last), rollback(2, last), rollback(3, last))
        assert went_back(learner, lineage, last + 1).restored == 2
        lineage.command(rollback(3, last))  # late: it has been answered
        lineage.write(served_by(last + 1, lineage.samples(4, seed=5)))
        manifests = learn(learner, lineage, 24)
    assert len(manifests) == last + 2
    assert manifests[-1].restored == 0
    assert control(lineage) == ControlState(condemned=[(3, last)])


def test_a_rollback_said_while_no_learner_runs_is_followed_by_the_next(lineage: Lineage) -> None:
    with lineage.started() as learner:
        last = learned(learner, lineage)[-1].version
    lineage.command(rollback(1, last))
    assert control(lineage).pinned == {"learning": 1}
    with lineage.started() as learner:
        assert went_back(learner, lineage, last + 1).restored == 1
    with lineage.started() as learner:
        lineage.write(served_by(last + 1, lineage.samples(4, seed=5)))
        assert learn(learner, lineage, 24)[-1].version == last + 2
    assert control(lineage) == ControlState(condemned=[(2, last)])


def test_a_version_that_is_not_there_cannot_be_gone_back_to_and_learning_goes_on(
    lineage: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    lineage.command(rollback(70, 71))
    with caplog.at_level(logging.ERROR, "dwell.learner"), lineage.started() as learner:
        manifests = learned(learner, lineage)
    assert accounted(manifests) == counts(trained=20)
    assert caplog.text.count("version 70 is not whole in the log") == 1
    assert control(lineage).pinned == {"learning": 70}


def test_a_learner_that_signs_goes_back_only_to_what_is_signed(
    lineage: Lineage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lineage.started() as learner:
        unsigned = learned(learner, lineage)[-1].version
    private, _ = make_pair(tmp_path / "keys")
    signing = replace(STEPWISE, signing_key=str(private), anchor_every_s=0)
    with lineage.started(signing) as learner:
        lineage.write(lineage.samples(8, seed=5))
        last = learn(learner, lineage, 28)[-1].version
        lineage.command(rollback(unsigned, last))
        lineage.write(lineage.samples(12, seed=6))
        assert not any(manifest.restored for manifest in learn(learner, lineage, 40))
        assert f"version {unsigned} is not whole, and signed by" in caplog.text


def test_a_drop_of_the_rewards_leads_back_to_before_it(lineage: Lineage) -> None:
    """Its figures are those of a policy; only its viewers tell."""
    settings = replace(HASTY, reward_alarm=100.0)
    lineage.command(pin("control", 1))
    with lineage.started(settings) as learner:
        last = learned(learner, lineage)[-1].version
        usual = earned(100, 1, 20_000, "control")
        interleaved(lineage, earned(60, 2, 30_000), usual[:60])
        count = learn(learner, lineage, 140)[-1].version
        interleaved(lineage, earned(40, last, 1_000), usual[60:])
        with running(learner) as ended:
            until(lambda: bool(ended) or control(lineage).condemned != [])
        assert not ended, ended
    manifests = [manifest for manifest, _ in published(lineage.kafka)]
    (back,) = [manifest for manifest in manifests if manifest.restored]
    assert back.version > count
    assert back.restored == 1, "older than version 2, from which on it was in doubt"
    assert back.digest == manifests[back.restored - 1].digest
    _, said = commands(lineage)
    assert (said.action, said.restored, said.version) == ("follow", back.restored, back.version)
    assert "the learning arm has earned 0.0333 a request, control 0.667" in said.why
    assert made_again(lineage, lineage.start) == len(manifests)


def interleaved(lineage: Lineage, learning: list[Sample], usual: list[Sample]) -> None:
    """Both arms in both partitions."""
    lineage.write(
        [
            each
            for n in range(0, len(usual), 2)
            for arm in (learning, usual)
            for each in arm[n : n + 2]
        ]
    )


def earned(count: int, version: int, play_ms: int, arm: str = "learning") -> list[Sample]:
    """Requests whose one item of 30 s was played for so long."""
    made = [
        sample(f"r{n}", [Shown((0, 0, 0))], 59, user=f"u{n}", arm=arm, policy_version=version)
        for n in range(count)
    ]
    for each in made:
        each.items[0].play_ms = play_ms
    return made


def test_a_pin_does_not_make_the_learner_go_back(lineage: Lineage) -> None:
    with lineage.started() as learner:
        last = learned(learner, lineage)[-1].version
        lineage.command(pin("learning", 2))
        lineage.write(lineage.samples(4, seed=5))
        manifests = learn(learner, lineage, 24)
    assert (manifests[-1].version, manifests[-1].restored) == (last + 1, 0)
    assert control(lineage).pinned == {"learning": 2}

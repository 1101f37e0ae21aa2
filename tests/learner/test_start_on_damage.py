"""A learner that starts where the newest version on the log is none: it goes back to the newest that is one."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from learner.checkpoint import load
from learner.fenced import Fenced, Record
from learner.recovery import RunLog, follow
from learner.settings import LearnSettings
from learner.versions import CHECKPOINTS
from ops.audit_samples import journals
from storage.checkpoints import Checkpoints
from streams.blocks import State, blocked_state, root
from streams.clients import records
from streams.control import ControlState
from streams.delta import changes
from streams.events import command_decoder, decode
from streams.signing import Signer, make_pair
from streams.topics import CONTROL, WEIGHTS
from streams.weights import Manifest, pack
from streams.weights_log import manifests_after, version_at
from tests.learner.cluster import published, writing
from tests.learner.lineage import (
    STEPWISE,
    Lineage,
    accounted,
    counts,
    learn,
    running,
    until,
)

Spoil = Callable[[State], None]


def louder(state: State) -> None:
    for value in state.values():
        value *= 100


def not_a_number(state: State) -> None:
    state["places"][0, 3] = np.nan


def forge(
    lineage: Lineage, spoil: Spoil, signer: Signer | None = None, digest: str = ""
) -> Manifest:
    """A next version that no learner published."""
    last = manifests_after(lineage.kafka.bootstrap, 0)[-1]
    state = version_at(lineage.kafka.bootstrap, last.version).state
    spoilt = {name: value.copy() for name, value in state.items()}
    spoil(spoilt)
    delta, blocks = changes(blocked_state(state), spoilt)
    made = structs.replace(
        last,
        version=last.version + 1,
        base=last.version,
        journal=[],
        digest=digest or root(blocks),
        created_ms=int(time.time() * 1000),
    )
    parts: list[Record] = [
        (WEIGHTS, key.encode(), value) for key, value in pack(made, delta, signer)
    ]
    with closing(Fenced(lineage.kafka.bootstrap)) as fenced:
        fenced.commit(parts, 20.0)
    return made


def control(lineage: Lineage) -> ControlState:
    state = ControlState()
    for record in records(lineage.kafka.bootstrap, CONTROL):
        assert state.apply(decode(command_decoder, record.value))
    return state


def goes_on(lineage: Lineage, settings: LearnSettings, good: Manifest, bad: Manifest) -> None:
    """The next learner publishes the last good version again, in full, under the next number, and learns on."""
    with lineage.started(settings) as learner:
        with running(learner) as ended:
            until(
                lambda: (
                    bool(ended)
                    or manifests_after(lineage.kafka.bootstrap, 0)[-1].version > bad.version
                )
            )
        assert not ended, ended
        back = manifests_after(lineage.kafka.bootstrap, 0)[-1]
        assert (back.version, back.restored) == (bad.version + 1, good.version)
        assert (back.digest, back.base, back.anchor) == (good.digest, 0, back.version)
        assert control(lineage).condemned == [(good.version + 1, bad.version)]
        lineage.write(lineage.samples(4, seed=6))
        manifests = learn(learner, lineage, 24)
    assert manifests[-1].version == back.version + 1
    assert accounted(manifests) == counts(trained=24)
    assert version_at(lineage.kafka.bootstrap, manifests[-1].version).number == back.version + 1
    trainer, progress, _ = load(lineage.start, settings, settings.lr)
    with closing(RunLog.of(lineage.kafka, progress)) as run:
        differing = [
            manifest.version
            for manifest, digest in follow(trainer, progress, manifests, run)
            if digest != manifest.digest
        ]
    assert differing == [bad.version], "the journals lead past it"


def learned(lineage: Lineage, settings: LearnSettings) -> Manifest:
    """Some versions; the last."""
    with lineage.started(settings) as learner:
        lineage.write(lineage.samples(20, seed=4))
        return learn(learner, lineage, 20)[-1]


def test_a_version_that_is_not_what_it_says_is_left_behind(
    lineage: Lineage, caplog: pytest.LogCaptureFixture
) -> None:
    good = learned(lineage, STEPWISE)
    bad = forge(lineage, louder, digest="0" * 32)
    with caplog.at_level(logging.ERROR, "dwell.learner"):
        goes_on(lineage, STEPWISE, good, bad)
    assert f"version {bad.version}: digest" in caplog.text
    with lineage.started(STEPWISE) as learner:  # a start after that finds nothing amiss
        assert learner.progress.version == bad.version + 2


def test_a_version_that_is_not_finite_is_left_behind(lineage: Lineage) -> None:
    good = learned(lineage, STEPWISE)
    goes_on(lineage, STEPWISE, good, forge(lineage, not_a_number))


@pytest.mark.parametrize("signed", [True, False])
def test_a_learner_with_a_key_does_not_make_its_own_what_it_did_not_sign(
    lineage: Lineage, tmp_path: Path, signed: bool
) -> None:
    """It would sign the next version, and actors would take that."""
    private, _ = make_pair(tmp_path / "keys")
    foreign, _ = make_pair(tmp_path / "foreign")
    settings = replace(STEPWISE, signing_key=str(private))
    good = learned(lineage, settings)
    goes_on(lineage, settings, good, forge(lineage, louder, Signer(foreign) if signed else None))


def test_without_its_newest_checkpoint_it_goes_back_to_the_newest_version_that_is_one(
    lineage: Lineage,
) -> None:
    good = learned(lineage, STEPWISE)
    bad = forge(lineage, louder, digest="0" * 32)
    Checkpoints(lineage.data_dir / CHECKPOINTS).path(good.version).write_bytes(b"damaged")
    goes_on(lineage, STEPWISE, good, bad)


def test_a_version_that_somebody_wrote_again_is_passed_over(lineage: Lineage) -> None:
    learned(lineage, STEPWISE)
    again = [
        (record.key, record.value)
        for record in records(lineage.kafka.bootstrap, WEIGHTS)
        if (record.key or b"").startswith(b"2/")
    ]
    with writing(lineage.kafka) as client:
        for key, value in again:
            client.send(WEIGHTS, value, key, partition=0)
    with lineage.started(STEPWISE) as learner:
        lineage.write(lineage.samples(4, seed=6))
        manifests = learn(learner, lineage, 24)
    assert accounted(manifests) == counts(trained=24)
    assert [manifest.version for manifest, _ in published(lineage.kafka)] == [
        manifest.version for manifest in manifests
    ]
    assert journals(lineage.kafka) == {"versions": len(manifests), "twice": 0, "passed_over": 0}

"""The loop in one process: deterministic under its seeds, and learning."""

from dataclasses import replace

import pytest

from ops.config import Config, demo
from ops.serial import Serial, SerialRun
from ops.warmup import warm_start

NOW_MS = 1_700_000_000_000


def small(seed: int) -> Config:
    config = demo(Config())
    return replace(
        config,
        simulate=replace(config.simulate, people=60, items=400, requests_per_s=20.0, seed=seed),
        pretrain=replace(config.pretrain, steps=20),
        learn=replace(config.learn, seed=seed),
    )


def serial(seed: int, requests: int = 400) -> SerialRun:
    config = small(seed)
    start = warm_start(config, NOW_MS, lambda *_: None)
    return Serial(config, start, seed, NOW_MS).run(requests, lambda *_: None)


@pytest.fixture(scope="module")
def run() -> SerialRun:
    return serial(7)


def test_the_same_seed_gives_the_same_weights(run: SerialRun) -> None:
    again = serial(7)
    assert again.weights_digest == run.weights_digest
    assert again.lines == run.lines


def test_another_seed_gives_other_weights(run: SerialRun) -> None:
    assert serial(8).weights_digest != run.weights_digest


def test_every_request_is_a_sample_or_still_open(run: SerialRun) -> None:
    assert run.requests >= 400
    assert run.samples + run.open == run.requests
    assert run.samples > 100


def test_steps_are_taken_and_slates_are_full(run: SerialRun) -> None:
    assert run.steps > 3
    assert run.versions > 3
    assert run.filled == run.slots


def test_only_the_learning_arm_changes_its_policy(run: SerialRun) -> None:
    versions = {
        arm: {line.policy_version for line in run.lines if line.arm == arm}
        for arm in ("control", "learning")
    }
    assert versions["control"] == {1}
    assert len(versions["learning"]) > 3


def test_twins_meet_the_same_truth(run: SerialRun) -> None:
    by_person: dict[tuple[str, int], set[str]] = {}
    for line in run.lines:
        by_person.setdefault((line.person, line.visit), set()).add(line.arm)
    assert all(arms == {"control", "learning"} for arms in by_person.values())

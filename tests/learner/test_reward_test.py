"""The reward test: how often it is wrong, what it sees and how fast, and how far back it leads."""

import numpy as np
import pytest

from learner.reward_test import RewardTest, reward
from streams.events import ACTION_BITS, Sample
from tests.learner.makers import Shown, sample

MEAN, SPREAD = 0.27, 0.17
"""Of control's rewards in the demonstration."""


def one(arm: str, value: float, version: int) -> Sample:
    made = sample("r", [Shown((0, 0, 0))], 0, arm=arm, policy_version=version)
    made.items[0].duration_ms, made.items[0].play_ms = 1_000_000, round(value * 1_000_000)
    return made


def rewards(rng: np.random.Generator, mean: float) -> float:
    """Beta, with control's spread."""
    size = MEAN * (1 - MEAN) / SPREAD**2 - 1
    return float(rng.beta(mean * size, (1 - mean) * size))


def until_alarm(
    seed: int, threshold: float, before: int, lift: float, drop: float, most: int
) -> tuple[int, int] | None:
    """Pairs after the drop, and the version to return to; a version has 25 pairs."""
    rng = np.random.default_rng(seed)
    test = RewardTest(threshold)
    for number in range(before + most):
        mean = MEAN + (lift if number < before else -drop)
        test.see(one("control", rewards(rng, MEAN), 1))
        found = test.see(one("learning", rewards(rng, mean), 1 + number // 25))
        if found is not None:
            return number - before, found.version
    return None


def test_without_a_difference_an_alarm_is_as_rare_as_was_promised() -> None:
    lengths = []
    for seed in range(30):
        found = until_alarm(seed, 300.0, 0, 0.0, 0.0, most=3_000)
        lengths.append(3_000 if found is None else found[0])
    assert np.mean(lengths) > 300


def test_an_arm_that_earns_more_gives_no_alarm() -> None:
    assert until_alarm(1, 1e6, 0, 0.0, -0.02, most=6_000) is None


@pytest.mark.parametrize(("drop", "within"), [(0.027, 4_000), (0.054, 900), (0.135, 300)])
def test_a_drop_is_seen_in_time_though_all_was_well_before(drop: float, within: int) -> None:
    """A tenth, a fifth and a half of control's reward, at the default rate of false alarms."""
    for seed in range(3):
        found = until_alarm(seed, 1e8, 1_500, 0.05, drop, most=within)
        assert found is not None
        pairs, version = found
        assert pairs >= 0, "and not before"
        assert version <= 1 + 1_500 // 25, "older than the drop"
        if drop > 0.1:
            assert version > 1_500 // 25 - 30, "and not much older"


def test_single_requests_that_close_late_do_not_lead_far_back() -> None:
    """Their versions are as much older as a request may stay open."""
    rng = np.random.default_rng(5)
    test = RewardTest(1e8)
    found = None
    for number in range(900):
        version = 100 if number < 400 else 101
        late = number in (300, 390, 410, 430)
        mean = MEAN + 0.05 if late or version == 100 else 0.6 * MEAN
        test.see(one("control", rewards(rng, MEAN), 1))
        found = found or test.see(one("learning", rewards(rng, mean), 2 if late else version))
    assert found is not None
    assert found.version == 99


def test_a_reward_is_what_was_watched_of_what_was_shown() -> None:
    made = sample("r", [Shown((0, 0, n)) for n in range(4)], 0)
    plays = [(10_000, 20_000, 0), (90_000, 20_000, 0), (20_000, 20_000, ACTION_BITS["dislike"])]
    for item, (play_ms, duration_ms, actions) in zip(made.items, plays, strict=False):
        item.play_ms, item.duration_ms, item.actions = play_ms, duration_ms, actions
    made.items[3].play_ms = 0
    assert reward(made) == pytest.approx(1.5 / 4)


def test_arms_of_other_sizes_and_names_are_borne() -> None:
    test = RewardTest(1_000.0)
    for _ in range(50):
        for _ in range(9):
            test.see(one("control", 0.3, 1))
        assert test.see(one("other", 0.0, 1)) is None
        assert test.see(one("learning", 0.3, 5)) is None
    assert test.evidence > 0
    found = None
    for _ in range(60):
        for _ in range(9):
            test.see(one("control", 0.3, 1))
        found = found or test.see(one("learning", 0.0, 9))
    assert found is not None
    assert found.learning == pytest.approx(0.0)
    assert found.control == pytest.approx(0.3)

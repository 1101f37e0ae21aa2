"""The comparison of two arms: ratios, pairing, the window, and what an interval covers."""

import math

import numpy as np
import pytest

from ops.lift import last_quarter, lift, spread
from ops.served import Served


def served(person: int, arm: str, **given: object) -> Served:
    values: dict[str, object] = {
        "person": f"p{person}",
        "user": f"p{person}-{arm}",
        "arm": arm,
        "visit": 0,
        "time_ms": 0,
        "request": "r",
        "policy_version": 1,
        "asked": 6,
        "items": ["a"] * 6,
        "satisfaction": 0.6,
        "permuted": 0.6,
        "oracle": 0.8,
        "dwell_s": 60.0,
        "seen": 6,
        "dislikes": 0,
        "complete": True,
    }
    return Served(**{**values, **given})  # type: ignore[arg-type]


def arms(
    people: int, gain: float, noise: float, seed: int = 0
) -> tuple[list[Served], list[Served]]:
    """Persons who differ much from each other, and twins who differ by `gain` and a little noise."""
    rng = np.random.default_rng(seed)
    control, learning = [], []
    for person in range(people):
        own = rng.uniform(0.2, 1.6)
        for visit in range(3):
            control.append(served(person, "control", visit=visit, satisfaction=own))
            value = own * (1 + gain) + noise * rng.normal()
            learning.append(served(person, "learning", visit=visit, satisfaction=value))
    return control, learning


def test_a_lift_is_the_relative_difference_per_slot_asked_for() -> None:
    result = lift(
        [served(1, "control", satisfaction=0.6, permuted=0.9, dwell_s=30.0, dislikes=3)],
        [served(1, "learning", satisfaction=1.8, permuted=1.2, dwell_s=75.0)],
    )
    assert result is not None
    assert result.satisfaction["control"]["mean"] == pytest.approx(0.1)
    assert result.satisfaction["learning"]["mean"] == pytest.approx(0.3)
    assert result.dwell_s["control"]["mean"] == pytest.approx(5)
    assert result.dislikes["control"]["mean"] == pytest.approx(0.5)
    assert result.lift_satisfaction["mean"] == pytest.approx(2.0)
    assert result.lift_dwell["mean"] == pytest.approx(1.5)
    assert result.permuted_satisfaction_lift["mean"] == pytest.approx(1 / 3)
    assert result.oracle == pytest.approx(0.8)
    assert result.gap_closed["mean"] == pytest.approx((0.3 - 0.1) / (0.8 - 0.1))


def test_an_empty_slot_counts_nothing_and_lowers_the_fill() -> None:
    short = served(1, "learning", items=["a"] * 3, satisfaction=0.9)
    result = lift([served(1, "control")], [short])
    assert result is not None
    assert result.fill == {"control": 1.0, "learning": 0.5}
    assert result.satisfaction["learning"]["mean"] == pytest.approx(0.15)


def test_persons_seen_in_one_arm_only_are_left_out() -> None:
    result = lift(
        [served(1, "control"), served(2, "control", satisfaction=6.0)],
        [served(1, "learning"), served(3, "learning", satisfaction=6.0)],
    )
    assert result is not None
    assert result.persons == 1
    assert result.requests == {"control": 1, "learning": 1}
    assert result.lift_satisfaction["mean"] == pytest.approx(0)
    assert lift([served(1, "control")], [served(2, "learning")]) is None


def test_pairing_takes_the_differences_between_persons_out_of_the_interval() -> None:
    control, learning = arms(people=200, gain=0.1, noise=0.02)
    paired = lift(control, learning)
    # The same twins assigned at random to each other: an unpaired comparison.
    shuffled = np.random.default_rng(1).permutation(200)
    for line in learning:
        line.person = f"p{shuffled[int(line.person[1:])]}"
    unpaired = lift(control, learning)
    assert paired is not None
    assert unpaired is not None
    assert paired.lift_satisfaction["low"] > 0.08
    assert paired.lift_satisfaction["high"] < 0.12
    width = paired.lift_satisfaction["high"] - paired.lift_satisfaction["low"]
    assert unpaired.lift_satisfaction["high"] - unpaired.lift_satisfaction["low"] > 5 * width


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        result = lift(*arms(people=80, gain=0.2, noise=0.3, seed=seed), samples=300, seed=seed)
        assert result is not None
        covered += result.lift_satisfaction["low"] <= 0.2 <= result.lift_satisfaction["high"]
    assert 85 <= covered <= 100


def test_the_same_seed_gives_the_same_interval() -> None:
    control, learning = arms(people=30, gain=0.1, noise=0.2)
    assert lift(control, learning, seed=3) == lift(control, learning, seed=3)
    assert lift(control, learning, seed=3) != lift(control, learning, seed=4)


def test_a_lift_over_nothing_is_not_a_number() -> None:
    result = lift([served(1, "control", satisfaction=0.0)], [served(1, "learning")])
    assert result is not None
    assert math.isnan(result.lift_satisfaction["mean"])
    assert result.satisfaction["learning"]["mean"] == pytest.approx(0.1)


def test_the_last_quarter_is_of_the_time_and_not_of_the_lines() -> None:
    lines = [served(1, "control", time_ms=time) for time in (0, 10, 20, 30, 70, 75, 90, 100)]
    assert [line.time_ms for line in last_quarter(lines)] == [75, 90, 100]
    assert [line.time_ms for line in last_quarter(lines, 0, 80)] == [70, 75]
    assert last_quarter([]) == []


def test_coverage_and_gini_tell_even_from_lopsided_showings() -> None:
    even = [served(1, "control", items=["a", "b", "c", "d"])]
    assert spread(even, catalogue=4) == pytest.approx((1.0, 0.0))
    lopsided = [served(1, "control", items=["a"] * 6)]
    assert spread(lopsided, catalogue=4) == pytest.approx((0.25, 0.75))
    assert spread([], catalogue=4) == (0.0, 0.0)

"""Warnings of the watch over entropy and divergence."""

from dataclasses import fields
from typing import Any

import pytest

from learner.settings import LearnSettings
from learner.step import StepMetrics
from learner.watch import Watch


def metrics(**given: float) -> StepMetrics:
    healthy: dict[str, Any] = {one.name: 0.0 for one in fields(StepMetrics)}
    return StepMetrics(**{**healthy, "entropy": 1.5, **given})


def warnings(watch: Watch, *series: StepMetrics) -> list[str]:
    return [warning for one in series for warning in watch.see(one)]


def test_a_good_run_is_not_warned_about() -> None:
    """The reference runs: 2.5 nats a level at the start, 1.5 at the end."""
    watch = Watch(LearnSettings())
    steps = [metrics(entropy=2.5 - step / 2000, divergence=0.05) for step in range(2000)]
    assert warnings(watch, *steps) == []


def test_a_collapse_is_told_once_with_the_figure_and_the_key() -> None:
    watch = Watch(LearnSettings())
    (warning,) = warnings(watch, *[metrics()] * 50, *[metrics(entropy=0.02)] * 500)
    assert "entropy" in warning
    assert "learn.entropy_floor = 0.5" in warning
    assert "\n" not in warning


def test_a_policy_that_starts_below_the_floor_is_told_at_once() -> None:
    assert len(warnings(Watch(LearnSettings()), metrics(entropy=0.1))) == 1


def test_one_odd_batch_is_no_crossing() -> None:
    series = [*[metrics()] * 20, metrics(entropy=0.0, divergence=4.0), *[metrics()] * 20]
    assert warnings(Watch(LearnSettings()), *series) == []


def test_hovering_at_the_floor_is_one_crossing() -> None:
    watch = Watch(LearnSettings())
    hovering = [metrics(entropy=0.5 + 0.02 * (-1) ** step) for step in range(400)]
    assert len(warnings(watch, *hovering)) == 1


def test_a_second_collapse_is_told_again_after_a_recovery() -> None:
    watch = Watch(LearnSettings())
    low, high = [metrics(entropy=0.1)] * 100, [metrics()] * 100
    assert len(warnings(watch, *low, *high, *low, *high)) == 2


def test_a_policy_far_from_what_was_served_is_told_once_per_crossing() -> None:
    watch = Watch(LearnSettings())
    near, far = [metrics(divergence=0.05)] * 100, [metrics(divergence=2.0)] * 100
    told = warnings(watch, *near, *far, *near, *far)
    assert len(told) == 2
    assert "learn.divergence_ceiling = 0.5" in told[0]


def test_both_limits_are_watched_at_once() -> None:
    told = warnings(Watch(LearnSettings()), metrics(entropy=0.0, divergence=3.0))
    assert len(told) == 2


def test_limits_are_the_operators() -> None:
    watch = Watch(LearnSettings(entropy_floor=0.0, divergence_ceiling=10.0))
    assert warnings(watch, *[metrics(entropy=0.0, divergence=9.0)] * 10) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_beyond_the_limit(value: float) -> None:
    watch = Watch(LearnSettings())
    assert len(warnings(watch, metrics(), *[metrics(divergence=value)] * 5)) == 1
    watch = Watch(LearnSettings())
    assert len(warnings(watch, metrics(), *[metrics(entropy=-value)] * 5)) == 1

"""The figures of steps in a loop that learns, as docs/objectives.md has them (-s prints them)."""

import copy
from dataclasses import fields

import numpy as np
import pytest

from learner.objectives import OBJECTIVES
from learner.step import StepMetrics
from learner.update import train
from learner.watch import Watch
from ops.config import Config, demo
from ops.serial import Serial
from ops.warmup import WarmStart, warm_start

NOW_MS = 1_700_000_000_000
CONFIG = demo(Config())


@pytest.fixture(scope="module")
def start() -> WarmStart:
    """The demonstration's, seed 7."""
    return warm_start(CONFIG, NOW_MS, lambda *_: None)


def steps_of(
    start: WarmStart, objective: str, monkeypatch: pytest.MonkeyPatch
) -> list[StepMetrics]:
    """The figures of the steps of 6,000 requests, half of them learned from."""
    found: list[StepMetrics] = []

    def noted(*given: object) -> StepMetrics | None:
        metrics = train(*given)  # type: ignore[arg-type]
        found.extend([metrics] if metrics else [])
        return metrics

    monkeypatch.setattr("ops.serial.train", noted)
    own = copy.deepcopy(start)
    own.trainer.objective = OBJECTIVES[objective]
    Serial(CONFIG, own, CONFIG.learn.seed, NOW_MS).run(6000, lambda *_: None)
    quarter = len(found) // 4
    for name, part in (("first", found[:quarter]), ("last", found[-quarter:])):
        means = {
            one.name: round(float(np.mean([getattr(m, one.name) for m in part])), 3)
            for one in fields(StepMetrics)
        }
        print(f"\n{objective}, {name} quarter of {len(found)} steps: {means}")
    return found


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("objective", ["gbpo_level", "ppo_clip"])
def test_the_demonstrations_loop_stays_far_from_both_limits(
    objective: str, start: WarmStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = steps_of(start, objective, monkeypatch)
    watch = Watch(CONFIG.learn)
    assert [warning for metrics in found for warning in watch.see(metrics)] == []
    assert max(m.divergence for m in found) < CONFIG.learn.divergence_ceiling / 2
    assert min(m.entropy for m in found) > 2 * CONFIG.learn.entropy_floor

"""The stages from a decided play to answers that have learned from it, on a run made by hand."""

import numpy as np
import pytest

from ops.bench_freshness import figures
from ops.freshness import ANSWERS, STAGES, Run, stages
from streams.weights import Manifest, StepEntry


def manifest(version: int, first: int, upto: int, made_ms: int) -> Manifest:
    entry = StepEntry(
        ranges=[(0, first, upto)],
        trained=upto - first,
        control=0,
        without_target=0,
        made_ms=made_ms,
    )
    return Manifest(
        version=version,
        lineage="l",
        codebook="c",
        preset="tiny",
        codes=2,
        user_rows=1,
        schema=[],
        digest="",
        size_bytes=0,
        chunks=0,
        journal=[entry],
        watermark_ms=0,
        created_ms=0,
    )


def run_of(answers: list[tuple[int, int]]) -> Run:
    """Two samples in version 2, one in version 3; version 3 was applied first, and 2 never."""
    return Run(
        samples={(0, 0): (1000, 1100), (0, 1): (1200, 1250), (0, 2): (2000, 2040)},
        manifests=[manifest(2, 0, 2, 1500), manifest(3, 2, 3, 2300)],
        committed={2: 1560, 3: 2400},
        applied={3: 2450},
        answers=answers,
    )


def steady(version: int, from_ms: int, count: int = ANSWERS) -> list[tuple[int, int]]:
    return [(from_ms + 10 * number, version) for number in range(count)]


def test_each_stage_counts_from_the_one_before() -> None:
    found = stages(run_of([*steady(1, 0), *steady(3, 2600)]), 0)
    assert np.allclose(found["joined"], [0.1, 0.05, 0.04])
    assert np.allclose(found["stepped"], [0.4, 0.25, 0.26])
    assert np.allclose(found["published"], [0.06, 0.06, 0.1])
    assert np.allclose(found["applied"], [0.89, 0.89, 0.05])  # version 3 contains version 2
    assert np.allclose(found["answers"], [0.15, 0.15, 0.15])
    assert np.allclose(found["total"], [1.45, 1.25, 0.45])
    assert np.allclose(found["to_answers"], [1.6, 1.4, 0.6])
    assert set(found) == {*STAGES, "total", "to_answers"}


def test_nineteen_of_twenty_answers_are_enough_and_eighteen_are_not() -> None:
    answers = [*steady(1, 0), *steady(3, 2600)]
    answers[25] = (answers[25][0], 1)
    assert stages(run_of(answers), 0)["answers"][0] == pytest.approx(0.15)
    answers[27] = (answers[27][0], 1)
    late = stages(run_of([*answers, *steady(3, 2800)]), 0)["answers"][0]
    assert late == pytest.approx(0.21)  # from the answer after the first that was too old


def test_what_has_not_passed_all_stages_or_came_early_does_not_count() -> None:
    assert not len(stages(run_of(steady(1, 0)), 0)["total"])
    assert len(stages(run_of([*steady(1, 0), *steady(3, 2600)]), 1100)["total"]) == 2


def test_a_rate_holds_when_both_goals_hold_and_viewers_were_served() -> None:
    answers = [*steady(1, 0, 230), *steady(3, 2300, 70)]
    found = figures(run_of(answers), 200.0, 0.0)
    assert found["samples"] == 3
    assert found["requests_per_second"] == pytest.approx(200, rel=0.02)
    assert not found["holds"]  # p50 of 1.3 s
    assert figures(run_of(answers[:-1]), 400.0, 0.0)["holds"] is False

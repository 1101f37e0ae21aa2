"""What a sample was judged by is of the past, and recorded with it: cutting the stream changes no earlier label.

Copies of this shaping take the cut over a batch or over the whole log, where a play's label depends on plays that
came after it. The checks below hold for our fold and fail on such shapers, written here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest

from streams.decision import Decision
from streams.events import PositionOutcome
from streams.join import Joined
from streams.settings import ShapeSettings
from streams.shape import Shape
from tests.streams.makers import T0, exposure


class Label(NamedTuple):
    """One play as it was judged."""

    percentile: float
    threshold: float
    advantage: int | None


Shaper = Callable[[Sequence[Joined]], list[list[Label]]]


def played(number: int, play_ms: Sequence[int], user: str) -> Joined:
    """A request every ten seconds, whose plays have all ended before the next one."""
    at = T0 + 10_000 * number
    shown = exposure(f"r{number}", at, len(play_ms), user=user)
    positions = {
        position: PositionOutcome("ended", play, at + 1000 + position, 0)
        for position, play in enumerate(play_ms)
    }
    decision = Decision(at + 5000, "decided", positions)
    return Joined(shown, number, at, decision, 0, 0, 0)


@pytest.fixture(scope="module")
def log() -> list[Joined]:
    """Plays that grow longer from request to request, so that the future differs from the past."""
    rng = np.random.default_rng(1)
    return [
        played(
            number,
            [int(play) for play in 1000 * rng.lognormal(1.0 + number / 60, 0.8, 5)],
            user=f"u{rng.integers(20)}",
        )
        for number in range(120)
    ]


def ours(log: Sequence[Joined]) -> list[list[Label]]:
    shape = Shape(ShapeSettings(), lambda _arm, _user: None)
    labels = []
    for joined in log:
        sample = shape.shape(joined)
        labels.append(
            [
                Label(item.percentile, sample.threshold, item.advantage)
                for item in sample.items
                if item.percentile is not None
            ]
        )
    return labels


def cut(labels: Sequence[Sequence[Label]], threshold: float) -> list[list[Label]]:
    return [
        [Label(one.percentile, threshold, int(one.percentile > threshold)) for one in of]
        for of in labels
    ]


def by_the_whole_log(log: Sequence[Joined]) -> list[list[Label]]:
    """Wrong: the top quartile of everything that there is."""
    labels = ours(log)
    return cut(labels, float(np.quantile([one.percentile for of in labels for one in of], 0.75)))


def by_the_batch(log: Sequence[Joined]) -> list[list[Label]]:
    """Wrong here, though the report's letter: the top quartile of the batch of 50 in which a play falls."""
    labels, found = ours(log), []
    for first in range(0, len(labels), 50):
        batch = labels[first : first + 50]
        found += cut(
            batch, float(np.quantile([one.percentile for of in batch for one in of], 0.75))
        )
    return found


def by_whole_histories(log: Sequence[Joined]) -> list[list[Label]]:
    """Wrong: a percentile among all plays, later ones too; the cut is honest."""
    plays = np.sort([p.play_ms for joined in log for p in joined.decision.positions.values()])
    found = []
    for joined, of in zip(log, ours(log), strict=True):
        ranks = [
            float(np.searchsorted(plays, joined.decision.positions[place].play_ms) / len(plays))
            for place in range(len(of))
        ]
        found.append(
            [
                Label(rank, one.threshold, int(rank > one.threshold))
                for rank, one in zip(ranks, of, strict=True)
            ]
        )
    return found


def what_comes_later_changes_no_label(shaper: Shaper, log: Sequence[Joined]) -> None:
    whole = shaper(log)
    for upto in (1, 30, 49, 75, len(log) - 1):
        assert shaper(log[:upto]) == whole[:upto]


@pytest.mark.parametrize("wrong", [by_the_whole_log, by_the_batch, by_whole_histories])
def test_no_label_depends_on_what_comes_later(wrong: Shaper, log: list[Joined]) -> None:
    what_comes_later_changes_no_label(ours, log)
    with pytest.raises(AssertionError):
        what_comes_later_changes_no_label(wrong, log)


def the_recorded_threshold_is_the_one_that_judged(shaper: Shaper, log: Sequence[Joined]) -> None:
    """And it was known before the play: the quantile of the percentiles of earlier requests."""
    earlier: list[float] = []
    settings = ShapeSettings()
    for of in shaper(log):
        for one in of:
            assert one.advantage == int(one.percentile > one.threshold)
        # by plain counting, with the uniform prior of 64 percentiles
        threshold = of[0].threshold
        below = 64 * threshold + sum(one <= threshold for one in earlier)
        share = below / (64 + len(earlier))
        assert share == pytest.approx(settings.threshold_quantile, abs=0.02)
        earlier += [one.percentile for one in of]


@pytest.mark.parametrize("wrong", [by_the_whole_log, by_the_batch])
def test_the_threshold_of_a_sample_is_recorded_and_of_the_past(
    wrong: Shaper, log: list[Joined]
) -> None:
    the_recorded_threshold_is_the_one_that_judged(ours, log)
    with pytest.raises(AssertionError):
        the_recorded_threshold_is_the_one_that_judged(wrong, log)

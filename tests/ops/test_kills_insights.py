"""The insights of the bench of kills, held against its samples."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ops import kills_insights
from ops.kills_insights import GRACE_MS, WINDOW_MS, caught_up, figures, stuck, truth
from streams.events import Insight, Sample, encode
from streams.insights import Insights
from streams.settings import KafkaSettings
from streams.topics import SAMPLES
from tests.streams import makers

START_MS = 1_700_000_000_000
"""Start of a window."""


def sample(watermark_ms: int, arm: str = "control") -> Sample:
    return makers.sample(watermark_ms, arm, [])


def insight(
    window: int, requests: int, final: bool = True, arm: str = "control", partition: int = 0
) -> Insight:
    return Insight(
        window_start_ms=START_MS + window * WINDOW_MS,
        window_ms=WINDOW_MS,
        arm=arm,
        partitions=[partition],
        final=final,
        requests=requests,
        shown=0,
        seen=0,
        plays_ms=0,
        judged=0,
        positives=0,
        dislikes=0,
        censored=0,
        distinct_items=0,
    )


def two_windows_and_an_open_one() -> list[tuple[int, Sample]]:
    """Three and two samples; the other partition has come to where the second window is over."""
    over_ms = START_MS + 2 * WINDOW_MS + GRACE_MS
    at_ms = [START_MS, START_MS + 1, START_MS + WINDOW_MS - 1, START_MS + WINDOW_MS]
    first = [(0, sample(ms)) for ms in (*at_ms, over_ms + 7_000)]
    return [*first, (1, sample(START_MS + WINDOW_MS + 5)), (1, sample(over_ms))]


EXACT = truth(two_windows_and_an_open_one())


def test_windows_are_those_of_the_application() -> None:
    defaults = inspect.signature(Insights).parameters
    assert defaults["window_s"].default * 1000 == WINDOW_MS
    assert defaults["grace_s"].default * 1000 == GRACE_MS


def test_only_windows_that_all_partitions_have_left_behind_are_summed() -> None:
    assert EXACT.requests == {(START_MS, "control"): 3, (START_MS + WINDOW_MS, "control"): 2}
    slower = truth(two_windows_and_an_open_one()[:-1])
    assert not slower.requests
    *others, (partition, last) = two_windows_and_an_open_one()
    early = truth([*others, (partition, sample(last.watermark_ms - 1))])
    assert set(early.requests) == {(START_MS, "control")}


def test_a_window_is_stuck_until_all_that_stands_of_it_is_final() -> None:
    second = (START_MS + WINDOW_MS, "control")
    assert stuck(EXACT, []) == [(START_MS, "control"), second]
    assert stuck(EXACT, [insight(0, 3), insight(1, 2, final=False)]) == [second]
    assert stuck(EXACT, [insight(0, 3), insight(1, 2, arm="learning")]) == [second]
    parts = [insight(1, 1, final=False), insight(1, 1, partition=1)]
    assert stuck(EXACT, [insight(0, 3), *parts]) == [second]
    assert stuck(EXACT, [insight(0, 3), *parts, insight(1, 1)]) == []


def test_what_stands_is_compared_window_by_window() -> None:
    good = figures(EXACT, [insight(0, 1, final=False), insight(0, 3), insight(1, 2)])
    assert good == {
        "windows": 2,
        "stuck": 0,
        "requests": 5,
        "samples": 5,
        "error": 0.0,
        "behind_s": (GRACE_MS + 7_000) / 1000,
    }
    moved = figures(EXACT, [insight(0, 2), insight(1, 3), insight(3, 1, final=False)])
    assert (moved["requests"], moved["error"]) == (5, 2 / 5)
    assert moved["behind_s"] == 0, "the open window is published"
    unknown = figures(EXACT, [insight(0, 3), insight(1, 2), insight(1, 4, arm="learning")])
    assert (unknown["requests"], unknown["error"]) == (9, 4 / 5)


def test_nothing_to_compare_is_no_error() -> None:
    few = truth([(0, sample(START_MS))])
    assert figures(few, []) == {
        **dict.fromkeys(("windows", "stuck", "requests", "samples"), 0),
        "error": 0.0,
        "behind_s": START_MS / 1000,
    }


class Log:
    """A cluster whose insights come one at each look."""

    def __init__(self, insights: list[Insight]) -> None:
        self.looks = 0
        self._insights = insights

    def read(self, _: object, topic: str, partition: int = 0, first: int = 0) -> Iterator[Any]:
        if topic == SAMPLES:
            mine = [one for at, one in two_windows_and_an_open_one() if at == partition]
            yield from (SimpleNamespace(value=encode(one)) for one in mine)
            return
        self.looks += 1
        for offset, one in list(enumerate(self._insights))[first : self.looks]:
            yield SimpleNamespace(value=encode(one), offset=offset)


def looked_at(log: Log, monkeypatch: pytest.MonkeyPatch, patience_s: float) -> dict[str, Any]:
    monkeypatch.setattr(kills_insights, "consumer", lambda _: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(kills_insights, "read", log.read)
    monkeypatch.setattr(kills_insights, "PAUSE_S", 0.01)
    monkeypatch.setattr(kills_insights, "PATIENCE_S", patience_s)
    return caught_up(KafkaSettings(bootstrap="nowhere:1", partitions=2), lambda: None)


def test_late_insights_are_waited_for_and_stuck_ones_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = Log([insight(0, 2, final=False), insight(0, 3), insight(1, 2)])
    found = looked_at(late, monkeypatch, patience_s=60.0)
    assert (found["stuck"], found["error"], late.looks) == (0, 0.0, 3)
    never = looked_at(Log([insight(0, 3)]), monkeypatch, patience_s=0.1)
    assert (never["stuck"], never["windows"]) == (1, 2)
    assert never["waited_s"] > 0.1

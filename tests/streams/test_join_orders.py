"""The join against a slow reference (`streams.reference`), over random histories and orders of arrival."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.decision import Decision, decide
from streams.events import Exposure, Feedback
from streams.reference import verdict
from tests.streams.fed import END, RULES, SETTINGS, SPAN, TIMES, Arrived, Fed, as_verdict
from tests.streams.makers import T0, Feed, exposure


@dataclass(frozen=True)
class Request:
    """An exposure and everything its viewer did."""

    exposure: Exposure
    feedback: list[Feedback]


@st.composite
def requests(draw: st.DrawFn, name: str) -> Request:
    """Any exposure with any feedback: also before it, of foreign positions, after leaving, of any order."""
    shown = exposure(name, T0 + draw(st.integers(0, 30)), draw(st.integers(1, 3)))
    feed = Feed(name)
    feedback = []
    kinds = st.sampled_from(
        ["begin", "heartbeat", "heartbeat", "heartbeat", "end", "like", "dislike", "follow", "left"]
    )
    for _ in range(draw(st.integers(0, 14))):
        kind: Any = draw(kinds)
        feedback.append(
            feed(
                kind,
                -1 if kind == "left" else draw(st.integers(0, 3)),
                draw(st.integers(-5, SPAN)),
                play_ms=draw(st.integers(0, 50)),
                withdrawn=draw(st.booleans()) if kind in ("like", "dislike", "follow") else False,
            )
        )
    return Request(shown, feedback)


@st.composite
def histories(draw: st.DrawFn) -> list[Request]:
    return [draw(requests(f"r{number}")) for number in range(draw(st.integers(1, 3)))]


def arrivals(history: list[Request], seed: int, ticks: bool = True) -> list[Arrived]:
    """An order of arrival in which everything comes less than the lateness late, with repeats and ticks.

    A record arrives at its time plus less than the lateness, so nothing that came before it is more than that
    ahead. A repeat may come at any later moment. A tick claims what is true: it comes no earlier than its time.
    """
    rng = random.Random(seed)
    timed: list[tuple[float, float, Arrived]] = []

    def arrives(event: Arrived, at: float) -> None:
        timed.append((at, rng.random(), event))

    for request in history:
        events: list[Exposure | Feedback] = [request.exposure, *request.feedback]
        for event in events:
            at = event.time_ms + rng.uniform(0, TIMES.lateness - 0.001)
            arrives(event, at)
            if rng.random() < 0.3:
                arrives(event, at + rng.choice([0.0, 1.0, 20.0, 300.0]))
    for _ in range(rng.randrange(6) if ticks else 0):
        at_ms = T0 + rng.randrange(-20, SPAN)
        arrives(at_ms, at_ms + rng.uniform(0, 30))
    timed.sort(key=lambda entry: entry[:2])
    return [event for _, _, event in timed]


@settings(max_examples=400)
@given(histories(), st.integers(0, 1 << 30), st.sampled_from([0, 1, 2000]))
def test_the_join_agrees_with_the_slow_reference_in_any_order_within_the_lateness(
    history: list[Request], seed: int, most_hot: int
) -> None:
    fed = Fed(most_hot=most_hot).take(*arrivals(history, seed), END)
    expected = {
        each.exposure.request: verdict(each.exposure, each.exposure.time_ms, each.feedback, RULES)
        for each in history
    }
    assert {j.exposure.request: as_verdict(j.decision) for j in fed.closed} == expected


@settings(max_examples=150)
@given(histories(), st.integers(0, 1 << 30), st.sampled_from([0, 1, 2000]))
def test_each_exposure_closes_exactly_once_and_nothing_stays_open(
    history: list[Request], seed: int, most_hot: int
) -> None:
    fed = Fed(most_hot=most_hot).take(*arrivals(history, seed), END)
    assert Counter(j.exposure.request for j in fed.closed) == {
        each.exposure.request: 1 for each in history
    }
    assert fed.join.open == 0
    assert fed.join.needed(111, 222) == (111, 222)


@settings(max_examples=150)
@given(histories(), st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_two_orders_of_arrival_give_the_same_decisions(
    history: list[Request], one: int, other: int
) -> None:
    def decisions(seed: int) -> dict[str, Decision]:
        fed = Fed().take(*arrivals(history, seed), END)
        return {joined.exposure.request: joined.decision for joined in fed.closed}

    assert decisions(one) == decisions(other)


@settings(max_examples=150)
@given(histories(), st.integers(0, 1 << 30))
def test_no_request_closes_before_its_decision_has_passed_by_the_lateness(
    history: list[Request], seed: int
) -> None:
    fed = Fed()
    for event in arrivals(history, seed):
        before = fed.join.watermark_ms
        done = len(fed.closed)
        fed.take(event)
        for joined in fed.closed[done:]:
            assert before < joined.watermark_ms <= fed.join.watermark_ms
            assert joined.watermark_ms >= joined.decision.decided_ms + TIMES.lateness
        if fed.join.watermark_ms == before:
            continue
        due = [
            each.exposure.request
            for each in history
            if verdict(each.exposure, each.exposure.time_ms, each.feedback, RULES).decided_ms
            + TIMES.lateness
            <= fed.join.watermark_ms
        ]
        assert set(due) <= {joined.exposure.request for joined in fed.closed}


@settings(max_examples=200)
@given(requests("r"), st.integers(1, 400), st.integers(0, 1 << 30))
def test_a_late_exposure_is_judged_from_its_arrival(
    request: Request, behind: int, seed: int
) -> None:
    watermark = request.exposure.time_ms + TIMES.lateness + behind
    start = watermark - TIMES.lateness
    rng = random.Random(seed)
    feedback = list(request.feedback)
    rng.shuffle(feedback)
    early = rng.randrange(len(feedback) + 1)
    after = [e for e in feedback[early:] if start < e.time_ms <= watermark]
    fed = Fed().take(*feedback[:early], watermark)
    if fed.join.watermark_ms > watermark:  # early feedback may be ahead, the exposures are not
        pytest.fail("the watermark is the smaller of both inputs")
    fed.take(request.exposure, *after, END)
    expected = verdict(request.exposure, start, [*feedback[:early], *after], RULES)
    assert as_verdict(fed.only) == expected
    assert fed.closed[0].start_ms == start


@settings(max_examples=200)
@given(requests("r"), st.integers(0, 1 << 30), st.integers(0, 60))
def test_deciding_does_not_depend_on_the_order_of_the_events(
    request: Request, seed: int, later: int
) -> None:
    start = request.exposure.time_ms + later
    shuffled = list(request.feedback)
    random.Random(seed).shuffle(shuffled)
    assert decide(request.exposure, start, shuffled, TIMES) == decide(
        request.exposure, start, request.feedback, TIMES
    )


@settings(max_examples=150)
@given(st.lists(requests("r"), min_size=2, max_size=2), st.integers(0, 1 << 30))
def test_beyond_the_most_open_the_one_due_first_closes_as_it_stands(
    pair: list[Request], seed: int
) -> None:
    """Two exposures at one time and room for one: the reference, broken off there, says the same."""
    first, second = (
        [renamed(each.exposure, name), *(renamed(event, name) for event in each.feedback)]
        for name, each in zip("ab", pair, strict=True)
    )
    before = [e for e in first if isinstance(e, Exposure) or e.time_ms <= T0 + 30]
    fed = Fed(replace(SETTINGS, max_open=1)).take(*before, T0 + 30)
    if fed.closed:
        return  # it was decided by itself
    exposed = second[0]
    assert isinstance(exposed, Exposure)
    fed.take(msgspec.structs.replace(exposed, time_ms=T0 + 30 + seed % 5))
    assert len(fed.closed) == fed.join.counts["closed_by_memory"] == 1
    joined = fed.closed[0]
    heard = before if joined.exposure.request == "a" else []
    events = [e for e in heard if isinstance(e, Feedback)]
    broken_off = max(joined.watermark_ms, joined.start_ms)
    expected = verdict(joined.exposure, joined.start_ms, events, RULES, until=broken_off)
    assert as_verdict(joined.decision) == expected
    assert fed.join.open == 1


def renamed(event: Exposure | Feedback, name: str) -> Exposure | Feedback:
    """The same of another request."""
    if isinstance(event, Exposure):
        return msgspec.structs.replace(event, request=name)
    return msgspec.structs.replace(event, request=name, event=f"{name}/{event.event}")

"""The join against a slow reference (`streams.reference`), and each rule of the contract by itself."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.kv import MemoryKv
from streams.decision import NEVER, Decision, JoinTimes, decide
from streams.events import Exposure, Feedback
from streams.join import Join, Joined
from streams.open_requests import OFFSET_BLOCK
from streams.reference import Found, Rules, Verdict, verdict
from streams.settings import JoinSettings
from tests.streams.makers import T0, Feed, exposure

SETTINGS = JoinSettings(
    window_s=0.040,
    cap_s=0.090,
    abandon_s=0.012,
    lateness_s=0.008,
    max_skew_s=1.0,
    dedupe_horizon_s=1.0,
)
TIMES = JoinTimes.of(SETTINGS)
RULES = Rules(window=40, cap=90, abandon=12, horizon=1000)
SPAN = 150

Arrived = Exposure | Feedback | int
"""An arrival; a number is a tick on both inputs."""


class Fed:
    """A join, what it closed, and the offsets it was fed at."""

    def __init__(
        self,
        settings: JoinSettings = SETTINGS,
        closed: set[str] | None = None,
        most_hot: int = 2000,
    ) -> None:
        committed = closed or set()
        self.join = Join(settings, committed.__contains__, MemoryKv(), most_hot)
        self.closed: list[Joined] = []
        self._offsets: Counter[str] = Counter()

    def take(self, *arrivals: Arrived, record_ms: int = T0) -> "Fed":
        for event in arrivals:
            if isinstance(event, Exposure):
                self.closed += self.join.expose(event, self._next("exposures"), record_ms)
            elif isinstance(event, Feedback):
                self.closed += self.join.feed(event, self._next("feedback"), record_ms)
            else:
                self.closed += self.join.tick(event, True, record_ms)
                self.closed += self.join.tick(event, False, record_ms)
            self.join.settle()
        return self

    def _next(self, topic: str) -> int:
        self._offsets[topic] += 1
        return self._offsets[topic] - 1

    @property
    def only(self) -> Decision:
        (joined,) = self.closed
        return joined.decision


END = T0 + 10_000


def as_verdict(decision: Decision) -> Verdict:
    return Verdict(
        decision.decided_ms,
        decision.closed_by,
        {
            p: Found(o.outcome, o.play_ms, o.actions, None if o.last_ms == NEVER else o.last_ms)
            for p, o in decision.positions.items()
        },
    )


# --- random histories -------------------------------------------------------------------------------


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


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow], deadline=None)
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


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
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


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(histories(), st.integers(0, 1 << 30), st.integers(0, 1 << 30))
def test_two_orders_of_arrival_give_the_same_decisions(
    history: list[Request], one: int, other: int
) -> None:
    def decisions(seed: int) -> dict[str, Decision]:
        fed = Fed().take(*arrivals(history, seed), END)
        return {joined.exposure.request: joined.decision for joined in fed.closed}

    assert decisions(one) == decisions(other)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
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


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
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


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
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


# --- each rule by itself ----------------------------------------------------------------------------


def decision(*feedback: Feedback, slots: int = 2) -> Decision:
    """What an exposure at `T0` with this feedback comes to."""
    return Fed().take(exposure(slots=slots), *feedback, END).only


def test_what_was_served_and_never_began_is_unseen() -> None:
    feed = Feed()
    found = decision(feed("end", 0, 5, play_ms=5), feed("like", 1, 6)).positions
    assert found[0].outcome == "ended"
    assert (found[1].outcome, found[1].play_ms) == ("unseen", 0)


def test_the_largest_play_time_wins_in_any_order() -> None:
    feed = Feed()
    events = [feed("heartbeat", 0, at, play_ms=play) for at, play in ((2, 7), (4, 30), (6, 12))]
    for order in (events, events[::-1], events[1:] + events[:1]):
        assert decision(*order, feed("end", 0, 8, play_ms=9), slots=1).positions[0].play_ms == 30


def test_an_action_holds_until_it_is_withdrawn_and_may_come_back() -> None:
    feed = Feed()
    end = feed("end", 0, 30)
    like, withdrawn = feed("like", 0, 2), feed("like", 0, 4, withdrawn=True)
    again, dislike = feed("like", 0, 6), feed("dislike", 0, 3)
    assert decision(like, dislike, end, slots=1).positions[0].actions == 1 | 16
    assert decision(like, withdrawn, dislike, end, slots=1).positions[0].actions == 16
    assert decision(again, withdrawn, like, end, slots=1).positions[0].actions == 1


def test_actions_count_until_the_whole_request_is_decided() -> None:
    feed = Feed()
    play = [feed("end", 0, 5), feed("end", 1, 20)]
    inside, outside = feed("like", 0, 19), feed("follow", 0, 21)
    assert decision(*play, inside, outside).positions[0].actions == 1


def test_leaving_makes_begun_plays_final_and_the_others_unseen() -> None:
    feed = Feed()
    found = decision(feed("begin", 0, 2), feed("heartbeat", 0, 6, play_ms=4), feed.left(8), slots=2)
    assert (found.decided_ms, found.closed_by) == (T0 + 8, "decided")
    assert (found.positions[0].outcome, found.positions[0].play_ms) == ("left", 4)
    assert found.positions[1].outcome == "unseen"


def test_nothing_counts_after_leaving() -> None:
    feed = Feed()
    found = decision(
        feed("begin", 0, 2, play_ms=1),
        feed.left(8),
        feed("end", 0, 9, play_ms=7),
        feed("begin", 1, 9),
    )
    assert (found.positions[0].outcome, found.positions[0].play_ms) == ("left", 1)
    assert found.positions[1].outcome == "unseen"


def test_nothing_counts_after_leaving_when_the_whole_request_came_late() -> None:
    feed = Feed()
    late = Fed().take(T0 + 500, exposure())
    late.take(feed("begin", 0, 2, play_ms=1), feed.left(8), feed("begin", 1, 9), END)
    assert late.only.positions[0].outcome == "left"
    assert late.only.positions[1].outcome == "unseen"


def test_a_silent_play_is_abandoned_at_what_was_played() -> None:
    feed = Feed()
    found = decision(
        feed("begin", 0, 2),
        feed("heartbeat", 0, 10, play_ms=8),
        feed("heartbeat", 0, 23, play_ms=21),  # 13 ms after the last: too late
        slots=1,
    )
    assert found.decided_ms == T0 + 10 + TIMES.abandon
    assert (found.positions[0].outcome, found.positions[0].play_ms) == ("abandoned", 8)
    assert found.positions[0].last_ms == T0 + 10


def test_a_play_still_going_at_the_deadline_is_censored() -> None:
    feed = Feed()
    beats = [feed("heartbeat", 0, at, play_ms=at) for at in range(0, 100, 10)]
    found = decision(*beats, slots=1)
    assert (found.decided_ms, found.closed_by) == (T0 + TIMES.window, "deadline")
    assert (found.positions[0].outcome, found.positions[0].play_ms) == ("censored", 40)


def test_each_play_that_begins_postpones_the_deadline_until_the_cap() -> None:
    feed = Feed()
    assert decision(feed("begin", 0, 30)).decided_ms == T0 + 30 + TIMES.window
    chain = [feed("begin", position, 35 * position) for position in range(3)]
    assert decision(*chain, slots=4).decided_ms == T0 + TIMES.cap


def test_a_request_without_plays_waits_for_the_window() -> None:
    found = decision()
    assert (found.decided_ms, found.closed_by) == (T0 + TIMES.window, "deadline")
    assert {outcome.outcome for outcome in found.positions.values()} == {"unseen"}


def test_feedback_waits_for_its_exposure() -> None:
    feed = Feed()
    fed = Fed().take(feed("end", 0, 5, play_ms=5), feed("end", 1, 9, play_ms=2), T0 + 200)
    assert not fed.closed
    assert fed.join.open == 1
    fed.take(exposure(), END)
    assert [o.play_ms for o in fed.only.positions.values()] == [5, 2]


def test_feedback_whose_exposure_never_comes_is_counted_as_orphan() -> None:
    feed = Feed()
    fed = Fed().take(feed("begin", 0, 0), feed("end", 0, 5), T0 + TIMES.horizon)
    assert fed.join.open == 1
    fed.take(T0 + 5 + TIMES.horizon + TIMES.lateness)
    assert fed.join.open == 0
    assert fed.join.counts["orphans"] == 2
    assert not fed.closed


def test_feedback_older_than_the_horizon_counts_for_no_exposure() -> None:
    feed = Feed()
    old, young = feed("end", 0, -TIMES.horizon), feed("begin", 1, 1 - TIMES.horizon, play_ms=3)
    found = decision(old, young)
    assert [o.outcome for o in found.positions.values()] == ["unseen", "abandoned"]


def test_repeats_change_nothing_and_are_counted() -> None:
    feed = Feed()
    like, withdrawn = feed("like", 0, 2), feed("like", 0, 4, withdrawn=True)
    fed = Fed().take(
        exposure(slots=1), exposure(slots=1), like, withdrawn, like, feed("end", 0, 9), END
    )
    assert fed.only.positions[0].actions == 0
    fed.take(exposure(slots=1))
    assert len(fed.closed) == 1
    assert fed.join.counts["duplicate_feedback"] == 1
    assert fed.join.counts["duplicate_exposures"] == 2


def test_a_request_closed_before_the_last_commit_is_a_repeat_too() -> None:
    fed = Fed(closed={"r"}).take(exposure(), Feed()("end", 0, 3), END)
    assert fed.closed == []
    assert fed.join.counts == {"duplicate_exposures": 1, "late_feedback": 1}


def test_feedback_after_the_closing_is_late_and_counted() -> None:
    feed = Feed()
    fed = Fed().take(exposure(slots=1), feed("end", 0, 5), T0 + 100)
    assert len(fed.closed) == 1
    fed.take(feed("like", 0, 5), END)
    assert fed.join.counts["late_feedback"] == 1
    assert len(fed.closed) == 1
    assert fed.join.open == 0


def test_the_watermark_is_the_smaller_of_both_inputs_and_never_goes_back() -> None:
    fed = Fed()
    fed.take(exposure("a", T0 + 50))
    assert fed.join.watermark_ms < 0
    fed.take(Feed("a")("begin", 0, 20))
    assert fed.join.watermark_ms == T0 + 20
    fed.take(Feed("a")("begin", 1, 7), exposure("b", T0 + 10))
    assert fed.join.watermark_ms == T0 + 20
    fed.take(Feed("b")("begin", 1, 90))
    assert fed.join.watermark_ms == T0 + 50


def test_ticks_close_an_idle_partition() -> None:
    fed = Fed().take(exposure())
    due = T0 + TIMES.window + TIMES.lateness
    fed.join.tick(due, True, 0)
    assert fed.join.tick(due - 1, False, 0) == []
    (joined,) = fed.join.tick(due, False, 4321)
    assert joined.watermark_ms == due
    assert joined.closable_ms == 4321


def test_one_input_alone_closes_nothing() -> None:
    fed = Fed().take(exposure())
    assert fed.join.tick(END, True, 0) == []


def test_a_closed_request_says_what_it_was_closed_from() -> None:
    feed = Feed()
    fed = Fed().take(exposure("other", T0 - 5), exposure(), feed("end", 0, 5), feed("end", 1, 6))
    fed.take(Feed("other").left(7))
    (joined,) = [
        *fed.join.tick(T0 + 6 + TIMES.lateness, True, 1),
        *fed.join.tick(T0 + 6 + TIMES.lateness, False, 77),
    ]
    assert (joined.exposure_offset, joined.feedback_upto, joined.closable_ms) == (1, 3, 77)


def test_a_request_is_closable_with_the_record_that_brings_its_decision_forward() -> None:
    """Also where that record is an earlier play event, far out of order: it moves the play's start."""
    feed = Feed()
    fed = Fed().take(exposure(slots=2), feed("begin", 0, 30), T0 + TIMES.window + TIMES.lateness)
    due = T0 + 24 + TIMES.window + TIMES.lateness
    fed.take(feed("begin", 0, 24), due - 1)
    assert not fed.closed
    fed.take(due)
    assert fed.only.decided_ms == T0 + 24 + TIMES.window


def test_an_exposure_older_than_the_horizon_is_too_late() -> None:
    fed = Fed().take(T0)
    assert fed.join.too_late(exposure(time_ms=T0 - TIMES.horizon - 1))
    assert not fed.join.too_late(exposure(time_ms=T0 - TIMES.horizon))


def test_ids_are_remembered_at_least_as_long_as_a_request_may_be_open() -> None:
    short = JoinTimes.of(replace(SETTINGS, dedupe_horizon_s=0.001))
    assert short.horizon == short.cap + short.lateness


def test_the_offsets_still_needed_are_those_of_open_requests_by_whole_blocks() -> None:
    first, second = OFFSET_BLOCK + 3, 3 * OFFSET_BLOCK + 3
    feed, other = Feed("a"), Feed("b")
    join = Join(SETTINGS, lambda _: False)
    join.expose(exposure("a", slots=1), first, T0)
    join.feed(feed("begin", 0, 1), first, T0)
    join.expose(exposure("b"), second, T0)
    join.feed(other("begin", 0, 2), second, T0)
    assert join.needed(9999, 9999) == (OFFSET_BLOCK, OFFSET_BLOCK)
    assert join.feed(feed("end", 0, 3), second + 1, T0) == []
    on_exposures = join.tick(T0 + 3 + TIMES.lateness, True, T0)
    closed = on_exposures + join.tick(T0 + 3 + TIMES.lateness, False, T0)
    assert [joined.exposure.request for joined in closed] == ["a"]
    assert join.needed(9999, 9999) == (3 * OFFSET_BLOCK, 3 * OFFSET_BLOCK)
    join.tick(END, True, T0)
    join.tick(END, False, T0)
    assert join.needed(9999, 9999) == (9999, 9999)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
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

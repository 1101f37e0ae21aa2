"""The join: each rule of the contract by itself."""

from dataclasses import replace

from streams.decision import Decision, JoinTimes
from streams.events import Feedback
from streams.join import Join
from streams.open_requests import OFFSET_BLOCK
from tests.streams.fed import END, SETTINGS, TIMES, Fed
from tests.streams.makers import T0, Feed, exposure


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

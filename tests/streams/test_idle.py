"""When a tick may say that nothing older will come."""

import math

from hypothesis import given
from hypothesis import strategies as st

from streams.idle import AWAY_S, BEHIND_S, PAUSE_S, Idle

GRACE = 0.5


def answering(upto_s: float, since_s: float = 0.0) -> Idle:
    """Kafka has answered all the time."""
    idle = Idle(GRACE)
    for at in range(math.floor((upto_s - since_s) * 20) + 1):
        idle.answered(since_s + at / 20)
    return idle


def test_an_input_without_events_is_idle_as_soon_as_kafka_has_answered() -> None:
    idle = Idle(GRACE)
    assert not idle.at(100.0)
    idle.answered(100.0)
    assert idle.at(100.0)


def test_what_had_an_event_is_idle_after_the_grace() -> None:
    idle = answering(100.0)
    idle.heard(99.9)
    assert not idle.at(100.3)
    assert idle.at(100.4)


def test_without_kafkas_answers_nothing_is_idle() -> None:
    idle = answering(100.0)
    assert idle.at(100.0 + AWAY_S)
    assert not idle.at(100.1 + AWAY_S)


@given(away_s=st.floats(AWAY_S + 0.1, 1e5))
def test_after_an_absence_writers_have_time_to_return(away_s: float) -> None:
    idle = answering(100.0)
    back = 100.0 + away_s
    answered = back
    while answered < back + PAUSE_S - 0.1:
        idle.answered(answered)
        assert not idle.at(answered)
        answered += 0.5
    idle.answered(back + PAUSE_S + 0.1)
    assert idle.at(back + PAUSE_S + 0.1)


def test_after_an_event_that_had_to_wait_there_may_be_more() -> None:
    idle = answering(110.0)
    idle.heard(100.0, BEHIND_S)
    assert idle.at(100.0 + GRACE)
    idle.heard(101.0, BEHIND_S + 0.1)
    assert not idle.at(101.0 + PAUSE_S - 0.1)
    assert idle.at(101.0 + PAUSE_S)


def test_an_error_is_an_absence_however_short() -> None:
    idle = answering(100.0)
    idle.lost()
    assert not idle.at(100.0)
    answered = 100.1
    while answered < 100.0 + PAUSE_S:
        idle.answered(answered)
        assert not idle.at(answered)
        answered += 1.0
    idle.answered(answered + 1.0)
    assert idle.at(answered + 1.0)


@given(gaps=st.lists(st.floats(0.0, GRACE - 0.01), min_size=1, max_size=50))
def test_a_writer_that_catches_up_is_not_overtaken(gaps: list[float]) -> None:
    """However old its events are."""
    idle, now = answering(100.0), 100.0
    for gap in gaps:
        idle.heard(now)
        now += gap
        idle.answered(now)
        assert not idle.at(now)

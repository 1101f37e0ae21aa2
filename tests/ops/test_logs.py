"""A role's log says each thing, and does not repeat a library's complaint."""

import logging

from ops.logs import SAME_LINE_S, Seldom


def record(name: str, message: str, at: float) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.WARNING, __file__, 1, message, (), None)
    made.created = at
    return made


def test_a_library_repeats_itself_once_a_minute_at_most() -> None:
    seldom = Seldom()
    times = [0.0, 0.1, SAME_LINE_S - 1, SAME_LINE_S + 1]
    passed = [at for at in times if seldom.filter(record("aiokafka.conn", "no broker", at))]
    assert passed == [0.0, SAME_LINE_S + 1]


def test_another_message_is_not_held_back() -> None:
    seldom = Seldom()
    assert seldom.filter(record("aiokafka.conn", "no broker", 1.0))
    assert seldom.filter(record("aiokafka.conn", "still no broker", 1.0))


def test_our_own_words_always_pass() -> None:
    seldom = Seldom()
    assert all(seldom.filter(record("dwell.actor", "refused", at)) for at in (0.0, 0.1, 0.2))

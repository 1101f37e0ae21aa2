"""Whether an input of a partition is idle, so that a tick may claim that all older events have been written. Pure.

Notable choices
- Not while events come, which move the watermark themselves.
- Not without Kafka's answers, and not for `PAUSE_S` after it was away: actors that kept events on their disks see it
  return a moment later than we do. A tick in between would make all that they kept late.
- Not for as long after an event that was written long after it happened: who catches up has more of the past to come.
"""

import math
from typing import Final

AWAY_S: Final = 2.0
"""Kafka has not answered for so long: it was away. It is asked every few hundredths of a second."""
BEHIND_S: Final = 2.0
"""An event that was written so long after it happened had to wait somewhere."""
PAUSE_S: Final = 5.0
"""An actor looks for Kafka every half second, and sends what it kept a thousand events at a time."""


class Idle:
    """One input; times in seconds of one clock."""

    def __init__(self, grace_s: float) -> None:
        """Idle is what has had no event for `grace_s`."""
        self._grace_s = grace_s
        self._heard_s = -math.inf
        self._answered_s: float | None = None
        self._paused_s = -math.inf

    def heard(self, now_s: float, behind_s: float = 0.0) -> None:
        """An event came that was written `behind_s` after it happened."""
        self._heard_s = now_s
        if behind_s > BEHIND_S:
            self._paused_s = now_s

    def answered(self, at_s: float) -> None:
        """Kafka's newest answer, with records or without."""
        if self._answered_s is not None and at_s - self._answered_s > AWAY_S:
            self._paused_s = at_s
        self._answered_s = at_s

    def lost(self) -> None:
        """Kafka gave an error in place of an answer: its next one is a return."""
        self._answered_s = -math.inf

    def at(self, now_s: float) -> bool:
        """Whether it is idle."""
        return (
            self._answered_s is not None
            and now_s - self._answered_s <= AWAY_S
            and now_s - self._paused_s >= PAUSE_S
            and now_s - self._heard_s >= self._grace_s
        )

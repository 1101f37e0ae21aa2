"""Log time against wall time: when an event is sent, and what must have come of all that was."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from streams.decision import JoinTimes, decide
from streams.events import Exposure, Feedback
from streams.settings import JoinSettings

SLICE_S: Final = 0.05
"""Events that are due this soon are sent at once."""


class Clock:
    """Log time at `speed` log seconds per wall second; without a speed nothing waits."""

    def __init__(self, speed: float | None, first_ms: int) -> None:
        self._speed = speed
        self._first_ms = first_ms
        self._began = time.monotonic()

    def wait_for(self, time_ms: int) -> None:
        """Return when the log has come to `time_ms`."""
        if self._speed:
            due = self._began + (time_ms - self._first_ms) / 1000 / self._speed
            left = due - time.monotonic()
            if left > SLICE_S:
                time.sleep(left)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still meanwhile."""
        since = time.monotonic()
        yield
        self._began += time.monotonic() - since


class Due:
    """How many requests the join must have closed at a watermark, by its own rule over the events sent."""

    def __init__(self, join: JoinSettings) -> None:
        self.closed = 0
        self._times = JoinTimes.of(join)
        self._open: dict[str, tuple[Exposure, list[Feedback]]] = {}

    def take(self, event: Exposure | Feedback) -> None:
        """An event, in event-time order; feedback to a request that closed before changes nothing."""
        if isinstance(event, Exposure):
            self._open[event.request] = (event, [])
        elif event.request in self._open:
            self._open[event.request][1].append(event)

    def at(self, watermark_ms: int) -> int:
        """Requests closed so far, once the join's watermark stands there."""
        for request, (exposure, feedback) in list(self._open.items()):
            decision = decide(exposure, exposure.time_ms, feedback, self._times)
            if decision.decided_ms + self._times.lateness <= watermark_ms:
                del self._open[request]
                self.closed += 1
        return self.closed

    def deadline_ms(self, time_ms: int) -> int:
        """A log time at which every request exposed until `time_ms` has closed."""
        return time_ms + self._times.cap + self._times.lateness + 1

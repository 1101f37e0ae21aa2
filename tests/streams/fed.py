"""A join fed by hand, and its decisions in the terms of the slow reference."""

from collections import Counter

from storage.kv import MemoryKv
from streams.decision import NEVER, Decision, JoinTimes
from streams.events import Exposure, Feedback
from streams.join import Join, Joined
from streams.reference import Found, Rules, Verdict
from streams.settings import JoinSettings
from tests.streams.makers import T0

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

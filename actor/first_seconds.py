"""The first seconds of a version: label-free figures of what an arm really serves, and when they call for a return.

Pure: time comes as an argument. One watch an arm (DESIGN, invariant 10; docs/guard.md).

Notable choices
- Figures are of first slots: the first of a draw without replacement is an exact draw from the policy, so the mean of
  -log p estimates its entropy without asking the policy anything.
- Versions that follow each other faster than `FEWEST` requests come are judged together; what has served so many, and
  `SPAN_S` seconds or until its successor came, has passed and is what the next is measured by.
- A return goes to the last that passed. If what was returned to proves harmful itself, the next goes further back.
- A weight that is not a number shows at the first draw, which fails; one is enough.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

SPAN_S: Final = 2.0
FEWEST: Final = 16
FELL: Final = 0.25
"""Of the surprise before; with FEWEST requests its standard error is about a tenth."""
ROSE: Final = 1.0
"""Nats a level above the surprise before."""
TOP_SHARE: Final = 0.5
GREW: Final = 3.0
"""One item's share must be above TOP_SHARE, and so many times the share before."""
PASSED: Final = 8
"""Versions that passed and are remembered."""


class Harm(NamedTuple):
    """What to say on `control`."""

    version: int
    """The one to return to."""
    upto: int
    """The newest that was found harmful."""
    why: str


@dataclass
class _Served:
    """What the versions after the last that passed have shown."""

    newest: int = 0
    began_s: float = 0.0
    requests: int = 0
    surprise: float = 0.0
    items: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> float:
        return self.surprise / self.requests

    @property
    def top_share(self) -> float:
        return max(self.items.values()) / self.requests


class FirstSeconds:
    """The watch of one arm."""

    def __init__(self) -> None:
        self._passed: deque[int] = deque(maxlen=PASSED)
        self._before: _Served | None = None
        self._now = _Served()
        self._asked: tuple[int, float] | None = None

    @property
    def passed(self) -> int:
        """The newest version that has passed; 0 for none."""
        return self._passed[-1] if self._passed else 0

    def rest(self) -> None:
        """The arm is pinned: somebody has decided, and nothing is watched until it follows again."""
        self._now, self._asked = _Served(), None

    def again(self) -> None:
        """The return that was asked for could not be said."""
        self._asked = None

    def served(self, version: int, item: str, surprise: float, now_s: float) -> Harm | None:
        """A request's first slot: its item and -log p, mean over levels. The harm that is now plain, if any."""
        if not self._watched(version, now_s):
            return None
        self._begin(version, now_s)
        now = self._now
        now.requests += 1
        now.surprise += surprise
        now.items[item] += 1
        if now.requests < FEWEST:
            return None
        fault = self._fault(now)
        if fault:
            return self._harm(fault, now_s)
        if now_s - now.began_s >= SPAN_S:
            self._pass()
        return None

    def broken(self, version: int, why: str, now_s: float) -> Harm | None:
        """A draw that could not be made."""
        if not self._watched(version, now_s):
            return None
        self._begin(version, now_s)
        return self._harm(why, now_s)

    def _watched(self, version: int, now_s: float) -> bool:
        """Not what has passed, nor what is served until a return that was asked for is heard."""
        if self._asked is not None:
            upto, asked_s = self._asked
            if version <= upto or now_s - asked_s < SPAN_S:
                return False
        return not self._passed or version > self._passed[-1]

    def _begin(self, version: int, now_s: float) -> None:
        """What was served before has passed, if it has shown enough."""
        if self._now.requests >= FEWEST and version > self._now.newest:
            self._pass()
        if not self._now.newest:
            self._now.began_s = now_s
        self._now.newest = max(self._now.newest, version)

    def _pass(self) -> None:
        self._passed.append(self._now.newest)
        self._before, self._now = self._now, _Served()

    def _harm(self, why: str, now_s: float) -> Harm | None:
        upto, self._now = self._now.newest, _Served()
        if not self._passed:
            return None
        self._asked = upto, now_s
        version = self._passed.pop() if len(self._passed) > 1 else self._passed[0]
        return Harm(version, upto, f"version {upto} in its first seconds: {why}")

    def _fault(self, now: _Served) -> str:
        before = self._before
        if before is None:
            return ""
        if not FELL * before.mean <= now.mean <= before.mean + ROSE:
            return f"{now.mean:.2g} nats a level in {now.requests} first slots, {before.mean:.2g} before"
        if now.top_share > max(TOP_SHARE, GREW * before.top_share):
            return (
                f"one item in {now.top_share:.0%} of {now.requests} first slots, {before.top_share:.0%} at most "
                "before"
            )
        return ""

"""The two inputs of a partition, kept abreast of each other. Pure.

Notable choices
- Records are taken by record timestamp, each input in its own order. No outcome depends on it (contract of the
  streams, "Time"), but how much is open at once does: feedback is many times as many records as exposures, so a
  reader that has fallen behind would take up hours of exposures before it gets to their feedback.
- Nobody waits for an input that has been read to its end.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final, Generic, Protocol, TypeVar

_TIMESTAMP: Final = attrgetter("timestamp")


class Stamped(Protocol):
    """A record of Kafka."""

    @property
    def timestamp(self) -> Any:
        """When it was written, ms."""

    @property
    def offset(self) -> Any:
        """Its place in the log."""


R = TypeVar("R", bound=Stamped)


@dataclass
class _Input(Generic[R]):
    waiting: deque[R] = field(default_factory=deque)
    reach_ms: float = float("-inf")
    """Largest timestamp read so far, infinite at the end."""
    largest_ms: float = float("-inf")

    def upto(self, reach_ms: float) -> list[R]:
        """Take what comes before the first record that is later than this."""
        if self.largest_ms <= reach_ms:
            taken = list(self.waiting)
            self.waiting.clear()
            return taken
        taken = []
        while self.waiting and self.waiting[0].timestamp <= reach_ms:
            taken.append(self.waiting.popleft())
        return taken


class Inputs(Generic[R]):
    """Records that were read and not taken yet; `exposures` is input 0, `feedback` 1."""

    def __init__(self) -> None:
        self._inputs: tuple[_Input[R], _Input[R]] = (_Input(), _Input())

    def wants(self, which: int) -> bool:
        """Whether to read more of an input: not while records of it wait for the other."""
        return not self._inputs[which].waiting

    def read(self, which: int, records: list[R], at_end: bool) -> None:
        """What came of an input, and whether there is no more for now."""
        each = self._inputs[which]
        each.waiting.extend(records)
        if records:
            each.largest_ms = max(each.largest_ms, max(map(_TIMESTAMP, records)))
        each.reach_ms = float("inf") if at_end else each.largest_ms

    def take(self) -> list[R]:
        """All records up to which the other input has been read, by timestamp."""
        exposures, feedback = self._inputs
        first, second = exposures.upto(feedback.reach_ms), feedback.upto(exposures.reach_ms)
        if not (first and second):
            return first or second
        if _ascending(first) and _ascending(second):
            return sorted(first + second, key=_TIMESTAMP)  # stable, and quick with two runs
        return list(heapq.merge(first, second, key=_TIMESTAMP))

    def position(self, which: int, read_upto: int) -> int:
        """The next offset to be taken, of an input read up to this one."""
        waiting = self._inputs[which].waiting
        return int(waiting[0].offset) if waiting else read_upto


def _ascending(records: list[R]) -> bool:
    stamps = [record.timestamp for record in records]
    return stamps == sorted(stamps)

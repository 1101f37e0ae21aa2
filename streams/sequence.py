"""Order `exposure`: closed requests wait until the older ones of their partition have closed too. Pure.

Notable choices (contract of the streams, "Join" and "Shaping")
- Older = (start, request id), which no order of arrival can change. So the shaping fold goes over the same requests
  in the same order however the inputs were shuffled within the allowed lateness, and makes the same samples.
- What became of a request is fixed when it closes. Who waits is in the changelog with its decision, not decided again
  after a restart: feedback that came meanwhile was too late and stays so.
- A request waits no longer than the oldest open one may stay open, which is `cap_s`.
"""

import heapq
from collections.abc import Iterable

from streams.decision import Decision
from streams.events import Exposure, Held
from streams.join import Joined

Key = tuple[int, str]


class Sequence:
    """Closed requests that wait; `changes` has them by exposure offset, None once they have gone on."""

    def __init__(self) -> None:
        self.changes: dict[int, Held | None] = {}
        self._waiting: list[tuple[Key, int, Joined]] = []
        self._requests: set[str] = set()
        self._offsets: list[int] = []
        self._gone: set[int] = set()
        self._leaving: list[str] = []

    def __contains__(self, request: str) -> bool:
        """Whether a request is closed, and waits or has just gone on."""
        return request in self._requests

    def __len__(self) -> int:
        return len(self._waiting)

    def hold(self, joined: Iterable[Joined]) -> None:
        """Take closed requests."""
        for one in joined:
            self.changes[one.exposure_offset] = held_of(one)
            self.restore(one)

    def restore(self, one: Joined) -> None:
        """Take one that waited before a restart."""
        key = (one.start_ms, one.exposure.request)
        heapq.heappush(self._waiting, (key, one.exposure_offset, one))
        heapq.heappush(self._offsets, one.exposure_offset)
        self._requests.add(one.exposure.request)

    def go_on(self, oldest_open: Key | None, before_ms: int) -> list[Joined]:
        """Those older than the oldest open request, and than anything that may still come: not before `before_ms`."""
        released: list[Joined] = []
        while self._waiting:
            key, offset, one = self._waiting[0]
            if key[0] >= before_ms or (oldest_open is not None and oldest_open < key):
                break
            heapq.heappop(self._waiting)
            self._leaving.append(one.exposure.request)
            self._gone.add(offset)
            if self.changes.get(offset) is None:
                self.changes[offset] = None
            else:
                del self.changes[offset]  # came and went between two commits
            released.append(one)
        return released

    def settle(self) -> None:
        """Those that went on are now known as closed by their samples."""
        self._requests.difference_update(self._leaving)
        self._leaving.clear()

    def needed(self, exposures_upto: int) -> int:
        """Smallest exposure offset among those that wait, or `exposures_upto`."""
        while self._offsets and self._offsets[0] in self._gone:
            self._gone.discard(heapq.heappop(self._offsets))
        return min(self._offsets[0], exposures_upto) if self._offsets else exposures_upto


def held_of(one: Joined) -> Held:
    """The record that keeps a closed request's decision."""
    return Held(
        offset=one.exposure_offset,
        start_ms=one.start_ms,
        decided_ms=one.decision.decided_ms,
        closed_by=one.decision.closed_by,
        watermark_ms=one.watermark_ms,
        closable_ms=one.closable_ms,
        feedback_upto=one.feedback_upto,
        positions=one.decision.positions,
    )


def joined_of(held: Held, exposure: Exposure) -> Joined:
    """The closed request that a record keeps."""
    return Joined(
        exposure=exposure,
        exposure_offset=held.offset,
        start_ms=held.start_ms,
        decision=Decision(held.decided_ms, held.closed_by, held.positions),
        watermark_ms=held.watermark_ms,
        closable_ms=held.closable_ms,
        feedback_upto=held.feedback_upto,
    )

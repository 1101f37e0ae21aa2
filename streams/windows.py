"""Windowed sums over the samples: the pure core of the insights.

Notable choices
- A sample belongs to the window in which its join's *watermark* stood when it closed: what was learned in those
  seconds, whenever it was served. The watermark only grows within a partition, so a window is complete as soon
  as every partition has passed it, and quickly decided requests are not over-represented in the latest window, as
  they are when windows go by the time of serving.
- Nothing is stored: a window is rebuilt from the log. `settle` names, per partition, the offset of the first
  sample that a window still open contains; a reader that starts there sums each open window exactly once and
  none of the closed ones. Partitions whose earlier windows another reader has closed are in the record's
  `partitions` only from there on.
- How far event time has come is the slowest partition's affair, except that a partition without samples for a
  while is not waited for: an idle one must not hold back the others for ever.
"""

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from streams.events import ACTION_BITS, Insight, Sample

_DISLIKE = ACTION_BITS["dislike"]

Key = tuple[int, str]
"""Start of the window in ms, arm."""


@dataclass
class Sums:
    """What one arm's samples of one window add up to."""

    requests: int = 0
    shown: int = 0
    seen: int = 0
    plays_ms: int = 0
    judged: int = 0
    positives: int = 0
    dislikes: int = 0
    censored: int = 0
    items: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample) -> None:
        """Count one request and its items."""
        self.requests += 1
        self.shown += len(sample.items)
        for item in sample.items:
            self.items[item.item] += 1
            self.seen += item.outcome != "unseen"
            self.censored += item.outcome == "censored"
            self.plays_ms += item.play_ms
            self.judged += item.advantage is not None
            self.positives += item.advantage == 1
            self.dislikes += bool(item.actions & _DISLIKE)


class Windows:
    """Sums per (window of event time, arm) over the samples of some partitions.

    `window_ms` is the length of a window, `grace_ms` how far event time must have passed its end before it is
    closed, `top` how many of the most shown items are named. Times in ms.

    Use: `add` samples; now and then publish `report(now)`, and when that is on the log, `settle`.
    """

    def __init__(self, window_ms: int, grace_ms: int, top: int = 10) -> None:
        self.late = 0
        """Samples that came after their window had been closed; they are in no sum."""
        self._window_ms = window_ms
        self._grace_ms = grace_ms
        self._top = top
        self._sums: dict[Key, Sums] = {}
        self._first: dict[int, dict[int, int]] = {}
        self._next: dict[int, int] = {}
        self._since_ms: dict[int, int] = {}
        self._horizon_ms: int | None = None
        self._changed: set[Key] = set()
        self._unsettled: set[Key] = set()

    def add(self, partition: int, offset: int, sample: Sample) -> bool:
        """Count a sample of that place in the log; False if it was counted before or its window is closed."""
        if offset < self._next.get(partition, 0):
            return False
        self._next[partition] = offset + 1
        start_ms = sample.watermark_ms // self._window_ms * self._window_ms
        if self._horizon_ms is not None and start_ms < self._horizon_ms:
            self.late += 1
            return False
        self._since_ms.setdefault(partition, start_ms)
        key = (start_ms, sample.arm)
        self._sums.setdefault(key, Sums()).add(sample)
        self._first.setdefault(start_ms, {}).setdefault(partition, offset)
        self._changed.add(key)
        return True

    def report(self, now_ms: int | None, with_open: bool = True) -> list[Insight]:
        """What has to be published, oldest first: windows that are closed at event time `now_ms` (None: unknown),
        and, `with_open`, those that changed. Repeated by later reports until `settle`."""
        if now_ms is not None:
            horizon_ms = (now_ms - self._grace_ms) // self._window_ms * self._window_ms
            self._horizon_ms = max(horizon_ms, self._horizon_ms or horizon_ms)
        closed = {key for key in self._sums if self._closed(key[0])}
        if with_open:
            self._unsettled |= self._changed
            self._changed.clear()
        return [self._insight(key) for key in sorted(closed | self._unsettled)]

    def settle(self) -> dict[int, int]:
        """The last report is on the log: forget what is closed; offsets by partition at which to start again."""
        self._unsettled.clear()
        for key in [key for key in self._sums if self._closed(key[0])]:
            del self._sums[key]
            self._first.pop(key[0], None)
            self._changed.discard(key)
        offsets = dict(self._next)
        for firsts in self._first.values():
            for partition, offset in firsts.items():
                offsets[partition] = min(offset, offsets[partition])
        return offsets

    def _closed(self, start_ms: int) -> bool:
        return self._horizon_ms is not None and start_ms < self._horizon_ms

    def _insight(self, key: Key) -> Insight:
        start_ms, arm = key
        sums = self._sums[key]
        whole = sorted(p for p, since_ms in self._since_ms.items() if since_ms <= start_ms)
        return Insight(
            window_start_ms=start_ms,
            window_ms=self._window_ms,
            arm=arm,
            partitions=whole,
            final=self._closed(start_ms),
            requests=sums.requests,
            shown=sums.shown,
            seen=sums.seen,
            plays_ms=sums.plays_ms,
            judged=sums.judged,
            positives=sums.positives,
            dislikes=sums.dislikes,
            censored=sums.censored,
            distinct_items=len(sums.items),
            top_items=heapq.nsmallest(
                self._top, sums.items.items(), key=lambda counted: (-counted[1], counted[0])
            ),
        )


def standing(insights: Iterable[Insight]) -> list[Insight]:
    """Of records in the order of the log those that count, oldest window first; see `Insight`."""
    by_window: dict[Key, list[Insight]] = {}
    for insight in insights:
        key = (insight.window_start_ms, insight.arm)
        others = [
            each
            for each in by_window.get(key, [])
            if set(each.partitions).isdisjoint(insight.partitions)
        ]
        by_window[key] = [*others, insight]
    return [insight for key in sorted(by_window) for insight in by_window[key]]


class EventClock:
    """How far event time has come in all of some partitions; the wall clock only tells which of them are idle.

    A partition that has shown nothing for `idle_s` seconds (nor since the beginning, `wall_s`) is not waited for.
    """

    def __init__(self, partitions: Iterable[int], idle_s: float, wall_s: float) -> None:
        self._idle_s = idle_s
        self._heard_s = dict.fromkeys(partitions, wall_s)
        self._watermark_ms: dict[int, int] = {}
        self._now_ms: int | None = None

    def observe(self, partition: int, watermark_ms: int, wall_s: float) -> None:
        """A sample of that watermark was read from the partition."""
        self._heard_s[partition] = wall_s
        self._watermark_ms[partition] = max(watermark_ms, self._watermark_ms.get(partition, 0))

    def now_ms(self, wall_s: float) -> int | None:
        """The event time that every partition has reached, never smaller than before; None: not known yet."""
        busy = [p for p, heard_s in self._heard_s.items() if wall_s - heard_s < self._idle_s]
        if busy and all(p in self._watermark_ms for p in busy):
            reached_ms = min(self._watermark_ms[p] for p in busy)
            self._now_ms = max(reached_ms, self._now_ms or reached_ms)
        return self._now_ms

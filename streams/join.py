"""The join: exposures meet their feedback, and each request is closed exactly once. A pure core.

Notable choices
- Time is event time; the watermark is the smaller of the largest event times seen on the two inputs. The core
  reads no clock: it moves by records and ticks alone (contract of the streams, "Time").
- What became of a request (streams/decision.py) is taken only once the watermark has passed its decision by
  `lateness`. So outcomes do not depend on the order of arrival, as long as every event arrives while the watermark
  is less than `lateness` ahead of it.
- A request is looked at when the watermark reaches the earliest moment at which it could be decided. Most events
  postpone that moment and cost nothing; those that may bring it forward ask for an earlier look.
- A late exposure (a slow producer, a drained spool) starts at its arrival, and its feedback is not older than
  that. "Late" means behind the watermark by more than `lateness`, so that an on-time request has the same start
  in any order of arrival (docs/decisions.md).
- Feedback waits `dedupe_horizon` for its exposure.
- More than `max_open` requests at once: the one that would be looked at first is closed as it stands, `memory`.
"""

import heapq
from collections import Counter
from collections.abc import Callable
from typing import Final

import msgspec

from storage.kv import Kv, MemoryKv
from streams.decision import FOREVER, NEVER, Decision, JoinTimes, decide_ordered
from streams.events import PLAY_KINDS, Exposure, Feedback
from streams.open_requests import OffsetFloor, OpenRequest, OpenRequests
from streams.settings import JoinSettings

HOT_REQUESTS: Final = 1000
"""Open requests of a partition held in memory; the others are on local disk."""


class Joined(msgspec.Struct, frozen=True):
    """A closed request: the exposure, its outcome, and why it could be closed."""

    exposure: Exposure
    exposure_offset: int
    start_ms: int
    decision: Decision
    watermark_ms: int
    closable_ms: int
    feedback_upto: int


class Join:
    """The open requests of one partition.

    `is_closed` answers for requests closed before the last commit; the core itself remembers those closed since
    (`closed`, taken by the shell at each commit). Offsets of each input must ascend.
    `late_changes` has the starts of exposures that came late, by offset, None once closed: replaying the inputs
    cannot tell them, so the shell commits them too. `late` has feedback that came after its request was closed, if
    the settings want it kept.
    """

    def __init__(
        self,
        settings: JoinSettings,
        is_closed: Callable[[str], bool],
        kv: Kv | None = None,
        most_hot: int = HOT_REQUESTS,
    ) -> None:
        self.times = JoinTimes.of(settings)
        self.exposures_ms = NEVER
        self.feedback_ms = NEVER
        self.feedback_upto = 0
        self.counts: Counter[str] = Counter()
        self.closed: dict[str, int] = {}
        self.late_changes: dict[int, int | None] = {}
        self.late: list[Feedback] = []
        self._is_closed = is_closed
        self._requests = OpenRequests(kv or MemoryKv(), most_hot)
        self._keep_late = settings.late == "side"
        self._most_exposed = settings.max_open
        self._exposed = 0
        self._starts: list[tuple[int, str]] | None = [] if settings.order == "exposure" else None
        self._exposure_offsets = OffsetFloor()
        self._feedback_offsets = OffsetFloor()

    @property
    def watermark_ms(self) -> int:
        """No event older than this minus the lateness is still expected."""
        return min(self.exposures_ms, self.feedback_ms)

    @property
    def open(self) -> int:
        """Requests that wait for feedback, or whose feedback waits for its exposure."""
        return len(self._requests)

    @property
    def oldest_open(self) -> tuple[int, str] | None:
        """(start, request) of the oldest open request; kept under order `exposure` only."""
        while self._starts:
            start_ms, name = self._starts[0]
            request = self._requests.get(name)
            if request is not None and request.exposure is not None:
                return start_ms, name
            heapq.heappop(self._starts)
        return None

    def needed(self, exposures_upto: int, feedback_upto: int) -> tuple[int, int]:
        """Input offsets from which the open requests can be rebuilt."""
        return self._exposure_offsets.floor(exposures_upto), self._feedback_offsets.floor(
            feedback_upto
        )

    def settle(self) -> None:
        """Between two batches: memory back to its bound."""
        self._requests.settle()

    def expose(self, exposure: Exposure, offset: int, record_ms: int) -> list[Joined]:
        """Take one exposure; returns what became closable by it.

        Raises nothing: duplicates are counted, and the caller dead-letters what `too_late` says.
        """
        earliest = self.watermark_ms - self.times.lateness
        late_ms = earliest if exposure.time_ms < earliest else None
        if self._open(exposure, offset, late_ms) and late_ms is not None:
            self.late_changes[offset] = late_ms
        if exposure.time_ms > self.exposures_ms:
            self.exposures_ms = exposure.time_ms
        return self._close(record_ms)

    def reopen(self, exposure: Exposure, offset: int, late_ms: int | None) -> None:
        """Take an exposure again after a restart, with its start if it was late; moves no watermark."""
        self._open(exposure, offset, late_ms)

    def _open(self, exposure: Exposure, offset: int, late_ms: int | None) -> bool:
        """Whether the request is open by this exposure, and was not before."""
        name = exposure.request
        request = self._requests.get(name)
        if (request is not None and request.exposure is not None) or self._known(name):
            self.counts["duplicate_exposures"] += 1
            return False
        if request is None:
            request = self._requests.new(name)
        request.exposure, request.exposure_offset = exposure, offset
        request.start_ms = exposure.time_ms if late_ms is None else late_ms
        request.late = late_ms is not None
        request.decision = None
        self._exposed += 1
        self._exposure_offsets.add(offset)
        if self._starts is not None:
            heapq.heappush(self._starts, (request.start_ms, name))
        if request.events:
            shown = {item.position for item in exposure.items}
            request.begun = {p: at for p, at in request.begun.items() if p in shown}
            self._schedule(name, request)
        else:
            wait = min(self.times.window, self.times.cap) if exposure.items else 0
            self._requests.look_at(name, request, request.start_ms + wait + self.times.lateness)
        return True

    def too_late(self, exposure: Exposure) -> bool:
        """Whether the exposure is older than what closed ids are remembered for."""
        return exposure.time_ms < self.watermark_ms - self.times.horizon

    def feed(self, feedback: Feedback, offset: int, record_ms: int) -> list[Joined]:
        """Take one feedback event; returns what became closable by it."""
        self.refeed(feedback, offset)
        if feedback.time_ms > self.feedback_ms:
            self.feedback_ms = feedback.time_ms
        return self._close(record_ms)

    def refeed(self, feedback: Feedback, offset: int) -> None:
        """Take feedback again after a restart: it moves no watermark and closes nothing."""
        self.feedback_upto = offset + 1
        name = feedback.request
        request = self._requests.get(name)
        if request is None and self._known(name):
            self.counts["late_feedback"] += 1
            if self._keep_late:
                self.late.append(feedback)
        elif request is not None and feedback.event in request.ids:
            self.counts["duplicate_feedback"] += 1
        else:
            if request is None:
                request = self._requests.new(name)
                self._requests.look_at(name, request, self._useless_from(feedback))
            if not request.events:
                request.feedback_offset = offset
                self._feedback_offsets.add(offset)
            request.add(feedback)
            self._note(feedback, request)

    def tick(self, time_ms: int, on_exposures: bool, record_ms: int) -> list[Joined]:
        """A tick on one of the inputs; returns what became closable by it."""
        if on_exposures:
            self.exposures_ms = max(self.exposures_ms, time_ms)
        else:
            self.feedback_ms = max(self.feedback_ms, time_ms)
        return self._close(record_ms)

    def _known(self, request_id: str) -> bool:
        return request_id in self.closed or self._is_closed(request_id)

    def _note(self, feedback: Feedback, request: OpenRequest) -> None:
        """Ask for an earlier look where the event can bring the closing forward; all others postpone it."""
        name, kind = feedback.request, feedback.kind
        if kind == "left":
            self._schedule(name, request)
        if kind not in PLAY_KINDS:
            return
        begun_ms = request.begun.get(feedback.position)
        first = begun_ms is None or feedback.time_ms < begun_ms
        if first:
            request.begun[feedback.position] = feedback.time_ms
        elif kind != "end":
            return
        if request.exposure is None:
            return
        all_begun = len(request.begun) >= len(request.exposure.items)
        if all_begun and begun_ms is None and kind != "end":
            # not before this play has been silent for long enough; its `end` would ask again
            at = max(feedback.time_ms, request.start_ms)
            due_ms = at + self.times.abandon + self.times.lateness
            self._requests.look_at(name, request, due_ms)
        elif all_begun or (first and begun_ms is not None):  # the latter: it began earlier
            self._schedule(name, request)

    def _schedule(self, name: str, request: OpenRequest) -> None:
        if request.exposure is not None:
            due_ms = self._decision(request).decided_ms + self.times.lateness
            self._requests.look_at(name, request, due_ms)

    def _decision(self, request: OpenRequest, cut_ms: int = FOREVER) -> Decision:
        """What becomes of it if nothing else comes."""
        assert request.exposure is not None
        if request.decision is None or cut_ms < FOREVER:
            request.decision = decide_ordered(
                request.exposure, request.start_ms, request.ordered(), self.times, cut_ms
            )
        return request.decision

    def _close(self, record_ms: int) -> list[Joined]:
        """What the watermark has made certain, and what there is no room for, in the order of their decisions."""
        watermark = self.exposures_ms if self.exposures_ms < self.feedback_ms else self.feedback_ms
        joined: list[Joined] = []
        if self._requests.next_ms > watermark and self._exposed <= self._most_exposed:
            return joined  # as after most events
        while (found := self._requests.due(watermark)) is not None:
            name, request = found
            if request.exposure is None:
                self._wait_for_exposure(name, request, watermark)
                continue
            decision = self._decision(request)
            due_ms = decision.decided_ms + self.times.lateness
            if (
                due_ms > request.looked_ms
            ):  # also if due by now: requests close in the order of decisions
                self._requests.look_at(name, request, due_ms)
                continue
            joined.append(self._closed(name, request, decision, record_ms))
        while self._exposed > self._most_exposed:
            joined.append(self._force(record_ms))
        return joined

    def _wait_for_exposure(self, name: str, request: OpenRequest, watermark_ms: int) -> None:
        """Feedback without an exposure waits on, or is of no use any more."""
        useless_from = max(self._useless_from(event) for event in request.events)
        if useless_from > watermark_ms:
            self._requests.look_at(name, request, useless_from)
        else:
            self._forget(name, request)
            self.counts["orphans"] += len(request.events)

    def _force(self, record_ms: int) -> Joined:
        """Close the request that would be looked at first, as it stands at this watermark."""
        passed: list[tuple[str, OpenRequest]] = []
        while True:
            found = self._requests.due(FOREVER - 1)
            assert found is not None  # more than one has an exposure
            name, request = found
            if request.exposure is not None:
                break
            passed.append(found)
        for waiting, early in passed:
            self._requests.look_at(waiting, early, early.looked_ms)
        decision = self._decision(request, max(self.watermark_ms, request.start_ms))
        return self._closed(name, request, decision, record_ms)

    def _closed(
        self, name: str, request: OpenRequest, decision: Decision, record_ms: int
    ) -> Joined:
        exposure = request.exposure
        assert exposure is not None
        self._forget(name, request)
        self.closed[name] = exposure.time_ms
        self.counts[f"closed_by_{decision.closed_by}"] += 1
        return Joined(
            exposure,
            request.exposure_offset,
            request.start_ms,
            decision,
            self.watermark_ms,
            record_ms,
            self.feedback_upto,
        )

    def _useless_from(self, feedback: Feedback) -> int:
        """The watermark from which on no exposure could come that this feedback would count for."""
        return feedback.time_ms + self.times.horizon + self.times.lateness

    def _forget(self, name: str, request: OpenRequest) -> None:
        self._requests.remove(name)
        if request.events:
            self._feedback_offsets.remove(request.feedback_offset)
        if request.exposure is None:
            return
        offset = request.exposure_offset
        self._exposed -= 1
        self._exposure_offsets.remove(offset)
        if request.late:
            if self.late_changes.get(offset) is None:
                self.late_changes[offset] = None
            else:
                del self.late_changes[offset]  # opened and closed between two commits

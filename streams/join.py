"""The join: exposures meet their feedback, and each request is closed exactly once. A pure core.

Notable choices
- Time is event time; the watermark is the smaller of the largest event times seen on the two inputs. The core
  reads no clock: it moves by records and ticks alone (contract of the streams, "Time").
- What became of a request is a function of its events *in event-time order*, cut at the moment it is decided,
  and it is taken only once the watermark has passed that moment by `lateness`. So outcomes do not depend on the
  order of arrival, as long as every event arrives while the watermark is less than `lateness` ahead of it.
- A decided position is final: an `end`, `left`, or `abandon` after the last play event. Later plays of it change
  nothing; actions count until the whole request is decided.
- A late exposure (a slow producer, a drained spool) starts at its arrival, and its feedback is not older than
  that. "Late" means behind the watermark by more than `lateness`, so that an on-time request has the same start
  in any order of arrival (docs/decisions.md).
- Feedback waits `dedupe_horizon` for its exposure. What is older than the exposure's start by more counts for
  nothing, whether it is still waiting or not: a restart must not decide that.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from streams.events import ACTION_BITS, PLAY_KINDS, Exposure, Feedback, Outcome
from streams.settings import JoinSettings

_RANK = {"begin": 0, "heartbeat": 1, "end": 2, "left": 4}  # within one millisecond; actions are 3
NEVER = -(1 << 62)


@dataclass(frozen=True)
class JoinTimes:
    """`JoinSettings` in the integer milliseconds that the core counts in."""

    window: int
    cap: int
    abandon: int
    lateness: int
    horizon: int

    @classmethod
    def of(cls, settings: JoinSettings) -> "JoinTimes":
        """Seconds to milliseconds; an id is remembered at least as long as its request may be open."""
        cap, lateness = round(settings.cap_s * 1000), round(settings.lateness_s * 1000)
        return cls(
            window=round(settings.window_s * 1000),
            cap=cap,
            abandon=round(settings.abandon_s * 1000),
            lateness=lateness,
            horizon=max(round(settings.dedupe_horizon_s * 1000), cap + lateness),
        )


@dataclass(frozen=True)
class PositionOutcome:
    """What became of one slot; `last_ms` is the event time of its last play event."""

    outcome: Outcome
    play_ms: int
    last_ms: int
    actions: int


@dataclass(frozen=True)
class Decision:
    """What became of a request, decided at `decided_ms`; outcomes by position of the exposure."""

    decided_ms: int
    closed_by: Literal["decided", "deadline", "memory"]
    positions: dict[int, PositionOutcome]


@dataclass(frozen=True)
class Joined:
    """A closed request: the exposure, its outcome, and why it could be closed."""

    exposure: Exposure
    exposure_offset: int
    start_ms: int
    decision: Decision
    watermark_ms: int
    closable_ms: int
    feedback_upto: int


@dataclass
class _Play:
    last_ms: int
    play_ms: int
    ended: bool = False


@dataclass
class _Request:
    exposure: Exposure | None = None
    exposure_offset: int = -1
    start_ms: int = NEVER
    check_ms: int = 1 << 62
    events: list[Feedback] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    begun: dict[int, int] = field(default_factory=dict)
    """Earliest play event by position."""


def decide(exposure: Exposure, start_ms: int, events: list[Feedback], times: JoinTimes) -> Decision:
    """What `events` make of the request if nothing else comes; `events` in any order, without duplicates.

    What happened before `start_ms` counts as happening then, in its own order.
    """
    shown = {item.position for item in exposure.items}
    end = start_ms + min(times.window, times.cap)
    plays: dict[int, _Play] = {}
    actions: dict[int, int] = {}
    left_ms: int | None = None
    decided: int | None = None if shown else start_ms
    for event in sorted(
        events, key=lambda e: (e.time_ms, _RANK.get(e.kind, 3), e.withdrawn, e.event)
    ):
        at = max(event.time_ms, start_ms)
        if at > end or (decided is not None and at > decided):
            break
        kind, position = event.kind, event.position
        if event.time_ms <= start_ms - times.horizon:
            continue
        if kind == "left":
            left_ms = decided = at
            break
        if position not in shown:
            continue
        if kind in PLAY_KINDS:
            play = plays.get(position)
            if play is None:
                play = plays[position] = _Play(at, 0)
                end = min(max(end, at + times.window), start_ms + times.cap)
            elif play.ended or at > play.last_ms + times.abandon:
                continue
            play.last_ms = at
            play.play_ms = max(play.play_ms, event.play_ms)
            play.ended = kind == "end"
            if len(plays) == len(shown):
                decided = max(
                    p.last_ms if p.ended else p.last_ms + times.abandon for p in plays.values()
                )
        else:
            bit = ACTION_BITS[kind]
            mask = actions.get(position, 0)
            actions[position] = mask & ~bit if event.withdrawn else mask | bit
    by_deadline = decided is None or decided > end
    decided_ms = end if decided is None or by_deadline else decided

    def outcome(position: int) -> PositionOutcome:
        play = plays.get(position)
        if play is None:
            return PositionOutcome("unseen", 0, NEVER, actions.get(position, 0))
        name: Outcome = "censored"
        if play.ended:
            name = "ended"
        elif play.last_ms + times.abandon <= decided_ms:
            name = "abandoned"
        elif left_ms is not None:
            name = "left"
        return PositionOutcome(name, play.play_ms, play.last_ms, actions.get(position, 0))

    return Decision(
        decided_ms, "deadline" if by_deadline else "decided", {p: outcome(p) for p in sorted(shown)}
    )


class Join:
    """The open requests of one partition.

    `is_closed` answers for requests closed before the last commit; the core itself remembers those closed since
    (`closed`, taken by the shell at each commit). Offsets of each input must ascend.
    `late_changes` has the starts of exposures that came late, by offset, None once closed: replaying the inputs
    cannot tell them, so the shell commits them too.
    """

    def __init__(self, settings: JoinSettings, is_closed: Callable[[str], bool]) -> None:
        self.times = JoinTimes.of(settings)
        self.exposures_ms = NEVER
        self.feedback_ms = NEVER
        self.feedback_upto = 0
        self.counts: Counter[str] = Counter()
        self.closed: dict[str, int] = {}
        self.late_changes: dict[int, int | None] = {}
        self._is_closed = is_closed
        self._open: dict[str, _Request] = {}
        self._late: set[int] = set()
        self._checks: list[tuple[int, str]] = []
        self._starts: list[tuple[int, str]] | None = [] if settings.order == "exposure" else None
        self._exposure_offsets: OrderedDict[str, int] = OrderedDict()
        self._feedback_offsets: OrderedDict[str, int] = OrderedDict()

    @property
    def watermark_ms(self) -> int:
        """No event older than this minus the lateness is still expected."""
        return min(self.exposures_ms, self.feedback_ms)

    @property
    def open(self) -> int:
        """Requests that wait for feedback, or whose feedback waits for its exposure."""
        return len(self._open)

    @property
    def oldest_open(self) -> tuple[int, str] | None:
        """(start, request) of the oldest open request; kept under order `exposure` only."""
        while self._starts:
            start_ms, request_id = self._starts[0]
            request = self._open.get(request_id)
            if request is not None and request.exposure is not None:
                return start_ms, request_id
            heapq.heappop(self._starts)
        return None

    def needed(self, exposures_upto: int, feedback_upto: int) -> tuple[int, int]:
        """Smallest input offsets from which the open requests can be rebuilt."""
        first_exposure = next(iter(self._exposure_offsets.values()), exposures_upto)
        first_feedback = next(iter(self._feedback_offsets.values()), feedback_upto)
        return first_exposure, first_feedback

    def expose(self, exposure: Exposure, offset: int, record_ms: int) -> list[Joined]:
        """Take one exposure; returns what became closable by it.

        Raises nothing: duplicates are counted, and the caller dead-letters what `too_late` says.
        """
        earliest = self.watermark_ms - self.times.lateness
        self._open_at(exposure, offset, max(exposure.time_ms, earliest))
        if exposure.time_ms < earliest and self._exposure_offsets.get(exposure.request) == offset:
            self._late.add(offset)
            self.late_changes[offset] = earliest
        self.exposures_ms = max(self.exposures_ms, exposure.time_ms)
        return self._close(record_ms)

    def reopen(self, exposure: Exposure, offset: int, late_ms: int | None) -> None:
        """Take an exposure again after a restart, with its start if it was late; moves no watermark."""
        self._open_at(exposure, offset, exposure.time_ms if late_ms is None else late_ms)
        if late_ms is not None:
            self._late.add(offset)

    def _open_at(self, exposure: Exposure, offset: int, start_ms: int) -> None:
        request = self._open.get(exposure.request)
        if (request is not None and request.exposure is not None) or self._known(exposure.request):
            self.counts["duplicate_exposures"] += 1
            return
        if request is None:
            request = self._open[exposure.request] = _Request()
        request.exposure, request.exposure_offset = exposure, offset
        request.start_ms = start_ms
        self._exposure_offsets[exposure.request] = offset
        if self._starts is not None:
            heapq.heappush(self._starts, (start_ms, exposure.request))
        shown = {item.position for item in exposure.items}
        request.begun = {p: at for p, at in request.begun.items() if p in shown}
        self._schedule(exposure.request, request)

    def too_late(self, exposure: Exposure) -> bool:
        """Whether the exposure is older than what closed ids are remembered for."""
        return exposure.time_ms < self.watermark_ms - self.times.horizon

    def feed(self, feedback: Feedback, offset: int, record_ms: int) -> list[Joined]:
        """Take one feedback event; returns what became closable by it."""
        self.feedback_upto = offset + 1
        request = self._open.get(feedback.request)
        if request is None and self._known(feedback.request):
            self.counts["late_feedback"] += 1
        elif request is not None and feedback.event in request.ids:
            self.counts["duplicate_feedback"] += 1
        else:
            if request is None:
                request = self._open[feedback.request] = _Request()
                self._push(feedback.request, request, self._useless_from(feedback))
            if not request.events:
                self._feedback_offsets[feedback.request] = offset
            request.events.append(feedback)
            request.ids.add(feedback.event)
            self._note(feedback, request)
        self.feedback_ms = max(self.feedback_ms, feedback.time_ms)
        return self._close(record_ms)

    def tick(self, time_ms: int, on_exposures: bool, record_ms: int) -> list[Joined]:
        """A tick on one of the inputs; returns what became closable by it."""
        if on_exposures:
            self.exposures_ms = max(self.exposures_ms, time_ms)
        else:
            self.feedback_ms = max(self.feedback_ms, time_ms)
        return self._close(record_ms)

    def _known(self, request_id: str) -> bool:
        return request_id in self.closed or self._is_closed(request_id)

    def _note(self, feedback: Feedback, request: _Request) -> None:
        """Look again only where the event can bring the closing forward; all others postpone it."""
        brings_forward = feedback.kind == "left"
        if feedback.kind in PLAY_KINDS:
            begun_ms = request.begun.get(feedback.position)
            first = begun_ms is None or feedback.time_ms < begun_ms
            if first:
                request.begun[feedback.position] = feedback.time_ms
            exposure = request.exposure
            all_begun = exposure is not None and len(request.begun) >= len(exposure.items)
            brings_forward = all_begun and (first or feedback.kind == "end")
            brings_forward |= first and begun_ms is not None  # out of order: the play began earlier
        if brings_forward and request.exposure is not None:
            self._schedule(feedback.request, request)

    def _schedule(self, request_id: str, request: _Request) -> None:
        assert request.exposure is not None
        decision = decide(request.exposure, request.start_ms, request.events, self.times)
        self._push(request_id, request, decision.decided_ms + self.times.lateness)

    def _push(self, request_id: str, request: _Request, check_ms: int) -> None:
        if check_ms < request.check_ms:
            request.check_ms = check_ms
            heapq.heappush(self._checks, (check_ms, request_id))

    def _close(self, record_ms: int) -> list[Joined]:
        watermark = self.watermark_ms
        joined: list[Joined] = []
        while self._checks and self._checks[0][0] <= watermark:
            check_ms, request_id = heapq.heappop(self._checks)
            request = self._open.get(request_id)
            if request is None or request.check_ms != check_ms:
                continue
            request.check_ms = 1 << 62
            if request.exposure is None:
                useless_from = max(self._useless_from(event) for event in request.events)
                if useless_from > watermark:
                    self._push(request_id, request, useless_from)
                else:
                    self._forget(request_id)
                    self.counts["orphans"] += len(request.events)
                continue
            decision = decide(request.exposure, request.start_ms, request.events, self.times)
            due_ms = decision.decided_ms + self.times.lateness
            if (
                due_ms > check_ms
            ):  # also if due by now: requests close in the order of their decisions
                self._push(request_id, request, due_ms)
                continue
            self._forget(request_id)
            self.closed[request_id] = request.exposure.time_ms
            self.counts[f"closed_by_{decision.closed_by}"] += 1
            joined.append(
                Joined(
                    exposure=request.exposure,
                    exposure_offset=request.exposure_offset,
                    start_ms=request.start_ms,
                    decision=decision,
                    watermark_ms=watermark,
                    closable_ms=record_ms,
                    feedback_upto=self.feedback_upto,
                )
            )
        return joined

    def _useless_from(self, feedback: Feedback) -> int:
        """The watermark from which on no exposure could come that this feedback would count for."""
        return feedback.time_ms + self.times.horizon + self.times.lateness

    def _forget(self, request_id: str) -> None:
        offset = self._open.pop(request_id).exposure_offset
        if offset in self._late:
            self._late.discard(offset)
            if self.late_changes.get(offset) is None:
                self.late_changes[offset] = None
            else:
                del self.late_changes[offset]  # opened and closed between two commits
        self._exposure_offsets.pop(request_id, None)
        self._feedback_offsets.pop(request_id, None)

"""What its events make of one request: the outcome of every position, and when that is certain. Pure.

Notable choices (contract of the streams, "Join")
- A function of the events *in event-time order*, cut at the moment the request is decided: the order of arrival
  does not enter.
- A decided position is final: an `end`, `left`, or `abandon` after the last play event. Later plays of it change
  nothing; actions count until the whole request is decided.
- What is older than the exposure's start by the dedupe horizon counts for nothing, whether it is still kept or not:
  a restart must not decide that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from streams.events import (
    ACTION_BITS,
    PLAY_KINDS,
    Exposure,
    Feedback,
    Outcome,
    PositionOutcome,
)
from streams.settings import JoinSettings

NEVER: Final = -(1 << 62)
FOREVER: Final = 1 << 62
_RANK = {"begin": 0, "heartbeat": 1, "end": 2, "left": 4}  # within one millisecond; actions are 3


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


class Decision(msgspec.Struct, frozen=True):
    """What became of a request, decided at `decided_ms`; outcomes by position of the exposure."""

    decided_ms: int
    closed_by: Literal["decided", "deadline", "memory"]
    positions: dict[int, PositionOutcome]


class _Play:
    __slots__ = ("ended", "last_ms", "play_ms")

    def __init__(self, last_ms: int) -> None:
        self.last_ms = last_ms
        self.play_ms = 0
        self.ended = False


def event_order(event: Feedback) -> tuple[int, int, bool, str]:
    """By event time; within a millisecond plays, actions, withdrawals, leaving."""
    return event.time_ms, _RANK.get(event.kind, 3), event.withdrawn, event.event


def decide(
    exposure: Exposure,
    start_ms: int,
    events: Iterable[Feedback],
    times: JoinTimes,
    cut_ms: int = FOREVER,
) -> Decision:
    """What `events` make of the request if nothing else comes; `events` in any order, without duplicates.

    What happened before `start_ms` counts as happening then, in its own order. With `cut_ms` the request is closed
    there as it stands, by force: `memory`.
    """
    return decide_ordered(exposure, start_ms, sorted(events, key=event_order), times, cut_ms)


def decide_ordered(
    exposure: Exposure,
    start_ms: int,
    events: Sequence[Feedback],
    times: JoinTimes,
    cut_ms: int = FOREVER,
) -> Decision:
    """`decide` for events that are in `event_order`."""
    shown = {item.position for item in exposure.items}
    window, abandon = times.window, times.abandon
    end = start_ms + min(window, times.cap)
    oldest = start_ms - times.horizon
    plays: dict[int, _Play] = {}
    actions: dict[int, int] = {}
    left = False
    decided = FOREVER if shown else start_ms
    for event in events:
        time_ms = event.time_ms
        at = time_ms if time_ms > start_ms else start_ms
        if at > end or at > decided or at > cut_ms:
            break
        kind, position = event.kind, event.position
        if time_ms <= oldest:
            continue
        if kind == "left":
            left, decided = True, at
            break
        if position not in shown:
            continue
        if kind in PLAY_KINDS:
            play = plays.get(position)
            if play is None:
                play = plays[position] = _Play(at)
                end = min(max(end, at + window), start_ms + times.cap)
            elif play.ended or at > play.last_ms + abandon:
                continue
            play.last_ms = at
            if event.play_ms > play.play_ms:
                play.play_ms = event.play_ms
            play.ended = kind == "end"
            if len(plays) == len(shown):
                decided = start_ms
                for play in plays.values():
                    silent = play.last_ms if play.ended else play.last_ms + abandon
                    if silent > decided:
                        decided = silent
        else:
            bit = ACTION_BITS[kind]
            mask = actions.get(position, 0)
            actions[position] = mask & ~bit if event.withdrawn else mask | bit
    decided_ms = min(decided, end, cut_ms)
    closed_by: Literal["decided", "deadline", "memory"] = "decided"
    if cut_ms < FOREVER:
        closed_by = "memory"
    elif decided_ms < decided:
        closed_by = "deadline"
    outcomes: dict[int, PositionOutcome] = {}
    for position in sorted(shown):
        play = plays.get(position)
        mask = actions.get(position, 0)
        if play is None:
            outcomes[position] = PositionOutcome("unseen", 0, NEVER, mask)
            continue
        outcome: Outcome = "censored"
        if play.ended:
            outcome = "ended"
        elif play.last_ms + abandon <= decided_ms:
            outcome = "abandoned"
        elif left:
            outcome = "left"
        outcomes[position] = PositionOutcome(outcome, play.play_ms, play.last_ms, mask)
    return Decision(decided_ms, closed_by, outcomes)

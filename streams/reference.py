"""What became of a request, written from the contract's words alone: slow and obvious, moment by moment.

It shares nothing with `streams.join` but the records: the join's tests and the audit hold the one against the other.
Times are integer milliseconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from streams.events import Exposure, Feedback

PLAYS = ("begin", "heartbeat", "end")
BITS = {"like": 1, "follow": 2, "comment": 4, "forward": 8, "dislike": 16}


@dataclass(frozen=True)
class Rules:
    """The contract's times: window, cap, h (a silent play is abandoned), and the dedupe horizon."""

    window: int
    cap: int
    abandon: int
    horizon: int


@dataclass
class Slot:
    """One position as it stands."""

    plays: list[tuple[int, int]] = field(default_factory=list)
    """(moment, play time so far) of its play events."""
    final: str = ""
    """How it was decided: ended, abandoned or left."""
    held: set[str] = field(default_factory=set)
    """Actions that hold."""


@dataclass(frozen=True)
class Found:
    """What became of one position; `last_ms` is the moment of its last play event, None of one that never began."""

    outcome: str
    play_ms: int
    actions: int
    last_ms: int | None


@dataclass(frozen=True)
class Verdict:
    """What became of a request, and when that was certain."""

    decided_ms: int
    closed_by: str
    positions: dict[int, Found]


def verdict(
    exposure: Exposure,
    start_ms: int,
    feedback: Iterable[Feedback],
    rules: Rules,
    until: int | None = None,
) -> Verdict:
    """Lives through the request's time, from one moment at which anything could change to the next.

    With `until` it is broken off there, by force, whatever is certain by then.
    """
    slots = {item.position: Slot() for item in exposure.items}
    events = without_repeats(feedback)
    starts: list[int] = []

    def ended(at: int, why: str) -> Verdict:
        by = why if until is None else "memory"
        return Verdict(at, by, {position: found(slot) for position, slot in slots.items()})

    for now in moments(events, start_ms, rules, until):
        # 1. What happened before the start is taken as happening at the start; after leaving, nothing.
        left = False
        for event in in_order(e for e in events if moment(e, start_ms, rules) == now):
            left = event.kind == "left"
            if left:
                break
            slot = slots.get(event.position)
            if slot is None:
                continue
            if event.kind not in PLAYS:
                act(slot, event)
            elif not slot.final:
                if not slot.plays:
                    starts.append(now)
                slot.plays.append((now, event.play_ms))
                if event.kind == "end":
                    slot.final = "ended"
        # 2. A play that has been silent for h is over; leaving ends the others where they are.
        for slot in slots.values():
            if slot.plays and not slot.final and now >= slot.plays[-1][0] + rules.abandon:
                slot.final = "abandoned"
            elif left:
                slot.final = slot.final or "left"
        # 3. Is every position decided, or the deadline reached?
        if all(slot.final for slot in slots.values()):
            return ended(now, "decided")
        latest = max(starts, default=start_ms)
        if now >= min(latest + rules.window, start_ms + rules.cap):
            return ended(now, "deadline")
        if now == until:
            return ended(now, "memory")
    raise AssertionError("the cap is one of the moments")


def moments(
    events: Iterable[Feedback], start_ms: int, rules: Rules, until: int | None
) -> list[int]:
    """All times at which an event, a silence, a window, the cap or the end could decide something, in order."""
    beginnings = {start_ms}
    beginnings.update(at for e in events if (at := moment(e, start_ms, rules)) is not None)
    found = set(beginnings)
    found.update(at + wait for at in beginnings for wait in (rules.abandon, rules.window))
    found.add(start_ms + rules.cap)
    if until is not None:
        found.add(until)
    return sorted(found)


def without_repeats(feedback: Iterable[Feedback]) -> list[Feedback]:
    """The first of each event id."""
    first: dict[str, Feedback] = {}
    for event in feedback:
        first.setdefault(event.event, event)
    return list(first.values())


def moment(event: Feedback, start_ms: int, rules: Rules) -> int | None:
    """When an event counts: at its time, not before the start; never if it is too old for this exposure."""
    if event.time_ms <= start_ms - rules.horizon:
        return None
    return max(event.time_ms, start_ms)


def in_order(events: Iterable[Feedback]) -> list[Feedback]:
    """By time; at one time plays, then actions, then withdrawals, then leaving."""

    def rank(event: Feedback) -> int:
        if event.kind in PLAYS:
            return PLAYS.index(event.kind)
        return 5 if event.kind == "left" else 3 + event.withdrawn

    return sorted(events, key=lambda event: (event.time_ms, rank(event), event.event))


def act(slot: Slot, event: Feedback) -> None:
    """An action holds until it is withdrawn."""
    if event.withdrawn:
        slot.held.discard(event.kind)
    else:
        slot.held.add(event.kind)


def found(slot: Slot) -> Found:
    """A position's outcome when the request is over."""
    actions = sum(BITS[kind] for kind in slot.held)
    if not slot.plays:
        return Found("unseen", 0, actions, None)
    longest = max(play_ms for _, play_ms in slot.plays)
    return Found(slot.final or "censored", longest, actions, slot.plays[-1][0])

"""How a viewer goes through a slate, and what the network makes of the events on their way.

Notable choices (numbers and reasons: docs/simulator.md)
- Durations and play times are world time; only the *waiting* between events is divided by `pace`,
  so that six plays do not outlast a demonstration.
- A viewer's behaviour around the plays is keyed (person, visit) as the plays are: twins pause
  alike.
- The delays of `deliver` are real seconds at every pace: a network does not know about the
  simulation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from ops.world import Play, World
from streams.events import FeedbackKind

HEARTBEAT_MS: Final = 5000
VANISH_SHARE: Final = 0.01
UNDO_SHARE: Final = 0.02
"""Likes taken back in the pause after the play."""
AFTER_SHARE: Final = 0.2
"""Actions that come in the pause after the play instead of during it."""
LATE_SHARE: Final = 0.05
LATE_S: Final = 0.3
TWICE_SHARE: Final = 0.005

_PAUSE, _LEAVE, _MOMENT, _AFTER, _UNDO = range(5)


class Event(NamedTuple):
    """One thing a viewer's app reports; a copy of it has the same `number`."""

    at_s: float
    """Real seconds after the slate arrived."""
    number: int
    kind: FeedbackKind
    position: int
    """-1 for `left`, which is about the whole slate."""
    item: str
    play_ms: int
    """Play time so far (`begin` 0, `heartbeat`, `end`, actions)."""
    withdrawn: bool


@dataclass(frozen=True, slots=True)
class Viewing:
    """What the app reports in the course of time, and the truth that it does not report."""

    events: list[Event]
    """In the order of time."""
    satisfaction: list[float]
    """True satisfaction of every slot, seen or not."""
    dwell_ms: list[int]
    """What was watched of every slot; 0 = not seen."""
    dislikes: int
    vanished: bool
    """The app went away without `left`."""

    @property
    def lasts_s(self) -> float:
        """Real seconds from the slate's arrival to the last event."""
        return self.events[-1].at_s if self.events else 0.0


def hazard(play: Play) -> float:
    """The chance to leave the slate after this play: between .02 (delighted) and .12 (bored)."""
    return 0.02 + 0.10 * (1 - play.satisfaction)


def watch(world: World, person: int, visit: int, slate: Sequence[str], pace: float) -> Viewing:
    """One viewing of a slate of item ids at `pace` world seconds a real second (> 0).

    Raises KeyError for an item that is not of this world.
    """
    plays = world.plays(person, visit, slate) if slate else []
    u = world.uniforms(person, visit, len(slate) + 2, 5)
    draws = u.tolist()
    pauses_ms = (300 + 1200 * u[:, _PAUSE]).tolist()
    events: list[tuple[float, FeedbackKind, int, int, bool]] = []
    begins_ms: list[float] = []
    now_ms = 0.0
    for position, play in enumerate(plays):
        now_ms += pauses_ms[position]
        begins_ms.append(now_ms)
        events.append((now_ms, "begin", position, 0, False))
        events.extend(
            (now_ms + played, "heartbeat", position, played, False)
            for played in range(HEARTBEAT_MS, play.dwell_ms, HEARTBEAT_MS)
        )
        end_ms = now_ms + play.dwell_ms
        pause_ms = pauses_ms[position + 1]
        if play.like or play.follow or play.comment or play.forward:
            events.extend(_actions(play, position, now_ms, pause_ms, draws[position]))
        if play.dislike:
            events.append((end_ms, "dislike", position, play.dwell_ms, False))
        events.append((end_ms, "end", position, play.dwell_ms, False))
        now_ms = end_ms
        if draws[position][_LEAVE] < hazard(play):
            break
    seen = len(begins_ms)
    events.append((now_ms + pauses_ms[seen], "left", -1, 0, False))
    # Stable: of two events at one moment the one that was put down first comes first.
    events.sort(key=lambda event: event[0])
    dwell_ms = [play.dwell_ms for play in plays[:seen]] + [0] * (len(plays) - seen)
    dislikes = sum(play.dislike for play in plays[:seen])
    vanished = draws[-1][0] < VANISH_SHARE
    if vanished:
        cut_ms = events[-1][0] * draws[-1][1]
        events = [event for event in events if event[0] < cut_ms]
        dwell_ms[:seen] = [
            min(dwell, max(0, int(cut_ms - begin)))
            for dwell, begin in zip(dwell_ms, begins_ms, strict=False)
        ]
        dislikes = sum(event[1] == "dislike" for event in events)
    return Viewing(
        events=[
            Event(
                at / 1000 / pace,
                number,
                kind,
                position,
                slate[position] if position >= 0 else "",
                play_ms,
                withdrawn,
            )
            for number, (at, kind, position, play_ms, withdrawn) in enumerate(events)
        ],
        satisfaction=[play.satisfaction for play in plays],
        dwell_ms=dwell_ms,
        dislikes=dislikes,
        vanished=vanished,
    )


def _actions(
    play: Play, position: int, begin_ms: float, pause_ms: float, draws: list[float]
) -> list[tuple[float, FeedbackKind, int, int, bool]]:
    """Like, follow, comment and forward of one play, at one moment before the viewer goes on."""
    played = int(play.dwell_ms * (0.3 + 0.65 * draws[_MOMENT]))
    at_ms = begin_ms + played
    if draws[_AFTER] < AFTER_SHARE:
        played, at_ms = play.dwell_ms, begin_ms + play.dwell_ms + 0.4 * pause_ms
    kinds: list[tuple[FeedbackKind, bool]] = [
        ("like", play.like),
        ("follow", play.follow),
        ("comment", play.comment),
        ("forward", play.forward),
    ]
    done = [(at_ms, kind, position, played, False) for kind, holds in kinds if holds]
    if play.like and draws[_UNDO] < UNDO_SHARE:
        undone_ms = begin_ms + play.dwell_ms + 0.8 * pause_ms
        done.append((undone_ms, "like", position, play.dwell_ms, True))
    return done


def deliver(events: Sequence[Event], rng: np.random.Generator) -> list[Event]:
    """The events as they arrive: 5 % up to .3 s late, .5 % a second time up to .3 s after.

    A copy keeps its `number`. The result is in the order of arrival, `at_s` is the time of arrival.
    """
    arrived: list[Event] = []
    for event, (late, delay, twice, again) in zip(
        events, rng.random((len(events), 4)).tolist(), strict=True
    ):
        if late < LATE_SHARE:
            event = event._replace(at_s=event.at_s + LATE_S * delay)
        arrived.append(event)
        if twice < TWICE_SHARE:
            arrived.append(event._replace(at_s=event.at_s + LATE_S * again))
    arrived.sort(key=lambda event: event.at_s)
    return arrived

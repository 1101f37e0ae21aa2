"""The known truth of `dwell bench kills`: what viewers do, when each event is written, and how often. Pure.

Everything about a request follows from the seed and its number, so a producer that was killed says the same again:
its repeats are the duplicates of a real client's retries. On top of them come records that are sent twice, out of
order, late, and whole seconds of events that are held back and then drained at once, as from a spool.
"""

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from streams.events import Exposure, Feedback, FeedbackKind, ShownItem
from streams.settings import JoinSettings
from streams.topics import EXPOSURES, FEEDBACK

JOIN: Final = JoinSettings(
    window_s=2.0, cap_s=6.0, abandon_s=1.0, lateness_s=1.0, dedupe_horizon_s=3600.0
)
USERS: Final = 400
SPOOL_MS: Final = 2_000
"""How long the events of a second are held back after its end."""
LONGEST_MS: Final = 8_000
"""No event is written later than this after its request."""


@dataclass(frozen=True, order=True)
class Write:
    """One record and when it is written."""

    at_ms: int
    order: tuple[int, int]
    topic: str
    event: Exposure | Feedback


@dataclass(frozen=True)
class Plan:
    """Requests at a steady rate from `t0_ms` on."""

    seed: int
    t0_ms: int
    rate: float
    """Requests a second."""

    def time_of(self, number: int) -> int:
        """When a request is shown."""
        return self.t0_ms + int(number * 1000 / self.rate)

    def first_at(self, time_ms: int) -> int:
        """The first request shown at this time or later."""
        number = max(0, int((time_ms - self.t0_ms) * self.rate / 1000) - 1)
        while self.time_of(number) < time_ms:
            number += 1
        return number

    def writes(self, from_ms: int) -> Iterator[Write]:
        """All records written at `from_ms` or later, in order, without end."""
        waiting: list[Write] = []
        number = self.first_at(from_ms - LONGEST_MS)
        while True:
            shown_ms = self.time_of(number)
            while waiting and waiting[0].at_ms < shown_ms:
                write = heapq.heappop(waiting)
                if write.at_ms >= from_ms:
                    yield write
            for write in self.request(number):
                heapq.heappush(waiting, write)
            number += 1

    def request(self, number: int) -> list[Write]:
        """One request's records."""
        rng = random.Random(f"{self.seed}/{number}")
        shown_ms = self.time_of(number)
        request, user = f"{self.seed}-{number}", f"viewer-{rng.randrange(USERS)}"
        items = rng.randint(1, 3)
        events: list[tuple[str, Exposure | Feedback]] = [
            (EXPOSURES, _exposure(request, user, shown_ms, items, rng))
        ]
        events += [(FEEDBACK, event) for event in _feedback(request, user, shown_ms, items, rng)]
        held = (shown_ms // 1000) % 20 == 7  # every twentieth second goes through a spool
        drained_ms = (shown_ms // 1000) * 1000 + 1000 + SPOOL_MS
        writes: list[Write] = []
        for topic, event in events:
            delay = rng.choices([rng.randrange(200), rng.randrange(2000)], [0.95, 0.05])[0]
            at_ms = max(event.time_ms + delay, drained_ms if held else 0)
            for _ in range(1 + (rng.random() < 0.1)):
                writes.append(Write(at_ms, (number, len(writes)), topic, event))
                at_ms += rng.randrange(500)
        return writes


def _exposure(request: str, user: str, time_ms: int, items: int, rng: random.Random) -> Exposure:
    return Exposure(
        request=request,
        user=user,
        time_ms=time_ms,
        arm=rng.choice(["control", "learning"]),
        policy_version=1,
        catalogue_version=1,
        decode_mode="sample",
        temperature=1.0,
        context=b"",
        excluded=b"",
        items=[
            ShownItem(
                item=f"item-{rng.randrange(500)}",
                sid=(rng.randrange(32), rng.randrange(32), rng.randrange(32)),
                position=position,
                duration_ms=rng.randrange(1_000, 60_000),
                source="policy",
                logp_levels=(-1.0, -2.0, -3.0),
            )
            for position in range(items)
        ],
    )


def _feedback(
    request: str, user: str, shown_ms: int, items: int, rng: random.Random
) -> Iterator[Feedback]:
    """Plays one after the other, some given up, some never ended; sometimes the viewer leaves."""
    count = 0

    def event(kind: FeedbackKind, position: int, at_ms: int, play_ms: int = 0) -> Feedback:
        nonlocal count
        count += 1
        return Feedback(
            event=f"{request}/{count}",
            user=user,
            request=request,
            position=position,
            time_ms=at_ms,
            kind=kind,
            play_ms=play_ms,
        )

    now = shown_ms
    for position in range(items):
        if rng.random() < 0.25:
            continue
        now += rng.randrange(100, 500)
        began = now
        yield event("begin", position, now)
        for _ in range(rng.randrange(3)):
            now += rng.randrange(100, 300)
            yield event("heartbeat", position, now, now - began)
        if rng.random() < 0.1:
            yield event(rng.choice(["like", "dislike", "follow"]), position, now + 1)
        if rng.random() < 0.8:
            now += rng.randrange(50, 300)
            yield event("end", position, now, now - began)
    if rng.random() < 0.3:
        yield event("left", -1, now + rng.randrange(50, 300))

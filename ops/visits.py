"""Visits: when a viewer comes, what it asks, and its events as they fall due.

Notable choices
- Open loop: requests are sent at their rate whatever the answers do. A slow service meets the same load; one that
  does not answer is counted, not waited for, and not asked again.
- One heap over the viewings and one wake-up each 100 ms; no task and no timer for a single event.
- A line is written when its viewing is over. What a crash leaves unwritten is as if those viewers never came: their
  visit numbers are used again, request ids and event ids are not.
"""

import asyncio
import heapq
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import aiohttp
import msgspec
import numpy as np

from ops.errors import UserError
from ops.outbox import JSON, Outbox, OutboxCounts, Report
from ops.served import Served, encode_line
from ops.settings import SimulateSettings
from ops.viewer import Event, Viewing, deliver, watch
from ops.world import World

log = logging.getLogger(__name__)

GATHER_S: Final = 0.1
"""Events are gathered this long into one post."""
FLUSH_S: Final = 2.0
"""At the end the service may take this long to take the last events."""


@dataclass
class Counts(OutboxCounts):
    """What happened, from the client's side."""

    requests: int = 0
    """Recommendations answered."""
    requests_failed: int = 0
    """Recommendations refused, without connection or not answered in time."""
    pairs_skipped: int = 0
    """Arrivals for which no idle person, or no time, was left."""
    viewings: int = 0
    """Lines written."""


class _Shown(msgspec.Struct):
    item: str


class _Recommendation(msgspec.Struct):
    request: str
    arm: str
    policy_version: int
    items: list[_Shown]


_recommendation: Final = msgspec.json.Decoder(_Recommendation)
_encoder: Final = msgspec.json.Encoder()


@dataclass(slots=True)
class _Watching:
    """A viewing under way: the truth, its events as they will arrive, the line to be written."""

    began: float
    person: int
    line: Served
    viewing: Viewing
    arrivals: list[Event]
    next: int = 0

    def due(self) -> float:
        return self.began + self.arrivals[self.next].at_s


class Visits:
    """All viewers of one run."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        world: World,
        twins: Sequence[Mapping[str, str]],
        settings: SimulateSettings,
        out: BinaryIO,
        counts: Counts,
        past: Sequence[Served],
    ) -> None:
        self.session = session
        self.world = world
        self.twins = twins
        self.settings = settings
        self.out = out
        self.counts = counts
        # After a restart another part of the stream of arrivals.
        self.rng = np.random.default_rng([settings.seed, len(past)])
        self.visits = [-1] * len(twins)
        self.shown: defaultdict[str, set[str]] = defaultdict(set)
        place = {world.person_ids[at]: at for at in range(len(twins))}
        for line in past:
            self.shown[line.user].update(line.items)
            if line.person in place:
                at = place[line.person]
                self.visits[at] = max(self.visits[at], line.visit)
        self.busy: Counter[int] = Counter()
        """How many of a person's twins ask or watch."""
        self.heap: list[tuple[float, int, _Watching]] = []
        self.pushed = 0
        self.asking: set[asyncio.Task[None]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, until: asyncio.Event, drain_s: float) -> None:
        """Let viewers come until `until`; those who watch may go on for `drain_s`. Raises `UserError`."""
        outbox = Outbox(self.session, self.counts)
        ticker = asyncio.create_task(self._play_events(outbox))
        arriving = asyncio.create_task(self._arrive())
        stop = asyncio.create_task(until.wait())
        # Of these only `stop` may end in peace; whatever else ends first has failed.
        ends: list[asyncio.Future[Any]] = [stop, self.failed, ticker, arriving, *outbox.tasks]
        try:
            await _first(ends)
            arriving.cancel()
            drained = asyncio.create_task(self._drain(drain_s))
            ends = [drained, self.failed, ticker, *outbox.tasks]
            try:
                await _first(ends)
            finally:
                drained.cancel()
            ticker.cancel()
            if not await outbox.flush(FLUSH_S):
                log.warning("the service did not take the last events in time")
        finally:
            tasks = [stop, arriving, ticker, *self.asking]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await outbox.close()
            self.failed.cancel()
            for _, _, watching in self.heap:
                self._write(watching, complete=False)
            self.out.flush()

    async def _drain(self, drain_s: float) -> None:
        """Await the answers under way, and let those who watch go on a while."""
        if self.asking:
            await asyncio.wait(self.asking)
        last = time.monotonic() + drain_s
        while self.busy and time.monotonic() < last:
            await asyncio.sleep(GATHER_S)

    async def _arrive(self) -> None:
        """Pairs of twins come at their rate; a stall of up to a second is made up for."""
        gap = 2 / self.settings.requests_per_s
        due = time.monotonic()
        while True:
            behind = time.monotonic() - due
            if behind < 0:
                await asyncio.sleep(-behind)
            elif behind > 1.0:
                missed = int(behind / gap)
                self.counts.pairs_skipped += missed
                due += missed * gap
            due += gap
            person = self._idle_person()
            if person is None:
                self.counts.pairs_skipped += 1
                continue
            self.visits[person] += 1
            users = self.twins[person].values()
            self.busy[person] += len(users)
            for user in users:
                task = asyncio.create_task(self._ask(person, user, self.visits[person]))
                self.asking.add(task)
                task.add_done_callback(self._asked)

    def _idle_person(self) -> int | None:
        for person in self.rng.integers(len(self.twins), size=16).tolist():
            if person not in self.busy:
                return int(person)
        idle = [person for person in range(len(self.twins)) if person not in self.busy]
        return int(self.rng.choice(idle)) if idle else None

    def _asked(self, task: asyncio.Task[None]) -> None:
        self.asking.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _ask(self, person: int, user: str, visit: int) -> None:
        """One request, and the viewing that its answer begins."""
        time_ms = time.time_ns() // 1_000_000
        body = _encoder.encode({"user": user, "count": self.settings.slate})
        began = False
        try:
            async with self.session.post("/recommend", data=body, headers=JSON) as response:
                content = await response.read()
            if response.status != 200:
                raise aiohttp.ClientError(f"status {response.status}, {content[:200]!r}")
            answer = _recommendation.decode(content)
            self._begin(person, user, visit, time_ms, answer)
            began = True
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError) as error:
            self.counts.requests_failed += 1
            if self.counts.requests_failed == 1:
                log.warning("POST /recommend failed: %s", error or type(error).__name__)
        finally:
            if not began:
                self._leave(person)

    def _begin(
        self, person: int, user: str, visit: int, time_ms: int, answer: _Recommendation
    ) -> None:
        world = self.world
        items = [shown.item for shown in answer.items]
        try:
            viewing = watch(world, person, visit, items, self.settings.pace)
        except KeyError as error:
            raise UserError(
                f"the service recommends item {error}, which the simulated world does not hold: "
                "serve the catalogue of this world, with the same seed and number of items"
            ) from None
        self.counts.requests += 1
        before = self.shown[user]
        line = Served(
            person=world.person_ids[person],
            user=user,
            arm=answer.arm,
            visit=visit,
            time_ms=time_ms,
            request=answer.request,
            policy_version=answer.policy_version,
            asked=self.settings.slate,
            items=items,
            satisfaction=round(sum(viewing.satisfaction), 6),
            permuted=round(float(world.permuted_satisfaction(person, items).sum()), 6),
            oracle=round(world.oracle(person, before), 6),
            dwell_s=0.0,
            seen=0,
            dislikes=0,
            complete=False,
        )
        before.update(items)
        arrivals = deliver(viewing.events, self.rng)
        self._push(_Watching(time.monotonic(), person, line, viewing, arrivals))

    def _push(self, watching: _Watching) -> None:
        if watching.next < len(watching.arrivals):
            self.pushed += 1
            heapq.heappush(self.heap, (watching.due(), self.pushed, watching))
        else:
            self._write(watching, complete=True)
            self._leave(watching.person)

    def _leave(self, person: int) -> None:
        self.busy[person] -= 1
        if not self.busy[person]:
            del self.busy[person]

    async def _play_events(self, outbox: Outbox) -> None:
        while True:
            now = time.monotonic()
            reports: list[Report] = []
            while self.heap and self.heap[0][0] <= now:
                watching = heapq.heappop(self.heap)[2]
                arrivals = watching.arrivals
                while watching.next < len(arrivals) and watching.due() <= now:
                    reports.append(_report(arrivals[watching.next], watching.line))
                    watching.next += 1
                self._push(watching)
            outbox.push(reports)
            self.out.flush()
            await asyncio.sleep(GATHER_S)

    def _write(self, watching: _Watching, complete: bool) -> None:
        line = watching.line
        line.complete = complete
        if complete:
            dwell_ms = watching.viewing.dwell_ms
            line.dislikes = watching.viewing.dislikes
        else:
            dwell_ms, line.dislikes = _so_far(watching.arrivals[: watching.next])
        line.dwell_s = sum(dwell_ms) / 1000
        line.seen = sum(dwell > 0 for dwell in dwell_ms)
        self.out.write(encode_line(line))
        self.counts.viewings += 1


def _report(event: Event, line: Served) -> Report:
    return Report(
        f"{line.request}-{event.number}",
        line.user,
        line.request,
        event.position,
        event.item,
        event.kind,
        event.play_ms,
        event.withdrawn,
    )


def _so_far(arrived: Iterable[Event]) -> tuple[list[int], int]:
    """Play times and number of dislikes that these events tell of."""
    played: dict[int, int] = {}
    disliked: set[int] = set()
    for event in arrived:
        played[event.position] = max(played.get(event.position, 0), event.play_ms)
        if event.kind == "dislike":
            disliked.add(event.position)
    return list(played.values()), len(disliked)


async def _first(ends: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until one of these ends, and raise if it ended in an error."""
    done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    for end in done:
        end.result()

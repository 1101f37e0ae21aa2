"""Feedback events on their way to the service: gathered into posts, tried again until taken.

Notable choices
- A post that was refused for want of capacity (503, 429, no connection, no answer in time) is sent
  again with the same event ids: nothing is lost, and what was taken twice is recognised by the
  service.
- A post that the service calls wrong (any other 4xx) is not sent again: it would be refused for
  ever.
- The buffer is bounded: a service that stays away costs the oldest events, counted.
"""

import asyncio
import logging
import random
from collections import deque
from dataclasses import dataclass
from typing import Final

import aiohttp
import msgspec

log = logging.getLogger(__name__)

JSON: Final = {"Content-Type": "application/json"}
EVENTS_PER_POST: Final = 256
"""Most events that `POST /feedback` takes."""
POSTERS: Final = 4
"""Most posts under way at once."""
RETRY_S: Final = (0.1, 2.0)
"""First and longest pause before a post is tried again."""


class Report(msgspec.Struct):
    """One feedback event as `POST /feedback` takes it."""

    event: str
    user: str
    request: str
    position: int
    item: str
    kind: str
    play_ms: int
    withdrawn: bool


class _Post(msgspec.Struct):
    events: list[Report]


_encoder: Final = msgspec.json.Encoder()


@dataclass
class OutboxCounts:
    """What became of the events."""

    posts: int = 0
    posts_retried: int = 0
    events: int = 0
    """Events taken by the service, copies included."""
    events_rejected: int = 0
    """Events of posts that the service called wrong."""
    events_dropped: int = 0
    """Events that the bounded buffer, or the end, lost."""


class Outbox:
    """A bounded buffer and a few posters that empty it whenever `push` brings something."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        counts: OutboxCounts,
        bound: int = 100_000,
    ) -> None:
        self._session = session
        self._counts = counts
        self._bound = bound
        self._buffer: deque[Report] = deque()
        self._under_way = 0
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self.tasks = [asyncio.create_task(self._work()) for _ in range(POSTERS)]

    def push(self, reports: list[Report]) -> None:
        """Take these events on; beyond the bound the oldest go."""
        if not reports:
            return
        self._buffer.extend(reports)
        while len(self._buffer) > self._bound:
            self._buffer.popleft()
            self._counts.events_dropped += 1
        self._empty.clear()
        self._filled.set()

    async def flush(self, timeout_s: float) -> bool:
        """Wait until everything is taken; False if it is not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End the posters; what was not taken is counted as dropped."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self._counts.events_dropped += len(self._buffer)
        self._buffer.clear()

    async def _work(self) -> None:
        while True:
            await self._filled.wait()
            if not self._buffer:
                self._filled.clear()
                continue
            count = min(EVENTS_PER_POST, len(self._buffer))
            batch = [self._buffer.popleft() for _ in range(count)]
            self._under_way += 1
            try:
                await self._post(batch)
            except asyncio.CancelledError:
                self._counts.events_dropped += len(batch)
                raise
            finally:
                self._under_way -= 1
            if not self._buffer and not self._under_way:
                self._empty.set()

    async def _post(self, batch: list[Report]) -> None:
        body = _encoder.encode(_Post(batch))
        counts = self._counts
        pause, longest = RETRY_S
        while True:
            try:
                async with self._session.post("/feedback", data=body, headers=JSON) as response:
                    status, content = response.status, await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError):
                status = 503
            if status in (200, 202):
                counts.posts += 1
                counts.events += len(batch)
                return
            if 400 <= status < 500 and status not in (408, 429):
                if not counts.events_rejected:
                    log.warning("POST /feedback was refused: %d %r", status, content[:200])
                counts.events_rejected += len(batch)
                return
            counts.posts_retried += 1
            # Posters that failed together should not come back together.
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(longest, 2 * pause)

"""Requests that wait while the policy is busy are decoded together.

There is no waiting for a batch to fill: one decode runs at a time, in a thread, and the next takes what has come
meanwhile. What the requests' arms serve, and what the catalogue is, is asked when their decode begins: whoever waited
while a version or a change came is drawn by the new one, together with those who came after, for two batches take
longer than one of both. Requests of different versions or trees are decoded apart. A decode that fails is the failure
of its own requests; one whose request was given up in the meantime is nobody's.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from actor.policy import ServedPolicy
from actor.recommend import Prepared
from actor.sampling import Slates


@dataclass(frozen=True)
class Drawn:
    """Where a request's slate stands: row `row` of a draw of `policy`, for the request as it was then."""

    policy: ServedPolicy
    prepared: Prepared
    slates: Slates
    row: int


@dataclass(frozen=True)
class _Waiting:
    policy: ServedPolicy
    prepared: Prepared
    answer: asyncio.Future[Drawn]


Decode = Callable[[ServedPolicy, list[Prepared]], Slates]
Newest = Callable[[ServedPolicy, Prepared], tuple[ServedPolicy, Prepared]]
"""The version that draws a request which came with this one, and the request as it is now."""


class Batcher:
    """Runs `decode` on what waits; `run` until cancelled."""

    def __init__(self, decode: Decode, max_batch: int, newest: Newest) -> None:
        self._decode = decode
        self._newest = newest
        self._max_batch = max_batch
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        # torch tells a thread how many it may use when that first asks; till then a product takes every core.
        self._thread = ThreadPoolExecutor(1, "decode", initializer=torch.get_num_threads)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    async def draw(self, policy: ServedPolicy, prepared: Prepared) -> Drawn:
        """The request's slate, drawn by what it came with or what has come since."""
        answer: asyncio.Future[Drawn] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Waiting(policy, prepared, answer))
        return await answer

    async def run(self) -> None:
        """Serve the queue until cancelled; what waits then is cancelled too."""
        try:
            while True:
                waiting = [await self._queue.get()]
                while len(waiting) < self._max_batch and not self._queue.empty():
                    waiting.append(self._queue.get_nowait())
                groups: dict[tuple[int, int], list[_Waiting]] = {}
                for one in waiting:
                    if one.answer.done():
                        continue
                    policy, prepared = self._newest(one.policy, one.prepared)
                    now = _Waiting(policy, prepared, one.answer)
                    groups.setdefault((id(policy), id(prepared.tree)), []).append(now)
                try:
                    for group in groups.values():
                        await self._serve(group)
                finally:  # nothing is left here unless this task was cancelled
                    for one in waiting:
                        one.answer.cancel()
        finally:
            while not self._queue.empty():
                self._queue.get_nowait().answer.cancel()
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _serve(self, group: list[_Waiting]) -> None:
        """Decode one group, of one version and tree, and answer those who still wait."""
        group = [one for one in group if not one.answer.done()]
        if not group:
            return
        policy, prepared = group[0].policy, [one.prepared for one in group]
        loop = asyncio.get_running_loop()
        try:
            slates = await loop.run_in_executor(self._thread, self._decode, policy, prepared)
        except Exception as error:
            for one in group:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for row, one in enumerate(group):
            if not one.answer.done():
                one.answer.set_result(Drawn(policy, one.prepared, slates, row))

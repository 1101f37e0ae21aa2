"""Returns in a version's first seconds: each arm's watch, and saying on `control` that its version does harm.

What a watch makes of what is served is actor/first_seconds.py's affair; requests go on while a return is said.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final
from uuid import uuid4

from aiokafka.errors import KafkaError
from prometheus_client import Counter

from actor.first_seconds import FirstSeconds, Harm
from actor.producing import reason
from actor.words import Words
from streams.control import ControlState
from streams.events import LEVELS, Command, Exposure, encode
from streams.topics import CONTROL

log = logging.getLogger("dwell.actor")

HARMS = Counter(
    "dwell_actor_harms_total", "Returns asked for in a version's first seconds", ["arm"]
)

SAY_S: Final = 3.0
"""Longest wait for Kafka to hear of a return."""


class Returning:
    """The watches of one actor's arms."""

    def __init__(self, name: str, control: ControlState, words: Words) -> None:
        self._name = name
        self._control = control
        self._words = words
        self._watches: dict[str, FirstSeconds] = {}
        self._saying: set[asyncio.Task[None]] = set()

    def passed(self, arm: str) -> int:
        """The newest version that has passed its first seconds with an arm; 0 for none."""
        watch = self._watches.get(arm)
        return 0 if watch is None else watch.passed

    def served(self, exposure: Exposure) -> None:
        """A slate that was shown: its first slot is looked at, if the policy drew it."""
        first = exposure.items[0]
        if first.source != "policy" or first.logp_levels is None:
            return
        seen = -sum(first.logp_levels) / LEVELS, time.monotonic()
        self._heed(
            exposure.arm, lambda watch: watch.served(exposure.policy_version, first.item, *seen)
        )

    def broken(self, arm: str, version: int, why: str) -> None:
        """A version that could not be drawn from."""
        seen = version, why, time.monotonic()
        self._heed(arm, lambda watch: watch.broken(*seen))

    def _heed(self, arm: str, seen: Callable[[FirstSeconds], Harm | None]) -> None:
        """What an arm's watch makes of this; a return is asked for on `control` while requests go on."""
        watch = self._watches.setdefault(arm, FirstSeconds())
        if arm in self._control.pinned:
            watch.rest()
            return
        harm = seen(watch)
        if harm is None:
            return
        HARMS.labels(arm).inc()
        log.error("%s returns to version %d: %s", arm, harm.version, harm.why)
        task = asyncio.create_task(self._say(arm, harm))
        self._saying.add(task)
        task.add_done_callback(self._saying.discard)

    async def _say(self, arm: str, harm: Harm) -> None:
        command = Command(
            id=uuid4().hex,
            time_ms=int(time.time() * 1000),
            who=self._name,
            why=harm.why,
            action="rollback",
            arm=arm,
            version=harm.version,
            upto=harm.upto,
        )
        try:
            async with asyncio.timeout(SAY_S):
                await (await self._words.send(CONTROL, encode(command)))
        except (KafkaError, TimeoutError) as error:
            log.warning("the return of %s could not be said: %s", arm, reason(error))
            self._watches[arm].again()

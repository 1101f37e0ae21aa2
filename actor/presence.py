"""An actor's word on the catalogue: which version all its answers have, and until when it may serve without news.

Notable choices
- What it says on `catalogue.acks` counts for whole answers: a version is acknowledged once it is applied *and* what
  began at older ones has been answered, for a slate drawn before a deletion may still be on its way. The same
  figure bounds what the index of valid IDs must keep, so it is pruned here.
- It says so when the version has moved, at most every `TELL_S`, and every `SIGN_S` as a sign of life; the first time
  before it reads the catalogue, so that who waits for a deletion waits for an actor that is starting, too.
- Its producer is its own and not idempotent: a sign that expires while the broker is away would leave those after it
  out of sequence for ever, and a sign said twice does no harm.
- The catalogue is as old as the last answer of Kafka's after which nothing was left to apply. Beyond
  `actor.max_catalogue_age_s` nothing is served: no list is safe where deletions may have been missed.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final
from uuid import uuid4

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from prometheus_client import Gauge

from learner.catalogue import Catalogue
from streams.aioclients import begin, leave_producer
from streams.events import CatalogueAck, encode
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE_ACKS

log = logging.getLogger("dwell.actor")

AGE = Gauge("dwell_actor_catalogue_age_seconds", "Since the catalogue was known to be complete")
ROWS = Gauge("dwell_actor_catalogue_rows", "Items in leaves, those that died lately among them")

TELL_S: Final = 0.25
SIGN_S: Final = 3.0
LOOK_S: Final = 0.05
PATIENCE_S: Final = 1.0
"""Longest wait for the first and the last word."""
CLOSE_S: Final = 0.3


class InFlight:
    """The catalogue versions at which requests began that are not answered yet."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    @contextmanager
    def at(self, version: int) -> Iterator[None]:
        """A request from its beginning to its answer."""
        self._begun[version] += 1
        try:
            yield
        finally:
            self._begun[version] -= 1
            if not self._begun[version]:
                del self._begun[version]

    def oldest(self, version: int) -> int:
        """The oldest version that an answer may still be of; `version` is applied now."""
        return min(self._begun, default=version)


class Presence:
    """Signs of life of one process; `start` before the catalogue is read, `leave` when nothing is served any more."""

    def __init__(
        self, name: str, kafka: KafkaSettings, catalogue: Catalogue, max_age_s: float
    ) -> None:
        self._name = name
        self._kafka = kafka
        self._catalogue = catalogue
        self._max_age_s = max_age_s
        self._run = uuid4().hex
        self._in_flight = InFlight()
        self._producer: AIOKafkaProducer | None = None
        self._sent: asyncio.Future[object] | None = None
        self._said = -2
        self._said_at = 0.0
        self._unheard = False
        self._fresh_s = time.time()
        self._was_stale = False
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request from its beginning to its answer."""
        with self._in_flight.at(self._catalogue.version):
            yield

    def stale(self) -> str:
        """Why nothing may be served; empty while it may."""
        age_s = time.time() - self._fresh_s
        if age_s <= self._max_age_s:
            return ""
        return (
            f"the catalogue is {age_s:.0f} s old, for Kafka does not answer: items may have been deleted, and after "
            f"actor.max_catalogue_age_s = {self._max_age_s:g} nothing is served"
        )

    @property
    def complete_ms(self) -> int:
        """When the catalogue was last known to be complete."""
        return int(self._fresh_s * 1000)

    async def start(
        self,
        fresh_ms: Callable[[], Awaitable[int | None]],
        failed: Callable[[str], None],
        complete_ms: int | None = None,
    ) -> None:
        """Say that this actor is there, and go on saying so; never fails for want of Kafka.

        `fresh_ms` tells when the catalogue was complete, None while nobody knows; `failed` hears of a defect.
        `complete_ms` is of the catalogue that is here already, Kafka being away; None: it is read after this.
        """
        known_s = float("inf") if complete_ms is None else complete_ms / 1000
        self._fresh_s = min(time.time(), known_s)
        if complete_ms is None:
            await self._tell()
            if self._sent is not None:
                await asyncio.wait([self._sent], timeout=PATIENCE_S)
        self._task = asyncio.create_task(self._go_on(fresh_ms))
        self._task.add_done_callback(lambda task: _ended(task, failed))

    async def leave(self) -> None:
        """Say that this actor serves no more, and leave the cluster."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._producer is None:
            return
        if self._sent is None or self._sent.done():
            await self._tell(leaving=True)
            if self._sent is not None:
                await asyncio.wait([self._sent], timeout=PATIENCE_S)
        await leave_producer(self._producer, CLOSE_S)

    async def _go_on(self, fresh_ms: Callable[[], Awaitable[int | None]]) -> None:
        while True:
            self._catalogue.prune(self._in_flight.oldest(self._catalogue.version))
            ROWS.set(self._catalogue.valid.rows)
            complete_ms = await fresh_ms()
            if complete_ms is not None:
                self._fresh_s = complete_ms / 1000
            self._watch_age()
            since_s = time.monotonic() - self._said_at
            moved = self._in_flight.oldest(self._catalogue.version) != self._said
            if since_s >= SIGN_S or (moved and not self._unheard and since_s >= TELL_S):
                await self._tell()
            await asyncio.sleep(LOOK_S)

    def _watch_age(self) -> None:
        AGE.set(max(0.0, time.time() - self._fresh_s))
        stale = self.stale()
        if bool(stale) != self._was_stale:
            self._was_stale = bool(stale)
            log.error("%s", stale) if stale else log.warning("the catalogue is complete again")

    async def _tell(self, leaving: bool = False) -> None:
        """One sign; the next when Kafka has answered this one."""
        if self._sent is not None and not self._sent.done():
            return
        self._said_at = time.monotonic()
        version = self._in_flight.oldest(self._catalogue.version)
        ack = CatalogueAck(
            actor=self._name, run=self._run, catalogue_version=version, leaving=leaving
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                producer = await self._connected()
                self._sent = await producer.send(CATALOGUE_ACKS, encode(ack), partition=0)
        except (KafkaError, TimeoutError) as error:
            self._heard(error)
            return
        self._sent.add_done_callback(self._answered)
        self._said = version

    def _answered(self, sent: asyncio.Future[object]) -> None:
        if not sent.cancelled():
            self._heard(sent.exception())

    def _heard(self, error: BaseException | None) -> None:
        """What became of a sign: told once while it goes wrong."""
        if error is not None and not self._unheard:
            log.warning("the catalogue's version is not acknowledged: %r", error)
        self._unheard = error is not None

    async def _connected(self) -> AIOKafkaProducer:
        if self._producer is None:
            producer = AIOKafkaProducer(bootstrap_servers=self._kafka.bootstrap, acks="all")
            try:
                await begin(producer.start())
            except BaseException:
                await leave_producer(producer, PATIENCE_S)
                raise
            self._producer = producer
        return self._producer


def _ended(task: asyncio.Task[None], failed: Callable[[str], None]) -> None:
    with suppress(asyncio.CancelledError):
        error = task.exception()
        log.error("keeping the catalogue ended", exc_info=error)
        failed(f"keeping the catalogue ended: {' '.join(str(error).split())}")

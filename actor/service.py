"""What the routes do: prepare, draw, publish; and feedback from receipt to log.

One event loop owns all state; only the decode runs in a thread, on what was prepared here, and the spool's disk in
another. What runs beside the requests is watched: when it ends, or Kafka will not take a record however often it is
sent, the service has a `fault`, is not ready, and whoever opened it should end the process.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from prometheus_client import Counter

from actor.batching import Batcher
from actor.explore import Exploration
from actor.outgoing import Outgoing
from actor.policy import Arms, ServedPolicy
from actor.presence import Presence
from actor.producing import Producing, RefusedError, reason
from actor.recommend import SEEDS, Prepared, decode, expose, fall_back, prepare
from actor.returning import Returning
from actor.sampling import Slates
from actor.search import NotFiniteError
from actor.settings import ActorSettings
from actor.subscription import Subscription
from actor.users import Users
from actor.words import Words
from learner.catalogue import Catalogue
from learner.settings import PolicySettings
from storage.kv import StoreError
from storage.spool import Spool, spool_folder
from streams.control import arm_of
from streams.events import Exposure, Feedback, FeedbackKind, encode
from streams.settings import KafkaSettings
from streams.signing import KeyFileError, trust
from streams.topics import EXPOSURES, FEEDBACK

log = logging.getLogger("dwell.actor")

SLOTS = Counter("dwell_actor_slots_total", "Slots asked for and filled", ["what"])
FALLBACKS = Counter(
    "dwell_actor_fallbacks_total",
    "Slates served without the policy: no time, or it cannot be drawn from",
)
EVENTS = Counter("dwell_actor_feedback_total", "Feedback events taken", ["kind"])

DRAIN_BATCH_BYTES = 128 << 10  # eight times aiokafka's: one request a broker is under way at a time


class ServiceError(RuntimeError):
    """The actor cannot serve; the message says why."""


class NotReadyError(RuntimeError):
    """Nothing can be served yet; the message says what is missing."""


class BusyError(RuntimeError):
    """More requests wait than are worth keeping waiting; the message says how many."""


class FeedbackLike(Protocol):
    """A feedback event as it comes in over HTTP."""

    event: str
    user: str
    request: str
    kind: FeedbackKind
    position: int
    item: str
    play_ms: int
    withdrawn: bool
    client_time_ms: int | None


class Service:
    """One actor."""

    def __init__(
        self,
        name: str,
        kafka: KafkaSettings,
        policy: PolicySettings,
        settings: ActorSettings,
        data_dir: Path,
    ) -> None:
        self.name = name
        self.settings = settings
        self._kafka = kafka
        self._data_dir = data_dir
        self._arms = Arms()
        self._catalogue = Catalogue(policy.codes)
        self._presence = Presence(name, kafka, self._catalogue, settings.max_catalogue_age_s)
        self._users = Users(settings)
        self._explore = Exploration.of(settings)
        self._rng = np.random.default_rng()
        try:
            self._trust = trust(settings.trusted_key)
        except KeyFileError as error:
            raise ServiceError(f"actor.trusted_key: {error}") from None
        self._batcher = Batcher(self._decode, settings.max_batch)
        self.fault = ""
        """Why this service cannot go on; empty while it can."""
        self.failed = asyncio.Event()
        torch.set_num_threads(policy.threads)

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Service"]:
        """Connect, catch up, and follow the logs while open; raises `ServiceError` when Kafka does not let it."""
        async with AsyncExitStack() as stack:
            spool = self._spool()
            stack.callback(spool.close)
            producing = Producing(self._producer, self._kafka.partitions)
            self._outgoing = Outgoing(producing, spool, self.settings.kafka_patience_s)
            try:
                await self._outgoing.open()
                stack.push_async_callback(self._outgoing.close)
                words = Words(self._kafka.bootstrap)
                stack.push_async_callback(words.leave)
                await words.connect()
                self._returning = Returning(self.name, self._arms.control, words)
                subscription = Subscription(
                    self.name,
                    self._kafka,
                    self._arms,
                    self._catalogue,
                    self._users,
                    words,
                    self._trust,
                )
                stack.push_async_callback(subscription.stop)
                stack.push_async_callback(self._presence.leave)
                await self._presence.start(subscription.catalogue_complete_ms, self._fail)
                await subscription.start()
            except KafkaError as error:
                raise ServiceError(f"Kafka at {self._kafka.bootstrap}: {reason(error)}") from None
            tasks = [
                asyncio.create_task(self._watched("reading Kafka", subscription.run)),
                asyncio.create_task(self._watched("decoding", self._batcher.run)),
                asyncio.create_task(self._watched("writing the spool", self._outgoing.keep)),
                asyncio.create_task(self._watched("draining the spool", self._outgoing.drain)),
            ]
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _spool(self) -> Spool:
        folder = spool_folder(self._data_dir, self.settings.member)
        try:
            return Spool(folder, self.settings.spool_mb << 20, self.settings.spool_fsync)
        except StoreError as error:
            raise ServiceError(
                f"{error}; actors that share a data directory need names of their own (actor.member)"
            ) from None

    def _producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self._kafka.bootstrap,
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            max_batch_size=DRAIN_BATCH_BYTES,
        )

    async def _watched(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Work that must not end while the service is open."""
        try:
            await work()
        except Exception as error:
            if not isinstance(error, KafkaError | RefusedError | StoreError):
                log.exception("%s ended", what)
            self._fail(f"{what} ended: {reason(error)}")
        else:
            self._fail(f"{what} ended")

    def _fail(self, fault: str) -> None:
        if not self.fault:
            log.critical("%s", fault)
            self.fault = fault
            self.failed.set()

    @property
    def spooled(self) -> int:
        """Events that wait on the disk for Kafka."""
        return self._outgoing.waiting

    def missing(self) -> list[str]:
        """What keeps this actor from being ready."""
        missing = [self.fault] if self.fault else []
        missing += [] if self._catalogue.items else ["catalogue"]
        missing += [stale] if (stale := self._presence.stale()) else []
        return missing if self._arms.ready else [*missing, "weights"]

    def versions(self) -> dict[str, Any]:
        """Policy version by arm, catalogue version, program."""
        served = {arm: self._arms.served(arm) for arm in self._arms.control.shares}
        return {
            "dwell": "0.1.0",
            "arms": {arm: policy.version for arm, policy in served.items() if policy},
            "catalogue_version": self._catalogue.version,
        }

    async def recommend(self, user: str, count: int) -> Exposure:
        """Serve a slate; its exposure is durable when this returns, on the log or in the spool.

        Raises `NotReadyError`, `BusyError`, or as `Outgoing.send` does, and nothing was shown.
        """
        if stale := self._presence.stale():
            raise NotReadyError(stale)
        with self._presence.request():
            return await self._recommend(user, count)

    async def _recommend(self, user: str, count: int) -> Exposure:
        if self._batcher.waiting >= self.settings.max_waiting:
            raise BusyError(f"{self._batcher.waiting} requests wait already, try again")
        arm = arm_of(user, self._arms.control.shares)
        policy = self._arms.served(arm)
        if policy is None or not self._catalogue.items:
            raise NotReadyError(f"not ready: {', '.join(self.missing())} missing")
        prepared = prepare(
            uuid4().hex,
            user,
            arm,
            count,
            self._users,
            self._catalogue,
            policy.model.preset.context,
            int(time.time() * 1000),
            self._explore,
        )
        exposure = await self._slate(policy, prepared)
        SLOTS.labels("asked").inc(count)
        SLOTS.labels("filled").inc(len(exposure.items))
        if not exposure.items:
            raise NotReadyError(f"no item of the catalogue is left for user {user!r}")
        await self._send(EXPOSURES, [(user, encode(exposure))])
        self._users.exposed(user, [item.item for item in exposure.items], exposure.request)
        self._returning.served(exposure)
        return exposure

    async def _slate(self, policy: ServedPolicy, prepared: Prepared) -> Exposure:
        """The policy's slate, or a fallback where that takes too long."""
        temperature = self.settings.temperature
        try:
            async with asyncio.timeout(self.settings.patience_s):
                drawn = await self._batcher.draw(policy, prepared)
        except TimeoutError:
            FALLBACKS.inc()
            now_ms = int(time.time() * 1000)
            return fall_back(policy, prepared, self._catalogue, temperature, self._rng, now_ms)
        except NotFiniteError as error:
            FALLBACKS.inc()
            log.warning("version %d: %s", policy.version, error)
            self._returning.broken(prepared.arm, policy.version, str(error))
            now_ms = int(time.time() * 1000)
            return fall_back(policy, prepared, self._catalogue, temperature, self._rng, now_ms)
        return expose(
            drawn.policy,
            prepared,
            drawn.row,
            drawn.slates,
            self._catalogue,
            temperature,
            self._rng,
            int(time.time() * 1000),
        )

    async def feedback(self, events: Sequence[FeedbackLike], received_ms: int) -> int:
        """Take feedback; it is durable when this returns. Raises as `Outgoing.send` does."""
        taken = [
            Feedback(
                event=event.event,
                user=event.user,
                request=event.request,
                position=event.position,
                item=event.item,
                time_ms=received_ms,
                kind=event.kind,
                play_ms=event.play_ms,
                withdrawn=event.withdrawn,
                client_time_ms=event.client_time_ms,
            )
            for event in events
        ]
        await self._send(FEEDBACK, [(event.user, encode(event)) for event in taken])
        for event in taken:
            item = self._catalogue.items.get(self._users.item_of(event))
            self._users.feedback(event, item.duration_ms if item else 0)
            EVENTS.labels(event.kind).inc()
        return len(taken)

    async def _send(self, topic: str, records: list[tuple[str, bytes]]) -> None:
        """Make records durable."""
        try:
            await self._outgoing.send(topic, records)
        except RefusedError as error:
            self._fail(str(error))
            raise

    def _decode(self, policy: ServedPolicy, batch: list[Prepared]) -> Slates:
        seed = int(self._rng.integers(SEEDS))
        return decode(policy, batch, self.settings.temperature, seed)

"""What the routes do: prepare, draw, publish; and feedback from receipt to log.

One event loop owns all state; only the decode runs in a thread, on what was prepared here. What runs beside the
requests is watched: when it ends, or Kafka will not take another record, the service has a `fault`, is not ready,
and whoever opened it should end the process.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from prometheus_client import Counter

from actor.batching import Batcher
from actor.explore import Exploration
from actor.first_seconds import FirstSeconds, Harm
from actor.policy import Arms, ServedPolicy
from actor.recommend import SEEDS, Prepared, decode, expose, fall_back, prepare
from actor.sampling import NotFiniteError, Slates
from actor.settings import ActorSettings
from actor.subscription import Subscription
from actor.users import Users
from learner.catalogue import Catalogue
from learner.settings import PolicySettings
from streams.aioclients import leave_producer
from streams.control import arm_of
from streams.events import LEVELS, Command, Exposure, Feedback, FeedbackKind, encode
from streams.intake import partition_of
from streams.settings import KafkaSettings
from streams.topics import CONTROL, EXPOSURES, FEEDBACK

log = logging.getLogger("dwell.actor")

SLOTS = Counter("dwell_actor_slots_total", "Slots asked for and filled", ["what"])
FALLBACKS = Counter(
    "dwell_actor_fallbacks_total",
    "Slates served without the policy: no time, or it cannot be drawn from",
)
HARMS = Counter(
    "dwell_actor_harms_total", "Returns asked for in a version's first seconds", ["arm"]
)
EVENTS = Counter("dwell_actor_feedback_total", "Feedback events taken", ["kind"])

KAFKA_PATIENCE_S = 3.0


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
        self, name: str, kafka: KafkaSettings, policy: PolicySettings, settings: ActorSettings
    ) -> None:
        self.name = name
        self.settings = settings
        self._kafka = kafka
        self._arms = Arms()
        self._catalogue = Catalogue(policy.codes)
        self._users = Users(settings)
        self._explore = Exploration.of(settings)
        self._rng = np.random.default_rng()
        self._batcher = Batcher(self._decode, settings.max_batch)
        self._watches: dict[str, FirstSeconds] = {}
        self._saying: set[asyncio.Task[None]] = set()
        self.fault = ""
        """Why this service cannot go on; empty while it can."""
        self.failed = asyncio.Event()
        torch.set_num_threads(policy.threads)

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Service"]:
        """Connect, catch up, and follow the logs while open; raises `ServiceError` when Kafka does not let it."""
        async with AsyncExitStack() as stack:
            try:
                self._producer = AIOKafkaProducer(
                    bootstrap_servers=self._kafka.bootstrap,
                    acks="all",
                    enable_idempotence=True,
                    linger_ms=2,
                )
                stack.push_async_callback(leave_producer, self._producer)
                await self._producer.start()
                subscription = Subscription(
                    self.name, self._kafka, self._arms, self._catalogue, self._users
                )
                stack.push_async_callback(subscription.stop)
                await subscription.start(self._producer)
            except KafkaError as error:
                raise ServiceError(f"Kafka at {self._kafka.bootstrap}: {_why(error)}") from None
            tasks = [
                asyncio.create_task(self._watched("reading Kafka", subscription.run)),
                asyncio.create_task(self._watched("decoding", self._batcher.run)),
            ]
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _watched(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Work that must not end while the service is open."""
        try:
            await work()
        except Exception as error:
            if not isinstance(error, KafkaError):
                log.exception("%s ended", what)
            self._fail(f"{what} ended: {_why(error)}")
        else:
            self._fail(f"{what} ended")

    def _fail(self, fault: str) -> None:
        if not self.fault:
            log.critical("%s", fault)
            self.fault = fault
            self.failed.set()

    def missing(self) -> list[str]:
        """What keeps this actor from being ready."""
        missing = [self.fault] if self.fault else []
        missing += [] if self._catalogue.items else ["catalogue"]
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
        """Serve a slate; it is on the log when this returns.

        Raises `NotReadyError`, `BusyError`, `KafkaError` or `TimeoutError`, and nothing was shown.
        """
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
        first = exposure.items[0]
        if first.logp_levels is not None:
            seen = -sum(first.logp_levels) / LEVELS, time.monotonic()
            self._heed(arm, lambda watch: watch.served(exposure.policy_version, first.item, *seen))
        return exposure

    def _heed(self, arm: str, seen: Callable[[FirstSeconds], Harm | None]) -> None:
        """What an arm's watch makes of this; a return is asked for on `control` while requests go on."""
        watch = self._watches.setdefault(arm, FirstSeconds())
        if arm in self._arms.control.pinned:
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
            who=self.name,
            why=harm.why,
            action="rollback",
            arm=arm,
            version=harm.version,
            upto=harm.upto,
        )
        try:
            async with asyncio.timeout(KAFKA_PATIENCE_S):
                await self._producer.send_and_wait(CONTROL, encode(command), partition=0)
        except (KafkaError, TimeoutError) as error:
            log.warning("the return of %s could not be said: %s", arm, _why(error))
            self._watches[arm].again()

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
            seen = policy.version, str(error), time.monotonic()
            self._heed(prepared.arm, lambda watch: watch.broken(*seen))
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
        """Take feedback; it is on the log when this returns. Raises as `recommend`."""
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
        """Append to a topic and wait until Kafka has it."""
        async with asyncio.timeout(KAFKA_PATIENCE_S):
            sent = [
                await self._producer.send(
                    topic,
                    value,
                    user.encode(),
                    partition=partition_of(user, self._kafka.partitions),
                )
                for user, value in records
            ]
            try:
                await asyncio.gather(*sent)
            except KafkaError as error:
                if not error.retriable:  # the records after it would be out of sequence, for ever
                    self._fail(f"Kafka refused a record of {topic}: {_why(error)}")
                raise

    def _decode(self, policy: ServedPolicy, batch: list[Prepared]) -> Slates:
        seed = int(self._rng.integers(SEEDS))
        return decode(policy, batch, self.settings.temperature, seed)


def _why(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

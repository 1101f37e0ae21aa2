"""What the routes do: prepare, draw, publish; and feedback from receipt to log.

One event loop owns all state; only the decode runs in a thread, on what was prepared here, and the disk's work in
others. Where what runs beside the requests ends (actor/ties.py), the service has a `fault`, is not ready, and whoever
opened it should end the process.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
import torch
from prometheus_client import Counter

from actor.batching import Batcher
from actor.explore import Exploration
from actor.policy import Arms, ServedPolicy
from actor.producing import RefusedError
from actor.recommend import SEEDS, Prepared, decode, expose, fall_back, prepare, renewed
from actor.sampling import Slates
from actor.search import NotFiniteError
from actor.settings import ActorSettings
from actor.ties import Ties, TiesError
from actor.users import Users
from learner.catalogue import Catalogue
from learner.settings import PolicySettings
from streams.control import arm_of
from streams.events import Exposure, Feedback, FeedbackKind, encode
from streams.settings import KafkaSettings
from streams.signing import KeyFileError, trust
from streams.topics import EXPOSURES, FEEDBACK

log = logging.getLogger("dwell.actor")

SLOTS = Counter(
    "dwell_actor_slots_total", "Slots asked for and filled, items drawn and skipped", ["what"]
)
FALLBACKS = Counter(
    "dwell_actor_fallbacks_total",
    "Slates served without the policy: no time, or it cannot be drawn from",
)
EVENTS = Counter("dwell_actor_feedback_total", "Feedback events taken", ["kind"])


ServiceError = TiesError


class NotReadyError(RuntimeError):
    """Nothing can be served yet; the message says what is missing."""


class BusyError(RuntimeError):
    """More requests wait than are worth keeping waiting; the message says how many."""


class BrokenPolicyError(RuntimeError):
    """A version that cannot be drawn from; the message says why."""

    def __init__(self, policy: ServedPolicy, why: str) -> None:
        super().__init__(why)
        self.policy = policy


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
        self._arms = Arms()
        self._catalogue = Catalogue(policy.codes)
        self._users = Users(settings)
        self._explore = Exploration.of(settings)
        self._rng = np.random.default_rng()
        try:
            trusted = trust(settings.trusted_key)
        except KeyFileError as error:
            raise ServiceError(f"actor.trusted_key: {error}") from None
        held = self._arms, self._catalogue, self._users
        self._ties = Ties(name, kafka, settings, data_dir, *held, trusted)
        self._batcher = Batcher(self._decode, settings.max_batch, self._newest)
        torch.set_num_threads(policy.threads)

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Service"]:
        """Connect, catch up, and follow the logs while open; from a copy on the disk where Kafka is away.

        Raises `ServiceError` where neither can be.
        """
        async with self._ties.open():
            decoding = asyncio.create_task(self._ties.watched("decoding", self._batcher.run))
            try:
                yield self
            finally:
                decoding.cancel()
                await asyncio.gather(decoding, return_exceptions=True)

    @property
    def fault(self) -> str:
        """Why this service cannot go on; empty while it can."""
        return self._ties.fault

    @property
    def failed(self) -> asyncio.Event:
        """Set when there is a fault."""
        return self._ties.failed

    @property
    def spooled(self) -> int:
        """Events that wait on the disk for Kafka."""
        return self._ties.outgoing.waiting

    def missing(self) -> list[str]:
        """What keeps this actor from being ready."""
        missing = [self.fault] if self.fault else []
        missing += [] if self._catalogue.items else ["catalogue"]
        missing += [stale] if (stale := self._ties.presence.stale()) else []
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
        if stale := self._ties.presence.stale():
            raise NotReadyError(stale)
        with self._ties.presence.request():
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
            self.settings.author_cap,
            self.settings.beam_width,
        )
        exposure = await self._slate(policy, prepared)
        SLOTS.labels("asked").inc(count)
        SLOTS.labels("filled").inc(len(exposure.items))
        SLOTS.labels("skipped").inc(len(exposure.skipped or ()))
        if not exposure.items:
            raise NotReadyError(f"no item of the catalogue is left for user {user!r}")
        await self._send(EXPOSURES, [(user, encode(exposure))])
        self._users.exposed(user, [item.item for item in exposure.items], exposure.request)
        self._ties.returning.served(exposure)
        return exposure

    async def _slate(self, policy: ServedPolicy, prepared: Prepared) -> Exposure:
        """The policy's slate, or a fallback where that takes too long."""
        temperature = self.settings.temperature
        try:
            async with asyncio.timeout(self.settings.patience_s):
                drawn = await self._batcher.draw(policy, prepared)
        except TimeoutError:
            pass
        except BrokenPolicyError as error:
            policy = error.policy
            log.warning("version %d: %s", policy.version, error)
            self._ties.returning.broken(prepared.arm, policy.version, str(error))
        else:
            return expose(
                drawn.policy,
                drawn.prepared,
                drawn.row,
                drawn.slates,
                self._catalogue,
                temperature,
                self._rng,
                int(time.time() * 1000),
            )
        FALLBACKS.inc()
        now_ms = int(time.time() * 1000)
        return fall_back(policy, prepared, self._catalogue, temperature, self._rng, now_ms)

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
            await self._ties.outgoing.send(topic, records)
        except RefusedError as error:
            self._ties.fail(str(error))
            raise

    def _decode(self, policy: ServedPolicy, batch: list[Prepared]) -> Slates:
        seed = int(self._rng.integers(SEEDS))
        try:
            return decode(policy, batch, self.settings.temperature, seed)
        except NotFiniteError as error:
            raise BrokenPolicyError(policy, str(error)) from None

    def _newest(self, policy: ServedPolicy, one: Prepared) -> tuple[ServedPolicy, Prepared]:
        """What the request's arm serves now, where that reads contexts as the version that the request came with, and
        the request over the catalogue of now."""
        now = self._arms.served(one.arm)
        kept = now if now is not None and now.shape == policy.shape else policy
        return kept, renewed(one, self._catalogue)

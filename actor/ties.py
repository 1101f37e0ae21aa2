"""What ties an actor to the world outside its process: Kafka, the spool, the copy; opened and closed together.

Notable choices
- With Kafka there an actor reads its logs whole and makes its copy anew. Where nobody answers it begins from the
  copy, with all events going to the spool; when Kafka answers it reads on from where the copy ends, as one that was
  cut off.
- Nothing is sent from the spool before Kafka has been seen to be the same cluster as the copy's.
- What runs beside the requests is watched: when it ends, or Kafka will not take a record however often it is sent,
  there is a `fault`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from prometheus_client import Gauge

from actor.copying import Copying
from actor.kept import Copy, CopyError, Cut, copy_folder, emptied
from actor.outgoing import Outgoing
from actor.policy import Arms
from actor.presence import Presence
from actor.producing import Producing, RefusedError, passes, reason
from actor.restoring import restore, usable
from actor.returning import Returning
from actor.settings import ActorSettings
from actor.subscription import OtherLogError, Subscription
from actor.users import Users
from actor.words import Words
from learner.catalogue import Catalogue
from storage.kv import StoreError
from storage.spool import Spool, spool_folder
from streams.aioclients import cluster_id
from streams.settings import KafkaSettings
from streams.signing import Trust

log = logging.getLogger("dwell.actor")

FROM_COPY = Gauge(
    "dwell_actor_from_copy", "1 while Kafka has not answered since this actor began from its copy"
)

DRAIN_BATCH_BYTES: Final = 128 << 10
"""Eight times aiokafka's: one request a broker is under way at a time."""
ANSWER_S: Final = 3.0
"""Without an answer for this long Kafka is away, where there is a copy to begin from."""
NO_COPY_ANSWER_S: Final = 30.0
RETRY_S: Final = 1.0

Work = Callable[[], Coroutine[Any, Any, None]]


class TiesError(RuntimeError):
    """The actor cannot serve; the message says why."""


class Ties:
    """One actor's."""

    def __init__(
        self,
        name: str,
        kafka: KafkaSettings,
        settings: ActorSettings,
        data_dir: Path,
        arms: Arms,
        catalogue: Catalogue,
        users: Users,
        trust: Trust | None,
    ) -> None:
        """`arms`, `catalogue` and `users` are kept up to date."""
        self._name = name
        self._kafka = kafka
        self._settings = settings
        self._data_dir = data_dir
        self._arms = arms
        self._catalogue = catalogue
        self._users = users
        self._trust = trust
        self._words = Words(kafka.bootstrap)
        self.returning = Returning(name, arms.control, self._words)
        self.presence = Presence(name, kafka, catalogue, settings.max_catalogue_age_s)
        self.outgoing: Outgoing
        self._same_cluster = asyncio.Event()
        self.fault = ""
        """Why this actor cannot go on; empty while it can."""
        self.failed = asyncio.Event()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connect, catch up, and follow the logs while open; raises `TiesError`."""
        async with AsyncExitStack() as stack:
            spool = self._spool()
            stack.callback(spool.close)
            copy, cut, cluster = await self._begun()
            stack.callback(copy.close)
            copying = self._copying(copy)
            subscription = Subscription(
                self._name,
                self._kafka,
                self._arms,
                self._catalogue,
                self._users,
                self._words,
                copying,
                self._trust,
            )
            stack.push_async_callback(subscription.stop)
            producing = Producing(self._producer, self._kafka.partitions)
            self.outgoing = Outgoing(producing, spool, self._settings.kafka_patience_s)
            self._have_copy(copy, cut, cluster, copying, subscription)
            FROM_COPY.set(cut is not None)
            stack.push_async_callback(copying.close)
            self._beside(stack, "copying", copying.run)
            stack.push_async_callback(self._words.leave)
            await self._opened(stack, subscription, cut)
            self._beside(stack, "reading Kafka", lambda: self._read(subscription, cut))
            self._beside(stack, "writing the spool", self.outgoing.keep)
            self._beside(stack, "draining the spool", self._drain)
            yield

    async def _begun(self) -> tuple[Copy, Cut | None, str]:
        """The copy; its moment, if the actor must begin from it; else the cluster that answers."""
        folder = copy_folder(self._data_dir, self._settings.member)
        copy = cut = None
        try:
            copy = Copy(folder)
            max_age_s, now_ms = self._settings.max_catalogue_age_s, int(time.time() * 1000)
            cut, unusable = usable(copy, self._kafka, max_age_s, now_ms), ""
        except (StoreError, CopyError, OSError) as error:
            unusable = str(error)
        cluster, why = await self._asked(NO_COPY_ANSWER_S if cut is None else ANSWER_S)
        try:
            if cluster:
                return copy or emptied(folder), None, cluster
            if copy is not None and cut is not None:
                log.warning(
                    "Kafka at %s: %s; beginning from the copy in %s, %.0f s old",
                    *(self._kafka.bootstrap, why, folder, time.time() - cut.complete_ms / 1000),
                )
                return copy, cut, ""
        except (StoreError, OSError) as error:
            raise TiesError(str(error)) from None
        if copy is not None:
            copy.close()
        raise TiesError(
            f"Kafka at {self._kafka.bootstrap}: {why}; nor can the actor begin from the copy in {folder}: {unusable}"
        )

    async def _asked(self, patience_s: float) -> tuple[str, str]:
        """The cluster that answers, or why none does."""
        try:
            async with asyncio.timeout(patience_s):
                return await cluster_id(self._kafka.bootstrap), ""
        except TimeoutError:
            return "", f"no answer within {patience_s:g} s"
        except (KafkaError, OSError) as error:
            return "", reason(error)

    def _have_copy(
        self,
        copy: Copy,
        cut: Cut | None,
        cluster: str,
        copying: Copying,
        subscription: Subscription,
    ) -> None:
        """Begin from the copy, or begin a new one."""
        if cut is None:
            try:
                copying.begin(cluster)
            except (StoreError, OSError) as error:
                raise TiesError(f"{error}; the folder {copy.folder} may be removed") from None
            return
        try:
            newest = restore(copy, cut, self._trust, self._catalogue, self._users, self._arms)
        except (CopyError, StoreError, OSError) as error:
            raise TiesError(
                f"Kafka at {self._kafka.bootstrap} does not answer; nor can the actor begin from the copy in "
                f"{copy.folder}: {error}"
            ) from None
        copying.resume(cut, newest[0].number if newest else 0)
        subscription.resume(newest)

    async def _opened(
        self, stack: AsyncExitStack, subscription: Subscription, cut: Cut | None
    ) -> None:
        """Events have a way, the actor is heard of, and, with Kafka there, all logs are read."""
        try:
            await self.outgoing.open(away=cut is not None)
            stack.push_async_callback(self.outgoing.close)
            stack.push_async_callback(self.presence.leave)
            complete_ms = None if cut is None else cut.complete_ms
            await self.presence.start(subscription.catalogue_complete_ms, self.fail, complete_ms)
            if cut is None:
                await self._words.connect()
                await subscription.start()
        except KafkaError as error:
            raise TiesError(f"Kafka at {self._kafka.bootstrap}: {reason(error)}") from None

    async def _read(self, subscription: Subscription, cut: Cut | None) -> None:
        """Follow the logs; where the actor began from the copy, as soon as its cluster answers."""
        while cut is not None:
            cluster, _ = await self._asked(ANSWER_S)
            if cluster and cluster != cut.cluster:
                raise TiesError(
                    f"Kafka at {self._kafka.bootstrap} is the cluster {cluster}, and this actor serves from a copy "
                    f"of {cut.cluster}: its {self.outgoing.waiting} events in the spool were not sent there"
                )
            try:
                if cluster:
                    self._same_cluster.set()
                    await self._words.connect()
                    await subscription.start()
                    FROM_COPY.set(0)
                    log.warning("Kafka answers: the actor no longer serves from its copy")
                    break
            except (KafkaError, OSError) as error:
                if not passes(error):
                    raise
            await asyncio.sleep(RETRY_S)
        self._same_cluster.set()
        await subscription.run()

    async def _drain(self) -> None:
        await self._same_cluster.wait()
        await self.outgoing.drain()

    def _spool(self) -> Spool:
        folder = spool_folder(self._data_dir, self._settings.member)
        try:
            return Spool(folder, self._settings.spool_mb << 20, self._settings.spool_fsync)
        except StoreError as error:
            raise TiesError(
                f"{error}; actors that share a data directory need names of their own (actor.member)"
            ) from None

    def _copying(self, copy: Copy) -> Copying:
        return Copying(
            copy,
            self._kafka,
            self._arms,
            self._catalogue,
            self.returning.passed,
            lambda: self.presence.complete_ms,
            self._settings.copy_every_s,
        )

    def _producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self._kafka.bootstrap,
            acks="all",
            enable_idempotence=True,
            linger_ms=2,
            max_batch_size=DRAIN_BATCH_BYTES,
        )

    def _beside(self, stack: AsyncExitStack, what: str, work: Work) -> None:
        """Do this until the stack is left."""
        task = asyncio.create_task(self.watched(what, work))

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        stack.push_async_callback(end)

    async def watched(self, what: str, work: Work) -> None:
        """Work that must not end while the actor serves."""
        try:
            await work()
        except Exception as error:
            if not isinstance(
                error, KafkaError | RefusedError | StoreError | TiesError | OtherLogError
            ):
                log.exception("%s ended", what)
            self.fail(f"{what} ended: {reason(error)}")
        else:
            self.fail(f"{what} ended")

    def fail(self, fault: str) -> None:
        """The actor cannot go on."""
        if not self.fault:
            log.critical("%s", fault)
            self.fault = fault
            self.failed.set()

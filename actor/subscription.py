"""What an actor reads from Kafka: control, catalogue, histories and weights, in one event loop.

Notable choices
- At start each log is read to its present end before the actor is ready; of the weights only the newest version
  and those that `control` names are materialised.
- A version that cannot be taken (schema, digest, codebook) changes nothing: the arm keeps what it serves, and
  says so on `weights.acks`, in a metric and in the log.
- An actor obeys `control` without the learner: a pin to a version not at hand reads it from the log.
"""

import asyncio
import logging
import time

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import ConsumerRecord
from prometheus_client import Counter, Gauge, Histogram

from actor.policy import Arms, ServedPolicy, materialise
from actor.users import Users
from learner.catalogue import Catalogue, CatalogueError
from streams.events import UnreadableError, command_decoder, decode, encode
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE, CONTROL, HISTORIES, WEIGHTS_ACKS, WEIGHTS_ANCHORS
from streams.weights import Ack, Assembler, Manifest, WeightError

log = logging.getLogger("dwell.actor")

SERVED_VERSION = Gauge("dwell_actor_policy_version", "Version that an arm serves", ["arm"])
APPLIED = Counter("dwell_actor_versions_total", "Versions taken or refused", ["what"])
APPLY_SECONDS = Histogram("dwell_actor_apply_seconds", "Publication of a version to its swap")
CATALOGUE_ITEMS = Gauge("dwell_actor_catalogue_items", "Items alive")

WEIGHTS_PLACE = TopicPartition(WEIGHTS_ANCHORS, 0)
CONTROL_PLACE = TopicPartition(CONTROL, 0)
CATALOGUE_PLACE = TopicPartition(CATALOGUE, 0)


class Subscription:
    """Keeps arms, catalogue and users up to date; `start`, then `run` until cancelled."""

    def __init__(
        self, name: str, kafka: KafkaSettings, arms: Arms, catalogue: Catalogue, users: Users
    ) -> None:
        self._name = name
        self._kafka = kafka
        self._arms = arms
        self._catalogue = catalogue
        self._users = users
        self._assembler = Assembler()
        self._newest: tuple[Manifest, bytes] | None = None

    async def start(self, acks: AIOKafkaProducer) -> None:
        """Read all logs to their present ends and take the versions to be served."""
        self._acks = acks
        self._consumer = self._reader()
        await self._consumer.start()
        histories = [TopicPartition(HISTORIES, p) for p in range(self._kafka.partitions)]
        others = [CATALOGUE_PLACE, *histories, WEIGHTS_PLACE]
        self._consumer.assign([CONTROL_PLACE, *others])
        for place, first in (
            await self._consumer.beginning_offsets([CONTROL_PLACE, *others])
        ).items():
            self._consumer.seek(place, first)
        self._consumer.pause(*others)  # control first: it names the versions to be served
        await self._read_to_end([CONTROL_PLACE])
        self._consumer.resume(*others)
        await self._read_to_end(others)
        await self._settle()

    async def run(self) -> None:
        """Follow the logs."""
        while True:
            if await self._poll(50):
                await self._settle()

    async def _read_to_end(self, places: list[TopicPartition]) -> None:
        for place, end in (await self._consumer.end_offsets(places)).items():
            while await self._consumer.position(place) < end:
                await self._poll(200)

    async def stop(self) -> None:
        """Leave the cluster."""
        await self._consumer.stop()

    def _reader(self) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            bootstrap_servers=self._kafka.bootstrap,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            fetch_max_wait_ms=50,
            max_partition_fetch_bytes=16 << 20,
        )

    async def _poll(self, timeout_ms: int) -> bool:
        """Take what has come; whether arms may have to change."""
        settle = False
        for place, records in (await self._consumer.getmany(timeout_ms=timeout_ms)).items():
            for record in records:
                settle |= self._take(place, record)
        return settle

    def _take(self, place: TopicPartition, record: ConsumerRecord) -> bool:
        try:
            if place == WEIGHTS_PLACE:
                whole = self._assembler.take(record.value)
                self._newest = whole or self._newest
                return whole is not None
            if place == CONTROL_PLACE:
                self._arms.control.apply(decode(command_decoder, record.value))
                return True
            if place == CATALOGUE_PLACE:
                self._catalogue.take(record.offset, record.key, record.value)
                CATALOGUE_ITEMS.set(len(self._catalogue.items))
            else:
                self._users.take_history(record.key.decode(), record.value)
        except (UnreadableError, CatalogueError, WeightError) as error:
            log.warning("%s offset %d: %s", record.topic, record.offset, error)
        return False

    async def _settle(self) -> None:
        """Bring every arm to what `control` says, as far as versions can be had."""
        newest = self._arms.newest
        if self._newest is not None:
            manifest, content = self._newest
            if newest is None or manifest.version > newest.version:
                self._arms.newest = await self._materialise(manifest, content) or newest
            self._newest = None
        fetched = {}
        for version in self._arms.missing():
            policy = await self._fetch(version)
            if policy is not None:
                fetched[version] = policy
        for policy in self._arms.settle(fetched):
            await self._acknowledge(policy.manifest, "")
        for arm in self._arms.control.shares:
            served = self._arms.served(arm)
            if served is not None:
                SERVED_VERSION.labels(arm).set(served.version)

    async def _materialise(self, manifest: Manifest, content: bytes) -> ServedPolicy | None:
        try:
            return materialise(manifest, content, self._catalogue.codebook)
        except ValueError as error:
            log.error("refused: %s", error)
            await self._acknowledge(manifest, str(error))
            return None

    async def _fetch(self, version: int) -> ServedPolicy | None:
        """Read one older version from the log."""
        consumer = self._reader()
        await consumer.start()
        try:
            consumer.assign([WEIGHTS_PLACE])
            first = (await consumer.beginning_offsets([WEIGHTS_PLACE]))[WEIGHTS_PLACE]
            end = (await consumer.end_offsets([WEIGHTS_PLACE]))[WEIGHTS_PLACE]
            consumer.seek(WEIGHTS_PLACE, first)
            assembler = Assembler()
            while await consumer.position(WEIGHTS_PLACE) < end:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    for record in records:
                        whole = assembler.take(record.value)
                        if whole is not None and whole[0].version == version:
                            return await self._materialise(*whole)
        finally:
            await consumer.stop()
        log.error("control names version %d, which is not in the log", version)
        return None

    async def _acknowledge(self, manifest: Manifest, refused: str) -> None:
        now = time.time()
        APPLIED.labels("refused" if refused else "applied").inc()
        if not refused:
            APPLY_SECONDS.observe(max(0.0, now - manifest.created_ms / 1000))
        ack = Ack(
            actor=self._name,
            version=manifest.version,
            applied=not refused,
            reason=refused,
            created_ms=manifest.created_ms,
            applied_ms=int(now * 1000),
        )
        await asyncio.shield(self._acks.send(WEIGHTS_ACKS, encode(ack), partition=0))

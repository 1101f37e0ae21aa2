"""What an actor reads from Kafka: control, catalogue, histories and weights, in one event loop.

Notable choices
- At start each log is read to its present end before the actor is ready: of the weights the anchors, and the chain
  from the newest on. Only the newest version and those that `control` names are materialised, and none before there
  is a catalogue: they must have its codebook.
- A version that cannot be taken (damaged, signature, schema, digest, codebook) changes nothing: the arm keeps what it
  serves, and says so on `weights.acks`, in a metric and in the log; so with each that builds on it, until the next
  anchor. An actor that starts falls back to an older one.
- An actor obeys `control` without the learner: a pin to a version not at hand reads it from the log.
- While serving, records are applied a few at a time, with a pause between: thousands of changes of the catalogue that
  come together would stand in the way of requests for a tenth of a second.
- A broker that is away for a while is waited for; what cannot pass by itself ends the reader, and with it the actor.
"""

import asyncio
import logging
import time
from typing import Final

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import ConsumerRecord, RecordMetadata
from prometheus_client import Counter, Gauge, Histogram

from actor.copying import Copying
from actor.fetch import ANCHORS_PLACE, CHAIN_PLACE, reader
from actor.following import WEIGHT_PLACES, Following
from actor.policy import Arms, ServedPolicy, materialise
from actor.users import Users
from actor.words import Words
from learner.catalogue import Catalogue, CatalogueError
from streams.aioclients import leave
from streams.chain import Version
from streams.events import UnreadableError, command_decoder, decode, encode
from streams.settings import KafkaSettings
from streams.signing import Trust
from streams.topics import CATALOGUE, CONTROL, HISTORIES, WEIGHTS_ACKS
from streams.weights import Ack, Manifest, Seal, WeightError

log = logging.getLogger("dwell.actor")

SERVED_VERSION = Gauge("dwell_actor_policy_version", "Version that an arm serves", ["arm"])
APPLIED = Counter("dwell_actor_versions_total", "Versions taken or refused", ["what"])
APPLY_SECONDS = Histogram("dwell_actor_apply_seconds", "Publication of a version to its swap")
CATALOGUE_ITEMS = Gauge("dwell_actor_catalogue_items", "Items alive")

CONTROL_PLACE = TopicPartition(CONTROL, 0)
CATALOGUE_PLACE = TopicPartition(CATALOGUE, 0)

ACK_PATIENCE_S = 1.0
RETRY_S = 0.5
SLICE: Final = 64
"""Records applied before requests have their turn: a third of a millisecond."""
PAUSE_S: Final = 2e-3
"""That turn. 10,000 changes take .4 s then."""


class OtherLogError(RuntimeError):
    """What was copied is not of this log; the message says why."""


class Subscription:
    """Keeps arms, catalogue and users up to date; `start`, then `run` until cancelled."""

    def __init__(
        self,
        name: str,
        kafka: KafkaSettings,
        arms: Arms,
        catalogue: Catalogue,
        users: Users,
        words: Words,
        copying: Copying,
        trust: Trust | None = None,
    ) -> None:
        self._name = name
        self._kafka = kafka
        self._arms = arms
        self._catalogue = catalogue
        self._users = users
        self._words = words
        self._copying = copying
        self._consumer = reader(kafka.bootstrap)
        self._following = Following(kafka.bootstrap, trust)
        self._taking = False
        """Whether records have been read that are not applied yet."""
        self._tried = 0
        """The head of the chain that was made a policy last, or could not be."""

    def resume(self, newest: tuple[Version, Seal] | None) -> None:
        """Before `start`: what was copied is here already, up to the copy's positions."""
        if newest is not None:
            self._following.begin(*newest)
            self._tried = newest[0].number

    async def start(self) -> None:
        """Read all logs to their present ends and take the versions to be served.

        Raises `KafkaError`, and may then be tried again: it goes on where it was. Or `OtherLogError`.
        """
        await self.stop()
        self._consumer = reader(self._kafka.bootstrap)
        self._following.again()
        await self._consumer.start()
        histories = [TopicPartition(HISTORIES, p) for p in range(self._kafka.partitions)]
        others = [CATALOGUE_PLACE, *histories, ANCHORS_PLACE]
        every = [CONTROL_PLACE, *others, CHAIN_PLACE]
        self._consumer.assign(every)
        ends = await self._consumer.end_offsets(every)
        for place, first in (await self._consumer.beginning_offsets(every)).items():
            known = self._copying.positions.get(place, first)
            if not first <= known <= ends[place]:
                raise OtherLogError(
                    f"{place.topic} of partition {place.partition} has offsets {first} to {ends[place]}, and this "
                    f"actor has read it up to {known}: it is another log now, start it again to read it whole"
                )
            self._consumer.seek(place, known)
        # control first: it names the versions to be served; the chain last, from the newest anchor on
        self._consumer.pause(*others, CHAIN_PLACE)
        await self._read_to_end([CONTROL_PLACE])
        self._consumer.resume(*others)
        await self._read_to_end(others)
        self._following.pass_over()
        await self._settle()
        self._consumer.resume(CHAIN_PLACE)
        await self._read_to_end([CHAIN_PLACE])
        await self._settle()
        self._copying.complete()

    async def catalogue_complete_ms(self) -> int | None:
        """When Kafka last said that there is nothing of the catalogue left to apply; None before it has."""
        if CATALOGUE_PLACE not in self._consumer.assignment():
            return None
        end = self._consumer.last_stable_offset(CATALOGUE_PLACE)
        asked_ms: int | None = self._consumer.last_poll_timestamp(CATALOGUE_PLACE)
        complete = (
            not self._taking
            and end is not None
            and await self._consumer.position(CATALOGUE_PLACE) >= end
        )
        return asked_ms if complete else None

    async def run(self) -> None:
        """Follow the logs; raises `KafkaError` where waiting would not help."""
        settle = False
        while True:
            try:
                settle |= await self._poll(50, PAUSE_S)
                if settle:
                    await self._settle()
                    settle = False
            except KafkaError as error:
                if not error.retriable:
                    raise
                log.warning("Kafka: %s; trying again", error)
                await asyncio.sleep(RETRY_S)

    async def stop(self) -> None:
        """Leave the cluster."""
        await leave(self._consumer.stop())

    async def _read_to_end(self, places: list[TopicPartition]) -> None:
        for place, end in (await self._consumer.end_offsets(places)).items():
            while await self._consumer.position(place) < end:
                await self._poll(200)

    async def _poll(self, timeout_ms: int, pause_s: float = 0.0) -> bool:
        """Take what has come, pausing now and then; whether arms may have to change."""
        settle = False
        come = await self._consumer.getmany(timeout_ms=timeout_ms)
        self._taking = True
        try:
            for place, records in come.items():
                for number, record in enumerate(records, 1):
                    settle |= self._take(place, record)
                    if not number % SLICE:
                        await asyncio.sleep(pause_s)
        finally:
            self._taking = False
        return settle

    def _take(self, place: TopicPartition, record: ConsumerRecord) -> bool:
        """One record; what cannot be used costs nothing else."""
        try:
            if place in WEIGHT_PLACES:
                return self._following.take(place, record)
            self._copying.positions[place] = record.offset + 1
            if place == CONTROL_PLACE:
                self._following.unusable.clear()  # whoever names a version again wants it tried again
                if not self._arms.control.apply(decode(command_decoder, record.value)):
                    log.warning("control offset %d: the command makes no sense", record.offset)
                self._copying.command(record)
                return True
            if place == CATALOGUE_PLACE:
                return self._take_item(record)
            self._users.take_history((record.key or b"").decode(), record.value)
            self._copying.history(record)
        except (UnreadableError, CatalogueError, UnicodeDecodeError) as error:
            log.warning("%s offset %d: %s", record.topic, record.offset, error)
        return False

    def _take_item(self, record: ConsumerRecord) -> bool:
        """A record of the catalogue; whether it is the first that has a codebook."""
        first, item = not self._catalogue.codebook, (record.key or b"").decode(errors="replace")
        before = self._catalogue.items.get(item)
        self._catalogue.take(record.offset, record.key, record.value)
        after = self._catalogue.items.get(item)
        moved = before is None or after is None or before.sid != after.sid
        self._copying.item(record, moved)
        CATALOGUE_ITEMS.set(len(self._catalogue.items))
        return first

    async def _settle(self) -> None:
        """Bring every arm to what `control` says, as far as versions can be had; raises `KafkaError`."""
        for manifest, reason in await self._following.advance(self._consumer):
            await self._acknowledge(manifest, reason)
        if not self._catalogue.codebook:
            return
        await self._take_newest()
        await self._swap({})
        fetched = {}
        for version in self._arms.missing() - self._following.unusable:
            policy = await self._fetch(version)
            if policy is None:
                self._following.unusable.add(version)
            else:
                fetched[version] = policy
        if fetched:
            await self._swap(fetched)

    async def _take_newest(self) -> None:
        """Let the head of the chain be the newest policy."""
        head, newest = self._following.head, self._arms.newest
        if head is None or head.number <= self._tried:
            return
        self._tried = head.number
        policy = await self._materialise(head)
        if policy is None and newest is None:
            older = await self._following.older(head.number)
            policy = None if older is None else await self._materialise(older)
        self._arms.newest = policy or newest

    async def _swap(self, fetched: dict[int, ServedPolicy]) -> None:
        for policy in self._arms.settle(fetched):
            await self._acknowledge(policy.manifest, "")
        for arm in self._arms.control.shares:
            served = self._arms.served(arm)
            if served is not None:
                SERVED_VERSION.labels(arm).set(served.version)

    async def _materialise(self, version: Version) -> ServedPolicy | None:
        """Build a version in a thread: requests go on meanwhile."""
        codebook, codes = self._catalogue.codebook, self._catalogue.valid.codes
        try:
            policy = await asyncio.to_thread(
                materialise, version, codebook, codes, self._arms.newest
            )
            self._copying.built(version, self._following.seal(version.number))
            return policy
        except WeightError as error:
            log.error("refused: %s", error)
            await self._acknowledge(version.manifest, str(error))
            return None

    async def _fetch(self, version: int) -> ServedPolicy | None:
        """One older version, ready to be served; None where it is not there or cannot be used."""
        found = await self._following.read(version)
        return None if found is None else await self._materialise(found)

    async def _acknowledge(self, manifest: Manifest, refused: str) -> None:
        """Say what became of a version; nothing depends on being heard."""
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
        try:
            async with asyncio.timeout(ACK_PATIENCE_S):
                sent = await self._words.send(WEIGHTS_ACKS, encode(ack))
        except (KafkaError, TimeoutError) as error:
            log.warning("version %d is not acknowledged: %r", manifest.version, error)
            return
        sent.add_done_callback(_heard)


def _heard(sent: asyncio.Future[RecordMetadata]) -> None:
    if not sent.cancelled() and sent.exception() is not None:
        log.warning("an acknowledgement was lost: %r", sent.exception())

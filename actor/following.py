"""Following the versions on Kafka: what both topics tell of them, put together, and where each can be had again.

The pure half is `streams.chain`; this is what an actor must know of the log besides: what is under way, where the
anchors stand, and from where deltas must be read after one.
"""

import asyncio
import logging
from typing import Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from actor.fetch import ANCHORS_PLACE, CHAIN_PLACE, fetch
from streams.chain import Chain, Version, Whole
from streams.events import UnreadableError, decode
from streams.signing import Trust
from streams.weights import Assembler, Manifest, Seal, WeightError, weights_decoder

log = logging.getLogger("dwell.actor")

WEIGHT_PLACES: Final = (ANCHORS_PLACE, CHAIN_PLACE)

OLDER: Final = 3
"""Older versions that are tried where the newest is damaged and there is none to go on with."""

Refused = tuple[Manifest, str]


class Following:
    """The newest version that could be taken, from the records of both topics."""

    def __init__(self, bootstrap: str, trust: Trust | None) -> None:
        self._bootstrap = bootstrap
        self._trust = trust
        self._chain = Chain()
        self._assemblers = {place: Assembler(trust) for place in WEIGHT_PLACES}
        self._begun: dict[TopicPartition, Manifest] = {}
        self._arrived: list[Whole] = []
        self._refused: list[Refused] = []
        self._offsets: dict[int, int] = {}
        """Where each anchor's manifest stands in the log."""
        self._seals: dict[int, Seal] = {}
        """Of the newest version, and of what has arrived or was read since."""
        self.unusable: set[int] = set()
        """Versions that were read from the log in vain; not tried again until something is said of them."""

    @property
    def head(self) -> Version | None:
        """The newest version."""
        return self._chain.head

    def seal(self, version: int) -> Seal:
        """What was signed of the newest version, or of one that was just read."""
        return self._seals[version]

    def begin(self, version: Version, seal: Seal) -> None:
        """Go on from a version that was had elsewhere."""
        self._chain.begin(version)
        self._seals[version.number] = seal

    def again(self) -> None:
        """Both topics are read by another consumer: anew, but for what the newest version makes needless."""
        self._assemblers = {place: Assembler(self._trust) for place in WEIGHT_PLACES}
        self._begun.clear()
        self._arrived.clear()
        self._offsets.clear()
        if self._chain.head is not None:
            self._chain.begin(self._chain.head)

    def take(self, place: TopicPartition, record: ConsumerRecord) -> bool:
        """Take a record of a place; whether a version has come, or cannot."""
        number, _, part = (record.key or b"").decode(errors="replace").partition("/")
        if part == "manifest" and number.isdigit():
            self._note(place, int(number), record)
        try:
            whole = self._assemblers[place].take(record.value)
        except WeightError as error:
            log.error("%s offset %d: %s", record.topic, record.offset, error)
            if place in self._begun:
                self._refused.append((self._begun.pop(place), str(error)))
            return True
        if whole is None:
            return False
        self._begun.pop(place, None)
        self._arrived.append(whole)
        self._seals[whole[0].version] = self._assemblers[place].seal
        return True

    def _note(self, place: TopicPartition, version: int, record: ConsumerRecord) -> None:
        """A manifest, or its tombstone."""
        begun = None if record.value is None else _manifest(record.value)
        if begun is None:
            self._begun.pop(place, None)
        else:
            self._begun[place] = begun
            self.unusable.discard(version)
        if place == ANCHORS_PLACE:
            self._offsets.pop(version, None)
            if record.value is not None:
                self._offsets[version] = record.offset

    def pass_over(self) -> None:
        """Of all that has arrived, only the newest is to be taken: for a start, after the anchors were read."""
        self._arrived = sorted(self._arrived, key=lambda whole: whole[0].version)[-1:]

    async def advance(self, consumer: AIOKafkaConsumer) -> list[Refused]:
        """Follow the chain over what has arrived, and go back in the log where it says so; returns what was refused.

        Raises `KafkaError`.
        """
        said, self._refused = self._refused, []
        arrived, self._arrived = self._arrived, []
        refused, again = await asyncio.to_thread(self._chain.follow, arrived)
        for manifest, error in refused:
            log.error("refused: %s", error)
            said.append((manifest, str(error)))
        if arrived and self._chain.head is None:
            older = await self.older(max(manifest.version for manifest, _ in arrived))
            if older is not None:
                self._chain.begin(older)
                _, again = self._chain.follow([])
        if self._chain.head is not None:
            self._seals = {self._chain.head.number: self._seals[self._chain.head.number]}
        if again is not None:
            await self._rewind(consumer, again)
        return said

    async def _rewind(self, consumer: AIOKafkaConsumer, again: int) -> None:
        """After an anchor, read its deltas, some of them again."""
        first = (await consumer.beginning_offsets([CHAIN_PLACE]))[CHAIN_PLACE]
        wanted = max(first, again)
        if wanted < await consumer.position(CHAIN_PLACE) or CHAIN_PLACE in consumer.paused():
            consumer.seek(CHAIN_PLACE, wanted)
            self._assemblers[CHAIN_PLACE] = Assembler(self._trust)

    async def older(self, refused: int) -> Version | None:
        """The newest version in full before one that was refused."""
        older = sorted((version for version in self._offsets if version < refused), reverse=True)
        for version in older[:OLDER]:
            found = await self.read(version)
            if found is not None:
                return found
        return None

    async def read(self, version: int) -> Version | None:
        """Read one older version from the log; None where that does not lead to it."""
        anchor = max((one for one in self._offsets if one <= version), default=None)
        if anchor is None:
            log.error("version %d is not in the log", version)
            return None
        try:
            found, seal = await fetch(self._bootstrap, self._offsets[anchor], version, self._trust)
        except WeightError as error:
            log.error("%s", error)
            return None
        self._seals[version] = seal
        return found


def _manifest(value: bytes) -> Manifest | None:
    try:
        part = decode(weights_decoder, value)
    except UnreadableError:
        return None
    return part if isinstance(part, Manifest) else None

"""The rest of the loop as an actor sees it: what stands on Kafka, and an actor on it."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from kafka import KafkaProducer, TopicPartition

from actor.api import application
from actor.service import Service
from actor.settings import ActorSettings
from learner.decoder import LazyDecoder
from learner.policy import build, load_state, state_of
from learner.settings import PolicySettings
from streams.blocks import State, blocked_state, digest_of
from streams.clients import consumer, producer, records
from streams.control import DEFAULT_SHARES, arm_of
from streams.delta import changes
from streams.events import (
    Command,
    Exposure,
    Feedback,
    SemanticId,
    command_decoder,
    decode,
    encode,
    exposure_decoder,
    feedback_decoder,
)
from streams.settings import KafkaSettings
from streams.signing import Signer
from streams.topics import (
    CATALOGUE,
    CONTROL,
    EXPOSURES,
    FEEDBACK,
    HISTORIES,
    WEIGHTS,
    WEIGHTS_ACKS,
    WEIGHTS_ANCHORS,
)
from streams.weights import Ack, Manifest, ack_decoder, pack, schema_of
from tests.actor.asgi import Answer, call
from tests.learner.makers import CODEBOOK, random_catalogue, random_model, upsert

CODES, ROWS, ITEMS = 5, 64, 80
POLICY = PolicySettings(codes=CODES, user_rows=ROWS)

Damage = Callable[[Manifest, list[tuple[str, bytes]]], list[tuple[str, bytes]]]


def user_of(arm: str, number: int = 0) -> str:
    """The number-th user whom the hash gives to an arm."""
    found = (f"{arm}{n}" for n in range(10_000) if arm_of(f"{arm}{n}", DEFAULT_SHARES) == arm)
    return [next(found) for _ in range(number + 1)][-1]


class World:
    """Writes to a cluster, and reads what an actor wrote."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.kafka = kafka
        self.states: dict[int, State] = {}
        self.signer: Signer | None = None
        self._client: KafkaProducer | None = None

    def readable(self) -> bool:
        """Whether all that was written can be read: no transaction waits for its markers."""
        places = [TopicPartition(HISTORIES, at) for at in range(self.kafka.partitions)]
        places += [TopicPartition(at, 0) for at in (CATALOGUE, CONTROL, WEIGHTS, WEIGHTS_ANCHORS)]
        ends = []
        for isolation in ("read_committed", "read_uncommitted"):
            with closing(consumer(self.kafka.bootstrap, isolation)) as client:
                ends.append(client.end_offsets(places))
        return bool(ends[0] == ends[1])

    def close(self) -> None:
        """Leave the cluster; the next write comes back."""
        if self._client is not None:
            self._client.close(timeout=5)
            self._client = None

    def write(self, *parts: tuple[str, bytes | None, bytes | None], partition: int = 0) -> None:
        """Topic, key and value of each record, in one transaction."""
        if self._client is None:
            self._client = producer(
                self.kafka.bootstrap, transactional_id="world", max_request_size=1 << 20
            )
            self._client.init_transactions()
        self._client.begin_transaction()
        for topic, key, value in parts:
            self._client.send(topic, value, key, partition=partition)
        self._client.commit_transaction()

    def fill_catalogue(self, codebook: str = CODEBOOK, items: int = ITEMS) -> None:
        """A catalogue with shared leaves."""
        made = random_catalogue(CODES, items, seed=6, shared=items // 4)
        self.upsert(*((item, entry.sid) for item, entry in made.items.items()), codebook=codebook)

    def upsert(self, *items: tuple[str, SemanticId], codebook: str = CODEBOOK) -> None:
        """Items, each at its leaf."""
        self.write(
            *(
                (CATALOGUE, item.encode(), upsert(item, sid, codebook, 20_000))
                for item, sid in items
            )
        )

    def delete(self, *items: str) -> None:
        """Tombstones."""
        self.write(*((CATALOGUE, item.encode(), None) for item in items))

    def publish(
        self,
        version: int,
        codebook: str = CODEBOOK,
        damage: Damage = lambda _, parts: parts,
        codes: int = CODES,
        model: LazyDecoder | None = None,
    ) -> None:
        """A version with weights of its own, or those of `model`."""
        preset = build("tiny", 2, 1).preset
        state = state_of(model or random_model(preset, codes, ROWS, seed=100 + version))
        self.states[version] = state
        manifest = self._manifest(version, codebook, codes)
        parts = damage(manifest, pack(manifest, state, self.signer))
        self.write(*((WEIGHTS_ANCHORS, key.encode(), value) for key, value in parts))

    def move_on(self, damage: Damage = lambda _, parts: parts, anchor: bool = False) -> None:
        """The next version as a delta of the newest one, and in full too where asked for."""
        base = max(self.states)
        state = {name: value.copy() for name, value in self.states[base].items()}
        state["context.users.weight"][base % ROWS] += 0.1
        state["bos"] += np.float32(0.01 * base)
        self.states[base + 1] = state
        content, _ = changes(blocked_state(self.states[base]), state)
        manifest = self._manifest(base + 1, CODEBOOK, CODES, base)
        parts = damage(manifest, pack(manifest, content, self.signer))
        self.write(*((WEIGHTS, key.encode(), value) for key, value in parts))
        if anchor:
            whole = self._manifest(base + 1, CODEBOOK, CODES)
            packed = pack(whole, state, self.signer)
            self.write(*((WEIGHTS_ANCHORS, key.encode(), value) for key, value in packed))

    def _manifest(self, version: int, codebook: str, codes: int, base: int = 0) -> Manifest:
        state = self.states[version]
        return Manifest(
            version=version,
            lineage="l",
            codebook=codebook,
            preset="tiny",
            codes=codes,
            user_rows=ROWS,
            schema=schema_of(state),
            digest=digest_of(state),
            base=base,
            size_bytes=0,
            chunks=0,
            journal=[],
            watermark_ms=0,
            created_ms=int(time.time() * 1000),
        )

    def model(self, version: int) -> LazyDecoder:
        """A version's policy, rebuilt."""
        model = build("tiny", CODES, ROWS)
        load_state(model, self.states[version])
        return model.eval().requires_grad_(False)

    def pin(self, arm: str, version: int) -> None:
        """A command."""
        self._command(action="pin", arm=arm, version=version)

    def follow(self, arm: str) -> None:
        """A command."""
        self._command(action="follow", arm=arm)

    def answer(self, restored: int, version: int) -> None:
        """A learner's, to a roll-back."""
        self._command(action="follow", arm="learning", version=version, restored=restored)

    def commands(self) -> list[Command]:
        """What stands on `control`."""
        found = records(self.kafka.bootstrap, CONTROL)
        return [decode(command_decoder, record.value) for record in found]

    def _command(self, **what: Any) -> None:
        command = Command(id="c", time_ms=0, who="test", why="test", **what)
        self.write((CONTROL, None, encode(command)))

    def exposures(self) -> list[Exposure]:
        """What is on the log."""
        read = [
            decode(exposure_decoder, record.value)
            for partition in range(self.kafka.partitions)
            for record in records(self.kafka.bootstrap, EXPOSURES, partition)
        ]
        return [event for event in read if isinstance(event, Exposure)]

    def feedback(self) -> list[Feedback]:
        """What is on the log."""
        read = [
            decode(feedback_decoder, record.value)
            for partition in range(self.kafka.partitions)
            for record in records(self.kafka.bootstrap, FEEDBACK, partition)
        ]
        return [event for event in read if isinstance(event, Feedback)]

    def acks(self) -> list[Ack]:
        """What actors said of versions."""
        found = records(self.kafka.bootstrap, WEIGHTS_ACKS)
        return [decode(ack_decoder, record.value) for record in found]


@dataclass(frozen=True)
class Actor:
    """An open service and its HTTP application."""

    service: Service
    app: FastAPI

    async def recommend(self, user: str, count: int = 4) -> Answer:
        """One request."""
        return await call(self.app, "POST", "/recommend", {"user": user, "count": count})

    async def feed(self, *events: dict[str, object]) -> Answer:
        """One request of feedback."""
        return await call(self.app, "POST", "/feedback", {"events": list(events)})

    async def ready(self) -> list[str]:
        """What is missing."""
        answer = await call(self.app, "GET", "/ready")
        assert (answer.status == 200) == (answer.json["missing"] == [])
        missing: list[str] = answer.json["missing"]
        return missing

    async def arms(self) -> dict[str, int]:
        """Version by arm."""
        arms: dict[str, int] = (await call(self.app, "GET", "/version")).json["arms"]
        return arms


@asynccontextmanager
async def acting(
    world: World, data_dir: Path | None = None, **settings: Any
) -> AsyncIterator[Actor]:
    """An actor on the world's cluster, while inside; patient, for a busy machine must not change its answers."""
    actor = ActorSettings(**({"patience_s": 60.0, "kafka_patience_s": 60.0} | settings))
    with tempfile.TemporaryDirectory() as own:
        service = Service("actor:1", world.kafka, POLICY, actor, data_dir or Path(own))
        async with service.open():
            yield Actor(service, application(service))


async def until(true: Callable[[], Any], patience_s: float = 30.0) -> None:
    """Wait for a condition, which may be a coroutine's."""
    deadline = time.monotonic() + patience_s
    while True:
        found = true()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)

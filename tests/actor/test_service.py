"""An actor on a real broker."""

import asyncio
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaConnectionError, OffsetOutOfRangeError

from actor.recommend import decode
from actor.sampling import Slates
from actor.service import Service, ServiceError
from actor.settings import ActorSettings
from learner.batch import assemble
from learner.catalogue import Catalogue
from learner.masking import masked_log_softmax
from ops.broker import EmbeddedBroker
from streams.blocks import digest_of
from streams.clients import records
from streams.events import (
    BEHAVIOUR,
    Behaviour,
    Exposure,
    History,
    encode,
    unpack_leaves,
)
from streams.intake import partition_of
from streams.topics import CATALOGUE, CONTROL, EXPOSURES, HISTORIES, WEIGHTS_ANCHORS
from streams.weights import Ack, Chunk, Manifest, pack
from tests.actor.asgi import call
from tests.actor.slates import sampled
from tests.actor.world import CODES, ITEMS, POLICY, ROWS, Actor, World, acting, until, user_of
from tests.learner.cluster import PARTITIONS, refused

LEARNING, CONTROLLED = user_of("learning"), user_of("control")


def played(request: str, position: int, **more: object) -> dict[str, object]:
    event: dict[str, object] = {
        "event": f"{request}-{position}",
        "user": LEARNING,
        "request": request,
        "kind": "heartbeat",
        "position": position,
        "play_ms": 7000,
    }
    return {**event, **more}


def context_of(exposure: Exposure) -> list[tuple[tuple[int, ...], int]]:
    """Semantic ID and play time of each behaviour that the policy saw."""
    read = np.frombuffer(exposure.context, BEHAVIOUR)
    return [(tuple(int(code) for code in one["codes"]), int(one["play_ms"])) for one in read]


def catalogue_on(world: World) -> Catalogue:
    """The catalogue as anybody reads it from the log."""
    catalogue = Catalogue(CODES)
    for record in records(world.kafka.bootstrap, CATALOGUE):
        catalogue.take(record.offset, record.key, record.value)
    return catalogue


ROUNDING = 1e-4
"""Nats. The policies here are random and have logits of 15: two orders of adding up differ by 8e-5 at most."""


def off(world: World, exposures: list[Exposure], version: int | None = None) -> float:
    """Largest difference of logged and recomputed log-probabilities, per level in nats."""
    catalogue, worst = catalogue_on(world), 0.0
    for exposure in exposures:
        model = world.model(exposure.policy_version if version is None else version)
        batch = assemble([sampled(exposure)], catalogue.valid, model.preset.context, ROWS)
        with torch.no_grad():
            logits = model(model.process(batch.contexts), batch.sids_BkL) / exposure.temperature
            logp = masked_log_softmax(logits, batch.mask_BkLK)
            found = logp.gather(-1, batch.sids_BkL.unsqueeze(-1)).squeeze(-1)
        worst = max(worst, float((found - batch.targets.logp_old_BkL).abs().max()))
    return worst


async def test_an_exposure_is_on_the_log_when_its_answer_arrives(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, temperature=0.8) as actor:
        answer = await actor.recommend(LEARNING)
        assert answer.status == 200
        (exposure,) = await asyncio.to_thread(world.exposures)
    slate = answer.json
    assert slate["request"] == exposure.request
    assert (slate["user"], slate["arm"], slate["policy_version"]) == (LEARNING, "learning", 1)
    assert slate["catalogue_version"] == exposure.catalogue_version == catalogue_on(world).version
    assert [one["item"] for one in slate["items"]] == [one.item for one in exposure.items]
    assert [one["logp"] for one in slate["items"]] == [one.logp_decision for one in exposure.items]
    assert [one["position"] for one in slate["items"]] == [0, 1, 2, 3]
    assert exposure.temperature == 0.8
    assert abs(exposure.time_ms / 1000 - time.time()) < 60
    assert off(world, [exposure]) < ROUNDING


async def test_records_stand_in_their_users_partitions(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    users = [user_of("learning", n) for n in range(4)] + [user_of("control", n) for n in range(4)]
    async with acting(world) as actor:
        await asyncio.gather(*(actor.recommend(user) for user in users))
    for partition in range(PARTITIONS):
        for record in records(world.kafka.bootstrap, EXPOSURES, partition):
            assert partition_of(record.key.decode(), PARTITIONS) == partition
    assert {exposure.user for exposure in world.exposures()} == set(users)


async def test_nothing_is_served_before_there_are_weights_and_a_catalogue(world: World) -> None:
    async with acting(world) as actor:
        assert await actor.ready() == ["catalogue", "weights"]
        answer = await actor.recommend(LEARNING)
        assert answer.status == 503
        assert "weights" in answer.json["detail"]
        world.publish(1)
        await asyncio.sleep(0.3)
        assert await actor.ready() == ["catalogue", "weights"]  # of which codebook, is not known
        assert (await call(actor.app, "GET", "/health")).status == 200
        await asyncio.to_thread(world.fill_catalogue)
        await until(lambda: serves(actor, 1))
        assert await actor.ready() == []
        assert (await actor.recommend(LEARNING)).status == 200
    assert len(world.exposures()) == 1


async def serves(actor: Actor, version: int, arm: str = "learning") -> bool:
    return (await actor.arms()).get(arm) == version


async def test_ones_own_feedback_is_in_the_context_of_the_next_request(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        slate = (await actor.recommend(LEARNING)).json
        answer = await actor.feed(
            played(slate["request"], 0, item=slate["items"][0]["item"]),
            played(slate["request"], 2, play_ms=900, client_time_ms=5),
        )
        assert (answer.status, answer.json) == (200, {"accepted": 2})
        await actor.recommend(LEARNING)
        before = int(time.time() * 1000)
        exposures = await asyncio.to_thread(world.exposures)
        feedback = await asyncio.to_thread(world.feedback)
    first, second = sorted(exposures, key=lambda one: one.time_ms)
    assert context_of(first) == []
    expected = [(first.items[0].sid, 7000), (first.items[2].sid, 900)]
    assert context_of(second) == expected
    assert off(world, [second]) < ROUNDING
    assert [(one.position, one.play_ms, one.client_time_ms) for one in feedback] == [
        (0, 7000, None),
        (2, 900, 5),
    ]
    assert all(first.time_ms <= one.time_ms <= before for one in feedback)


async def test_what_was_shown_lately_is_not_shown_again(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    history = History(user=LEARNING, behaviours=[], shown=["i0", "i1", "i2"])
    place = partition_of(LEARNING, PARTITIONS)
    world.write((HISTORIES, LEARNING.encode(), encode(history)), partition=place)
    async with acting(world) as actor:
        for _ in range(5):
            assert (await actor.recommend(LEARNING, 12)).status == 200
        exposures = await asyncio.to_thread(world.exposures)
    catalogue = catalogue_on(world)
    shown = {"i0", "i1", "i2"}
    for exposure in sorted(exposures, key=lambda one: one.time_ms):
        excluded = {tuple(sid) for sid in unpack_leaves(exposure.excluded).tolist()}
        full = catalogue.valid.exhausted(shown, catalogue.version)
        assert excluded == {
            (int(key) // CODES**2, int(key) // CODES % CODES, int(key) % CODES) for key in full
        }
        items = {item.item for item in exposure.items}
        assert not items & shown
        assert not {item.sid for item in exposure.items} & excluded
        shown |= items
    assert len(shown) == 63
    assert off(world, exposures) < ROUNDING


async def test_a_user_who_has_seen_everything_gets_a_sentence(world: World) -> None:
    world.upsert(("a", (0, 0, 0)), ("b", (0, 0, 1)))
    world.publish(1)
    async with acting(world) as actor:
        assert len((await actor.recommend(LEARNING)).json["items"]) == 2
        answer = await actor.recommend(LEARNING)
        assert answer.status == 503
        assert "no item of the catalogue is left" in answer.json["detail"]
    assert len(world.exposures()) == 1


async def test_each_answer_is_of_one_version_while_versions_change_under_load(
    world: World,
) -> None:
    world.fill_catalogue(items=ITEMS)
    world.publish(1)
    answered: list[tuple[float, dict[str, Any]]] = []
    async with acting(world, exclude_shown=16) as actor:
        stop = asyncio.Event()

        async def load(number: int) -> None:
            user = user_of("learning", number)
            while not stop.is_set():
                began = time.monotonic()
                answer = await actor.recommend(user, 3)
                assert answer.status == 200
                answered.append((time.monotonic() - began, answer.json))

        clients = [asyncio.create_task(load(number)) for number in range(8)]
        for version in range(2, 8):
            await asyncio.to_thread(world.publish, version)
            if version % 3 == 0:
                await asyncio.to_thread(world.delete, f"i{version}")
            await until(partial(serves, actor, version))
        stop.set()
        await asyncio.gather(*clients)
        exposures = await asyncio.to_thread(world.exposures)
    versions = {exposure.policy_version for exposure in exposures}
    assert len(versions) >= 5
    assert {slate["request"] for _, slate in answered} == {one.request for one in exposures}
    by_version: dict[int, list[Exposure]] = {}
    for exposure in exposures:
        by_version.setdefault(exposure.policy_version, []).append(exposure)
    some = [exposure for group in by_version.values() for exposure in group[:6]]
    assert off(world, some) < ROUNDING
    assert off(world, by_version[max(versions)][:1], version=min(versions)) > 0.05


async def catalogue_applied(actor: Actor, world: World) -> int:
    """Until the actor has applied all of the catalogue; its version."""
    last = catalogue_on(world).version

    async def applied() -> bool:
        return bool((await call(actor.app, "GET", "/version")).json["catalogue_version"] == last)

    await until(applied)
    return last


async def test_deleted_items_are_not_served(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, exclude_shown=0) as actor:
        world.delete(*(f"i{number}" for number in range(40)))
        await catalogue_applied(actor, world)
        slate = (await actor.recommend(LEARNING, 30)).json
    assert all(int(one["item"][1:]) >= 40 for one in slate["items"])


def ack_of(acks: list[Ack], version: int) -> Ack:
    (ack,) = [one for one in acks if one.version == version]
    return ack


async def test_a_version_is_acknowledged_when_it_is_served(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        await asyncio.to_thread(world.publish, 2)
        await until(lambda: serves(actor, 2))
        await until(lambda: len(world.acks()) == 2)
    ack = ack_of(world.acks(), 2)
    assert (ack.actor, ack.applied, ack.reason) == ("actor:1", True, "")
    assert 0 <= ack.applied_ms - ack.created_ms < 20_000


def wrong_digest(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    manifest.digest = "0" * 32
    return [(parts[0][0], encode(manifest)), *parts[1:]]


def other_schema(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    manifest.schema = manifest.schema[1:]
    return [(parts[0][0], encode(manifest)), *parts[1:]]


def other_preset(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    manifest.preset = "gigantic"
    return [(parts[0][0], encode(manifest)), *parts[1:]]


def other_rows(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    manifest.user_rows += 1
    return [(parts[0][0], encode(manifest)), *parts[1:]]


def truncated(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    key, _ = parts[1]
    chunk = Chunk(version=manifest.version, index=0, data=b"x" * 100)
    return [parts[0], (key, encode(chunk)), parts[-1]]


def chunk_missing(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    del manifest
    return [parts[0], parts[-1]]


def rubbish(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    key, _ = parts[1]
    chunk = Chunk(version=manifest.version, index=0, data=b"x" * manifest.size_bytes)
    return [parts[0], (key, encode(chunk)), parts[-1]]


def unreadable(manifest: Manifest, parts: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    del manifest
    return [parts[0], (parts[1][0], b"\x93garbage"), parts[-1]]


DAMAGES = {
    "wrong digest": (wrong_digest, "digest"),
    "other schema": (other_schema, "schema differs"),
    "other preset": (other_preset, "gigantic"),
    "other rows": (other_rows, "users.weight"),
    "truncated": (truncated, "bytes"),
    "chunk missing": (chunk_missing, "chunk"),
    "rubbish": (rubbish, ""),
    "unreadable": (unreadable, "malformed"),
}


async def test_a_version_that_cannot_be_taken_is_refused_aloud_and_the_old_one_serves_on(
    world: World,
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        for number, (damage, _) in enumerate(DAMAGES.values()):
            await asyncio.to_thread(world.publish, 2 + number, damage=damage)
        refused = 2 + len(DAMAGES)
        await asyncio.to_thread(world.publish, refused, codebook="other")
        await asyncio.to_thread(world.publish, refused + 1, codes=CODES + 1)
        await until(lambda: len(world.acks()) == 3 + len(DAMAGES))
        assert await actor.arms() == {"control": 1, "learning": 1}
        assert await actor.ready() == []
        assert (await actor.recommend(LEARNING)).json["policy_version"] == 1
        await asyncio.to_thread(world.publish, 20)
        await until(lambda: serves(actor, 20))
    acks = world.acks()
    for number, (name, (_, says)) in enumerate(DAMAGES.items()):
        ack = ack_of(acks, 2 + number)
        assert not ack.applied, name
        assert says in ack.reason, name
        assert ack.created_ms > 0
        assert "\n" not in ack.reason
    assert "codebook other, the catalogue of c0debook" in ack_of(acks, refused).reason
    assert "6 codes a level, policy.codes is 5" in ack_of(acks, refused + 1).reason
    assert [ack.version for ack in acks if ack.applied] == [1, 20]


async def test_an_actor_that_starts_on_a_damaged_version_takes_the_one_before(
    world: World,
) -> None:
    world.fill_catalogue()
    world.publish(1)
    world.publish(2)
    world.publish(3, damage=wrong_digest)
    world.publish(4, damage=truncated)
    async with acting(world) as actor:
        assert await actor.arms() == {"control": 2, "learning": 2}
        assert await actor.ready() == []


async def test_control_moves_an_arm_to_an_older_version_without_the_learner(world: World) -> None:
    world.fill_catalogue()
    for version in (1, 2, 3):
        world.publish(version)
    world.pin("control", 1)
    async with acting(world) as actor:
        assert await actor.arms() == {"control": 1, "learning": 3}
        assert (await actor.recommend(CONTROLLED)).json["policy_version"] == 1
        await asyncio.to_thread(world.pin, "learning", 2)
        await until(lambda: serves(actor, 2))
        assert (await actor.recommend(LEARNING)).json["policy_version"] == 2
        await asyncio.to_thread(world.publish, 4)
        await asyncio.to_thread(world.follow, "control")
        await until(lambda: serves(actor, 4, "control"))
        assert await actor.arms() == {"control": 4, "learning": 2}
        exposures = await asyncio.to_thread(world.exposures)
    assert off(world, exposures) < ROUNDING
    assert {one.version for one in world.acks() if one.applied} == {1, 2, 3, 4}


async def test_a_pin_to_a_version_that_is_not_there_is_looked_for_once_and_obeyed_when_it_comes(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        await asyncio.to_thread(world.pin, "learning", 3)
        await until(lambda: "version 3 is not in the log" in caplog.text)
        assert await actor.ready() == ["weights"]
        assert (await actor.recommend(LEARNING)).json["policy_version"] == 1
        await asyncio.to_thread(world.publish, 2)
        await until(lambda: serves(actor, 2, "control"))
        assert await actor.arms() == {"control": 2, "learning": 1}
        assert caplog.text.count("3 is not in the log") == 1
        for version in (3, 4):
            await asyncio.to_thread(world.publish, version)
        await until(lambda: serves(actor, 3))
        assert await actor.ready() == []


async def test_records_that_cannot_be_used_are_passed_over(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        world.write(
            (CONTROL, None, b"rubbish"),
            (CATALOGUE, b"x", b"rubbish"),
            (HISTORIES, LEARNING.encode(), b"rubbish"),
            (HISTORIES, b"\xff\xfe", b"rubbish"),
            (WEIGHTS_ANCHORS, b"", b"rubbish"),
            (WEIGHTS_ANCHORS, b"\xff/manifest", b"rubbish"),
            (WEIGHTS_ANCHORS, b"7/manifest", b"rubbish"),
        )
        world.publish(2)
        await until(lambda: serves(actor, 2))
        assert await actor.ready() == []
        assert (await actor.recommend(LEARNING)).status == 200


async def test_a_history_from_the_log_is_in_the_context(world: World) -> None:
    world.upsert(("a", (0, 1, 2)), ("b", (3, 4, 0)))
    world.publish(1)
    plays = [
        Behaviour(request="h", position=n, item=item, end_ms=n, play_ms=10 + n, duration_ms=99)
        for n, item in enumerate(["a", "gone", "b"])
    ]
    history = History(user=LEARNING, behaviours=plays, shown=[])
    place = partition_of(LEARNING, PARTITIONS)
    world.write((HISTORIES, LEARNING.encode(), encode(history)), partition=place)
    async with acting(world) as actor:
        await actor.recommend(LEARNING, 2)
    (exposure,) = world.exposures()
    assert context_of(exposure) == [((0, 1, 2), 10), ((3, 4, 0), 12)]


@refused
async def test_while_the_broker_is_away_requests_are_served_and_once_it_is_back_all_are_on_the_log(
    world: World, own_broker: EmbeddedBroker
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, kafka_patience_s=0.5) as actor:
        good = (await actor.recommend(LEARNING)).json
        world.close()
        await asyncio.to_thread(own_broker.stop)
        served, took = [good["request"]], []
        for number in range(5):
            began = time.monotonic()
            answer = await actor.recommend(LEARNING)
            fed = await actor.feed(played(good["request"], 0, event=f"e{number}"))
            took.append(time.monotonic() - began)
            assert (answer.status, fed.status) == (200, 200)
            served.append(answer.json["request"])
        assert max(took[1:]) < 0.4, "only the first one waits to see that Kafka is away"
        assert (await call(actor.app, "GET", "/health")).status == 200
        assert await actor.ready() == []
        own_broker.start()
        await until(lambda: actor.service.spooled == 0)
        assert (await actor.feed(played(good["request"], 1, event="kept"))).status == 200
        exposures = await asyncio.to_thread(world.exposures)
        assert once(exposure.request for exposure in exposures) == served
        feedback = await asyncio.to_thread(world.feedback)
        assert once(one.event for one in feedback) == [*(f"e{n}" for n in range(5)), "kept"]
        await asyncio.to_thread(world.publish, 2)
        await until(lambda: serves(actor, 2))
        assert await actor.ready() == []
        assert not actor.service.fault


def once(ids: Iterable[str]) -> list[str]:
    """In the order of their first copies."""
    return list(dict.fromkeys(ids))


@refused
async def test_an_actor_can_leave_while_the_broker_is_away(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, tmp_path, kafka_patience_s=0.3) as actor:
        world.close()
        await asyncio.to_thread(own_broker.stop)
        answer = await actor.recommend(LEARNING)
        assert answer.status == 200
        left = time.monotonic()
    took = time.monotonic() - left
    own_broker.start()
    assert took < 10
    assert world.exposures() == []
    async with acting(world, tmp_path) as actor:
        await until(lambda: actor.service.spooled == 0)
    assert [exposure.request for exposure in world.exposures()] == [answer.json["request"]]


async def test_two_actors_do_not_share_a_spool(world: World, tmp_path: Path) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, tmp_path) as actor:
        with pytest.raises(ServiceError, match=r"another process uses it.*actor\.member"):
            async with acting(world, tmp_path):
                pass
        async with acting(world, tmp_path, member="second") as second:
            for one in (actor, second):
                assert (await one.recommend(LEARNING)).status == 200


async def test_kafka_that_does_not_answer_at_the_start_is_one_sentence(
    world: World, tmp_path: Path
) -> None:
    nowhere = replace(world.kafka, bootstrap="127.0.0.1:9")
    service = Service("actor:1", nowhere, POLICY, ActorSettings(), tmp_path)
    with pytest.raises(ServiceError, match=r"Kafka at 127\.0\.0\.1:9: ") as caught:
        async with service.open():
            pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OffsetOutOfRangeError({"weights.anchors": 5}), "reading Kafka ended"),
        (RuntimeError("a defect"), "reading Kafka ended: a defect"),
    ],
)
async def test_a_reader_that_ends_does_not_go_unnoticed(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    says: str,
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        assert await actor.ready() == []
        real = AIOKafkaConsumer.getmany

        async def broken(self: AIOKafkaConsumer, **more: object) -> object:
            del self, more
            raise error

        monkeypatch.setattr(AIOKafkaConsumer, "getmany", broken)
        await asyncio.wait_for(actor.service.failed.wait(), 10)
        monkeypatch.setattr(AIOKafkaConsumer, "getmany", real)
        (missing,) = await actor.ready()
        assert says in missing
        assert says in actor.service.fault
    assert says in caplog.text


async def test_a_passing_fault_of_kafka_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        real, faults = AIOKafkaConsumer.getmany, 3

        async def shaky(self: AIOKafkaConsumer, **more: object) -> object:
            nonlocal faults
            if faults:
                faults -= 1
                raise KafkaConnectionError("gone for a moment")
            return await real(self, **more)

        monkeypatch.setattr("actor.subscription.RETRY_S", 0.01)
        monkeypatch.setattr(AIOKafkaConsumer, "getmany", shaky)
        await asyncio.to_thread(world.publish, 2)
        await until(lambda: serves(actor, 2))
        assert faults == 0
        assert not actor.service.fault


async def test_weights_whose_logits_are_not_finite_give_fallback_slates_and_harm_no_other_arm(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fill_catalogue()
    world.publish(1)
    world.pin("control", 1)

    def poisoned(manifest: Manifest, _: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        state = world.states[2]
        state["bos"][:] = math.nan
        manifest.digest = digest_of(state)
        return pack(manifest, state)

    world.publish(2, damage=poisoned)
    async with acting(world) as actor:
        assert await actor.arms() == {"control": 1, "learning": 2}
        answer = await actor.recommend(LEARNING)
        assert (answer.status, answer.json["fallback"]) == (200, True)
        answer = await actor.recommend(CONTROLLED)
        assert (answer.status, answer.json["fallback"]) == (200, False)
        assert not actor.service.fault
    assert "not finite" in caplog.text


class Held:
    """The policy, which answers when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()

        def held(*arguments: Any) -> Slates:
            self.begun.set()
            self.go.wait(20)
            return decode(*arguments)

        monkeypatch.setattr("actor.service.decode", held)


async def test_a_request_for_which_there_is_no_time_gets_valid_items_and_says_whose_they_are(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill_catalogue()
    world.publish(1)
    held = Held(monkeypatch)
    async with acting(world, patience_s=0.2) as actor:
        began = time.monotonic()
        answer = await actor.recommend(LEARNING, 5)
        assert time.monotonic() - began < 2.0
        assert (answer.status, answer.json["fallback"]) == (200, True)
        again = await actor.recommend(LEARNING, 5)
        shown = [item["item"] for item in answer.json["items"] + again.json["items"]]
        assert len(set(shown)) == 10, "what was shown is not shown again"
        held.go.set()
        later: list[dict[str, Any]] = []

        async def by_the_policy() -> bool:
            later.append((await actor.recommend(LEARNING, 2)).json)
            return not later[-1]["fallback"]

        await until(by_the_policy)
    by_request = {exposure.request: exposure for exposure in world.exposures()}
    fallback = by_request[answer.json["request"]]
    assert (fallback.decode_mode, fallback.next_score, fallback.draw) == ("other", None, None)
    assert [(item.source, item.logp_levels) for item in fallback.items] == [("other", None)] * 5
    assert by_request[later[-1]["request"]].decode_mode == "gumbel_top_k"


async def test_who_waits_while_the_catalogue_moves_is_drawn_over_the_new_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill_catalogue()
    world.publish(1)
    held = Held(monkeypatch)
    async with acting(world, exclude_shown=0, patience_s=20.0) as actor:
        before = catalogue_on(world).version
        first = asyncio.create_task(actor.recommend(user_of("learning", 0), 5))
        await until(held.begun.is_set)
        waiting = asyncio.create_task(actor.recommend(user_of("learning", 1), 30))
        await asyncio.sleep(0.1)
        world.delete(*(f"i{number}" for number in range(40)))
        after = await catalogue_applied(actor, world)
        later = asyncio.create_task(actor.recommend(user_of("learning", 2), 30))
        await asyncio.sleep(0.1)
        held.go.set()
        answers = [(await one).json["request"] for one in (first, waiting, later)]
    by_request = {exposure.request: exposure for exposure in world.exposures()}
    exposures = [by_request[request] for request in answers]
    assert [one.catalogue_version for one in exposures] == [before, after, after]
    assert all(int(item.item[1:]) >= 40 for one in exposures[1:] for item in one.items)
    assert [one.draw.rows for one in exposures if one.draw] == [1, 2, 2], "and with those who come"
    assert off(world, exposures) < ROUNDING


async def test_more_than_may_wait_are_told_to_come_again_and_the_others_are_served(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill_catalogue()
    world.publish(1)
    held = Held(monkeypatch)
    async with acting(world, max_waiting=3, max_batch=2, patience_s=10.0) as actor:
        first = asyncio.create_task(actor.recommend(user_of("learning", 0)))
        await until(held.begun.is_set)
        others = [asyncio.create_task(actor.recommend(user_of("learning", n))) for n in range(1, 9)]
        await until(lambda: sum(task.done() for task in others) == 5)
        held.go.set()
        answers = await asyncio.gather(first, *others)
        statuses = [answer.status for answer in answers]
        assert statuses == [200] * 4 + [429] * 5
        assert answers[-1].headers["retry-after"] == "1"
        assert "wait already" in answers[-1].json["detail"]
        assert (await actor.recommend(user_of("learning", 9))).status == 200
    assert len(world.exposures()) == 5

"""An actor started while the broker is away serves from its copy, and is one that was cut off when that is back."""

import asyncio
import shutil
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actor.kept import Copy, copy_folder
from actor.service import ServiceError
from actor.settings import ActorSettings
from learner.catalogue import Catalogue
from ops.audit_propensity import audit_propensity
from ops.broker import EmbeddedBroker
from ops.config import Config
from streams.events import Exposure, History, encode, unpack_leaves
from streams.intake import partition_of
from streams.topics import HISTORIES
from tests.actor.test_process import asked, free_port, process
from tests.actor.test_service import (
    CONTROLLED,
    LEARNING,
    ROUNDING,
    catalogue_on,
    context_of,
    off,
    played,
    serves,
)
from tests.actor.world import CODES, POLICY, Actor, World, acting, until, user_of
from tests.learner.cluster import PARTITIONS, refused


async def copied(actor: Actor, folder: Path, versions: set[int]) -> None:
    """Wait until the copy has these versions, and everything read so far."""

    def there() -> bool:
        kept = folder / "actor" / "actor" / "copy" / "versions"
        return {int(path.name) for path in kept.iterdir() if path.name.isdigit()} == versions

    await until(there)
    assert not actor.service.fault


async def gone(world: World, broker: EmbeddedBroker) -> None:
    """Kill the broker, but not between a commit and its markers (docs/outage.md)."""
    await until(lambda: asyncio.to_thread(world.readable))
    world.close()
    await asyncio.to_thread(broker.kill)


def history(user: str) -> tuple[str, bytes, bytes]:
    made = History(user=user, behaviours=[], shown=["i7", "i8"])
    return HISTORIES, user.encode(), encode(made)


def tree_is_the_logs(world: World, exposures: list[Exposure]) -> None:
    """What was served was alive at the version that the exposure names, as anybody reads it from the log."""
    catalogue: Catalogue = catalogue_on(world)
    for exposure in exposures:
        for item in exposure.items:
            assert catalogue.valid.sid_of(item.item, exposure.catalogue_version) == item.sid


@refused
async def test_an_actor_started_without_a_broker_serves_and_follows_it_when_it_is_back(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    world.fill_catalogue()
    world.pin("control", 1)
    world.publish(1)
    world.publish(2)
    world.write(history(LEARNING), partition=partition_of(LEARNING, PARTITIONS))
    settings: dict[str, Any] = {"explore_slots": 2, "explore_span": 40}
    async with acting(world, tmp_path, **settings) as actor:
        first = await actor.recommend(LEARNING)
        await asyncio.to_thread(world.delete, "i1", "i2")
        await copied(actor, tmp_path, {1, 2})

        async def deleted() -> bool:
            return "i1" not in actor.service._catalogue.items

        await until(deleted)
    await gone(world, own_broker)
    began, began_ms = time.monotonic(), time.time() * 1000
    async with acting(world, tmp_path, **settings) as actor:
        assert time.monotonic() - began < 5.0
        assert await actor.ready() == []
        assert await actor.arms() == {"control": 1, "learning": 2}
        items = actor.service._catalogue.items
        assert "i1" not in items
        assert "i2" not in items
        slates = [first, *[await actor.recommend(LEARNING) for _ in range(3)]]
        slates.append(await actor.recommend(CONTROLLED))
        assert [slate.status for slate in slates] == [200] * 5
        request = slates[1].json["request"]
        assert (await actor.feed(played(request, 0))).status == 200
        assert actor.service.spooled == 5
        copied_ms = actor.service._ties.presence.complete_ms
        assert copied_ms < began_ms
        await asyncio.to_thread(own_broker.start)
        await until(lambda: actor.service.spooled == 0)
        await asyncio.to_thread(world.delete, "i3")
        await asyncio.to_thread(world.publish, 3)
        await until(lambda: serves(actor, 3))
        await asyncio.to_thread(world.move_on)
        await until(lambda: serves(actor, 4))
        slates.append(await actor.recommend(LEARNING))
        assert "i3" not in items
        assert actor.service._ties.presence.complete_ms > copied_ms, "it hears again"
        assert not actor.service.fault
    exposures = await asyncio.to_thread(world.exposures)
    by_request = {exposure.request: exposure for exposure in exposures}
    assert set(by_request) == {slate.json["request"] for slate in slates}
    assert [by_request[one.json["request"]].policy_version for one in slates] == [2, 2, 2, 2, 1, 4]
    assert {event.event for event in world.feedback()} == {f"{request}-0"}
    tree_is_the_logs(world, exposures)
    assert off(world, exposures) < ROUNDING
    config = replace(Config(), kafka=world.kafka, policy=POLICY, actor=ActorSettings(**settings))
    audited = await asyncio.to_thread(audit_propensity, config)
    assert (audited.exposures, audited.bit_equal, audited.not_at_hand) == (6, 1.0, {})
    excluded = unpack_leaves(by_request[request].excluded)
    full = catalogue_on(world).valid
    for item in ("i7", "i8"):
        leaf, version = full.sid_of(item), by_request[request].catalogue_version
        members = full.members(int(np.dot(leaf or (0, 0, 0), (CODES**2, CODES, 1))), version)
        if members == [item]:
            assert leaf in [tuple(one) for one in excluded.tolist()], "its history is known"
    assert context_of(by_request[slates[-1].json["request"]]), "what it saw itself, too"


@refused
async def test_what_came_while_an_actor_was_down_is_followed_when_the_broker_is_back(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, tmp_path) as actor:
        await copied(actor, tmp_path, {1})
    world.delete("i1")
    world.pin("control", 1)
    world.move_on()
    world.move_on()
    await gone(world, own_broker)
    requests = []
    for spooled in (0, 1):  # started twice
        async with acting(world, tmp_path) as actor:
            assert actor.service.spooled == spooled
            requests.append((await actor.recommend(LEARNING)).json["request"])
            assert "i1" in actor.service._catalogue.items, "nobody could tell it"
            if spooled:
                await asyncio.to_thread(own_broker.start)
                await until(lambda: actor.service.spooled == 0)
                await until(lambda: serves(actor, 3))
                assert await actor.arms() == {"control": 1, "learning": 3}
                assert "i1" not in actor.service._catalogue.items
                requests.append((await actor.recommend(LEARNING)).json["request"])
    exposures = world.exposures()
    assert [exposure.request for exposure in exposures] == requests
    tree_is_the_logs(world, exposures)
    assert off(world, exposures) < ROUNDING


@refused
async def test_a_log_that_is_another_than_the_one_copied_ends_the_actor_with_a_sentence(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, tmp_path) as actor:
        await copied(actor, tmp_path, {1})
    await gone(world, own_broker)
    copy = Copy(copy_folder(tmp_path, "actor"))
    cut = copy.cut()
    assert cut is not None
    cut.positions = [(topic, partition, 1000 + at) for topic, partition, at in cut.positions]
    copy.write({}, cut)
    copy.close()
    async with acting(world, tmp_path) as actor:
        await asyncio.to_thread(own_broker.start)
        await asyncio.wait_for(actor.service.failed.wait(), 20)
        assert "and this actor has read it up to 1" in actor.service.fault
        assert "start it again" in actor.service.fault


@refused
async def test_a_process_killed_with_its_broker_serves_when_it_is_started_again(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    world.fill_catalogue()
    world.publish(1)
    world.delete("i1")
    user, port = user_of("learning"), free_port()
    with process(world, port, data_dir=tmp_path) as actor:
        await until(lambda: actor.poll() is not None or asked(port, "/ready") == 200, 60)
        versions = tmp_path / "actor" / "actor" / "copy" / "versions"
        await until(lambda: (versions / "000000000001").exists())
        await gone(world, own_broker)
        actor.kill()
    again = free_port()
    with process(world, again, data_dir=tmp_path) as actor:
        await until(lambda: actor.poll() is not None or asked(again, "/ready") == 200, 60)
        assert asked(again, "/recommend", {"user": user}) == 200
        await asyncio.to_thread(own_broker.start)

        def drained() -> bool:
            with urllib.request.urlopen(f"http://127.0.0.1:{again}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            return {"dwell_actor_spool_records 0.0", "dwell_actor_from_copy 0.0"} <= set(lines)

        await until(lambda: asyncio.to_thread(drained))
    (exposure,) = world.exposures()
    assert (exposure.policy_version, len(exposure.items)) == (1, 6)
    tree_is_the_logs(world, [exposure])


@refused
async def test_without_a_broker_or_a_copy_that_can_be_used_the_start_says_why(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, tmp_path) as actor:
        await copied(actor, tmp_path, {1})
    await gone(world, own_broker)
    kept = tmp_path / "actor" / "actor" / "copy"

    async def says(*words: str, data_dir: Path = tmp_path, **settings: float) -> None:
        with pytest.raises(ServiceError) as caught:
            async with acting(world, data_dir, **settings):
                pass
        for word in (f"Kafka at {world.kafka.bootstrap}", *words):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)

    await says("there is none yet", data_dir=tmp_path / "elsewhere")
    await asyncio.sleep(1.0)
    await says("s old", "actor.max_catalogue_age_s = 0.5", max_catalogue_age_s=0.5)
    version = kept / "versions" / "000000000001"
    content = version.read_bytes()
    version.write_bytes(content[:-7])
    await says("version 1 is damaged")
    version.write_bytes(content)
    for path in (kept / "records").glob("MANIFEST*"):
        path.write_bytes(b"rubbish")
    await says(str(kept / "records"))
    own_broker.start()
    async with acting(world, tmp_path) as actor:  # with Kafka there a damaged copy does no harm
        assert await actor.ready() == []
        await copied(actor, tmp_path, {1})
    shutil.rmtree(kept)


@refused
async def test_another_cluster_at_the_same_address_gets_nothing(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, tmp_path) as actor:
        await copied(actor, tmp_path, {1})
    await gone(world, own_broker)
    async with acting(world, tmp_path) as actor:
        assert (await actor.recommend(LEARNING)).status == 200

        async def other(_: str) -> str:
            return "another"

        monkeypatch.setattr("actor.ties.cluster_id", other)
        await asyncio.to_thread(own_broker.start)
        await asyncio.wait_for(actor.service.failed.wait(), 20)
        assert "is the cluster another, and this actor serves from a copy of" in actor.service.fault
        assert "its 1 events in the spool were not sent there" in actor.service.fault
    assert world.exposures() == []

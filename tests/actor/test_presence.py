"""What an actor says of the catalogue, when, and what it does when it hears nothing more."""

import asyncio
import itertools
import logging
import time
from typing import Any

import pytest

from actor.presence import SIGN_S, TELL_S, InFlight
from ops.broker import EmbeddedBroker
from streams.clients import records
from streams.events import CatalogueAck, catalogue_ack_decoder, decode
from streams.topics import CATALOGUE, CATALOGUE_ACKS
from tests.actor.asgi import call
from tests.actor.world import Actor, World, acting, until, user_of
from tests.learner.cluster import refused

LEARNING = user_of("learning")


def signs(world: World) -> list[tuple[int, CatalogueAck]]:
    """When each was written, and what it says."""
    return [
        (record.timestamp, decode(catalogue_ack_decoder, record.value))
        for record in records(world.kafka.bootstrap, CATALOGUE_ACKS)
    ]


async def version_of(actor: Actor) -> int:
    answer = await call(actor.app, "GET", "/version")
    return int(answer.json["catalogue_version"])


def test_the_oldest_version_is_that_of_the_first_request_without_an_answer() -> None:
    flying = InFlight()
    assert flying.oldest(7) == 7
    with flying.at(3):
        with flying.at(5), flying.at(3):
            assert flying.oldest(9) == 3
        with pytest.raises(ValueError), flying.at(1):
            assert flying.oldest(9) == 1
            raise ValueError
        assert flying.oldest(9) == 3
    assert flying.oldest(9) == 9


async def test_an_actor_is_heard_of_before_it_reads_the_catalogue_and_says_what_it_has_applied(
    world: World,
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        version = await version_of(actor)
        await until(lambda: signs(world)[-1][1].catalogue_version == version)
        await asyncio.to_thread(world.delete, "i1")
        await until(lambda: signs(world)[-1][1].catalogue_version > version)
        last = await version_of(actor)
    said = [sign for _, sign in signs(world)]
    assert said[0].catalogue_version == -1
    assert [sign.catalogue_version for sign in said] == sorted(s.catalogue_version for s in said)
    assert said[-1].catalogue_version == last
    assert [sign.leaving for sign in said] == [False] * (len(said) - 1) + [True]
    assert {(sign.actor, sign.run) for sign in said} == {("actor:1", said[0].run)}


async def test_an_actor_at_rest_gives_a_sign_of_life_now_and_then_and_a_busy_one_not_too_often(
    world: World,
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world):
        await until(lambda: signs(world)[-1][1].catalogue_version >= 0)
        began, rest = time.monotonic(), len(signs(world))
        await asyncio.sleep(2 * SIGN_S + 0.5)
        more = len(signs(world)) - rest
        assert 1 <= more <= (time.monotonic() - began) / SIGN_S + 1
        for number in range(30):
            await asyncio.to_thread(world.delete, f"i{number}")
            await asyncio.sleep(0.02)
        await asyncio.sleep(2 * TELL_S)
    at = [written for written, sign in signs(world) if not sign.leaving][1:]  # the first connects
    assert len(at) > 3
    assert min(b - a for a, b in itertools.pairwise(at)) >= TELL_S * 1000 - 100


async def test_a_version_is_acknowledged_when_what_began_before_it_is_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        before = await version_of(actor)
        sending, go = asyncio.Event(), asyncio.Event()
        real = actor.service._send

        async def held(*arguments: Any) -> None:
            sending.set()
            await go.wait()
            await real(*arguments)

        monkeypatch.setattr(actor.service, "_send", held)
        request = asyncio.create_task(actor.recommend(LEARNING))
        await sending.wait()
        await asyncio.to_thread(world.delete, "i1")

        async def applied() -> bool:
            return await version_of(actor) > before

        await until(applied)
        await asyncio.sleep(SIGN_S + 3 * TELL_S)
        assert signs(world)[-1][1].catalogue_version == before
        valid = actor.service._catalogue.valid
        assert valid.oldest <= before, "its tree is kept"
        go.set()
        assert (await request).status == 200
        await until(lambda: signs(world)[-1][1].catalogue_version > before)
        await until(lambda: valid.oldest > before)


async def test_the_index_of_an_actor_does_not_grow_with_what_has_been(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        valid = actor.service._catalogue.valid
        for turn in range(20):
            items = [(f"i{n}", (turn % 5, n % 5, n // 5 % 5)) for n in range(20)]
            await asyncio.to_thread(world.delete, *(item for item, _ in items))
            await asyncio.to_thread(world.upsert, *items)
        last = world_end(world)

        async def applied() -> bool:
            return await version_of(actor) == last

        await until(applied)
        await until(lambda: valid.rows == 80)
        assert (await actor.recommend(LEARNING)).status == 200


def world_end(world: World) -> int:
    """The last record of the catalogue."""
    return max(int(record.offset) for record in records(world.kafka.bootstrap, CATALOGUE))


@refused
async def test_an_actor_cut_off_for_too_long_serves_nothing_and_serves_again_when_it_hears(
    world: World, own_broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, max_catalogue_age_s=2.0) as actor:
        await asyncio.sleep(2.5)
        assert (await actor.recommend(LEARNING)).status == 200, "it hears, though nothing changes"
        world.close()
        await asyncio.to_thread(own_broker.stop)
        gone = time.monotonic()

        async def stale() -> bool:
            return any("the catalogue is" in missing for missing in await actor.ready())

        with caplog.at_level(logging.WARNING, "dwell.actor"):
            await until(stale)
            assert time.monotonic() - gone > 1.0
            answer = await actor.recommend(LEARNING)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "actor.max_catalogue_age_s = 2" in answer.json["detail"]
            await until(lambda: "items may have been deleted" in caplog.text)
            await asyncio.to_thread(own_broker.start)

            async def serves() -> bool:
                return (await actor.recommend(LEARNING)).status == 200

            await until(serves)
            await until(lambda: "complete again" in caplog.text)
        assert await actor.ready() == []
        assert not actor.service.fault

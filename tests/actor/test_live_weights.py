"""Versions that come as deltas: followed, refused where they do not fit, and begun again at the next anchor."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from actor.service import ServiceError
from streams.events import encode
from streams.signing import Signer, make_pair
from streams.weights import Chunk, Manifest
from tests.actor.test_service import CONTROLLED, LEARNING, ROUNDING, off, serves
from tests.actor.world import World, acting, until

Parts = list[tuple[str, bytes]]


def torn(_: Manifest, parts: Parts) -> Parts:
    """Without its last chunk's bytes."""
    return [
        (key, encode(Chunk(version=int(key.split("/")[0]), index=0, data=b"x")))
        if key.endswith("/0")
        else (key, value)
        for key, value in parts
    ]


def refusals(world: World) -> dict[int, str]:
    return {one.version: one.reason for one in world.acks() if not one.applied}


async def test_deltas_are_followed_and_answers_are_of_the_state_they_make(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    world.move_on()
    async with acting(world) as actor:  # a late joiner: the anchor, then what follows it
        assert await actor.arms() == {"control": 2, "learning": 2}
        await actor.recommend(LEARNING)
        for version in (3, 4, 5):
            await asyncio.to_thread(world.move_on, anchor=version == 4)
            await until(lambda version=version: serves(actor, version))  # type: ignore[misc]
            await actor.recommend(LEARNING)
        exposures = await asyncio.to_thread(world.exposures)
    assert [exposure.policy_version for exposure in exposures] == [2, 3, 4, 5]
    assert off(world, exposures) < ROUNDING
    assert refusals(world) == {}


async def test_a_damaged_delta_is_told_and_the_next_anchor_recovers(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world) as actor:
        await asyncio.to_thread(world.move_on)
        await until(lambda: serves(actor, 2))
        await asyncio.to_thread(world.move_on, torn)
        await asyncio.to_thread(world.move_on)
        await until(lambda: refused(world, 4))
        assert (await actor.recommend(LEARNING)).json["policy_version"] == 2
        assert await actor.ready() == []
        await asyncio.to_thread(world.move_on, anchor=True)
        await until(lambda: serves(actor, 5))
        await asyncio.to_thread(world.move_on)
        await until(lambda: serves(actor, 6))
        await actor.recommend(LEARNING)
        exposures = await asyncio.to_thread(world.exposures)
    said = refusals(world)
    assert set(said) == {3, 4, 5}
    assert "1 bytes" in said[3]
    assert "a delta of version 3, and version 2 is here" in said[4]
    assert off(world, exposures) < ROUNDING


async def refused(world: World, version: int) -> bool:
    return version in await asyncio.to_thread(refusals, world)


def lying(change: Callable[[Manifest], None]) -> Callable[[Manifest, Parts], Parts]:
    def damage(manifest: Manifest, parts: Parts) -> Parts:
        change(manifest)
        return [(parts[0][0], encode(manifest)), *parts[1:]]

    return damage


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda manifest: setattr(manifest, "digest", "0" * 32), "the manifest says 0000"),
        (lambda manifest: setattr(manifest, "base", 1), "a delta of version 1"),
        (lambda manifest: setattr(manifest, "lineage", "x"), "of lineage x, not l"),
        (lambda manifest: setattr(manifest, "codebook", "x"), "is of codebook x"),
    ],
    ids=["digest", "base", "lineage", "codebook"],
)
async def test_a_manifest_that_lies_is_refused_by_its_version(
    world: World, change: Callable[[Manifest], None], says: str
) -> None:
    world.fill_catalogue()
    world.publish(1)
    world.move_on()
    async with acting(world) as actor:
        await asyncio.to_thread(world.move_on, lying(change))
        await until(lambda: refused(world, 3))
        assert says in refusals(world)[3]
        assert (await actor.recommend(LEARNING)).json["policy_version"] == 2


async def test_an_arm_is_pinned_to_a_version_that_only_the_chain_has(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    for _ in range(4):
        world.move_on()
    world.pin("control", 3)
    async with acting(world) as actor:
        assert await actor.arms() == {"control": 3, "learning": 5}
        await actor.recommend(CONTROLLED)
        await asyncio.to_thread(world.pin, "learning", 2)
        await until(lambda: serves(actor, 2))
        await actor.recommend(LEARNING)
        exposures = await asyncio.to_thread(world.exposures)
    assert sorted(exposure.policy_version for exposure in exposures) == [2, 3]
    assert off(world, exposures) < ROUNDING


async def test_an_actor_with_a_key_takes_only_what_the_learner_signed(
    world: World, tmp_path: Path
) -> None:
    private, public = make_pair(tmp_path / "keys")
    foreign, _ = make_pair(tmp_path / "foreign")
    world.signer = Signer(private)
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, trusted_key=str(public)) as actor:
        await asyncio.to_thread(world.move_on)
        await until(lambda: serves(actor, 2))
        world.signer = Signer(foreign)
        await asyncio.to_thread(world.move_on)
        await until(lambda: refused(world, 3))
        world.signer = None
        await asyncio.to_thread(world.publish, 4)
        await until(lambda: refused(world, 4))
        assert (await actor.recommend(LEARNING)).json["policy_version"] == 2
    assert refusals(world) == {3: "version 3: wrongly signed", 4: "version 4: not signed"}


async def test_a_key_that_is_not_there_ends_the_actor_in_one_sentence(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match=r"actor\.trusted_key: the public key .* cannot be read"):
        async with acting(world, trusted_key=str(tmp_path / "none")):
            pass

"""The first seconds of a version: what passes, what calls for a return and to which version, and how fast."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from actor.first_seconds import FEWEST, SPAN_S, FirstSeconds, Harm
from learner.catalogue import Catalogue
from learner.decoder import LazyDecoder
from learner.policy import build
from learner.valid_tree import Tree
from streams.control import DEFAULT_SHARES, arm_of
from tests.actor.world import CODES, ITEMS, ROWS, Actor, World, acting, until
from tests.learner.makers import random_catalogue, random_model
from tests.learner.poison import POISONS

USUAL = 1.8


class Arm:
    """An arm whose requests come ten times a second."""

    def __init__(self) -> None:
        self.watch = FirstSeconds()
        self.now_s = 0.0
        self._rng = np.random.default_rng(3)

    def serve(
        self, version: int, requests: int = 40, surprise: float = USUAL, top: float = 0.05
    ) -> Harm | None:
        """The first harm that is told, if any; `top` is the share of one item."""
        for number in range(requests):
            self.now_s += 0.1
            item = "top" if self._rng.random() < top else f"i{number}"
            seen = surprise * self._rng.gamma(9.0) / 9.0  # a third of it is its standard deviation
            harm = self.watch.served(version, item, seen, self.now_s)
            if harm is not None:
                return harm
        return None


def test_versions_alike_pass_whatever_their_pace() -> None:
    arm = Arm()
    for version in range(1, 400):
        assert arm.serve(version, requests=1 + version % 30) is None


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"surprise": 0.05}, "nats a level in 16 first slots"),
        ({"surprise": 6.0}, "nats a level in"),
        ({"top": 0.9}, "one item in"),
        ({"surprise": float("nan")}, "nan nats a level"),
    ],
)
def test_harm_returns_to_the_last_that_passed(what: dict[str, Any], says: str) -> None:
    arm = Arm()
    assert arm.serve(1) is arm.serve(2) is None
    harm = arm.serve(4, **what)
    assert harm is not None
    assert (harm.version, harm.upto) == (2, 4)
    assert says in harm.why
    assert arm.serve(4, **what) is None, "it has been said"


def test_versions_too_short_for_a_verdict_are_judged_together() -> None:
    arm = Arm()
    arm.serve(1)
    harm = None
    for version in range(2, 12):
        harm = harm or arm.serve(version, requests=4, surprise=0.05)
    assert harm is not None
    assert (harm.version, harm.upto) == (1, 1 + FEWEST // 4)


def test_a_draw_that_fails_is_enough() -> None:
    arm = Arm()
    arm.serve(1)
    arm.serve(2, requests=FEWEST)
    harm = arm.watch.broken(3, "not finite", arm.now_s)
    assert harm == (2, 3, "version 3 in its first seconds: not finite")


def test_the_first_version_has_nothing_to_return_to() -> None:
    arm = Arm()
    assert arm.watch.broken(1, "not finite", 0.0) is None
    assert arm.serve(1, surprise=0.01) is None


def test_if_the_version_returned_to_is_harmful_too_the_next_return_goes_further_back() -> None:
    arm = Arm()
    arm.serve(1)
    arm.serve(2)
    arm.serve(3)
    first = arm.serve(4, surprise=0.05)
    arm.watch.rest()
    second = arm.serve(5, surprise=0.05)
    assert first is not None
    assert second is not None
    assert (first.version, second.version) == (3, 2)


def test_a_return_that_could_not_be_said_is_asked_for_again() -> None:
    arm = Arm()
    arm.serve(1)
    assert arm.serve(2, surprise=0.05) is not None
    assert arm.serve(2, surprise=0.05) is None
    arm.watch.again()
    again = arm.serve(2, surprise=0.05)
    assert again is not None
    assert (again.version, again.upto) == (1, 2)


def test_what_has_passed_is_not_watched_any_more() -> None:
    arm = Arm()
    arm.serve(1)
    assert arm.now_s > SPAN_S
    assert arm.serve(1, surprise=0.05) is None


# --- on a real broker -------------------------------------------------------------------------------


def good(version: int) -> LazyDecoder:
    """Versions of one lineage: near to one another."""
    model = random_model(build("tiny", 2, 1).preset, CODES, ROWS, seed=100)
    for value in model.parameters():
        value.data.mul_(1.0 + 0.001 * version)
    return model


def spoilt(poison: Callable[[LazyDecoder, Tree], None]) -> LazyDecoder:
    catalogue: Catalogue = random_catalogue(CODES, ITEMS, seed=6, shared=ITEMS // 4)
    model = copy.deepcopy(good(3))
    poison(model, catalogue.valid.tree(catalogue.version))
    return model


async def serves(actor: Actor, version: int) -> bool:
    return (await actor.arms()).get("learning") == version


async def served(actor: Actor, requests: int, users: Iterator[str]) -> None:
    for _ in range(requests):
        answer = await actor.recommend(next(users))
        assert answer.status == 200


@pytest.mark.parametrize("poison", POISONS)
async def test_a_poisoned_version_that_is_served_is_returned_within_seconds(
    world: World, poison: Callable[[LazyDecoder, Tree], None]
) -> None:
    """It reached the log past the learner's guard; there is no learner to help either."""
    world.fill_catalogue()
    world.pin("control", 1)
    world.publish(1, model=good(1))
    users = (user for n in range(10_000) if arm_of(user := f"u{n}", DEFAULT_SHARES) == "learning")
    async with acting(world) as actor:
        await served(actor, 20, users)
        world.publish(2, model=good(2))
        await until(lambda: serves(actor, 2))
        await served(actor, 20, users)
        world.publish(3, model=spoilt(poison))
        began = time.monotonic()
        await until(lambda: serves(actor, 3))
        asked = 0
        while not await serves(actor, 2):
            await served(actor, 1, users)
            asked += 1
            assert asked < 200
        assert time.monotonic() - began < 10.0
        *_, said = world.commands()
        assert (said.action, said.arm, said.version, said.upto) == ("rollback", "learning", 2, 3)
        assert said.who == "actor:1"
        assert "version 3 in its first seconds" in said.why
        world.answer(restored=2, version=4)  # read before the version itself: nothing may change
        await served(actor, 5, users)
        assert await serves(actor, 2)
        world.publish(4, model=good(2))
        await until(lambda: serves(actor, 4))
        await served(actor, 20, users)
        assert (await actor.arms())["control"] == 1
    assert [command.action for command in world.commands()] == ["pin", "rollback", "follow"]

"""What an audit of propensities must pass, and each lie that it must find."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from actor.policy import ServedPolicy
from actor.settings import ActorSettings
from actor.users import Users
from learner.catalogue import Catalogue
from learner.valid_ids import UnknownVersionError
from ops.audit_propensity import GOAL_NATS
from ops.propensity import differences, drawn_again, together
from streams.events import Draw, Exposure, LogpLevels, SemanticId, ShownItem, encode
from streams.events import exposure_decoder as decoder
from tests.actor.slates import CODES, ITEMS, known_users, serve, served
from tests.learner.makers import random_catalogue

SIZES = (1, 9, 2, 17, 1, 30)

World = tuple[ServedPolicy, Catalogue, list[list[Exposure]]]


@pytest.fixture(scope="module")
def world() -> World:
    """Batches of several sizes, slates of several lengths, over a catalogue that moves meanwhile."""
    rng = np.random.default_rng(5)
    catalogue = random_catalogue(CODES, ITEMS, seed=6, shared=20)
    users = known_users(catalogue, 60, rng)
    policy = served(seed=7)
    batches = []
    first = 0
    for number, size in enumerate(SIZES):
        catalogue.take(ITEMS + number, f"i{3 * number}".encode(), None)
        batch = [(f"u{first + row}", int(rng.integers(1, 9))) for row in range(size)]
        first += size
        temperature = (1.0, 0.7, 1.6)[number % 3]
        batches.append(serve(policy, catalogue, users, batch, temperature, rng))
    return policy, catalogue, batches


def copies(batch: list[Exposure]) -> list[Exposure]:
    return [cast(Exposure, decoder.decode(encode(exposure))) for exposure in batch]


def worst(policy: ServedPolicy, batch: list[Exposure], catalogue: Catalogue) -> float:
    return float(differences(policy, batch, catalogue).max())


def test_the_truth_passes_both_ways(world: World) -> None:
    policy, catalogue, batches = world
    every = copies([exposure for batch in batches for exposure in batch])
    off = differences(policy, every, catalogue)
    assert len(off) == sum(len(exposure.items) for exposure in every) > 200
    assert off.max() < GOAL_NATS
    for exposure in every[::3]:
        exposure.arm = "control"  # arms that serve one version are decoded together
    shuffled = [every[at] for at in np.random.default_rng(1).permutation(len(every))]
    found = together(shuffled)
    assert sorted(map(len, found)) == sorted(SIZES)
    for batch in found:
        assert all(drawn_again(policy, batch, catalogue))


def nudged(levels: LogpLevels | None) -> LogpLevels:
    assert levels is not None
    return (levels[0], levels[1], levels[2] - 1e-4)


def relevel(exposure: Exposure) -> None:
    exposure.items[0].logp_levels = nudged(exposure.items[0].logp_levels)


def forget_exclusions(exposure: Exposure) -> None:
    exposure.excluded = b""


def forget_context(exposure: Exposure) -> None:
    exposure.context = b""


def another_user(exposure: Exposure) -> None:
    exposure.user = "somebody else"


def another_temperature(exposure: Exposure) -> None:
    exposure.temperature *= 1.01


def another_tree(exposure: Exposure) -> None:
    exposure.catalogue_version = ITEMS - 1


def another_leaf(exposure: Exposure) -> None:
    item = exposure.items[0]
    item.sid = cast(SemanticId, tuple((code + 1) % CODES for code in item.sid))


@pytest.mark.parametrize(
    "lie",
    [
        relevel,
        forget_exclusions,
        forget_context,
        another_user,
        another_temperature,
        another_tree,
        another_leaf,
    ],
)
def test_a_wrong_probability_is_found_both_ways(
    world: World, lie: Callable[[Exposure], None]
) -> None:
    policy, catalogue, batches = world
    batch = copies(batches[-1])
    for exposure in batch:
        lie(exposure)
    assert worst(policy, batch, catalogue) > GOAL_NATS
    assert not all(drawn_again(policy, batch, catalogue))


def test_other_weights_are_found_both_ways(world: World) -> None:
    _, catalogue, batches = world
    assert worst(served(seed=8), batches[-1], catalogue) > 0.1
    assert not any(drawn_again(served(seed=8), batches[-1], catalogue))


def ulp(score: float | None) -> float:
    assert score is not None
    return float(np.nextafter(score, np.inf))


def rescore(exposure: Exposure) -> None:
    exposure.items[0].score = ulp(exposure.items[0].score)


def rescore_next(exposure: Exposure) -> None:
    exposure.next_score = ulp(exposure.next_score)


def reseed(exposure: Exposure) -> None:
    assert exposure.draw is not None
    exposure.draw.seed += 1


def reorder(exposure: Exposure) -> None:
    exposure.items.reverse()


def redecide(exposure: Exposure) -> None:
    item = exposure.items[-1]
    assert item.logp_decision is not None
    item.logp_decision -= 1e-6


def halve(exposure: Exposure) -> None:
    """As if a leaf had more members than it has."""
    item = exposure.items[0]
    assert item.logp_decision is not None
    item.logp_decision -= float(np.log(100))


def another_item(exposure: Exposure) -> None:
    exposure.items[0].item = "i79"


@pytest.mark.parametrize(
    "lie", [rescore, rescore_next, reseed, reorder, redecide, halve, another_item]
)
def test_what_only_the_draw_tells_is_found_by_drawing_again(
    world: World, lie: Callable[[Exposure], None]
) -> None:
    policy, catalogue, batches = world
    whole = copies(batches[-1])
    at = next(row for row, exposure in enumerate(whole) if len(exposure.items) > 1)
    for exposure in whole if lie is reseed else [whole[at]]:
        lie(exposure)
    assert worst(policy, whole, catalogue) < GOAL_NATS
    same = drawn_again(policy, whole, catalogue)
    assert same[at] is False
    assert sum(same) == (0 if lie is reseed else len(whole) - 1)


def test_a_batch_of_which_a_row_is_missing_is_not_drawn_again(world: World) -> None:
    _, _, batches = world
    batch = batches[1]
    assert [len(found) for found in together(batch)] == [9]
    assert together(batch[:-1]) == []
    assert together(batch[1:]) == []
    old = copies(batch)
    for exposure in old:
        exposure.draw = None
    assert together(old) == []


def test_an_item_deleted_before_the_answer_is_no_lie() -> None:
    rng = np.random.default_rng(9)
    catalogue = random_catalogue(CODES, 12, seed=10)
    users, policy = Users(ActorSettings()), served(seed=11)

    def delete() -> None:
        for offset in range(6):
            catalogue.take(12 + offset, f"i{offset}".encode(), None)

    batch = serve(policy, catalogue, users, [("u", 8)] * 20, 1.0, rng, between=delete)
    assert any(len(exposure.items) < 8 for exposure in batch)
    assert all(drawn_again(policy, batch, catalogue))


def test_slots_that_are_not_the_policys_are_not_judged(world: World) -> None:
    policy, catalogue, batches = world
    batch = copies(batches[-1][:4])
    for exposure in batch:
        other = ShownItem(
            item="x", sid=exposure.items[0].sid, position=99, duration_ms=1, source="other"
        )
        exposure.items.append(other)
    off = differences(policy, batch, catalogue)
    assert len(off) == sum(len(exposure.items) - 1 for exposure in batch)
    assert off.max() < GOAL_NATS


def test_a_policy_slot_without_probabilities_is_infinitely_wrong(world: World) -> None:
    policy, catalogue, batches = world
    batch = copies(batches[0])
    batch[0].items[0].logp_levels = None
    assert worst(policy, batch, catalogue) == np.inf


def test_a_catalogue_version_not_at_hand_is_said(world: World) -> None:
    policy, catalogue, batches = world
    batch = copies(batches[0])
    batch[0].catalogue_version = catalogue.version + 1
    with pytest.raises(UnknownVersionError):
        differences(policy, batch, catalogue)


def test_a_draw_says_its_shape(world: World) -> None:
    _, _, batches = world
    for batch, size in zip(batches, SIZES, strict=True):
        draws = [exposure.draw for exposure in batch]
        (seed,) = {one.seed for one in draws if one is not None}
        assert draws == [
            Draw(seed=seed, row=row, rows=size, slots=len(exposure.items))
            for row, exposure in enumerate(batch)
        ]
        assert 0 <= seed < 1 << 53

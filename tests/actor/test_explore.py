"""Reserved slots against their law, and what an exposure says of them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from actor.explore import Exploration, Pool, alike
from actor.recommend import SEEDS, decode, expose, prepare
from actor.settings import ActorSettings
from actor.users import Users
from learner.batch import assemble
from learner.catalogue import Catalogue
from learner.valid_tree import Tree, keys_of, sid_of
from ops.propensity import differences, drawn_again
from streams.events import Exposure, unpack_leaves
from tests.actor.slates import CODES, ROWS, known_users, sampled, served
from tests.learner.makers import NOW_MS, SMALL, random_catalogue, upsert

# Seeded: a test of a law fails for good or never. Chance alone gives less once in 10,000 tests.
LEAST_P = 1e-4

LIVE = Tree(4, np.arange(0, 60, 3))
NEW = Tree(4, np.array([6, 9, 30, 57]))
TAKEN = np.array([9, 12, 13, 99, 0])


def plain_law(live: Tree, new: Tree, taken: set[int], share: float) -> dict[int, float]:
    """The law in words: `share` to the new that are left, the rest to all that are left."""
    left = [key for key in live.leaves().tolist() if key not in taken]
    fresh = [key for key in new.leaves().tolist() if key not in taken]
    share = share if fresh else 0.0
    return {
        key: (1 - share) / len(left) + (share / len(fresh) if key in fresh else 0.0) for key in left
    }


def test_slots_come_with_their_law_one_after_the_other() -> None:
    rng = np.random.default_rng(1)
    draws = 10_000
    seen: dict[tuple[int, int], int] = {}
    expected: dict[tuple[int, int], float] = {}
    before = plain_law(LIVE, NEW, set(TAKEN.tolist()), 0.4)
    after_each = {one: plain_law(LIVE, NEW, {*TAKEN.tolist(), one}, 0.4) for one in before}
    for _ in range(draws):
        (first, logp_1), (second, logp_2) = Pool(LIVE, NEW, TAKEN, 0.4).draw(2, rng)
        after = after_each[first]
        assert abs(logp_1 - np.log(before[first])) < 1e-12
        assert abs(logp_2 - np.log(after[second])) < 1e-12
        seen[first, second] = seen.get((first, second), 0) + 1
        expected[first, second] = before[first] * after[second]
    assert sum(expected.values()) == pytest.approx(1.0)
    cells = sorted(expected)
    observed = np.array([seen[cell] for cell in cells])
    law = np.array([expected[cell] for cell in cells]) * draws
    assert chisquare(observed, law * observed.sum() / law.sum()).pvalue > LEAST_P


def test_a_pool_runs_dry_of_new_leaves_and_then_of_all() -> None:
    pool = Pool(LIVE, NEW, np.empty(0, np.int64), 0.5)
    drawn = list(pool.draw(100, np.random.default_rng(2)))
    assert sorted(key for key, _ in drawn) == LIVE.leaves().tolist()
    assert drawn[-1][1] == pytest.approx(0.0)
    assert pool.logp(3) == -np.inf
    assert Pool(LIVE, NEW, LIVE.leaves(), 0.5).logp(6) == -np.inf
    assert list(Pool(LIVE, NEW, LIVE.leaves(), 0.5).draw(3, np.random.default_rng(3))) == []


def served_with(
    explore: Exploration, catalogue: Catalogue, batch: int, count: int
) -> list[Exposure]:
    rng = np.random.default_rng(4)
    users = known_users(catalogue, batch, rng)
    policy = served(seed=5)
    prepared = [
        prepare(
            f"r{n}", f"u{n}", "learning", count, users, catalogue, SMALL.context, NOW_MS, explore
        )
        for n in range(batch)
    ]
    slates = decode(policy, prepared, 0.9, int(rng.integers(SEEDS)))
    return [
        expose(policy, one, row, slates, catalogue, 0.9, rng, NOW_MS)
        for row, one in enumerate(prepared)
    ]


def unpacked(exposure: Exposure) -> list[tuple[int, ...]]:
    """The leaves that a request excluded."""
    return [tuple(leaf) for leaf in unpack_leaves(exposure.excluded).tolist()]


def test_reserved_slots_stand_last_and_leave_the_policys_as_they_are() -> None:
    catalogue = random_catalogue(CODES, 80, seed=6, shared=20)
    explore = Exploration(slots=2, new=0.5, span=10)
    exposures = served_with(explore, catalogue, 30, 6)
    plain = served_with(Exploration(), catalogue, 30, 4)
    for exposure, other in zip(exposures, plain, strict=True):
        sources = [item.source for item in exposure.items]
        assert sources == ["policy"] * 4 + ["explore"] * 2
        assert [item.position for item in exposure.items] == list(range(6))
        assert [item.sid for item in exposure.items[:4]] == [item.sid for item in other.items]
        assert [item.score for item in exposure.items[:4]] == [item.score for item in other.items]
        assert exposure.next_score == other.next_score
        assert len({item.sid for item in exposure.items}) == 6
        for item in exposure.items[4:]:
            assert (item.logp_levels, item.score) == (None, None)
            assert item.logp_decision is not None
            assert item.logp_decision < 0.0
    assert [len(one.items) for one in served_with(explore, catalogue, 3, 1)] == [1, 1, 1]


def test_learning_takes_another_laws_slot_as_it_takes_another_systems() -> None:
    catalogue = random_catalogue(CODES, 80, seed=6)
    exposures = served_with(Exploration(slots=2), catalogue, 5, 6)
    batch = assemble([sampled(one) for one in exposures], catalogue.valid, SMALL.context, ROWS)
    logged = ~batch.targets.logp_old_BkL.isnan().any(-1)
    assert logged.tolist() == [[True] * 4 + [False] * 2] * 5


def test_an_item_is_new_for_a_number_of_changes_and_then_no_more() -> None:
    catalogue = random_catalogue(CODES, 40, seed=7)
    free = next(
        key
        for key in range(CODES**3)
        if key not in catalogue.valid.tree(catalogue.version).leaves()
    )
    catalogue.take(40, b"fresh", upsert("fresh", sid_of(free, CODES)))
    for offset in range(41, 45):
        catalogue.take(offset, b"nobody", None)
    always = Exploration(slots=1, new=0.999, span=5)
    shown = served_with(always, catalogue, 20, 3)
    open_to_it = [one for one in shown if sid_of(free, CODES) not in unpacked(one)]
    assert len(open_to_it) > 5
    assert all("fresh" in [item.item for item in one.items] for one in open_to_it)
    assert any(one.items[-1].item == "fresh" for one in open_to_it)
    catalogue.take(45, b"nobody", None)
    shown = served_with(always, catalogue, 20, 3)
    assert sum(one.items[-1].item == "fresh" for one in shown) <= 5


def test_an_audit_holds_reserved_slots_against_their_law() -> None:
    catalogue = random_catalogue(CODES, 80, seed=6, shared=20)
    explore = Exploration(slots=2, new=0.5, span=10)
    exposures = served_with(explore, catalogue, 30, 6)
    policy = served(seed=5)
    assert differences(policy, exposures, catalogue).max() < 1e-5
    assert all(drawn_again(policy, exposures, catalogue, explore))
    for lie in (replace(explore, new=0.4), replace(explore, span=40), Exploration()):
        assert not all(drawn_again(policy, exposures, catalogue, lie))
    exposures[3].items[4], exposures[3].items[5] = exposures[3].items[5], exposures[3].items[4]
    twice = exposures[7].items
    twice[5].sid, twice[5].item = twice[0].sid, twice[0].item
    found = drawn_again(policy, exposures, catalogue, explore)
    assert found[7] is False
    assert sum(found) >= 28


def test_reserved_slots_are_settings() -> None:
    settings = ActorSettings(explore_slots=2, explore_new=0.25, explore_span=7)
    assert Exploration.of(settings) == Exploration(2, 0.25, 7)
    assert Exploration.of(ActorSettings()).slots == 0
    users, catalogue = Users(settings), random_catalogue(CODES, 20, seed=8)
    one = prepare("r", "u", "learning", 6, users, catalogue, 4, NOW_MS, Exploration.of(settings))
    assert (one.count, one.explore.slots) == (4, 2)
    assert one.new is not None
    assert one.new.leaves().tolist() == sorted(
        keys_of(np.array([catalogue.items[f"i{n}"].sid for n in range(13, 20)]), CODES).tolist()
    )


def test_leaves_drawn_all_alike_are_so_without_those_taken() -> None:
    leaves = np.array([1, 5, 6, 20, 33, 47, 60])
    tree, taken = Tree(4, leaves), np.array([60, 5, 5, 2])  # 2 does not live
    rng = np.random.default_rng(31)
    firsts, lasts = [], []
    for _ in range(3000):
        drawn = alike(tree, taken, 3, rng)
        keys = [key for key, _ in drawn]
        assert len({*keys}) == 3
        assert [logp for _, logp in drawn] == pytest.approx([-np.log(n) for n in (5, 4, 3)])
        firsts.append(keys[0])
        lasts.append(keys[2])
    for slot in (firsts, lasts):
        found, counts = np.unique(slot, return_counts=True)
        assert found.tolist() == [1, 6, 20, 33, 47]
        assert chisquare(counts).pvalue > 1e-4
    assert sorted(key for key, _ in alike(tree, taken, 9, rng)) == [1, 6, 20, 33, 47]
    assert alike(tree, leaves, 2, rng) == []

"""The world `easy`: the figures of its specification, twins, the log, and the scores of a slate."""

from hashlib import blake2b

import numpy as np
import pytest

from ops.world import LOG_NO_REPEAT, World, all_twins, twin_ids

ARMS = ("control", "learning")


@pytest.fixture(scope="module")
def world() -> World:
    return World.easy(seed=7)


def hashed(user: str) -> int:
    return int.from_bytes(blake2b(user.encode(), digest_size=8).digest(), "little")


def arm_of(user: str) -> str:
    return ARMS[hashed(user) % 2]


@pytest.mark.parametrize("seed", [7, 8])
def test_random_items_satisfy_little_and_the_best_hundred_much(seed: int) -> None:
    world = World.easy(seed)
    random = np.mean([world.satisfaction(person).mean() for person in range(1500)])
    best = np.mean([world.oracle(person, ()) for person in range(1500)])
    assert random == pytest.approx(0.14, abs=0.015)
    assert best == pytest.approx(0.86, abs=0.015)


def test_the_same_seed_gives_the_same_world_and_another_seed_another_one(world: World) -> None:
    again, other = World.easy(7), World.easy(8)
    assert np.array_equal(world.satisfactions, again.satisfactions)
    assert np.array_equal(world.embeddings, again.embeddings)
    slate = world.item_ids[:50]
    assert world.plays(3, 0, slate) == again.plays(3, 0, slate)
    assert not np.array_equal(world.satisfactions, other.satisfactions)


def test_a_catalogue_entry_tells_the_taste_apart_only_through_noise(world: World) -> None:
    assert world.item_ids[1] == "i0001"
    assert world.embeddings.shape == (3000, 16)
    assert world.embeddings.dtype == np.float32
    assert world.duration_ms.min() >= 3000
    assert world.duration_ms.max() <= 300_000
    assert len(set(world.tags)) == 20
    # Items of one topic lie close to each other: semantic IDs have something to find.
    unit = world.embeddings / np.linalg.norm(world.embeddings, axis=1, keepdims=True)
    same = np.array(world.tags)[:, None] == np.array(world.tags)
    likeness = unit @ unit.T
    assert likeness[same].mean() > likeness[~same].mean() + 0.5


def test_popularity_is_skewed_and_only_mildly_related_to_satisfaction(world: World) -> None:
    assert world.popularity.sum() == pytest.approx(1)
    top = np.sort(world.popularity)[::-1]
    assert top[:300].sum() > 0.4
    mean = world.satisfactions.mean(axis=0)
    assert 0.05 < np.corrcoef(np.log(world.popularity), mean)[0, 1] < 0.4


def test_an_item_plays_alike_whatever_else_is_on_the_slate(world: World) -> None:
    one, other = world.item_ids[:6], world.item_ids[3:9][::-1]
    plays = dict(zip(one, world.plays(5, 2, one), strict=True))
    others = dict(zip(other, world.plays(5, 2, other), strict=True))
    for item in set(one) & set(other):
        assert plays[item] == others[item] == world.play(5, 2, item)


def test_another_visit_person_or_seed_gives_another_play(world: World) -> None:
    items = world.item_ids[:200]
    base = [play.dwell_ms for play in world.plays(5, 2, items)]
    for person, visit in ((5, 3), (6, 2), (2, 5), (5, -2)):
        other = [play.dwell_ms for play in world.plays(person, visit, items)]
        equal = np.mean([a == b for a, b in zip(base, other, strict=True)])
        assert equal < 0.2  # full plays of short items only


def test_dwell_follows_the_stated_law(world: World) -> None:
    log_ratios = []
    for person in range(300):
        items = world.item_ids[person : person + 60]
        for item, play in zip(items, world.plays(person, 0, items), strict=True):
            duration = int(world.duration_ms[world.index[item]])
            assert 0 < play.dwell_ms <= duration
            if not play.dislike and play.dwell_ms < duration and duration > 100_000:
                centre = 14_000 * world.dwell_factor[person] * (duration / 40_000) ** 0.45
                centre *= np.exp(2.2 * (play.satisfaction - 0.4))
                log_ratios.append(np.log(play.dwell_ms / centre))
    assert np.mean(log_ratios) == pytest.approx(0, abs=0.05)
    assert np.std(log_ratios) == pytest.approx(0.6, abs=0.05)


def test_dislikes_are_rare_cut_the_play_short_and_spare_what_satisfies(world: World) -> None:
    rng = np.random.default_rng(1)
    plays, expected = [], 0.0
    for person in range(1500):
        items = [world.item_ids[at] for at in rng.integers(3000, size=40)]
        these = world.plays(person, 0, items)
        plays += these
        expected += sum(0.12 * max(0, 1 - 4 * play.satisfaction) for play in these)
    disliked = [play for play in plays if play.dislike]
    assert len(disliked) == pytest.approx(expected, rel=0.06)
    assert all(play.dwell_ms <= 4000 and play.satisfaction < 0.25 for play in disliked)
    assert all(play.dwell_ms >= 2000 for play in disliked)
    assert not any(play.like for play in disliked)


def test_likes_are_rare_and_rise_with_satisfaction(world: World) -> None:
    def share(items: np.ndarray, person: int) -> float:
        plays = world.plays(person, 1, [world.item_ids[at] for at in items])
        return float(np.mean([play.like for play in plays]))

    order = [np.argsort(-world.satisfaction(person)) for person in range(200)]
    best = np.mean([share(order[person][:100], person) for person in range(200)])
    rest = np.mean([share(order[person][1000:1100], person) for person in range(200)])
    assert best == pytest.approx(0.12 * 0.86**2, abs=0.01)
    assert rest < 0.005


def test_the_oracle_passes_over_what_was_shown(world: World) -> None:
    z = world.satisfaction(4)
    order = np.argsort(-z)
    shown = {world.item_ids[at] for at in order[:50]}
    assert world.oracle(4, shown) == pytest.approx(z[order[50:150]].mean(), abs=1e-6)
    assert world.oracle(4, set(world.item_ids[:-30])) == pytest.approx(z[-30:].mean(), abs=1e-6)
    assert world.oracle(4, set(world.item_ids)) == 0


def test_the_permuted_score_asks_another_person_always_the_same(world: World) -> None:
    people = np.arange(1500)
    assert np.array_equal(np.sort(world.permutation), people)
    assert not (world.permutation == people).any()
    other = int(world.permutation[9])
    items = world.item_ids[100:106]
    assert world.permuted_satisfaction(9, items) == pytest.approx(
        world.satisfaction(other)[100:106]
    )


def test_slates_that_suit_a_person_do_not_suit_the_permuted_one(world: World) -> None:
    own, permuted = [], []
    for person in range(1500):
        items = [world.item_ids[at] for at in np.argsort(-world.satisfaction(person))[:100]]
        own.append(world.oracle(person, ()))
        permuted.append(world.permuted_satisfaction(person, items).mean())
    assert np.mean(own) > 0.8
    assert np.mean(permuted) < 0.2


def test_the_log_is_chronological_and_over_before_now(world: World) -> None:
    now = 1_700_000_000_000
    log = world.mediocre_log(np.random.default_rng(3), visits=15, end_ms=now, span_s=172_800)
    assert set(log) == {person for person in range(1500) if not world.cold[person]}
    assert len(log) == 1350
    for person, visits in log.items():
        assert [visit.visit for visit in visits] == list(range(-15, 0))
        clock = now - 172_800_000
        for visit in visits:
            assert visit.time_ms >= clock
            clock = visit.time_ms
            for play, end in zip(visit.plays, visit.ends_ms, strict=True):
                assert end - play.dwell_ms > clock
                clock = end
        assert clock <= now
        assert visits[0].plays == world.plays(person, -15, visits[0].items)
    # Spread over the days, not all at the end.
    starts = [visit.time_ms for visits in log.values() for visit in visits]
    assert np.mean(starts) == pytest.approx(now - 86_400_000, abs=3_600_000)


def test_the_log_is_mediocre_seventy_per_cent_popular(world: World) -> None:
    log = world.mediocre_log(np.random.default_rng(3), visits=10, end_ms=10**12, span_s=86_400)
    items = [item for visits in log.values() for visit in visits for item in visit.items]
    places = [world.index[item] for item in items]
    tail = world.popularity < np.quantile(world.popularity, 0.5)
    expected = 0.7 * world.popularity[tail].sum() + 0.3 * 0.5
    assert tail[places].mean() == pytest.approx(expected, abs=0.02)
    satisfied = [p.satisfaction for v in log.values() for visit in v for p in visit.plays]
    assert np.mean(satisfied) == pytest.approx(0.15, abs=0.02)


def test_the_log_repeats_nothing_within_the_last_items_shown() -> None:
    world = World.easy(seed=7, people=100)
    log = world.mediocre_log(np.random.default_rng(3), visits=40, end_ms=10**12, span_s=864_000)
    for visits in log.values():
        items = [item for visit in visits for item in visit.items]
        for at, item in enumerate(items):
            assert item not in items[max(0, at - LOG_NO_REPEAT) : at]


def test_a_log_that_does_not_fit_into_its_span_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"20 visits of 6 plays do not fit into a log of 60 s"):
        world.mediocre_log(np.random.default_rng(3), visits=20, end_ms=10**12, span_s=60)


def test_twins_fall_into_their_arms_by_the_smallest_suffix() -> None:
    ids = twin_ids("p0001", arm_of, ARMS)
    assert list(ids) == list(ARMS)
    for arm, user in ids.items():
        assert arm_of(user) == arm
        suffix = int(user.removeprefix("p0001-"))
        assert all(arm_of(f"p0001-{smaller}") != arm for smaller in range(suffix))


def test_twins_share_no_row_of_the_user_table() -> None:
    def row_of(user: str) -> int:
        return hashed(user) // 2 % 512

    everybody = all_twins([f"p{at:04d}" for at in range(200)], arm_of, ARMS, row_of)
    users = [user for ids in everybody for user in ids.values()]
    assert len({row_of(user) for user in users}) == 400
    # The rows do collide when nobody looks.
    careless = all_twins([f"p{at:04d}" for at in range(200)], arm_of, ARMS)
    assert len({row_of(user) for ids in careless for user in ids.values()}) < 400


def test_an_arm_without_users_is_named() -> None:
    with pytest.raises(ValueError, match="'holdout'"):
        twin_ids("p0001", arm_of, ["holdout"])

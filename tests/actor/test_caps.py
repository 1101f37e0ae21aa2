"""Caps on authors: what is shown, what is skipped, and that neither changes what the draw says of itself."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import chisquare

from actor.explore import Exploration
from actor.policy import ServedPolicy
from actor.recommend import fall_back, prepare
from actor.settings import ActorSettings
from actor.slots import LEAST_SPARE, spare_of
from actor.users import Users
from learner.catalogue import Catalogue
from learner.valid_tree import keys_of
from ops.propensity import drawn_again, in_order
from streams.events import Exposure, SemanticId, ShownItem, SkippedItem
from tests.actor.slates import CODES, authored, known_users, sampled, serve, served, some_authors
from tests.learner.makers import NOW_MS, law, random_catalogue, upsert

# Seeded: a test of a law fails for good or never. Chance alone gives less once in 10,000 tests.
LEAST_P = 1e-4


def world(items: int, authors: int, seed: int, shared: int = 0) -> tuple[Catalogue, Users]:
    made = random_catalogue(CODES, items, seed, shared)
    catalogue = authored(made, some_authors(authors, seed))
    return catalogue, known_users(catalogue, 20, np.random.default_rng(seed))


def shown_of(exposure: Exposure, catalogue: Catalogue) -> Counter[str]:
    """Items of each author in a slate, without nobody's."""
    authors = [catalogue.items[item.item].author for item in exposure.items]
    return Counter(author for author in authors if author)


def test_no_slate_exceeds_the_cap_however_it_was_made() -> None:
    rng = np.random.default_rng(1)
    tight = nobodys = skipped = explored = 0
    for seed in range(30):
        cap, authors = int(rng.integers(1, 4)), int(rng.integers(2, 12))
        catalogue, users = world(int(rng.integers(55, 100)), authors, seed, shared=8)
        explore = Exploration(slots=int(rng.integers(0, 4)), new=0.5, span=10)
        batch = [(f"u{n}", int(rng.integers(1, 12))) for n in range(8)]
        policy = served(seed)
        made = serve(policy, catalogue, users, batch, 0.8, rng, lambda: None, explore, cap)
        one = prepare("r", "u1", "a", 9, users, catalogue, 4, NOW_MS, explore, cap)
        made.append(fall_back(policy, one, catalogue, 0.8, rng, NOW_MS))
        assert all(drawn_again(policy, made[:-1], catalogue, explore))
        for exposure in made:
            of = shown_of(exposure, catalogue)
            assert max(of.values(), default=0) <= cap
            assert exposure.author_cap == cap
            assert exposure.skipped is not None
            assert {item.reason for item in exposure.skipped} <= {"author"}
            tight += max(of.values(), default=0) == cap
            skipped += len(exposure.skipped)
            explored += any(item.source == "explore" for item in exposure.skipped)
            nobodys += len(exposure.items) - sum(of.values()) > cap
    assert min(tight, nobodys, skipped, explored) > 20


def test_a_capped_slate_is_the_draw_without_what_was_skipped() -> None:
    catalogue, users = world(90, 6, seed=2)
    batch = [(f"u{n}", 6) for n in range(20)]
    capped = serve(served(3), catalogue, users, batch, 0.8, np.random.default_rng(4), author_cap=1)
    wide = [(user, 6 + LEAST_SPARE) for user, _ in batch]
    whole = serve(served(3), catalogue, users, wide, 0.8, np.random.default_rng(4))
    for exposure, other in zip(capped, whole, strict=True):
        told = in_order(exposure, "policy")
        assert exposure.items[0].item == other.items[0].item
        for one, drawn in zip(told, other.items, strict=False):
            assert (one.item, one.sid, one.score) == (drawn.item, drawn.sid, drawn.score)
            assert one.logp_levels == drawn.logp_levels
            assert one.logp_decision == drawn.logp_decision
        later = [*[item.score for item in other.items], other.next_score][len(told)]
        assert exposure.next_score == later
        assert [item.position for item in exposure.items] == list(range(len(exposure.items)))
        assert len(exposure.items) == 6 or len(told) == 6 + LEAST_SPARE
    assert sum(len(exposure.items) == 6 for exposure in capped) > 5
    assert sum(bool(exposure.skipped) for exposure in capped) > 10


def drawn_often(
    policy: ServedPolicy, catalogue: Catalogue, count: int, cap: int, draws: int
) -> Iterator[Exposure]:
    """One user's slates, again and again."""
    users, rng = Users(ActorSettings()), np.random.default_rng(5)
    users.exposed("u", ["i1", "i7"])
    batch = [("u", count)] * 500
    for _ in range(draws // len(batch)):
        yield from serve(policy, catalogue, users, batch, 1.1, rng, author_cap=cap)


def test_slots_have_their_law_given_what_was_drawn_before_shown_or_not() -> None:
    """Slot 1 by counts; each later one, in the order of the draw, by its conditional law's integral transform."""
    catalogue, policy = world(48, 4, seed=6)[0], served(seed=7)
    exposures = list(drawn_often(policy, catalogue, 3, 1, 6_000))
    of = law(policy.model, sampled(exposures[0]), catalogue)
    place: dict[SemanticId, int] = {sid: n for n, sid in enumerate(sorted(of))}
    p_n = np.exp([sum(of[sid]) for sid in sorted(of)])
    assert len(p_n) == 46
    first = np.bincount([place[one.items[0].sid] for one in exposures], minlength=len(p_n))
    wanted = p_n * len(exposures)
    few = wanted < 5
    f_obs, f_exp = (np.append(x[~few], x[few].sum()) for x in (first, wanted))
    assert chisquare(f_obs, f_exp * f_obs.sum() / f_exp.sum()).pvalue > LEAST_P
    rng = np.random.default_rng(8)
    places: dict[int, list[float]] = {}
    skipped = 0
    for exposure in exposures:
        left_n = p_n.copy()
        for slot, item in enumerate(in_order(exposure, "policy")[:4]):
            at, total = place[item.sid], left_n.sum()
            assert item.logp_decision == pytest.approx(np.log(left_n[at] / total), abs=1e-4)
            upto = left_n[: at + 1].sum() - rng.random() * left_n[at]
            places.setdefault(slot, []).append(upto / total)
            left_n[at] = 0.0
            skipped += isinstance(item, SkippedItem)
    assert skipped > 2_000
    for slot in range(4):
        bins = np.bincount((np.array(places[slot]) * 30).astype(int).clip(0, 29), minlength=30)
        if slot < 3:  # later ones are looked at or not, depending on what came before
            assert len(places[slot]) == len(exposures)
            assert chisquare(bins).pvalue > LEAST_P, f"slot {slot + 1} of the draw"


def threshold(item: ShownItem, exposure: Exposure, catalogue: Catalogue, plain: bool) -> float:
    """The score below which this item would not have been shown (docs/propensity.md)."""
    author = catalogue.items[item.item].author
    of_author = [
        one.score
        for one in exposure.skipped or []
        if author and not plain and catalogue.items[one.item].author == author
    ]
    score = max([one for one in of_author if one is not None], default=exposure.next_score)
    return -np.inf if score is None else score


def test_scores_weight_capped_slates_to_unbiased_sums_and_need_what_was_skipped() -> None:
    made, policy = random_catalogue(CODES, 24, seed=9), served(seed=10)
    catalogue = authored(made, some_authors(5, seed=9))
    value = {item: float(n % 5) for n, item in enumerate(catalogue.items)}
    exposures = list(drawn_often(policy, catalogue, 3, 1, 8_000))
    of = law(policy.model, sampled(exposures[0]), catalogue)
    names = {catalogue.items[item].sid: item for item in catalogue.items}
    truth = sum(np.exp(sum(levels)) * value[names[sid]] for sid, levels in of.items())
    off = {}
    for plain in (False, True):
        sums = []
        for exposure in exposures:
            total = 0.0
            for item in exposure.items:
                logp = sum(of[item.sid])
                beaten = threshold(item, exposure, catalogue, plain)
                inclusion = 1.0 if np.isneginf(beaten) else -np.expm1(-np.exp(logp - beaten))
                total += np.exp(logp) / inclusion * value[item.item]
            sums.append(total)
        off[plain] = (np.mean(sums) - truth) / (np.std(sums) / np.sqrt(len(sums)))
    assert abs(off[False]) < 4
    assert abs(off[True]) > 8, "the skipped do not matter here"


def test_an_author_is_that_of_the_requests_catalogue_version() -> None:
    catalogue, users = world(60, 3, seed=11)
    before = {item: entry.author for item, entry in catalogue.items.items()}
    version = catalogue.version

    def change_hands() -> None:
        for item, entry in list(catalogue.items.items()):
            value = upsert(item, entry.sid, author="the same")
            catalogue.take(catalogue.version + 1, item.encode(), value)

    batch = [(f"u{n}", 4) for n in range(10)]
    rng = np.random.default_rng(12)
    made = serve(served(13), catalogue, users, batch, 1.0, rng, change_hands, author_cap=2)
    assert all(drawn_again(served(13), made, catalogue))
    for exposure in made:
        assert exposure.catalogue_version == version
        of = Counter(before[item.item] for item in exposure.items)
        assert len(exposure.items) == 4
        assert max(count for author, count in of.items() if author) <= 2


def test_what_was_deleted_meanwhile_is_logged_and_replaced_where_more_was_drawn() -> None:
    catalogue, users = world(60, 20, seed=14)

    def delete() -> None:
        for number in range(0, 60, 3):
            catalogue.take(catalogue.version + 1, f"i{number}".encode(), None)

    batch = [(f"u{n}", 5) for n in range(10)]
    for cap in (0, 4):
        catalogue, users = world(60, 20, seed=14)
        rng = np.random.default_rng(15)
        made = serve(served(16), catalogue, users, batch, 1.0, rng, delete, author_cap=cap)
        assert all(drawn_again(served(16), made, catalogue))
        gone = [one for exposure in made for one in exposure.skipped or []]
        assert {one.reason for one in gone} == {"deleted"}
        assert not {one.item for one in gone} & set(catalogue.items)
        assert all(one.duration_ms == 0 for one in gone)
        full = [len(exposure.items) == 5 for exposure in made]
        assert all(full) if cap else not all(full)


def test_what_is_drawn_beyond_a_slate_is_bounded_and_nothing_where_no_cap_can_bite() -> None:
    assert [spare_of(6, 6, cap) for cap in (0, 1, 5, 6, 7)] == [0, LEAST_SPARE, LEAST_SPARE, 0, 0]
    assert spare_of(50, 50, 2) == 50
    catalogue, users = world(40, 5, seed=17)
    one = prepare("r", "u0", "a", 6, users, catalogue, 4, NOW_MS, author_cap=2)
    assert (one.count, one.drawn, one.asked) == (6, 6 + LEAST_SPARE, 6)
    assert prepare("r", "u0", "a", 6, users, catalogue, 4, NOW_MS).drawn == 6


def test_a_catalogue_of_one_author_fills_a_slate_as_far_as_the_cap_goes() -> None:
    catalogue = authored(random_catalogue(CODES, 40, seed=18), lambda _: "a")
    users, rng = Users(ActorSettings()), np.random.default_rng(19)
    (exposure,) = serve(served(20), catalogue, users, [("u", 6)], 1.0, rng, author_cap=2)
    assert exposure.skipped is not None
    assert (len(exposure.items), len(exposure.skipped)) == (2, 12)
    assert exposure.next_score is not None
    assert drawn_again(served(20), [exposure], catalogue) == [True]
    keys = keys_of(np.array([one.sid for one in in_order(exposure, "policy")]), CODES)
    assert len(np.unique(keys)) == 14


def test_a_reserved_slot_has_its_law_given_what_was_skipped_before_it() -> None:
    """With all of one author but one item, the cap of 1 spent by the policy: only that item can fill the slot."""
    catalogue = authored(random_catalogue(CODES, 9, seed=21), lambda n: "b" if n == 4 else "a")
    users, rng = Users(ActorSettings()), np.random.default_rng(22)
    explore = Exploration(slots=1, new=0.5, span=1)
    policy = served(23)
    counts: Counter[int] = Counter()
    for _ in range(40):
        made = serve(policy, catalogue, users, [("u", 2)] * 10, 1.0, rng, lambda: None, explore, 1)
        assert all(drawn_again(policy, made, catalogue, explore))
        for exposure in made:
            own, reserved = in_order(exposure, "policy"), in_order(exposure, "explore")
            assert len(own) == 1 or own[0].item != "i4"
            if own[0].item != "i4":
                assert exposure.items[-1].item == "i4"
                counts[len(reserved)] += 1
                taken = {item.item for item in own}
                for item in reserved:
                    share = 0.0 if "i8" in taken else 0.5
                    p = (1 - share) / (9 - len(taken)) + (share if item.item == "i8" else 0.0)
                    assert item.logp_decision == pytest.approx(np.log(p))
                    taken.add(item.item)
    assert len(counts) > 3

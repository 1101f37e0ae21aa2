"""Deterministic beams, served: what is shown, what is said of it, and what an audit and the learner make of it."""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from actor.explore import Exploration
from actor.policy import ServedPolicy
from actor.sampling import beam, most_probable
from actor.search import NotFiniteError
from actor.settings import ActorSettings
from learner.batch import assemble
from learner.catalogue import Catalogue
from learner.valid_tree import keys_of
from ops.audit_propensity import audit_propensity
from ops.config import Config
from ops.propensity import differences, drawn_again, in_order
from streams.events import Exposure, encode, exposure_decoder, unpack_leaves
from tests.actor.slates import (
    CODES,
    ROWS,
    authored,
    known_users,
    sampled,
    serve,
    served,
    some_authors,
)
from tests.actor.test_sampling import TablePolicy, random_tree
from tests.actor.world import POLICY, World, acting, user_of
from tests.learner.makers import SMALL, law, random_catalogue

GOAL_NATS = 1e-5


def test_a_beam_says_the_policys_probability_of_each_level_of_each_leaf() -> None:
    policy, tree = TablePolicy(5, seed=1), random_tree(5, 40, seed=2)
    leaves = tree.leaves()
    excluded = [leaves[:0], leaves[::2]]
    for width in (1, 7, 50):
        codes, logp = beam(policy.step, tree, excluded, width, 0.7)
        found = most_probable(policy.step, tree, excluded, width, 0.7)
        assert (found.sids_BJ3 == codes).all()
        assert (found.filled_BJ == (logp > -np.inf)).all()
        summed = found.logp_levels_BJ3[found.filled_BJ].sum(-1)
        assert np.abs(summed - logp[found.filled_BJ]).max() < 1e-12
        assert np.isneginf(found.logp_levels_BJ3[~found.filled_BJ]).all()
        assert (found.logp_leaf_BJ[found.filled_BJ] == 0).all()
        assert found.next_score(0, 1) is found.score(0, 0) is None
    for request, gone in enumerate(excluded):
        left = np.setdiff1d(leaves, gone)
        of = dict(zip(left.tolist(), policy.law(left, 0.7), strict=True))
        for slot in range(len(left)):
            (key,) = keys_of(found.sids_BJ3[request, [slot]], 5).tolist()
            assert found.logp_levels_BJ3[request, slot].sum() == pytest.approx(of[key], abs=1e-6)


World_ = tuple[ServedPolicy, Catalogue, list[Exposure]]
EXPLORE = Exploration(slots=1, new=0.5, span=10)


@pytest.fixture(scope="module")
def beams() -> World_:
    """A batch by beams of 16 under a cap of 1, the last slot reserved; deletions came in between."""
    made = random_catalogue(CODES, 90, seed=3, shared=15)
    catalogue = authored(made, some_authors(8, seed=4))
    rng = np.random.default_rng(5)
    users, policy = known_users(catalogue, 30, rng), served(seed=6)
    batch = [(f"u{n}", 5) for n in range(30)]

    def delete() -> None:
        for number in range(0, 90, 6):
            catalogue.take(catalogue.version + 1, f"i{number}".encode(), None)

    return (
        policy,
        catalogue,
        serve(policy, catalogue, users, batch, 0.8, rng, delete, EXPLORE, 1, 16),
    )


def copies(batch: list[Exposure]) -> list[Exposure]:
    return [cast(Exposure, exposure_decoder.decode(encode(exposure))) for exposure in batch]


def test_a_beam_shows_the_most_probable_that_may_be_shown(beams: World_) -> None:
    policy, catalogue, exposures = beams
    reasons: Counter[str] = Counter()
    for exposure in exposures:
        assert exposure.decode_mode == "beam"
        assert {item.source for item in exposure.items} <= {"other", "explore"}
        assert (exposure.next_score, {item.score for item in exposure.items}) == (None, {None})
        of = law(policy.model, sampled(exposure), catalogue)
        told = [sum(of[item.sid]) for item in in_order(exposure, "other")]
        assert told == sorted(told, reverse=True)
        best = sorted((sum(levels) for levels in of.values()), reverse=True)
        assert told[0] == pytest.approx(best[0], abs=0.5)  # 16 of 5 codes a level: hardly less
        excluded = {tuple(leaf) for leaf in unpack_leaves(exposure.excluded).tolist()}
        assert not excluded & {item.sid for item in exposure.items}
        assert {item.item for item in exposure.items} <= set(catalogue.items)
        authors = Counter(catalogue.items[item.item].author for item in exposure.items)
        assert max([count for author, count in authors.items() if author], default=0) <= 1
        reasons.update(one.reason for one in exposure.skipped or () if one.source == "other")
    assert min(reasons["author"], reasons["deleted"]) > 10
    assert sum(len(exposure.items) == 5 for exposure in exposures) > 20


def test_an_audit_computes_its_probabilities_and_searches_again(beams: World_) -> None:
    policy, catalogue, exposures = beams
    off = differences(policy, exposures, catalogue)
    assert len(off) == sum(len(in_order(exposure, "other")) for exposure in exposures) > 150
    assert off.max() < GOAL_NATS
    assert all(drawn_again(policy, exposures, catalogue, EXPLORE))
    assert not any(drawn_again(served(seed=7), exposures, catalogue, EXPLORE))


def swap(exposure: Exposure) -> None:
    first, second, *_ = exposure.items
    exposure.items[:2] = second, first
    first.position, second.position = 1, 0


def nudge(exposure: Exposure) -> None:
    levels = exposure.items[0].logp_levels
    assert levels is not None
    exposure.items[0].logp_levels = (levels[0], levels[1], levels[2] - 1e-9)


def redecide(exposure: Exposure) -> None:
    """As if it had been drawn."""
    levels = exposure.items[0].logp_levels
    assert levels is not None
    exposure.items[0].logp_decision = sum(levels)


def claim_the_policys(exposure: Exposure) -> None:
    for item in exposure.items:
        item.source = "policy"


def claim_a_draw(exposure: Exposure) -> None:
    claim_the_policys(exposure)
    assert exposure.draw is not None
    exposure.draw.beam = 0
    exposure.decode_mode = "gumbel_top_k"


def claim_a_mode(exposure: Exposure) -> None:
    exposure.decode_mode = "gumbel_top_k"


def score(exposure: Exposure) -> None:
    exposure.items[0].score = 1.0


@pytest.mark.parametrize(
    "lie", [swap, nudge, redecide, claim_the_policys, claim_a_draw, claim_a_mode, score]
)
def test_a_lie_about_a_beam_is_found(beams: World_, lie: Callable[[Exposure], None]) -> None:
    policy, catalogue, exposures = beams
    told = copies(exposures)
    lie(told[4])
    found = drawn_again(policy, told, catalogue, EXPLORE)
    assert found == [row != 4 for row in range(len(told))]


def test_learning_takes_a_beam_as_it_takes_another_systems_slates(beams: World_) -> None:
    _, catalogue, exposures = beams
    samples = [sampled(exposure) for exposure in exposures]
    batch = assemble(samples, catalogue.valid, SMALL.context, ROWS)
    assert batch.targets.logp_old_BkL.isnan().all()
    assert all(item.logp_levels for exposure in exposures for item in exposure.items[:3])


def test_the_same_request_has_the_same_beam_alone_and_in_company() -> None:
    catalogue = random_catalogue(CODES, 60, seed=8)
    users, policy = known_users(catalogue, 9, np.random.default_rng(9)), served(seed=10)

    def asked(batch: list[tuple[str, int]], seed: int) -> list[list[str]]:
        made = serve(policy, catalogue, users, batch, 1.0, np.random.default_rng(seed), beam=12)
        return [[item.item for item in exposure.items] for exposure in made]

    together = asked([(f"u{n}", 2 + n) for n in range(9)], 11)
    assert [asked([(f"u{n}", 2 + n)], 12 + n)[0] for n in range(9)] == together
    assert len({tuple(items[:2]) for items in together}) > 3


def test_a_policy_that_is_not_finite_is_not_searched() -> None:
    policy, tree = TablePolicy(5, seed=13), random_tree(5, 40, seed=14)
    policy.tables[1][...] = torch.nan
    with pytest.raises(NotFiniteError):
        most_probable(policy.step, tree, None, 4, 1.0)


def test_beams_are_settings() -> None:
    assert (ActorSettings(beam=8).beam_width, ActorSettings(beam=8).most) == (0, 50)
    assert ActorSettings(decoding="beam", beam=8).beam_width == 8
    assert [ActorSettings(decoding="beam", beam=n).most for n in (1, 49, 512)] == [1, 49, 50]


async def test_beams_over_http_are_the_same_each_time_and_pass_the_audit(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    user = user_of("learning")
    async with acting(world, decoding="beam", beam=12, exclude_shown=0) as actor:
        first, second = await actor.recommend(user, 5), await actor.recommend(user, 5)
        assert first.status == second.status == 200
        assert not first.json["fallback"]
        assert len(first.json["items"]) == 5
        others = [user_of("learning", n) for n in range(1, 12)]
        answers = await asyncio.gather(*(actor.recommend(other, 8) for other in others))
        assert [len(answer.json["items"]) for answer in answers] == [8] * 11
        refused = await actor.recommend(user, 13)
        assert refused.status == 422
        assert "allowed 1..12" in refused.json["detail"][0]["msg"]
    exposures = await asyncio.to_thread(world.exposures)
    by_request = {exposure.request: exposure for exposure in exposures}
    leaves = [
        [item.sid for item in by_request[answer.json["request"]].items]
        for answer in (first, second)
    ]
    assert leaves[0] == leaves[1]
    config = replace(Config(), kafka=world.kafka, policy=POLICY)
    found = await asyncio.to_thread(audit_propensity, config)
    assert (found.exposures, found.beams, found.wrong) == (13, 13, [])
    assert (found.drawn_again, found.bit_equal, found.slots) == (13, 1.0, 98)
    assert found.max_difference_nats < 1e-4  # these weights are random, with logits of 15


async def test_a_width_of_one_answers_with_one_item(world: World) -> None:
    world.fill_catalogue()
    world.publish(1)
    async with acting(world, decoding="beam", beam=1) as actor:
        answers = [await actor.recommend(user_of("learning"), 1) for _ in range(3)]
    assert [len(answer.json["items"]) for answer in answers] == [1, 1, 1]
    assert len({answer.json["items"][0]["item"] for answer in answers}) == 3

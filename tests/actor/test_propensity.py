"""Truthful propensity: what an exposure says of its probability is what the learner recomputes from it.

Everything on the way is the real thing: prepare, decode and expose at the actor; the encoded exposure; the sample
that the join makes of it; assemble and the model at the learner.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare

from actor.policy import ServedPolicy
from actor.recommend import Prepared, decode, expose, prepare
from actor.settings import ActorSettings
from actor.users import Users
from learner.batch import assemble
from learner.catalogue import Catalogue
from learner.masking import masked_log_softmax
from learner.valid_tree import keys_of, sids_of
from streams.events import Sample, unpack_leaves
from tests.actor.slates import CODES, ITEMS, ROWS, known_users, sampled, serve, served
from tests.learner.makers import (
    NOW_MS,
    SMALL,
    catalogue_of,
    law,
    random_catalogue,
    upsert,
)


def recomputed(
    policy: ServedPolicy, samples: list[Sample], catalogue: Catalogue
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Log-probabilities per level of all shown items, as logged and as the learner has them, `[n, 3]` each."""
    batch = assemble(samples, catalogue.valid, SMALL.context, ROWS)
    with torch.no_grad():
        logits = policy.model(policy.model.process(batch.contexts), batch.sids_BkL)
        scaled = logits / batch.temperature_B[:, None, None, None]
        logp = masked_log_softmax(scaled, batch.mask_BkLK)
        found = logp.gather(-1, batch.sids_BkL.unsqueeze(-1)).squeeze(-1)
    shown = batch.targets.shown_Bk
    return batch.targets.logp_old_BkL[shown].numpy(), found[shown].numpy()


@pytest.fixture
def world() -> tuple[ServedPolicy, Catalogue, Users, list[Sample]]:
    """Samples of many requests in batches of several sizes, over a catalogue that moves meanwhile."""
    rng = np.random.default_rng(5)
    catalogue = random_catalogue(CODES, ITEMS, seed=6, shared=20)
    users = known_users(catalogue, 60, rng)
    policy = served(seed=7)
    samples = []
    first = 0
    for number, size in enumerate((1, 9, 2, 17, 1, 30)):
        catalogue.take(ITEMS + number, f"i{3 * number}".encode(), None)
        batch = [(f"u{first + row}", int(rng.integers(1, 9))) for row in range(size)]
        first += size
        temperature = (1.0, 0.7, 1.6)[number % 3]
        exposures = serve(policy, catalogue, users, batch, temperature, rng)
        assert [len(exposure.items) for exposure in exposures] == [count for _, count in batch]
        samples += [sampled(exposure) for exposure in exposures]
    return policy, catalogue, users, samples


World = tuple[ServedPolicy, Catalogue, Users, list[Sample]]


def test_the_learner_recomputes_what_the_actor_logged(world: World) -> None:
    policy, catalogue, _, samples = world
    logged, found = recomputed(policy, samples, catalogue)
    assert np.isfinite(logged).all()
    assert len(logged) == sum(len(sample.items) for sample in samples) > 200
    assert np.abs(logged - found).max() < 1e-5
    assert logged.std() > 0.5, "the law is nearly uniform: this would hold for any"


@pytest.mark.parametrize(
    "lost", ["exclusions", "version", "temperature", "context", "user", "mask"]
)
def test_without_any_part_of_an_exposure_the_probabilities_are_others(
    world: World, lost: str
) -> None:
    """What the test above holds is not held by accident: each part lost is a difference to see."""
    policy, catalogue, _, samples = world
    version = ITEMS - 1
    if lost == "mask":
        everything = sids_of(np.arange(CODES**3), CODES)
        catalogue = catalogue_of(CODES, [(a, b, c) for a, b, c in everything.tolist()])
        version = catalogue.version
    for sample in samples:
        if lost in ("exclusions", "mask"):
            sample.excluded = b""
        if lost in ("version", "mask"):
            sample.catalogue_version = version
        if lost == "temperature":
            sample.temperature = 1.0
        if lost == "context":
            sample.context = b""
        if lost == "user":
            sample.user = "somebody else"
    logged, found = recomputed(policy, samples, catalogue)
    off = np.abs(logged - found).max(axis=1)
    assert off.max() > 0.1
    assert (off > 1e-3).mean() > 0.1


def test_other_weights_give_other_probabilities(world: World) -> None:
    _, catalogue, _, samples = world
    logged, found = recomputed(served(seed=8), samples, catalogue)
    assert np.abs(logged - found).mean() > 0.3


def test_nothing_shown_lately_or_excluded_is_shown(world: World) -> None:
    _, catalogue, users, samples = world
    repeated = 0
    for sample in samples:
        shown = users.shown(sample.user)
        excluded = set(keys_of(unpack_leaves(sample.excluded), CODES).tolist())
        for item in sample.items:
            assert item.item not in shown
            key = int(keys_of(np.array([item.sid]), CODES)[0])
            assert key not in excluded
            repeated += bool(set(catalogue.valid.members(key, sample.catalogue_version)) & shown)
    assert repeated > 0, "no shared leaf with a member shown before: the last hop was not tried"


def test_the_decision_is_the_law_of_the_slot_with_the_last_hop_in_it(world: World) -> None:
    """p_j / (1 - sum of the p of earlier slots), over the eligible members of the leaf."""
    policy, catalogue, users, samples = world
    rng = np.random.default_rng(9)
    version = catalogue.version
    hops = set()
    for user in ("u50", "u51", "u52"):
        (exposure,) = serve(policy, catalogue, users, [(user, 6)], 0.7, rng)
        of = law(policy.model, sampled(exposure), catalogue)
        shown, spent = users.shown(user), 0.0
        for item in exposure.items:
            key = int(keys_of(np.array([item.sid]), CODES)[0])
            open_members = [
                one for one in catalogue.valid.members(key, version) if one not in shown
            ]
            hops.add(len(open_members))
            p = float(np.exp(sum(of[item.sid])))
            assert item.logp_decision is not None
            assert item.logp_decision == pytest.approx(
                np.log(p / (1 - spent) / len(open_members)), abs=1e-4
            )
            spent += p
    assert hops == {1, 2}
    assert samples


@pytest.mark.parametrize("slot", [0, 1])
def test_items_are_shown_as_often_as_their_decisions_say(slot: int) -> None:
    """Over a small catalogue with shared leaves and exclusions, by chi-square."""
    catalogue = random_catalogue(CODES, 12, seed=10, shared=4)
    users = Users(ActorSettings())
    users.exposed("u", ["i1", "i11"])
    policy = served(seed=11)
    rng = np.random.default_rng(12)
    counts: dict[tuple[str, str], int] = {}
    logp: dict[tuple[str, str], float] = {}
    draws = 4000
    for _ in range(draws // 500):
        for exposure in serve(policy, catalogue, users, [("u", 2)] * 500, 1.3, rng):
            first, second = exposure.items
            key = (first.item, second.item if slot else "")
            counts[key] = counts.get(key, 0) + 1
            decisions = [first.logp_decision, second.logp_decision][: slot + 1]
            assert None not in decisions
            logp[key] = sum(one for one in decisions if one is not None)
    p = np.exp(np.array([logp[key] for key in counts]))
    seen = np.array([counts[key] for key in counts])
    rest = max(0.0, 1.0 - p.sum())  # what was never drawn
    expected = np.append(p, rest) * draws
    kept = expected >= 5
    observed = np.append(seen, 0)
    f_obs = np.append(observed[kept], observed[~kept].sum())
    f_exp = np.append(expected[kept], expected[~kept].sum())
    assert len(f_obs) > 6
    if f_exp[-1] == 0:
        f_obs, f_exp = f_obs[:-1], f_exp[:-1]
    assert chisquare(f_obs, f_exp * f_obs.sum() / f_exp.sum()).pvalue > 1e-4


def test_an_item_deleted_between_preparation_and_answer_is_left_out() -> None:
    rng = np.random.default_rng(13)
    catalogue = random_catalogue(CODES, 12, seed=14)
    users = Users(ActorSettings())
    before = catalogue.version

    def delete() -> None:
        for offset in range(6):
            catalogue.take(12 + offset, f"i{offset}".encode(), None)

    policy = served(seed=15)
    exposures = serve(policy, catalogue, users, [("u", 8)] * 20, 1.0, rng, between=delete)
    for exposure in exposures:
        assert {item.item for item in exposure.items} <= set(catalogue.items)
        assert [item.position for item in exposure.items] == list(range(len(exposure.items)))
        assert exposure.catalogue_version == before
    assert any(len(exposure.items) < 6 for exposure in exposures)
    logged, found = recomputed(policy, [sampled(one) for one in exposures if one.items], catalogue)
    assert np.abs(logged - found).max() < 1e-5


def test_a_short_catalogue_fills_what_it_can() -> None:
    catalogue = random_catalogue(CODES, 5, seed=16)
    users = Users(ActorSettings())
    users.exposed("u", ["i0", "i1"])
    rng = np.random.default_rng(17)
    (exposure,) = serve(served(seed=18), catalogue, users, [("u", 6)], 1.0, rng)
    assert sorted(item.item for item in exposure.items) == ["i2", "i3", "i4"]
    assert exposure.next_score is None


def test_the_same_draw_of_random_numbers_gives_the_same_slates() -> None:
    catalogue = random_catalogue(CODES, ITEMS, seed=19)
    users = known_users(catalogue, 4, np.random.default_rng(20))
    batch = [(f"u{n}", 4) for n in range(4)]
    policy = served(seed=21)
    one, two, other = (
        serve(policy, catalogue, users, batch, 1.0, np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert one == two
    assert one != other


def test_a_request_prepared_earlier_keeps_its_own_tree() -> None:
    """The catalogue may move between preparation and decode: the answer is of the earlier version."""
    catalogue = random_catalogue(CODES, 6, seed=22)
    users = Users(ActorSettings())
    policy, rng = served(seed=23), np.random.default_rng(24)
    one: Prepared = prepare("r", "u", "learning", 6, users, catalogue, 4, NOW_MS)
    free = next(key for key in range(CODES**3) if key not in one.tree.leaves())
    sid = (free // CODES**2, free // CODES % CODES, free % CODES)
    catalogue.take(6, b"new", upsert("new", sid))
    slates = decode(policy, [one], 1.0, rng)
    exposure = expose(policy, one, 0, slates, catalogue, 1.0, rng, NOW_MS)
    assert sorted(item.item for item in exposure.items) == [f"i{n}" for n in range(6)]
    assert exposure.catalogue_version == 5
    later = replace(one, tree=catalogue.valid.tree(6), catalogue_version=6, count=7)
    slates = decode(policy, [later], 1.0, rng)
    assert len(expose(policy, later, 0, slates, catalogue, 1.0, rng, NOW_MS).items) == 7

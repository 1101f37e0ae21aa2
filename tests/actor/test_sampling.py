"""Draws against their law, computed leaf by leaf; and the probabilities that are logged."""

import math
import time
from collections import Counter
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from actor.sampling import Slates, beam, draw, last_hop
from actor.search import Step, of_whole_level
from learner.masking import masked_log_softmax
from learner.valid_tree import Children, Keys, Tree, keys_of, sids_of

# Seeded: a test of a law fails for good or never. Chance alone gives less once in 10,000 tests.
LEAST_P = 1e-4


class TablePolicy:
    """Logits of every prefix in tables, so that any leaf's law can be written down."""

    def __init__(self, codes: int, seed: int, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.codes = codes
        self.tables = [
            spread * torch.randn((codes,) * (level + 1), generator=generator) for level in range(3)
        ]
        self.seen: list[tuple[int, ...]] = []

    def step(self, prefix_BMl: Tensor, children: Children) -> Tensor:
        return of_whole_level(self.whole)(prefix_BMl, children)

    def whole(self, prefix_BMl: Tensor) -> Tensor:
        """Logits of all codes of a level."""
        assert prefix_BMl.dtype == torch.int64
        self.seen.append(tuple(prefix_BMl.shape))
        level = prefix_BMl.shape[-1]
        table: Tensor = self.tables[level]
        if level == 0:
            return table.expand(*prefix_BMl.shape[:2], -1)
        return table[tuple(prefix_BMl.unbind(-1))]

    def law(self, leaves_n: Keys, temperature: float = 1.0) -> NDArray[np.float64]:
        """Log-probabilities of the leaves of a tree of just these leaves, by plain sums."""
        sids = [tuple(map(int, leaf)) for leaf in sids_of(leaves_n, self.codes)]
        logp = []
        for leaf in sids:
            total = 0.0
            for level in range(3):
                siblings = {other[level] for other in sids if other[:level] == leaf[:level]}
                row = (self.tables[level][leaf[:level]] / temperature).double()
                total += float(row[leaf[level]] - torch.logsumexp(row[sorted(siblings)], 0))
            logp.append(total)
        return np.array(logp)


def random_tree(codes: int, leaves: int, seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    return Tree(codes, np.sort(rng.choice(codes**3, leaves, replace=False)).astype(np.int64))


def rows_of(slates: Slates, leaves_n: Keys, codes: int) -> NDArray[np.int64]:
    """Each slot's place among `leaves_n`, `[B, J]`; -1 where not filled."""
    rows_BJ = np.full(slates.filled_BJ.shape, -1, dtype=np.int64)
    keys = keys_of(slates.sids_BJ3[slates.filled_BJ], codes)
    rows = np.searchsorted(leaves_n, keys)
    assert np.array_equal(leaves_n[rows], keys), "a slot shows a leaf that is not valid"
    rows_BJ[slates.filled_BJ] = rows
    return rows_BJ


def chi_square_p(observed: NDArray[Any], probability: NDArray[np.float64]) -> float:
    """P-value, with cells of fewer than 5 expected counts put together."""
    expected = probability * observed.sum()
    small = expected < 5
    seen = np.append(observed[~small], observed[small].sum())
    wanted = np.append(expected[~small], expected[small].sum())
    kept = wanted > 0
    return float(chisquare(seen[kept], wanted[kept] * seen.sum() / wanted.sum()).pvalue)


def assert_draws_have_the_law(
    slates: Slates, leaves_n: Keys, logp_n: NDArray[np.float64], codes: int
) -> None:
    """Slot 1 by counts per leaf; each slot by its conditional law given the slots before.

    The latter by the randomised integral transform: with F the cumulative law of the leaves that
    are left, F(before the shown leaf) + v p(shown leaf), v uniform, is uniform on 0..1.
    """
    rows_BJ = rows_of(slates, leaves_n, codes)
    p_n = np.exp(logp_n)
    counts = np.bincount(rows_BJ[:, 0], minlength=len(leaves_n))
    assert chi_square_p(counts, p_n) > LEAST_P
    rng = np.random.default_rng(99)
    left_Bn = np.tile(p_n, (len(rows_BJ), 1))
    request_B = np.arange(len(rows_BJ))
    for slot in range(rows_BJ.shape[1]):
        shown_B = rows_BJ[:, slot]
        cumulative_Bn = left_Bn.cumsum(axis=1) / left_Bn.sum(axis=1, keepdims=True)
        share_B = left_Bn[request_B, shown_B] / left_Bn.sum(axis=1)
        place_B = cumulative_Bn[request_B, shown_B] - rng.random(len(rows_BJ)) * share_B
        bins = np.bincount((place_B * 50).astype(int).clip(0, 49), minlength=50)
        assert chi_square_p(bins, np.full(50, 0.02)) > LEAST_P, f"slot {slot + 1}"
        assert np.allclose(slates.logp_leaf_BJ[:, slot], np.log(share_B), rtol=0, atol=1e-9)
        left_Bn[request_B, shown_B] = 0.0


def test_every_slot_has_its_conditional_law() -> None:
    policy, tree = TablePolicy(5, seed=1), random_tree(5, 45, seed=2)
    rng = np.random.default_rng(3)
    slates = draw(policy.step, tree, None, 6, 1.0, rng, requests=20_000)
    assert slates.filled_BJ.all()
    assert_draws_have_the_law(slates, tree.leaves(), policy.law(tree.leaves()), 5)
    assert policy.seen == [(20_000, 1, 0), (20_000, 5, 1), (20_000, 7, 2)]


def test_the_temperature_is_that_of_the_law() -> None:
    policy, tree = TablePolicy(5, seed=4), random_tree(5, 30, seed=5)
    rng = np.random.default_rng(6)
    slates = draw(policy.step, tree, None, 3, 0.6, rng, requests=20_000)
    assert_draws_have_the_law(slates, tree.leaves(), policy.law(tree.leaves(), 0.6), 5)


def test_ordered_pairs_and_triples_come_with_their_joint_probability() -> None:
    policy, tree = TablePolicy(3, seed=7), random_tree(3, 6, seed=8)
    p = np.exp(policy.law(tree.leaves()))
    rng = np.random.default_rng(9)
    slates = draw(policy.step, tree, None, 3, 1.0, rng, requests=40_000)
    seen = Counter(map(tuple, rows_of(slates, tree.leaves(), 3).tolist()))
    cells, probability = [], []
    for i, j, k in np.ndindex(6, 6, 6):
        if len({i, j, k}) == 3:
            cells.append(seen[i, j, k])
            probability.append(p[i] * p[j] / (1 - p[i]) * p[k] / (1 - p[i] - p[j]))
    assert sum(cells) == 40_000
    assert chi_square_p(np.array(cells), np.array(probability)) > LEAST_P


def test_exclusions_are_each_requests_own_and_give_the_law_of_the_smaller_tree() -> None:
    policy, tree = TablePolicy(5, seed=10), random_tree(5, 50, seed=11)
    rng = np.random.default_rng(12)
    # Half of the leaves at random; everything below one level-1 code; nothing.
    kinds = [
        rng.choice(tree.leaves(), 25, replace=False),
        tree.leaves()[tree.leaves() // 25 == 2],
        np.empty(0, dtype=np.int64),
    ]
    each = 6_000
    slates = draw(policy.step, tree, [kind for kind in kinds for _ in range(each)], 4, 1.0, rng)
    for number, kind in enumerate(kinds):
        part = slice(number * each, (number + 1) * each)
        own = Slates(
            slates.sids_BJ3[part],
            slates.filled_BJ[part],
            slates.logp_levels_BJ3[part],
            slates.logp_leaf_BJ[part],
            slates.scores_BW[part],
        )
        left = np.setdiff1d(tree.leaves(), kind)
        assert_draws_have_the_law(own, left, policy.law(left), 5)


def test_scores_weight_a_slate_and_any_cut_of_it_to_unbiased_sums() -> None:
    # Kool et al., section 4: a leaf is above the next score t with probability
    # 1 - exp(-exp(log p - t)), and sums weighted with p / that are unbiased. Needs true scores,
    # the root's noise in them, and the right "next" for the cut.
    policy, tree = TablePolicy(4, seed=13), random_tree(4, 20, seed=14)
    logp_n = policy.law(tree.leaves())
    value_n = np.random.default_rng(15).normal(size=20)
    count = 15_000
    slates = draw(policy.step, tree, None, 5, 1.0, np.random.default_rng(16), requests=count)
    rows_BJ = rows_of(slates, tree.leaves(), 4)
    for slots in (1, 3, 5):
        next_B = np.array([slates.next_score(request, slots) for request in range(count)])
        logp_BJ = logp_n[rows_BJ[:, :slots]]
        inclusion_BJ = -np.expm1(-np.exp(logp_BJ - next_B[:, None]))
        weight_BJ = np.exp(logp_BJ) / inclusion_BJ
        for truth, values_BJ in (
            (float((np.exp(logp_n) * value_n).sum()), value_n[rows_BJ[:, :slots]]),
            (1.0, np.ones(slots)),
        ):
            estimate_B = (weight_BJ * values_BJ).sum(axis=1)
            assert abs(estimate_B.mean() - truth) < 4 * estimate_B.std() / math.sqrt(count)


def test_slots_stand_in_the_order_of_their_scores_and_never_repeat() -> None:
    policy, tree = TablePolicy(6, seed=17, spread=5.0), random_tree(6, 50, seed=18)
    slates = draw(policy.step, tree, None, 12, 1.0, np.random.default_rng(19), requests=2000)
    rows_BJ = np.sort(rows_of(slates, tree.leaves(), 6), axis=1)
    assert (np.diff(rows_BJ, axis=1) > 0).all()
    assert (np.diff(slates.scores_BW, axis=1) < 0).all()
    # A slot's noise is what its score is above its log-probability: finite for all.
    assert np.isfinite(slates.scores_BW).all()


def test_logged_levels_are_what_the_learner_computes_along_the_path() -> None:
    policy, tree = TablePolicy(6, seed=20), random_tree(6, 50, seed=21)
    rng = np.random.default_rng(22)
    excluded = [rng.choice(tree.leaves(), 20, replace=False) for _ in range(50)]
    slates = draw(policy.step, tree, excluded, 6, 0.8, rng)
    mask = torch.from_numpy(tree.path_masks(slates.sids_BJ3, excluded))
    sids = torch.from_numpy(slates.sids_BJ3)
    for level in range(3):
        logits = policy.tables[level][tuple(sids[..., :level].unbind(-1))]
        logits = logits.expand(*sids.shape[:2], 6)
        logp = masked_log_softmax(logits, mask[:, :, level], 0.8)
        taken = logp.gather(-1, sids[:, :, level, None])[..., 0].double().numpy()
        assert np.abs(taken - slates.logp_levels_BJ3[:, :, level]).max() < 1e-6


def test_the_probabilities_of_all_leaves_sum_to_one() -> None:
    policy, tree = TablePolicy(5, seed=23), random_tree(5, 40, seed=24)
    _, logp = beam(policy.step, tree, None, 125)
    assert np.exp(logp[0]).sum() == pytest.approx(1.0, abs=1e-13)
    slates = draw(policy.step, tree, None, 40, 1.0, np.random.default_rng(25), requests=20)
    assert np.exp(slates.logp_levels_BJ3.sum(-1)).sum(-1) == pytest.approx(1.0, abs=1e-13)
    # The last leaf of a whole tree is certain.
    assert slates.logp_leaf_BJ[:, -1] == pytest.approx(0.0, abs=1e-12)
    assert slates.next_score(0, 40) is None


def test_what_a_sharp_policy_leaves_is_not_lost_in_rounding() -> None:
    # After some slots 1 - sum of p is 0 in float64; the truth is a sum over what is left.
    policy, tree = TablePolicy(5, seed=26, spread=40.0), random_tree(5, 45, seed=27)
    logp_n = policy.law(tree.leaves())
    slates = draw(policy.step, tree, None, 8, 1.0, np.random.default_rng(28), requests=200)
    rows_BJ = rows_of(slates, tree.leaves(), 5)
    smallest = 0.0
    for request in range(200):
        for slot in range(8):
            left = np.delete(logp_n, rows_BJ[request, :slot])
            log_left = float(np.logaddexp.reduce(np.sort(left)))
            smallest = min(smallest, log_left)
            law = logp_n[rows_BJ[request, slot]] - log_left
            assert slates.logp_leaf_BJ[request, slot] == pytest.approx(law, abs=1e-8)
    assert smallest < math.log(2.0**-53)


def test_a_slate_is_short_when_fewer_leaves_live() -> None:
    policy, tree = TablePolicy(5, seed=29), random_tree(5, 10, seed=30)
    leaves = tree.leaves()
    excluded = [leaves[:0], leaves[:7], leaves[:9], leaves]
    slates = draw(policy.step, tree, excluded, 6, 1.0, np.random.default_rng(31))
    assert slates.filled_BJ.sum(axis=1).tolist() == [6, 3, 1, 0]
    for request, count in enumerate([6, 3, 1, 0]):
        open_slots = slice(count, None)
        assert (np.diff(slates.filled_BJ[request].astype(int)) <= 0).all()
        assert (slates.sids_BJ3[request, open_slots] == -1).all()
        assert np.isneginf(slates.logp_levels_BJ3[request, open_slots]).all()
        assert np.isneginf(slates.logp_leaf_BJ[request, open_slots]).all()
        shown = keys_of(slates.sids_BJ3[request, :count], 5)
        assert len(np.unique(shown)) == count
        assert not np.isin(shown, excluded[request]).any()
    assert slates.next_score(0, 6) is not None
    assert slates.next_score(1, 2) == slates.scores_BW[1, 2]
    assert [slates.next_score(1, 3), slates.next_score(3, 0)] == [None, None]


def test_an_empty_catalogue_gives_empty_slates() -> None:
    tree = Tree(5, np.empty(0, dtype=np.int64))
    policy = TablePolicy(5, seed=32)
    nothing = [np.array([3], dtype=np.int64)] * 2
    slates = draw(policy.step, tree, nothing, 4, 1.0, np.random.default_rng(33))
    assert not slates.filled_BJ.any()
    assert slates.sids_BJ3.shape == (2, 4, 3)
    codes, logp = beam(policy.step, tree, None, 4)
    assert (codes == -1).all()
    assert np.isneginf(logp).all()


def test_the_same_generator_gives_the_same_slates() -> None:
    policy, tree = TablePolicy(5, seed=34), random_tree(5, 40, seed=35)
    first, again, other = (
        draw(policy.step, tree, None, 5, 1.0, np.random.default_rng(seed), requests=8)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first.sids_BJ3, again.sids_BJ3)
    assert np.array_equal(first.scores_BW, again.scores_BW)
    assert not np.array_equal(first.sids_BJ3, other.sids_BJ3)


@pytest.mark.parametrize("noise", [0.0, 1e3])
def test_the_ends_of_the_noise_give_finite_scores_and_no_repeats(noise: float) -> None:
    class Constant:
        def standard_exponential(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
            return np.full(shape, noise)

    policy, tree = TablePolicy(5, seed=36), random_tree(5, 40, seed=37)
    rng = cast(np.random.Generator, Constant())
    slates = draw(policy.step, tree, None, 8, 1.0, rng)
    assert np.isfinite(slates.scores_BW).all()
    assert len(np.unique(rows_of(slates, tree.leaves(), 5))) == 8


def test_equal_scores_are_taken_in_the_order_of_the_codes() -> None:
    tree = random_tree(5, 40, seed=38)

    def flat(prefix_BMl: Tensor) -> Tensor:
        return torch.zeros(*prefix_BMl.shape[:2], 5)

    full = Tree(5, np.arange(125))
    codes, _ = beam(of_whole_level(flat), full, None, 7)
    assert keys_of(codes[0], 5).tolist() == list(range(7))
    first, second = (beam(of_whole_level(flat), tree, None, 7)[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_a_wide_beam_ranks_every_leaf_by_its_probability() -> None:
    policy, tree = TablePolicy(5, seed=39), random_tree(5, 40, seed=40)
    leaves = tree.leaves()
    excluded = [leaves[:0], leaves[::2]]
    codes, logp = beam(policy.step, tree, excluded, 50)
    for request, gone in enumerate(excluded):
        left = np.setdiff1d(leaves, gone)
        law = policy.law(left)
        order = np.argsort(-law)
        assert keys_of(codes[request, : len(left)], 5).tolist() == left[order].tolist()
        assert np.abs(logp[request, : len(left)] - law[order]).max() < 1e-6
        assert (codes[request, len(left) :] == -1).all()
        assert np.isneginf(logp[request, len(left) :]).all()


def test_a_beam_of_one_is_greedy() -> None:
    policy, tree = TablePolicy(5, seed=41), Tree(5, np.arange(125))
    codes, _ = beam(policy.step, tree, None, 1)
    c1 = int(policy.tables[0].argmax())
    c2 = int(policy.tables[1][c1].argmax())
    assert codes[0].tolist() == [[c1, c2, int(policy.tables[2][c1, c2].argmax())]]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_logits_that_are_not_finite_are_refused_by_level(level: int) -> None:
    policy, tree = TablePolicy(5, seed=42), Tree(5, np.arange(125))
    policy.tables[level][...] = torch.nan
    for search in (
        lambda: draw(policy.step, tree, None, 2, 1.0, np.random.default_rng(0)),
        lambda: beam(policy.step, tree, None, 2),
    ):
        with pytest.raises(ValueError, match=f"logits of level {level + 1} are not finite"):
            search()


def test_the_last_hop_is_uniform_over_eligible_members() -> None:
    rng = np.random.default_rng(43)
    members = ["a", "b", "c", "d"]
    drawn = [last_hop(members, lambda item: item != "b", rng) for _ in range(9000)]
    counts = Counter(item for item, _ in drawn)
    assert set(counts) == {"a", "c", "d"}
    assert {logp for _, logp in drawn} == {-math.log(3)}
    assert chi_square_p(np.array([counts[i] for i in "acd"]), np.full(3, 1 / 3)) > LEAST_P
    assert last_hop(["x"], lambda _: True, rng) == ("x", 0.0)
    with pytest.raises(ValueError, match="no member of the leaf is eligible"):
        last_hop(members, lambda _: False, rng)


@pytest.mark.parametrize("size", [0, -1])
def test_slates_and_beams_have_a_place_at_least(size: int) -> None:
    policy, tree = TablePolicy(5, seed=44), random_tree(5, 10, seed=45)
    with pytest.raises(ValueError, match=f"got {size}"):
        draw(policy.step, tree, None, size, 1.0, np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"got {size}"):
        beam(policy.step, tree, None, size)


def test_drawing_costs_little_beside_a_decoder() -> None:
    tree = random_tree(32, 3000, seed=46)
    rng = np.random.default_rng(47)
    excluded = [rng.choice(tree.leaves(), 128, replace=False)]
    logits = {0: torch.randn(1, 1, 32), 1: torch.randn(1, 7, 32), 2: torch.randn(1, 7, 32)}
    step: Step = of_whole_level(lambda prefix: logits[prefix.shape[-1]])
    spent = []
    for _ in range(50):
        begin = time.process_time()
        draw(step, tree, excluded, 6, 1.0, rng)
        spent.append(time.process_time() - begin)
    assert min(spent) < 4.5e-3

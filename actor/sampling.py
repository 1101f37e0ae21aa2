"""Slates drawn without replacement from the policy, and the probabilities of what was drawn.

Notable choices
- Stochastic beam search (Kool, van Hoof and Welling 2019, arXiv 1903.06059, algorithm 1): each leaf
  has the perturbed score log p + Gumbel noise, and the k best leaves in the order of their scores
  are k draws without replacement. Top down, a node's children are given noise under the condition
  that their maximum is the node's own score. k + 1 beams, so that the (k + 1)-th score is known.
- The way down the valid tree is actor/search.py's, for draws and beams alike.
- The first n slots of a larger draw have the law of a draw of n, and the score after them is the
  (n + 1)-th: requests of different sizes are drawn together and cut.
- What is left after some slots is summed over the leaves that are left (up the search tree), never
  taken as 1 - sum, which cancels.
- Noise is minus the log of exponential noise, which is never taken as zero.

Shapes: B requests, M prefixes of a request in the beam, N = B * M, W beam width, J slots, n children.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actor.search import Floats, Ints, Search, Step, Value, pick
from learner.valid_tree import Keys, Tree
from streams.events import LEVELS

_SMALLEST: Final = 2.0**-1000
_MINUS_LN2: Final = -np.log(2.0)


@dataclass(frozen=True)
class Slates:
    """One draw per request, slots in the order of their perturbed scores.

    A request with fewer live leaves than slots has the rest of its slots not `filled`: codes -1,
    log-probabilities and scores -inf.
    """

    sids_BJ3: Ints
    filled_BJ: NDArray[np.bool_]
    logp_levels_BJ3: Floats
    """Conditional log-probability of each code on the request's tree at the temperature."""
    logp_leaf_BJ: Floats
    """Log of p_j / (1 - sum of p of the earlier slots); `last_hop` adds its own to it."""
    scores_BW: Floats
    """Perturbed scores of the slots and of the leaf after them, W = J + 1."""
    seed: int | None = None
    """Seed of the noise, where a seed of its own was asked for."""

    def score(self, request: int, slot: int) -> float | None:
        """A slot's score; None where nothing was drawn."""
        score = float(self.scores_BW[request, slot])
        return score if np.isfinite(score) else None

    def next_score(self, request: int, slots: int) -> float | None:
        """The score after the first `slots` slots; None where there is no further leaf."""
        return self.score(request, slots)


def draw(
    step: Step,
    tree: Tree,
    excluded: Sequence[Keys] | None,
    slate: int,
    temperature: float,
    rng: np.random.Generator,
    requests: int = 1,
) -> Slates:
    """Draw `slate` distinct leaves per request over its valid tree.

    `excluded` holds leaf keys, one array a request; without it `requests` says how many there are.
    Raises `ValueError` where the policy's logits are not finite.
    """
    if slate < 1:
        raise ValueError(f"a slate has at least one slot, got {slate}")
    search = Search(step, tree, excluded, requests, temperature)
    score_BM = _gumbel(rng, (search.requests, 1))  # the root's: log 1 + noise
    for _ in range(LEVELS):
        level = search.expand()
        free_n = level.logp_n + level.of_prefix(search.logp_BM)
        free_n += _gumbel(rng, len(free_n))
        largest_n = level.largest(free_n)
        chosen_BM, at_x = None, np.arange(len(free_n))
        if score_BM.shape[1] == 1:
            # Children of one prefix keep their order: only the best of them need a score.
            chosen_BM = search.best(free_n, slate + 1)
            at_x = chosen_BM[chosen_BM >= 0]
        place_x = level.children.place_n[at_x]
        score_n = np.full(len(free_n), -np.inf)
        score_n[at_x] = _given_largest(free_n[at_x], largest_n[at_x], score_BM.reshape(-1)[place_x])
        if chosen_BM is None:
            chosen_BM = search.best(score_n, slate + 1)
        score_BM = search.keep(chosen_BM, score_n)
    return _slates(search, slate, score_BM)


def beam(
    step: Step,
    tree: Tree,
    excluded: Sequence[Keys] | None,
    width: int,
    temperature: float = 1.0,
    requests: int = 1,
) -> tuple[Ints, Floats]:
    """Deterministic beam search: codes `[B, W, 3]` and log-probabilities `[B, W]`, best first.

    The best `width` leaves among the children of the best `width` prefixes; padding has codes -1 and
    log-probability -inf. `excluded` and errors as in `draw`.
    """
    search = _beamed(step, tree, excluded, width, temperature, requests)
    return _pad(search.codes_BMl, width, -1), _pad(search.logp_BM, width, -np.inf)


def most_probable(
    step: Step,
    tree: Tree,
    excluded: Sequence[Keys] | None,
    width: int,
    temperature: float,
    requests: int = 1,
) -> Slates:
    """The leaves of a deterministic beam as slates, best first.

    Their law is certainty, they have no scores; all else is as in `beam` and `draw`.
    """
    search = _beamed(step, tree, excluded, width, temperature, requests)
    sids_BJ3, filled_BJ, logp_levels_BJ3 = _finished(search, width)
    scores_BW = np.full((search.requests, width + 1), -np.inf)
    return Slates(
        sids_BJ3, filled_BJ, logp_levels_BJ3, np.where(filled_BJ, 0.0, -np.inf), scores_BW
    )


def last_hop(
    members: Sequence[str], eligible: Callable[[str], bool], rng: np.random.Generator
) -> tuple[str, float]:
    """Choose the item of a leaf, uniformly among its eligible members: item, log-probability.

    Raises `ValueError` where none is eligible: such a leaf must be excluded before the draw.
    """
    open_members = [member for member in members if eligible(member)]
    if not open_members:
        raise ValueError("no member of the leaf is eligible; the leaf should have been excluded")
    if len(open_members) == 1:
        return open_members[0], 0.0
    chosen = open_members[int(rng.integers(len(open_members)))]
    return chosen, -float(np.log(len(open_members)))


def _beamed(
    step: Step,
    tree: Tree,
    excluded: Sequence[Keys] | None,
    width: int,
    temperature: float,
    requests: int,
) -> Search:
    if width < 1:
        raise ValueError(f"a beam is at least one wide, got {width}")
    search = Search(step, tree, excluded, requests, temperature)
    for _ in range(LEVELS):
        level = search.expand()
        score_n = level.logp_n + level.of_prefix(search.logp_BM)
        search.keep(search.best(score_n, width), score_n)
    return search


def _slates(search: Search, slate: int, score_BW: Floats) -> Slates:
    """The slots of a finished draw."""
    sids_BJ3, filled_BJ, logp_levels_BJ3 = _finished(search, slate)
    path = search.path(min(slate, search.codes_BMl.shape[1]))
    laws_BJ = _pad(_leaf_laws(search, path, filled_BJ), slate, -np.inf)
    scores_BW = _pad(score_BW, slate + 1, -np.inf)
    return Slates(sids_BJ3, filled_BJ, logp_levels_BJ3, laws_BJ, scores_BW)


def _finished(search: Search, slate: int) -> tuple[Ints, NDArray[np.bool_], Floats]:
    """Codes `[B, J, 3]`, which slots are filled, and log-probabilities per level `[B, J, 3]`."""
    sids_BJ3 = _pad(search.codes_BMl, slate, -1)
    filled_BJ = sids_BJ3[:, :, 0] >= 0
    path = search.path(min(slate, search.codes_BMl.shape[1]))
    logp_levels_Bj3 = np.stack(
        [
            pick(level.logp_n, chosen_Bj, -np.inf)
            for level, chosen_Bj in zip(search.levels, path, strict=True)
        ],
        axis=-1,
    )
    logp_levels_BJ3 = _pad(logp_levels_Bj3, slate, -np.inf)
    logp_levels_BJ3[~filled_BJ] = -np.inf
    return sids_BJ3, filled_BJ, logp_levels_BJ3


def _leaf_laws(
    search: Search, path: tuple[Ints, Ints, Ints], filled_BJ: NDArray[np.bool_]
) -> Floats:
    """Each slot's log p minus the log of what the earlier slots left; -inf where not filled.

    What is left before a slot is what no slot of the slate shows, summed up the tree, and the
    leaves of this slot and the later ones. All terms are positive: nothing cancels, however
    little is left.
    """
    chosen_3 = path[2]
    filled_Bj = filled_BJ[:, : chosen_3.shape[1]]
    rest_n = search.levels[2].logp_n.copy()
    rest_n[chosen_3[filled_Bj]] = -np.inf
    for upper, lower, chosen_Bj, child_Bj in zip(
        search.levels[1::-1], search.levels[:0:-1], path[1::-1], path[:0:-1], strict=True
    ):
        node_x, place_x = chosen_Bj[filled_Bj], lower.children.place_n[child_Bj[filled_Bj]]
        below_x = lower.log_sums(rest_n, place_x)
        rest_n = upper.logp_n.copy()
        rest_n[node_x] += below_x
    unshown_B = np.full(search.requests, -np.inf)
    served = np.flatnonzero(filled_Bj[:, 0])
    unshown_B[served] = search.levels[0].log_sums(rest_n, served)
    logp_Bj = np.where(filled_Bj, search.logp_BM[:, : chosen_3.shape[1]], -np.inf)
    later_Bj = np.logaddexp.accumulate(logp_Bj[:, ::-1], axis=1)[:, ::-1]
    with np.errstate(invalid="ignore"):  # -inf - -inf, in slots that are not filled
        laws_Bj: Floats = logp_Bj - np.logaddexp(unshown_B[:, None], later_Bj)
    laws_Bj[~filled_Bj] = -np.inf
    return laws_Bj


def _gumbel(rng: np.random.Generator, shape: int | tuple[int, ...]) -> Floats:
    noise: Floats = -np.log(np.maximum(rng.standard_exponential(shape), _SMALLEST))
    return noise


def _given_largest(free_n: Floats, largest_n: Floats, parent_n: Floats) -> Floats:
    """Perturbed scores of children with free scores `free_n`, of which the largest of each prefix's is
    `largest_n`, given that it is the prefix's own score, `parent_n`.

    The stable form of the paper's appendix B.3: with G a child's free score, Z the largest of its
    siblings' and T the parent's score, v = T - G + log(1 - exp(G - Z)), and the child's score is
    T - max(0, v) - log(1 + exp(-|v|)).
    """
    below_n = free_n - largest_n
    with np.errstate(divide="ignore"):  # the largest child: log 0, and its score is the parent's
        log1mexp_n = np.where(
            below_n > _MINUS_LN2, np.log(-np.expm1(below_n)), np.log1p(-np.exp(below_n))
        )
    v_n = parent_n - free_n + log1mexp_n
    score_n: Floats = parent_n - np.maximum(v_n, 0.0) - np.log1p(np.exp(-np.abs(v_n)))
    return score_n


def _pad(array: NDArray[Value], width: int, value: float) -> NDArray[Value]:
    """Widen the second axis to `width`, or cut it."""
    missing = width - array.shape[1]
    if missing <= 0:
        return array[:, :width]
    return np.concatenate([array, np.full_like(array[:, :1], value).repeat(missing, 1)], axis=1)

"""Slates drawn without replacement from the policy, and the probabilities of what was drawn.

Notable choices
- Stochastic beam search (Kool, van Hoof and Welling 2019, arXiv 1903.06059, algorithm 1): each leaf
  has the perturbed score log p + Gumbel noise, and the k best leaves in the order of their scores
  are k draws without replacement. Top down, a node's children are given noise under the condition
  that their maximum is the node's own score. k + 1 beams, so that the (k + 1)-th score is known.
- Only valid children exist here: all arrays are lists of children, those of a prefix together, and
  nothing has the codebook's width. So the constraint makes a decode cheaper, not dearer.
- The first n slots of a larger draw have the law of a draw of n, and the score after them is the
  (n + 1)-th: requests of different sizes are drawn together and cut.
- Laws are kept in float64 and normalised there. What is left after some slots is summed over the
  leaves that are left (up the search tree), never taken as 1 - sum, which cancels.
- Noise is minus the log of exponential noise, which is never taken as zero. Equal scores keep the
  order of beam and code.

Shapes: B requests, M prefixes of a request in the beam, N = B * M, W beam width, J slots, n children.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.valid_tree import Children, Keys, Tree, ranges
from streams.events import LEVELS

Step = Callable[[Tensor, Children], Tensor]
"""Prefixes `[B, M, l]` of l codes, int64 (padding: zeros), and their valid children -> the children's
logits `[n]`; called with l = 0 (and M = 1), 1 and 2."""

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_T = TypeVar("_T", np.float64, np.int64)

_SMALLEST: Final = 2.0**-1000
_MINUS_LN2: Final = -np.log(2.0)


def of_whole_level(step: Callable[[Tensor], Tensor]) -> Step:
    """A `Step` of a policy that computes the logits `[B, M, K]` of all codes."""

    def of_children(prefix_BMl: Tensor, children: Children) -> Tensor:
        logits_BMK = step(prefix_BMl)
        logits_NK = logits_BMK.reshape(-1, logits_BMK.shape[-1])
        return logits_NK[torch.from_numpy(children.place_n), torch.from_numpy(children.code_n)]

    return of_children


class NotFiniteError(ValueError):
    """A policy that cannot be drawn from: it must not be served."""


@dataclass(frozen=True)
class Slates:
    """One draw per request, slots in the order of their perturbed scores.

    A request with fewer live leaves than slots has the rest of its slots not `filled`: codes -1,
    log-probabilities and scores -inf.
    """

    sids_BJ3: _Ints
    filled_BJ: NDArray[np.bool_]
    logp_levels_BJ3: _Floats
    """Conditional log-probability of each code on the request's tree at the temperature."""
    logp_leaf_BJ: _Floats
    """Log of p_j / (1 - sum of p of the earlier slots); `last_hop` adds its own to it."""
    scores_BW: _Floats
    """Perturbed scores of the slots and of the leaf after them, W = J + 1."""
    seed: int | None = None
    """Seed of the noise, where a seed of its own was asked for."""

    def next_score(self, request: int, slots: int) -> float | None:
        """The score after the first `slots` slots; None where there is no further leaf."""
        score = float(self.scores_BW[request, slots])
        return score if np.isfinite(score) else None


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
    Raises `NotFiniteError` where the policy's logits are not finite.
    """
    if slate < 1:
        raise ValueError(f"a slate has at least one slot, got {slate}")
    search = _Search(step, tree, excluded, requests, temperature)
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
    return search.slates(slate, score_BM)


def beam(
    step: Step,
    tree: Tree,
    excluded: Sequence[Keys] | None,
    width: int,
    temperature: float = 1.0,
    requests: int = 1,
) -> tuple[_Ints, _Floats]:
    """Deterministic beam search: codes `[B, W, 3]` and log-probabilities `[B, W]`, best first.

    The best `width` leaves among the children of the best `width` prefixes; padding has codes -1 and
    log-probability -inf. `excluded` and errors as in `draw`.
    """
    if width < 1:
        raise ValueError(f"a beam is at least one wide, got {width}")
    search = _Search(step, tree, excluded, requests, temperature)
    score_BW = np.zeros((search.requests, 1))
    for _ in range(LEVELS):
        level = search.expand()
        score_n = level.logp_n + level.of_prefix(search.logp_BM)
        score_BW = search.keep(search.best(score_n, width), score_n)
    return _pad(search.codes_BMl, width, -1), _pad(score_BW, width, -np.inf)


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


class _Level:
    """The children that a search looked at on one level, and their conditional log-probabilities.

    S of the N prefixes have children at all.
    """

    def __init__(self, children: Children, prefixes: int, scaled_n: _Floats) -> None:
        """`scaled_n` are the children's logits at the temperature, not normalised."""
        self.children: Final = children
        self.size_N: Final = np.bincount(children.place_n, minlength=prefixes)
        """Children of each prefix."""
        self.first_N: Final = self.size_N.cumsum() - self.size_N
        """Where they begin."""
        self._there_S: Final = np.flatnonzero(self.size_N)
        self._size_S: Final = self.size_N[self._there_S]
        if len(scaled_n):
            peak_n = self.largest(scaled_n)
            total_S = np.add.reduceat(np.exp(scaled_n - peak_n), self.first_N[self._there_S])
            scaled_n = scaled_n - peak_n - np.repeat(np.log(total_S), self._size_S)
        self.logp_n: Final[_Floats] = scaled_n

    def largest(self, value_n: _Floats) -> _Floats:
        """For each child the largest value among it and its siblings, `[n]`."""
        if not len(value_n):
            return value_n
        largest_S = np.maximum.reduceat(value_n, self.first_N[self._there_S])
        largest_n: _Floats = np.repeat(largest_S, self._size_S)
        return largest_n

    def of_prefix(self, value_BM: _Floats) -> _Floats:
        """Each child's prefix's value `[n]`."""
        value_n: _Floats = value_BM.reshape(-1)[self.children.place_n]
        return value_n

    def log_sums(self, value_n: _Floats, prefixes: _Ints) -> _Floats:
        """For some prefixes, all with children, the log of the sum of exp of these; -inf where all are."""
        size_P = self.size_N[prefixes]
        if not len(prefixes):
            return np.empty(0)
        here_n = value_n[ranges(self.first_N[prefixes], size_P)]
        first_P = size_P.cumsum() - size_P
        peak_P = np.maximum.reduceat(here_n, first_P)
        peak_P[np.isneginf(peak_P)] = 0.0
        total_P = np.add.reduceat(np.exp(here_n - np.repeat(peak_P, size_P)), first_P)
        with np.errstate(divide="ignore"):
            log_sum_P: _Floats = np.log(total_P) + peak_P
        return log_sum_P


class _Search:
    """The beam as it goes down: codes, row and log-probability of each prefix, and where it came from."""

    def __init__(
        self,
        step: Step,
        tree: Tree,
        excluded: Sequence[Keys] | None,
        requests: int,
        temperature: float,
    ) -> None:
        self.requests: Final = requests if excluded is None else len(excluded)
        self.codes_BMl: _Ints = np.zeros((self.requests, 1, 0), dtype=np.int64)
        self.logp_BM: _Floats = np.zeros((self.requests, 1))
        self._step = step
        self._tree = tree
        self._excluded = None if excluded is None else tree.locate(excluded)
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self._temperature = temperature
        self._row_BM: Keys = np.zeros((self.requests, 1), dtype=np.int64)
        self._row_B1: Final = np.arange(self.requests)[:, None]
        self._levels: list[_Level] = []
        self._parent_of_level: list[_Ints] = []
        self._chosen_of_level: list[_Ints] = []
        """Each prefix's place among its level's children; -1 in padding."""

    def expand(self) -> _Level:
        """The beam's valid children, with their conditional log-probabilities."""
        depth = self.codes_BMl.shape[-1]
        children = self._tree.children(self._row_BM, depth, self._excluded)
        with torch.inference_mode():
            logits_n = self._step(torch.from_numpy(self.codes_BMl.clip(min=0)), children)
            # Divided in the logits' own type, as the learner does; then wide enough to sum to one.
            scaled_n = (logits_n / self._temperature).cpu().double().numpy()
        if not np.isfinite(scaled_n).all():
            raise NotFiniteError(f"the policy's logits of level {depth + 1} are not finite")
        self._levels.append(_Level(children, self._row_BM.size, scaled_n))
        return self._levels[-1]

    def keep(self, chosen_BM: _Ints, score_n: _Floats) -> _Floats:
        """Go down to these children; returns their scores."""
        level, row_B1 = self._levels[-1], self._row_B1
        place_n, row_n, code_n = level.children
        parent_BM = _pick(place_n, chosen_BM, 0) % self._row_BM.shape[1]
        codes_BMl = np.where(chosen_BM[:, :, None] >= 0, self.codes_BMl[row_B1, parent_BM], -1)
        code_BM = _pick(code_n, chosen_BM, -1)
        self.codes_BMl = np.concatenate([codes_BMl, code_BM[:, :, None]], -1)
        self.logp_BM = _pick(level.logp_n + level.of_prefix(self.logp_BM), chosen_BM, -np.inf)
        self._row_BM = _pick(row_n, chosen_BM, -1)
        self._parent_of_level.append(parent_BM)
        self._chosen_of_level.append(chosen_BM)
        return _pick(score_n, chosen_BM, -np.inf)

    def best(self, score_n: _Floats, width: int) -> _Ints:
        """Places `[B, M]` of each request's largest scores, descending, the first of equal ones first; padding -1."""
        level, beam = self._levels[-1], self._row_BM.shape[1]
        size_B = level.size_N.reshape(-1, beam).sum(axis=1)
        first_B = level.first_N.reshape(-1, beam)[:, 0]
        best_BM = np.full((self.requests, max(1, min(width, size_B.max(initial=0)))), -1)
        for request, (first, size) in enumerate(
            zip(first_B.tolist(), size_B.tolist(), strict=True)
        ):
            own_n = score_n[first : first + size]
            open_n = np.arange(size)
            if size > width:
                # Sort little: what is below the width-th largest cannot be among the best.
                open_n = np.flatnonzero(own_n >= np.partition(own_n, size - width)[size - width])
            order_n = open_n[np.argsort(-own_n[open_n], kind="stable")][:width]
            best_BM[request, : len(order_n)] = first + order_n
        return best_BM

    def slates(self, slate: int, score_BW: _Floats) -> Slates:
        """The slots of a finished search."""
        sids_BJ3 = _pad(self.codes_BMl, slate, -1)
        filled_BJ = sids_BJ3[:, :, 0] >= 0
        slots = min(slate, self.codes_BMl.shape[1])
        # Where a slot's path went through: up from its leaf.
        chosen_3, beam_3 = (
            part[:, :slots] for part in (self._chosen_of_level[2], self._parent_of_level[2])
        )
        chosen_2 = self._chosen_of_level[1][self._row_B1, beam_3]
        beam_2 = self._parent_of_level[1][self._row_B1, beam_3]
        chosen_1 = self._chosen_of_level[0][self._row_B1, beam_2]
        path = (chosen_1, chosen_2, chosen_3)
        logp_levels_Bj3 = np.stack(
            [
                _pick(level.logp_n, chosen_Bj, -np.inf)
                for level, chosen_Bj in zip(self._levels, path, strict=True)
            ],
            axis=-1,
        )
        logp_levels_BJ3 = _pad(logp_levels_Bj3, slate, -np.inf)
        logp_levels_BJ3[~filled_BJ] = -np.inf
        return Slates(
            sids_BJ3,
            filled_BJ,
            logp_levels_BJ3,
            _pad(self._leaf_laws(path, filled_BJ), slate, -np.inf),
            _pad(score_BW, slate + 1, -np.inf),
        )

    def _leaf_laws(self, path: tuple[_Ints, _Ints, _Ints], filled_BJ: NDArray[np.bool_]) -> _Floats:
        """Each slot's log p minus the log of what the earlier slots left; -inf where not filled.

        What is left before a slot is what no slot of the slate shows, summed up the tree, and the
        leaves of this slot and the later ones. All terms are positive: nothing cancels, however
        little is left.
        """
        chosen_3 = path[2]
        filled_Bj = filled_BJ[:, : chosen_3.shape[1]]
        rest_n = self._levels[2].logp_n.copy()
        rest_n[chosen_3[filled_Bj]] = -np.inf
        for upper, lower, chosen_Bj, child_Bj in zip(
            self._levels[1::-1], self._levels[:0:-1], path[1::-1], path[:0:-1], strict=True
        ):
            node_x, place_x = chosen_Bj[filled_Bj], lower.children.place_n[child_Bj[filled_Bj]]
            below_x = lower.log_sums(rest_n, place_x)
            rest_n = upper.logp_n.copy()
            rest_n[node_x] += below_x
        unshown_B = np.full(self.requests, -np.inf)
        served = np.flatnonzero(filled_Bj[:, 0])
        unshown_B[served] = self._levels[0].log_sums(rest_n, served)
        logp_Bj = np.where(filled_Bj, self.logp_BM[:, : chosen_3.shape[1]], -np.inf)
        later_Bj = np.logaddexp.accumulate(logp_Bj[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):  # -inf - -inf, in slots that are not filled
            laws_Bj: _Floats = logp_Bj - np.logaddexp(unshown_B[:, None], later_Bj)
        laws_Bj[~filled_Bj] = -np.inf
        return laws_Bj


def _gumbel(rng: np.random.Generator, shape: int | tuple[int, ...]) -> _Floats:
    noise: _Floats = -np.log(np.maximum(rng.standard_exponential(shape), _SMALLEST))
    return noise


def _given_largest(free_n: _Floats, largest_n: _Floats, parent_n: _Floats) -> _Floats:
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
    score_n: _Floats = parent_n - np.maximum(v_n, 0.0) - np.log1p(np.exp(-np.abs(v_n)))
    return score_n


def _pick(value_n: NDArray[_T], at_BM: _Ints, padding: float) -> NDArray[_T]:
    """The values at these places; `padding` where the place is -1."""
    if at_BM.min(initial=0) >= 0:
        return value_n[at_BM]
    picked_BM = np.full(at_BM.shape, padding, dtype=value_n.dtype)
    real_BM = at_BM >= 0
    picked_BM[real_BM] = value_n[at_BM[real_BM]]
    return picked_BM


def _pad(array: NDArray[_T], width: int, value: float) -> NDArray[_T]:
    """Widen the second axis to `width`, or cut it."""
    missing = width - array.shape[1]
    if missing <= 0:
        return array[:, :width]
    return np.concatenate([array, np.full_like(array[:, :1], value).repeat(missing, 1)], axis=1)

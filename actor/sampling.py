"""Slates drawn without replacement from the policy, and the probabilities of what was drawn.

Notable choices
- Stochastic beam search (Kool, van Hoof and Welling 2019, arXiv 1903.06059, algorithm 1): each leaf
  has the perturbed score log p + Gumbel noise, and the k best leaves in the order of their scores
  are k draws without replacement. Top down, a node's children are given noise under the condition
  that their maximum is the node's own score. k + 1 beams, so that the (k + 1)-th score is known.
- The first n slots of a larger draw have the law of a draw of n, and the score after them is the
  (n + 1)-th: requests of different sizes are drawn together and cut.
- Laws are kept in float64 and normalised there. What is left after some slots is summed over the
  leaves that are left (up the search tree), never taken as 1 - sum, which cancels.
- Uniform noise has 53 bits and is never zero. Equal scores keep the order of beam and code.

Shapes: B requests, M prefixes of a request in the beam, W beam width, J slots, K codes of a level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.masking import masked_log_softmax
from learner.valid_ids import Exclusions, Keys, Tree
from streams.events import LEVELS

Step = Callable[[Tensor], Tensor]
"""Prefixes `[B, M, l]` of l codes, int64 (padding: zeros) -> logits `[B, M, K]` of the next code;
called with l = 0 (and M = 1), 1 and 2."""

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_T = TypeVar("_T", np.float64, np.int64)

_SMALLEST_UNIFORM: Final = 2.0**-54
_MINUS_LN2: Final = -np.log(2.0)


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
    Raises `ValueError` where the policy's logits are not finite.
    """
    if slate < 1:
        raise ValueError(f"a slate has at least one slot, got {slate}")
    search = _Search(step, tree, excluded, requests, temperature)
    score_BM = _gumbel(rng, (search.requests, 1))  # the root's: log 1 + noise
    for _ in range(LEVELS):
        score_BM = search.keep(_perturb(search.expand(), score_BM, rng), slate + 1)
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
        score_BW = search.keep(search.expand(), width)
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


class _Search:
    """The beam as it goes down: codes and log-probability of each prefix, and where it came from."""

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
        self._excluded: Exclusions | None = None if excluded is None else tree.locate(excluded)
        self._temperature = temperature
        self._key_BM: Keys = np.zeros((self.requests, 1), dtype=np.int64)
        self._row_B1: Final = np.arange(self.requests)[:, None]
        self._logp_of_level: list[_Floats] = []
        self._parent_of_level: list[_Ints] = []

    def expand(self) -> _Floats:
        """Log-probabilities `[B, M, K]` of the children from the root; -inf where not valid."""
        level = self.codes_BMl.shape[-1]
        mask_BMK = self._tree.child_mask(self._key_BM, level, self._excluded)
        with torch.inference_mode():
            logits_BMK = self._step(torch.from_numpy(self.codes_BMl.clip(min=0)))
            logp_BMK: _Floats = masked_log_softmax(
                logits_BMK.cpu(), torch.from_numpy(mask_BMK), self._temperature, torch.float64
            ).numpy()
        if not np.array_equal(np.isfinite(logp_BMK), mask_BMK):
            raise ValueError(f"the policy's logits of level {level + 1} are not finite")
        self._logp_of_level.append(logp_BMK)
        return logp_BMK + self.logp_BM[:, :, None]

    def keep(self, score_BMK: _Floats, width: int) -> _Floats:
        """Go down to the `width` best children; returns their scores, descending."""
        codes = score_BMK.shape[-1]
        score_Bn = score_BMK.reshape(self.requests, -1)
        best_BM = _best(score_Bn, width)
        real_BM = best_BM >= 0
        parent_BM, code_BM = np.divmod(best_BM.clip(min=0), codes)
        row_B1 = self._row_B1
        logp_BM = self._logp_of_level[-1][row_B1, parent_BM, code_BM]
        self.logp_BM = np.where(real_BM, self.logp_BM[row_B1, parent_BM] + logp_BM, -np.inf)
        self._key_BM = np.where(real_BM, self._key_BM[row_B1, parent_BM] * codes + code_BM, -1)
        codes_BMl = np.concatenate([self.codes_BMl[row_B1, parent_BM], code_BM[:, :, None]], -1)
        self.codes_BMl = np.where(real_BM[:, :, None], codes_BMl, -1)
        self._parent_of_level.append(parent_BM)
        return np.where(real_BM, score_Bn[row_B1, best_BM], -np.inf)

    def slates(self, slate: int, score_BW: _Floats) -> Slates:
        """The slots of a finished search."""
        sids_BJ3 = _pad(self.codes_BMl, slate, -1)
        filled_BJ = sids_BJ3[:, :, 0] >= 0
        slots = min(slate, self.codes_BMl.shape[1])
        code_Bj3 = self.codes_BMl[:, :slots].clip(min=0)
        # Positions in the beams that a slot's path went through: level 3's parent first.
        beam_3 = self._parent_of_level[2][:, :slots]
        beam_2 = self._parent_of_level[1][self._row_B1, beam_3]
        beams = (np.zeros_like(beam_2), beam_2, beam_3)
        logp_levels_Bj3 = np.stack(
            [
                self._logp_of_level[level][self._row_B1, beams[level], code_Bj3[:, :, level]]
                for level in range(LEVELS)
            ],
            axis=-1,
        )
        logp_levels_BJ3 = _pad(logp_levels_Bj3, slate, -np.inf)
        logp_levels_BJ3[~filled_BJ] = -np.inf
        return Slates(
            sids_BJ3,
            filled_BJ,
            logp_levels_BJ3,
            np.where(filled_BJ, _pad(self._leaf_laws(code_Bj3, beams), slate, 0.0), -np.inf),
            _pad(score_BW, slate + 1, -np.inf),
        )

    def _leaf_laws(self, code_Bj3: _Ints, beams: tuple[_Ints, _Ints, _Ints]) -> _Floats:
        """Each slot's log p minus the log of what the earlier slots left.

        Every shown leaf's path is in the beam, so the share of its parent that is left is a sum over
        the parent's other children; that share scales the parent in its own parent's sum, and so
        on. All terms are positive: nothing cancels, however little is left.
        """
        full_1, full_2, full_3 = self._logp_of_level
        left_1, left_2, left_3 = full_1.copy(), full_2.copy(), full_3.copy()
        row_B = self._row_B1[:, 0]
        left_B = np.zeros(self.requests)
        laws: list[_Floats] = []
        for slot in range(code_Bj3.shape[1]):
            if slot:
                last = slot - 1
                at_3 = (row_B, beams[2][:, last], code_Bj3[:, last, 2])
                at_2 = (row_B, beams[1][:, last], code_Bj3[:, last, 1])
                at_1 = (row_B, beams[0][:, last], code_Bj3[:, last, 0])
                left_3[at_3] = -np.inf
                left_2[at_2] = full_2[at_2] + np.logaddexp.reduce(left_3[at_3[:2]], axis=-1)
                left_1[at_1] = full_1[at_1] + np.logaddexp.reduce(left_2[at_2[:2]], axis=-1)
                left_B = np.logaddexp.reduce(left_1[at_1[:2]], axis=-1)
            with np.errstate(invalid="ignore"):  # -inf - -inf, in slots that are not filled
                laws.append(self.logp_BM[:, slot] - left_B)
        return np.stack(laws, axis=1)


def _gumbel(rng: np.random.Generator, shape: int | tuple[int, ...]) -> _Floats:
    # `random` may be 0 but never 1.
    noise: _Floats = -np.log(-np.log(np.maximum(rng.random(shape), _SMALLEST_UNIFORM)))
    return noise


def _perturb(logp_BMK: _Floats, parent_BM: _Floats, rng: np.random.Generator) -> _Floats:
    """Perturbed scores of children with log-probabilities `logp_BMK` (-inf: not valid), given that
    the largest is their parent's score `parent_BM`.

    The stable form of the paper's appendix B.3: with G a child's free score, Z the largest of its
    siblings' and T the parent's score, v = T - G + log(1 - exp(G - Z)), and the child's score is
    T - max(0, v) - log(1 + exp(-|v|)).
    """
    score_BMK = np.full(logp_BMK.shape, -np.inf)
    score_flat = score_BMK.reshape(-1)
    logp_flat = logp_BMK.reshape(-1)
    valid_n = np.flatnonzero(logp_flat > -np.inf)
    score_n = logp_flat[valid_n] + _gumbel(rng, len(valid_n))
    score_flat[valid_n] = score_n
    row_n = valid_n // logp_BMK.shape[-1]
    parent_n = parent_BM.reshape(-1)[row_n]
    below_n = score_n - score_BMK.max(axis=-1).reshape(-1)[row_n]
    with np.errstate(divide="ignore"):  # the largest child: log 0, and its score is the parent's
        log1mexp_n = np.where(
            below_n > _MINUS_LN2, np.log(-np.expm1(below_n)), np.log1p(-np.exp(below_n))
        )
    v_n = parent_n - score_n + log1mexp_n
    score_flat[valid_n] = parent_n - np.maximum(v_n, 0.0) - np.log1p(np.exp(-np.abs(v_n)))
    return score_BMK


def _best(score_Bn: _Floats, width: int) -> _Ints:
    """Indices `[B, width]` of the largest finite scores, descending, the first of equal ones first;
    -1 where a row has fewer."""
    requests, size = score_Bn.shape
    open_Bn = score_Bn > -np.inf
    if width < size:
        # Sort little: what is below the row's width-th largest cannot be among the best.
        open_Bn &= score_Bn >= np.partition(score_Bn, size - width, axis=1)[:, size - width, None]
    request_n, index_n = np.nonzero(open_Bn)
    order_n = np.lexsort((-score_Bn[request_n, index_n], request_n))
    request_n, index_n = request_n[order_n], index_n[order_n]
    rank_n = np.arange(len(order_n)) - np.searchsorted(request_n, request_n)
    kept_n = rank_n < width
    best_BW = np.full((requests, min(width, size)), -1, dtype=np.int64)
    best_BW[request_n[kept_n], rank_n[kept_n]] = index_n[kept_n]
    return best_BW


def _pad(array: NDArray[_T], width: int, value: float) -> NDArray[_T]:
    """Widen the second axis to `width`, or cut it."""
    missing = width - array.shape[1]
    if missing <= 0:
        return array[:, :width]
    return np.concatenate([array, np.full_like(array[:, :1], value).repeat(missing, 1)], axis=1)

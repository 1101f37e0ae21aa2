"""Codes of bounded size: a penalty for each centroid, high enough that no code has too many points.

Notable choices
- Of all assignments that keep to capacities the cheapest is one of least squared distance plus a
  penalty for the centroid (Aurenhammer, Hoffmann and Aronov 1998, Minkowski-type theorems and
  least-squares clustering). So an assignment stays a plain search with the centroids' own
  constants, and a new item gets its code alone, as without penalties.
- The penalties are found by a forward auction (Bertsekas 1988): a code above capacity raises its
  penalty by just what makes its surplus leave, those points first that lose least by it. Penalties
  only rise, so that a round concerns the points of raised codes alone.
- Equal points cannot be told apart by any codebook, so they count as one.
- Centroids then move to the means of their points, and the auction begins again from nothing. These
  auctions are held on a sample; the last one, over all points, begins from the sample's penalties.

Shapes: N points, D width, K codes.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.kmeans import Done, first_of_equal, means, sample_rows
from learner.nearest import Codes, Floats, Nearest

MOVES: Final = 3
"""Times that centroids move to the means of a balanced assignment."""
_MORE: Final = (0.25, 0.1)
"""Share of a raised code's points that leave beyond its surplus, while centroids move and at last.
Without it ever fewer leave and rounds do not end; the more, the fewer rounds, and the further the
result from the cheapest; at .6 neighbours flood one another in turn."""
_ROUNDS: Final = 300
"""Rounds of one auction at most."""


class Balanced(NamedTuple):
    """Centroids `[K, D]`, their penalties `[K]` (squared distance, not negative), codes `[N]`."""

    table_KD: NDArray[np.float32]
    penalty_K: NDArray[np.float32]
    code_N: Codes


def balance(
    points_ND: Floats,
    table_KD: NDArray[np.float32],
    most: float,
    rng: np.random.Generator,
    done: Done,
) -> Balanced:
    """Bound the sizes of codes to `most` times their mean, beginning from centroids without penalties.

    Where the bound cannot be reached in the rounds allowed, the sizes of what is returned say so.
    """
    counted_N = first_of_equal(points_ND)
    sample_S = sample_rows(len(points_ND), len(table_KD), rng)
    sample_SD, counted_S = points_ND[sample_S], counted_N[sample_S]
    free_K = np.zeros(len(table_KD), dtype=np.float32)
    moving, at_last = _MORE
    for _ in range(MOVES):
        penalty_K, _ = _auction(sample_SD, table_KD, free_K, counted_S, most, moving, done)
        code_N = Nearest(table_KD, penalty_K).code(points_ND)
        done(len(points_ND))
        table_KD, _ = means(points_ND, code_N, table_KD)
    penalty_K, _ = _auction(sample_SD, table_KD, free_K, counted_S, most, at_last, done)
    penalty_K, code_N = _auction(points_ND, table_KD, penalty_K, counted_N, most, at_last, done)
    return Balanced(table_KD, penalty_K, code_N)


def _auction(
    points_ND: Floats,
    table_KD: NDArray[np.float32],
    penalty_K: NDArray[np.float32],
    counted_N: NDArray[np.bool_],
    most: float,
    more: float,
    done: Done,
) -> tuple[NDArray[np.float32], Codes]:
    """Penalties `[K]`, none below those given, and codes `[N]`."""
    capacity = max(1, int(most * counted_N.sum() / len(table_KD)))
    code_N = Nearest(table_KD, penalty_K).code(points_ND)
    done(len(points_ND))
    stuck_K = np.zeros(len(table_KD), dtype=bool)
    for _ in range(_ROUNDS):
        size_K = np.bincount(code_N[counted_N], minlength=len(table_KD))
        over_K = (size_K > capacity) & ~stuck_K
        if not over_K.any():
            break
        rows = np.flatnonzero(over_K[code_N])
        lead_n = Nearest(table_KD, penalty_K).two(points_ND[rows]).lead_N
        votes = counted_N[rows]
        raised_K = _raised(code_N[rows[votes]], lead_n[votes], size_K - capacity, more, penalty_K)
        stuck_K = over_K & (raised_K == penalty_K)
        penalty_K = raised_K
        code_N[rows] = Nearest(table_KD, penalty_K).code(points_ND[rows])
        done(2 * len(rows))
    return penalty_K, code_N


def _raised(
    code_n: Codes,
    lead_n: Floats,
    surplus_K: NDArray[np.intp],
    more: float,
    penalty_K: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Penalties that make each of these codes' surplus leave: above the leads of as many points."""
    raised_K = penalty_K.copy()
    order = np.lexsort((lead_n, code_n))
    code_n, lead_n = code_n[order], lead_n[order]
    start = np.flatnonzero(np.r_[True, code_n[1:] != code_n[:-1]])
    end = np.r_[start[1:], len(code_n)]
    for first, last in zip(start.tolist(), end.tolist(), strict=True):
        code = code_n[first]
        size = last - first
        leaving = first + min(int(surplus_K[code] + more * size), size - 1)
        # Between the last that leaves and the first that stays.
        needed = (lead_n[leaving - 1] + lead_n[leaving]) / 2
        if needed < lead_n[last - 1]:  # else everything would leave
            new = np.float32(penalty_K[code] + needed)
            raised_K[code] = max(new, np.nextafter(penalty_K[code], np.float32(np.inf)))
    return raised_K

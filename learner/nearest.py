"""The nearest centroid, as fast as a matrix product and as exact as the plain float64 distance.

Notable choices
- The definition is the plain one: squared distances summed pair by pair in float64 (SciPy's
  `cdist`), plus the centroid's penalty where there is one; the first of equal ones. An item's
  answer then depends neither on what it was asked together with, nor on threads, nor on BLAS.
- The work is one float32 matrix product: argmin |x - c|^2 + p = argmax x.c - (|c|^2 + p) / 2. Its
  answer is taken only where the best leads by more than rounding can account for; the other
  points, about one in a thousand, are answered by the definition itself.
- The bound on rounding: in a product of D + 1 terms of float32 operands, each rounded once, the
  error is at most (D + 4) u (sum of |terms|), in whatever order they are added (Higham, Accuracy
  and Stability of Numerical Algorithms, section 3.1). Centroids are shifted to their mean and
  scaled by a power of two to length 1 at most, points likewise, so that the sum is at most 2,
  nothing overflows, and a large common offset costs no accuracy. The definition's own rounding,
  in float64, is added to the bound: where points lie so far away that it cannot tell centroids
  apart, neither does this.

Shapes: N points, D width, K centroids, U of them distinct.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

_PREPARED: Final = 4096
"""Points made ready at once."""
_SCORES: Final = 1 << 21
"""Scores held at once: 8 MiB, which stay in the cache between product and argmax."""
_U32: Final = 2.0**-24
_U64: Final = 2.0**-53


class Two(NamedTuple):
    """Each point's nearest centroid `[N]`, how much less it costs than the next `[N]` (infinite where there is
    no other)."""

    code_N: Codes
    lead_N: Floats


class Nearest:
    """Answers which of these centroids `[K, D]` costs least; immutable, may be shared by threads.

    The cost is the squared distance plus `penalty_K`. Of equal centroids the first is meant.
    """

    def __init__(
        self, centroids_KD: NDArray[np.floating], penalty_K: NDArray[np.floating] | None = None
    ) -> None:
        table_KD = np.asarray(centroids_KD, dtype=np.float64)
        penalty = np.zeros(len(table_KD)) if penalty_K is None else penalty_K.astype(np.float64)
        # A repeated centroid never wins over its first copy, and would make every lead zero.
        self._code_U: Final = _first_rows(np.column_stack([table_KD, penalty]))
        self._table_UD: Final = table_KD[self._code_U]
        self._penalty_U: Final = None if penalty_K is None else penalty[self._code_U]
        penalty_U = penalty[self._code_U]
        self._middle_D: Final = self._table_UD.mean(axis=0)
        shifted_UD = self._table_UD - self._middle_D
        length = np.sqrt(np.square(shifted_UD).sum(axis=1).max())
        self._scale: Final = _power_of_two(max(length, np.sqrt(penalty_U.max())))
        shifted_UD /= self._scale
        offset_U = (np.square(shifted_UD).sum(axis=1) + penalty_U / self._scale**2) / 2
        self._largest_offset: Final = float(offset_U.max())
        self._table_dU: Final = np.vstack([shifted_UD.T, -offset_U]).astype(np.float32)

    def code(self, points_ND: Floats) -> Codes:
        """The code `[N]` of each point's nearest centroid."""
        code_N = np.empty(len(points_ND), dtype=np.int64)
        for part, score_nU, slack_n in self._scored(points_ND):
            best_n, top_n = _take_best(score_nU)
            # "not more" and not "less": what is not a number is in doubt.
            doubt = np.flatnonzero(~(top_n - score_nU.max(axis=1) > slack_n))
            for rows in _pieces(doubt, len(self._code_U)):
                best_n[rows] = self._costs(points_ND[part][rows]).argmin(axis=1)
            code_N[part] = self._code_U[best_n]
        return code_N

    def two(self, points_ND: Floats) -> Two:
        """Each point's nearest centroid, and its lead on the next."""
        if len(self._code_U) == 1:
            code_N = np.repeat(self._code_U, len(points_ND))
            return Two(code_N, np.full(len(points_ND), np.inf))
        code_N, lead_N = np.empty(len(points_ND), dtype=np.int64), np.empty(len(points_ND))
        for part, score_nU, slack_n in self._scored(points_ND):
            best_n, first_n = _take_best(score_nU)
            next_n, second_n = _take_best(score_nU)
            third_n = score_nU.max(axis=1)
            sure_n = (first_n - second_n > slack_n) & (second_n - third_n > slack_n)
            for rows in _pieces(np.flatnonzero(~sure_n), len(self._code_U)):
                cost_nU = self._costs(points_ND[part][rows])
                best_n[rows] = cost_nU.argmin(axis=1)
                cost_nU[np.arange(len(rows)), best_n[rows]] = np.inf
                next_n[rows] = cost_nU.argmin(axis=1)
            # Of either kind by the same sums, so that it does not matter which kind a point was.
            lead_n = self._pair_costs(points_ND[part], next_n)
            lead_n -= self._pair_costs(points_ND[part], best_n)
            code_N[part], lead_N[part] = self._code_U[best_n], np.maximum(lead_n, 0.0)
        return Two(code_N, lead_N)

    def _scored(
        self, points_ND: Floats
    ) -> Iterator[tuple[slice, NDArray[np.float32], NDArray[np.float64]]]:
        """By parts: scores `[n, U]`, and the lead `[n]` up to which rounding may have decided."""
        width = self._table_UD.shape[1]
        at_once = max(1, min(_PREPARED, _SCORES // len(self._code_U)))
        score_nU = np.empty((min(at_once, len(points_ND)), len(self._code_U)), dtype=np.float32)
        for start in range(0, len(points_ND), _PREPARED):
            with np.errstate(all="ignore"):  # what overflows is in doubt, and answered exactly
                point_nD = (points_ND[start : start + _PREPARED] - self._middle_D) / self._scale
                length_n = np.sqrt(np.einsum("nd,nd->n", point_nD, point_nD))
                factor_n = np.ldexp(1.0, np.maximum(np.frexp(length_n)[1], 0))
                augmented_nd = np.empty((len(point_nD), width + 1), dtype=np.float32)
                augmented_nd[:, :width] = point_nD / factor_n[:, None]
                augmented_nd[:, width] = 1.0 / factor_n
                terms_n = length_n / factor_n + self._largest_offset / factor_n
                product_n = (width + 4) * (_U32 * terms_n + 2.0**-126)
                far_n = (length_n + 1.0) ** 2 / factor_n + self._largest_offset / factor_n
                underflow = width * 2.0**-1022 / self._scale**2
                plain_n = (width + 10) * (_U64 * far_n + underflow)
                slack_n = 2.02 * (product_n + plain_n)
                slack_n[~np.isfinite(length_n)] = np.nan
            for at in range(0, len(point_nD), at_once):
                augmented = augmented_nd[at : at + at_once]
                score = score_nU[: len(augmented)]
                with np.errstate(all="ignore"):
                    np.matmul(augmented, self._table_dU, out=score)
                part = slice(start + at, start + at + len(augmented))
                yield part, score, slack_n[at : at + at_once]

    def _costs(self, points_nD: Floats) -> Floats:
        """The definition: costs `[n, U]`."""
        cost_nU: Floats = cdist(points_nD, self._table_UD, metric="sqeuclidean")
        if self._penalty_U is not None:
            cost_nU += self._penalty_U
        return cost_nU

    def _pair_costs(self, points_nD: Floats, row_n: NDArray[np.intp]) -> Floats:
        cost_n = squared_distances(points_nD, self._table_UD[row_n])
        return cost_n if self._penalty_U is None else cost_n + self._penalty_U[row_n]


def squared_distances(a_ND: Floats, b_ND: Floats) -> Floats:
    """Squared distance `[N]` of each pair."""
    apart_ND = a_ND - b_ND
    distance_N: Floats = np.einsum("nd,nd->n", apart_ND, apart_ND)
    return distance_N


def keys_of(rows_ND: Floats) -> NDArray[np.uint64]:
    """A key `[N]` of each row: equal rows have equal keys, others with a probability of 2^-64."""
    factor_D = np.random.default_rng(0).integers(1, 1 << 63, rows_ND.shape[1], dtype=np.uint64)
    bits_ND = (rows_ND + 0.0).view(np.uint64)  # -0 becomes 0
    mixed_ND = (bits_ND ^ (bits_ND >> np.uint64(29))) * (factor_D | np.uint64(1))
    key_N: NDArray[np.uint64] = mixed_ND.sum(axis=1, dtype=np.uint64)
    return key_N


def _first_rows(rows_ND: Floats) -> NDArray[np.intp]:
    """The rows that equal none before them, ascending."""
    if len(np.unique(keys_of(rows_ND))) == len(rows_ND):
        return np.arange(len(rows_ND))
    return np.sort(np.unique(rows_ND, axis=0, return_index=True)[1])


def _power_of_two(value: float) -> float:
    """The next power of two above, 1 for 0."""
    return float(np.ldexp(1.0, int(np.frexp(value)[1]))) if value > 0.0 else 1.0


def _take_best(score_nU: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Place and value of each row's best score, which is taken out."""
    best_n = score_nU.argmax(axis=1)
    rows = np.arange(len(best_n))
    top_n = score_nU[rows, best_n].astype(np.float64)
    score_nU[rows, best_n] = -np.inf
    return best_n, top_n


def _pieces(rows: NDArray[np.intp], columns: int) -> Iterator[NDArray[np.intp]]:
    at_once = max(1, _SCORES // columns)
    for start in range(0, len(rows), at_once):
        yield rows[start : start + at_once]

"""k-means, one level: Lloyd's iterations over all points, where there are many over a sample first.

Notable choices
- Up to `EXHAUSTIVE` pairs of points and centroids: k-means++ (Arthur and Vassilvitskii 2007) and
  25 iterations over all points in float64. The seeding is written here because SciPy's is
  quadratic in the number of codes; the iterations are SciPy's.
- Beyond, an iteration over all points is dear (10^6 x 8192 x 64: a teraflop), and most of what the
  first ones find a sample shows as well: seeds and the first iterations see 32 points a code, the
  others all of them. More iterations over a sample only fit the sample better.
- Seeds of the large way are drawn in 16 rounds, each in proportion to the squared distance from the
  seeds so far: k-means|| (Bahmani et al. 2012) with as many seeds as codes, so without its second
  clustering. k-means++ itself would take 8,192 rounds; on separate clusters, seeds drawn evenly
  left four times the error, on diffuse ones 1 % less.
- The large way rests on exact nearest centroids (learner/nearest.py) and on float64 sums in a fixed
  order, nowhere on the rounding of a matrix product: the same seed gives the same centroids under
  any number of threads and any BLAS. The small way's iterations are SciPy's, which use BLAS.
- The report gives utilisation 1.0 on all levels (arXiv 2506.13695), so no centroid stays idle: one
  that lost its points moves onto a point that is badly served.

Shapes: N points, S of them in a sample, D width, K codes.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_array
from scipy.spatial.distance import cdist

from learner.nearest import Codes, Floats, Nearest, keys_of, squared_distances

EXHAUSTIVE: Final = 1 << 25
"""Pairs of points and codes up to which all points are seen from the first iteration on."""
ITERATIONS: Final = 25
"""Lloyd's iterations over few points."""
SAMPLE: Final = 32
"""Of the large way: points of the sample a code."""
SAMPLE_ITERATIONS: Final = 4
FULL_ITERATIONS: Final = (5, 25)
"""Of the large way: iterations over all points, at least and at most; in between as `_FULL_PAIRS` allow."""
_FULL_PAIRS: Final = 1 << 35
_SEED_ROUNDS: Final = 16
_REPAIRS: Final = 8
"""Rounds that move idle centroids and iterate again, before they are only moved."""
_PIECE: Final = 1 << 16
"""Points handled at once where they are copied."""

_F = TypeVar("_F", np.float32, np.float64)

Done = Callable[[int], None]
"""Progress: this many more points were assigned."""


def planned(points: int, codes: int) -> int:
    """Points that `cluster` will assign, about: the whole of its progress."""
    if points * codes <= EXHAUSTIVE:
        return points
    sample = min(points, SAMPLE * codes)
    return sample * (1 + SAMPLE_ITERATIONS) + points * (_full_iterations(points, codes) + 1)


def cluster(
    points_ND: Floats, codes: int, rng: np.random.Generator, done: Done
) -> tuple[NDArray[np.float32], Codes]:
    """Centroids `[K, D]`, and the nearest one `[N]` of each point.

    With fewer distinct points than codes the surplus centroids repeat the first one and are never
    assigned; else none is idle.
    """
    if len(points_ND) * codes <= EXHAUSTIVE:
        table_KD = _exhaustive(points_ND, codes, rng).astype(np.float32)
        done(len(points_ND))
        return table_KD, Nearest(table_KD).code(points_ND)
    distinct = np.flatnonzero(first_of_equal(points_ND))
    if len(distinct) <= codes:
        table_KD = _with_surplus(points_ND[distinct], codes).astype(np.float32)
        return table_KD, Nearest(table_KD).code(points_ND)
    return _sampled(points_ND, codes, rng, done)


def sample_rows(points: int, codes: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows `[S]` of a sample without repeats, ascending; all of them where there are few."""
    return np.sort(rng.permutation(points)[: SAMPLE * codes])


def first_of_equal(points_ND: Floats) -> NDArray[np.bool_]:
    """Whether a point is the first of those equal to it, `[N]`; two others are taken for equal
    with a probability of 2^-64."""
    key_N = np.concatenate([keys_of(points_ND[part]) for part in _parts(len(points_ND))])
    first_N = np.zeros(len(points_ND), dtype=bool)
    first_N[np.unique(key_N, return_index=True)[1]] = True
    return first_N


def means(
    points_ND: Floats, code_N: Codes, old_KD: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Mean of each code's points `[K, D]`, an idle one's old place, and how many points it has."""
    size_K = np.bincount(code_N, minlength=len(old_KD))
    order_N = np.argsort(code_N, kind="stable")
    start_K = np.concatenate([[0], np.cumsum(size_K)])
    members_KN = csr_array(
        (np.ones(len(code_N)), order_N, start_K), shape=(len(old_KD), len(code_N))
    )
    mean_KD = (members_KN @ points_ND) / np.maximum(size_K, 1)[:, None]
    return np.where(size_K[:, None] > 0, mean_KD, old_KD).astype(np.float32), size_K


def distances(points_ND: Floats, table_KD: NDArray[np.float32], code_N: Codes) -> Floats:
    """Squared distance `[N]` of each point to its centroid."""
    distance_N = np.empty(len(points_ND))
    for part in _parts(len(points_ND)):
        distance_N[part] = squared_distances(
            points_ND[part], table_KD[code_N[part]].astype(np.float64)
        )
    return distance_N


def _full_iterations(points: int, codes: int) -> int:
    least, most = FULL_ITERATIONS
    return min(most, max(least, _FULL_PAIRS // (points * codes)))


def _parts(points: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, points, _PIECE))


def _sampled(
    points_ND: Floats, codes: int, rng: np.random.Generator, done: Done
) -> tuple[NDArray[np.float32], Codes]:
    sample_SD = points_ND[sample_rows(len(points_ND), codes, rng)]
    table_KD = _seed_in_rounds(sample_SD, codes, rng)
    done(len(sample_SD))
    for _ in range(SAMPLE_ITERATIONS):
        table_KD = _iterate(sample_SD, table_KD, rng)
        done(len(sample_SD))
    for _ in range(_full_iterations(len(points_ND), codes)):
        table_KD = _iterate(points_ND, table_KD, rng)
        done(len(points_ND))
    code_N = Nearest(table_KD).code(points_ND)
    done(len(points_ND))
    for _ in range(_REPAIRS):
        idle = np.flatnonzero(np.bincount(code_N, minlength=codes) == 0)
        if not len(idle):
            break
        worst = np.argsort(-distances(points_ND, table_KD, code_N), kind="stable")[: len(idle)]
        table_KD[idle] = points_ND[worst]
        code_N = Nearest(table_KD).code(points_ND)
    return table_KD, code_N


def _iterate(
    points_ND: Floats, table_KD: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """One of Lloyd's iterations; idle centroids move onto points drawn by their squared distance."""
    code_N = Nearest(table_KD).code(points_ND)
    moved_KD, size_K = means(points_ND, code_N, table_KD)
    idle = np.flatnonzero(size_K == 0)
    if len(idle):
        drawn = _draw(distances(points_ND, table_KD, code_N), len(idle), rng)
        moved_KD[idle[: len(drawn)]] = points_ND[drawn]
    return moved_KD


def _seed_in_rounds(points_SD: Floats, codes: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Seeds `[K, D]`; where the sample has too few distinct points, the last ones repeat the first."""
    distance_S = np.ones(len(points_SD))
    seeds: list[NDArray[np.float32]] = []
    for share in np.array_split(np.arange(codes), min(_SEED_ROUNDS, codes)):
        drawn = _draw(distance_S, len(share), rng)
        if not len(drawn):
            break
        seeds.append(points_SD[drawn].astype(np.float32))
        code_S = Nearest(seeds[-1]).code(points_SD)
        nearer_S = distances(points_SD, seeds[-1], code_S)
        distance_S = nearer_S if len(seeds) == 1 else np.minimum(distance_S, nearer_S)
    return _with_surplus(np.concatenate(seeds), codes)


def _draw(weight_N: Floats, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """At most `count` different places, in proportion to the weights; none of weight 0."""
    # The smallest of exponential times at these rates (Efraimidis and Spirakis 2006).
    open_n = np.flatnonzero(weight_N > 0.0)
    time_n = rng.exponential(size=len(open_n)) / weight_N[open_n]
    return open_n[np.argsort(time_n, kind="stable")[:count]]


def _with_surplus(table_kD: NDArray[_F], codes: int) -> NDArray[_F]:
    surplus_KD = np.repeat(table_kD[:1], codes - len(table_kD), axis=0)
    return np.concatenate([table_kD, surplus_KD])


def _exhaustive(points_ND: Floats, codes: int, rng: np.random.Generator) -> Floats:
    seeds_kD = _seed(points_ND, codes, rng)
    if len(seeds_kD) < codes:
        # Every distinct point is a centroid already.
        return _with_surplus(seeds_kD, codes)
    return refine(points_ND, seeds_kD)


def refine(points_ND: Floats, centroids_KD: Floats) -> Floats:
    """Lloyd's iterations from any start, without idle centroids where K distinct points exist.

    An idle centroid moves onto the point farthest from its own, one after the other.
    """
    centroids_KD = _lloyd(points_ND, centroids_KD)
    for repair in range(_REPAIRS + len(centroids_KD)):
        index_N, distance_N = _compared(points_ND, centroids_KD)
        idle = np.flatnonzero(np.bincount(index_N, minlength=len(centroids_KD)) == 0)
        if not len(idle):
            break
        for code in idle:
            worst = int(distance_N.argmax())
            centroids_KD[code] = points_ND[worst]
            distance_N = np.minimum(distance_N, _distance_to(points_ND, worst))
        if repair < _REPAIRS:
            centroids_KD = _lloyd(points_ND, centroids_KD)
    return centroids_KD


def _compared(points_ND: Floats, centroids_KD: Floats) -> tuple[Codes, Floats]:
    """Each point's nearest centroid and its squared distance, all pairs compared in float64."""
    index_N = np.empty(len(points_ND), dtype=np.int64)
    distance_N = np.empty(len(points_ND))
    for start in range(0, len(points_ND), 4096):
        part = slice(start, start + 4096)
        distance_nK = cdist(points_ND[part], centroids_KD, metric="sqeuclidean")
        index_N[part] = distance_nK.argmin(axis=1)
        distance_N[part] = distance_nK.min(axis=1)
    return index_N, distance_N


def _distance_to(points_ND: Floats, row: int) -> Floats:
    """Squared distance `[N]` of each point to one of them."""
    return cdist(points_ND, points_ND[row : row + 1], metric="sqeuclidean")[:, 0]


def _seed(points_ND: Floats, codes: int, rng: np.random.Generator) -> Floats:
    """k-means++ seeds, fewer than `codes` where there are fewer distinct points."""
    chosen = [int(rng.integers(len(points_ND)))]
    distance_N = np.full(len(points_ND), np.inf)
    while len(chosen) < codes:
        distance_N = np.minimum(distance_N, _distance_to(points_ND, chosen[-1]))
        cumulative_N = np.cumsum(distance_N)
        if cumulative_N[-1] <= 0.0:
            break
        # side="right": a point at distance zero has no share and is never found.
        drawn = np.searchsorted(cumulative_N, rng.random() * cumulative_N[-1], side="right")
        chosen.append(min(int(drawn), int(np.flatnonzero(distance_N)[-1])))
    return points_ND[chosen].copy()


def _lloyd(points_ND: Floats, centroids_KD: Floats) -> Floats:
    with warnings.catch_warnings():
        # Idle centroids are looked for, and moved, by the caller.
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        moved_KD, _ = kmeans2(points_ND, centroids_KD, iter=ITERATIONS, minit="matrix")
    return np.asarray(moved_KD, dtype=np.float64)

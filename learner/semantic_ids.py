"""Semantic IDs: three codes per item, from k-means level by level on residuals.

Notable choices
- RQ-Kmeans of the OneRec report (arXiv 2506.13695, tokeniser section): level l + 1 clusters what
  the centroids up to level l leave over. The report gives utilisation 1.0 on all levels, so a
  centroid that lost all its points is moved onto the point that is worst served.
- Seeding is k-means++ (Arthur and Vassilvitskii 2007), written here because SciPy's is quadratic
  in the number of codes (6.5 s a level at 256 codes, 7,583 x 64); the iterations are SciPy's.
- Distances of `assign` are summed pair by pair in float64, without a matrix product: an item gets
  the same ID alone or among a million, and equal centroids always resolve to the first.

Shapes: N items, d embedding width, K codes of a level.
"""

import hashlib
import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

from streams.events import LEVELS

ITERATIONS: Final = 25
"""Lloyd's iterations of a level."""
_REPAIRS: Final = 8
"""Rounds that move idle centroids and iterate again, before they are only moved."""
_CHUNK: Final = 4096
"""Items compared with all centroids at once."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Codebooks:
    """Centroids of the three levels, float32 `[K, d]` each; immutable for a policy lineage."""

    centroids: tuple[NDArray[np.float32], ...]

    def __post_init__(self) -> None:
        shapes = {table.shape for table in self.centroids}
        if len(self.centroids) != LEVELS or len(shapes) != 1 or len(self.centroids[0].shape) != 2:
            raise ValueError(f"codebooks need {LEVELS} tables of one shape [K, d], got {shapes}")

    @property
    def codes(self) -> int:
        """Codes of a level."""
        return int(self.centroids[0].shape[0])

    @property
    def width(self) -> int:
        """Width of the embeddings that these codebooks read."""
        return int(self.centroids[0].shape[1])

    def assign(self, embeddings_ND: NDArray[np.floating]) -> NDArray[np.int64]:
        """Semantic IDs `[N, 3]`; raises `ValueError` on a wrong width or non-finite values."""
        residual_ND = _checked(embeddings_ND)
        if residual_ND.shape[1] != self.width:
            raise ValueError(
                f"embeddings have width {residual_ND.shape[1]}, the codebooks read {self.width}"
            )
        sids_N3 = np.empty((len(residual_ND), LEVELS), dtype=np.int64)
        for level, table_KD in enumerate(self.centroids):
            centroids_KD = table_KD.astype(np.float64)
            sids_N3[:, level] = _nearest(residual_ND, centroids_KD)[0]
            residual_ND = residual_ND - centroids_KD[sids_N3[:, level]]
        return sids_N3

    def digest(self) -> str:
        """BLAKE2b over shapes and values, 16 bytes in hexadecimal."""
        state = hashlib.blake2b(digest_size=16)
        for table in self.centroids:
            state.update(np.asarray(table.shape, dtype="<i8").tobytes())
            state.update(np.ascontiguousarray(table, dtype="<f4").tobytes())
        return state.hexdigest()

    def to_tensors(self) -> dict[str, NDArray[np.float32]]:
        """The tables by name, for a checkpoint."""
        return {f"codebook.{level}": table for level, table in enumerate(self.centroids)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.float32]]) -> "Codebooks":
        """The inverse of `to_tensors`; other names are ignored, a missing one is a `ValueError`."""
        names = [f"codebook.{level}" for level in range(LEVELS)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"the checkpoint has no {', '.join(missing)}")
        return cls(tuple(np.asarray(tensors[name], dtype=np.float32) for name in names))


def fit(embeddings_ND: NDArray[np.floating], codes: int, seed: int) -> Codebooks:
    """Fit codebooks of `codes` centroids a level; deterministic under `seed`.

    With fewer distinct residuals than codes the surplus centroids repeat the first one and are
    never assigned. Raises `ValueError` on an empty, non-finite or not two-dimensional array.
    """
    if codes < 1:
        raise ValueError(f"codes must be at least 1, got {codes}")
    residual_ND = _checked(embeddings_ND)
    if not len(residual_ND):
        raise ValueError("no embeddings to fit codebooks on")
    rng = np.random.default_rng(seed)
    tables: list[NDArray[np.float32]] = []
    for _ in range(LEVELS):
        # Rounded before the residual is taken: the next level must see what `assign` will leave.
        table_KD = _cluster(residual_ND, codes, rng).astype(np.float32)
        tables.append(table_KD)
        centroids_KD = table_KD.astype(np.float64)
        residual_ND = residual_ND - centroids_KD[_nearest(residual_ND, centroids_KD)[0]]
    return Codebooks(tuple(tables))


def _checked(embeddings_ND: NDArray[np.floating]) -> _Floats:
    array = np.asarray(embeddings_ND, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"embeddings must be [items, width], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("embeddings hold values that are not finite")
    return array


def _nearest(points_ND: _Floats, centroids_KD: _Floats) -> tuple[NDArray[np.int64], _Floats]:
    """Index of, and squared distance to, each point's nearest centroid; the first of equal ones."""
    index_N = np.empty(len(points_ND), dtype=np.int64)
    distance_N = np.empty(len(points_ND))
    for start in range(0, len(points_ND), _CHUNK):
        part = slice(start, start + _CHUNK)
        distance_nK = cdist(points_ND[part], centroids_KD, metric="sqeuclidean")
        index_N[part] = distance_nK.argmin(axis=1)
        distance_N[part] = distance_nK.min(axis=1)
    return index_N, distance_N


def _distance_to(points_ND: _Floats, row: int) -> _Floats:
    """Squared distance `[N]` of each point to one of them."""
    return cdist(points_ND, points_ND[row : row + 1], metric="sqeuclidean")[:, 0]


def _cluster(points_ND: _Floats, codes: int, rng: np.random.Generator) -> _Floats:
    seeds_kD = _seed(points_ND, codes, rng)
    if len(seeds_kD) < codes:
        # Every distinct point is a centroid already.
        surplus_KD = np.repeat(seeds_kD[:1], codes - len(seeds_kD), axis=0)
        return np.concatenate([seeds_kD, surplus_KD])
    return refine(points_ND, seeds_kD)


def refine(
    points_ND: NDArray[np.float64], centroids_KD: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Lloyd's iterations from any start, without idle centroids where K distinct points exist.

    An idle centroid moves onto the point farthest from its own, one after the other.
    """
    centroids_KD = _lloyd(points_ND, centroids_KD)
    for repair in range(_REPAIRS + len(centroids_KD)):
        index_N, distance_N = _nearest(points_ND, centroids_KD)
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


def _seed(points_ND: _Floats, codes: int, rng: np.random.Generator) -> _Floats:
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


def _lloyd(points_ND: _Floats, centroids_KD: _Floats) -> _Floats:
    with warnings.catch_warnings():
        # Idle centroids are looked for, and moved, by the caller.
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        moved_KD, _ = kmeans2(points_ND, centroids_KD, iter=ITERATIONS, minit="matrix")
    return np.asarray(moved_KD, dtype=np.float64)

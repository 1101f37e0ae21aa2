"""Semantic IDs: three codes per item, from k-means level by level on residuals.

Notable choices
- RQ-Kmeans of the OneRec report (arXiv 2506.13695, tokeniser section): level l + 1 clusters what
  the centroids up to level l leave over. How a level is clustered is in learner/kmeans.py.
- An assignment is exact (learner/nearest.py): an item gets the same ID alone or among a million,
  and equal centroids always resolve to the first.
- Codebooks may be balanced (learner/balance.py): then a level's tables are its centroids and a
  penalty for each, which is added to the squared distance. Codebooks without penalties have the
  tensors and the digest that they had before there were any.
- Several items may have one ID. Codes never tell them apart; the actor's last hop does, uniformly
  over the members that may be shown, and writes the probability down (docs/tokeniser.md).

Shapes: N items, n of a piece, d embedding width, K codes of a level.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from learner.balance import balance
from learner.kmeans import cluster, planned
from learner.nearest import Nearest
from streams.events import LEVELS

_PIECE: Final = 1 << 15
"""Items whose residuals are held at once in an assignment."""

Tell = Callable[[str, int, int], None]
"""Progress of a phase: what, done, in all."""

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Codebooks:
    """Centroids of the three levels, float32 `[K, d]` each; immutable for a policy lineage.

    `penalties` of balanced codebooks are float32 `[K]` for each level, else there are none.
    """

    centroids: tuple[NDArray[np.float32], ...]
    penalties: tuple[NDArray[np.float32], ...] = ()

    def __post_init__(self) -> None:
        shapes = {table.shape for table in self.centroids}
        if len(self.centroids) != LEVELS or len(shapes) != 1 or len(self.centroids[0].shape) != 2:
            raise ValueError(f"codebooks need {LEVELS} tables of one shape [K, d], got {shapes}")
        wanted = [(self.codes,)] * LEVELS if self.penalties else []
        if [penalty.shape for penalty in self.penalties] != wanted:
            raise ValueError(
                f"codebooks of {self.codes} codes need {LEVELS} tables of as many penalties, or none, "
                f"got {[penalty.shape for penalty in self.penalties]}"
            )

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
        embeddings_ND = np.asarray(embeddings_ND)
        sids_N3 = np.empty((len(embeddings_ND), LEVELS), dtype=np.int64)
        for start in range(0, max(1, len(embeddings_ND)), _PIECE):
            part = slice(start, start + _PIECE)
            residual_nD = _checked(embeddings_ND[part])
            if residual_nD.shape[1] != self.width:
                raise ValueError(
                    f"embeddings have width {residual_nD.shape[1]}, the codebooks read {self.width}"
                )
            for level, nearest in enumerate(self._nearest):
                sids_N3[part, level] = nearest.code(residual_nD)
                residual_nD = residual_nD - self.centroids[level][sids_N3[part, level]]
        return sids_N3

    def decode(self, sids_N3: NDArray[np.integer], levels: int = LEVELS) -> NDArray[np.float64]:
        """What the first `levels` codes say of the embeddings: the sum of their centroids `[N, d]`."""
        total_ND = np.zeros((len(sids_N3), self.width))
        for level in range(levels):
            total_ND += self.centroids[level][sids_N3[:, level]]
        return total_ND

    @cached_property
    def _nearest(self) -> tuple[Nearest, ...]:
        penalties = self.penalties or (None,) * LEVELS
        return tuple(Nearest(*tables) for tables in zip(self.centroids, penalties, strict=True))

    def digest(self) -> str:
        """BLAKE2b over shapes and values, 16 bytes in hexadecimal."""
        state = hashlib.blake2b(digest_size=16)
        for table in (*self.centroids, *self.penalties):
            state.update(np.asarray(table.shape, dtype="<i8").tobytes())
            state.update(np.ascontiguousarray(table, dtype="<f4").tobytes())
        return state.hexdigest()

    def to_tensors(self) -> dict[str, NDArray[np.float32]]:
        """The tables by name, for a checkpoint."""
        tables = {f"codebook.{level}": table for level, table in enumerate(self.centroids)}
        return tables | {f"penalty.{level}": table for level, table in enumerate(self.penalties)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[np.float32]]) -> "Codebooks":
        """The inverse of `to_tensors`; other names are ignored, a missing one is a `ValueError`."""
        names = [f"codebook.{level}" for level in range(LEVELS)]
        if any(name.startswith("penalty.") for name in tensors):
            names += [f"penalty.{level}" for level in range(LEVELS)]
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"the checkpoint has no {', '.join(missing)}")
        tables = [np.asarray(tensors[name], dtype=np.float32) for name in names]
        return cls(tuple(tables[:LEVELS]), tuple(tables[LEVELS:]))


def fit(
    embeddings_ND: NDArray[np.floating],
    codes: int,
    seed: int,
    balanced: float | None = None,
    tell: Tell | None = None,
) -> Codebooks:
    """Fit codebooks of `codes` centroids a level; deterministic under `seed`.

    Large fits are so under any number of threads, small ones under the same (learner/kmeans.py).
    `balanced` bounds the items of a code to that many times their mean, on each level; equal ones
    count once. With fewer distinct residuals than codes the surplus centroids repeat the first one
    and are never assigned. Holds the residuals in float64 beside the embeddings. Raises
    `ValueError` on an empty, non-finite or not two-dimensional array, and on a bound below 1.
    """
    if codes < 1:
        raise ValueError(f"codes must be at least 1, got {codes}")
    if balanced is not None and not balanced >= 1.0:
        raise ValueError(f"codes can hold their mean or more, not {balanced} times as much")
    residual_ND = _checked(np.array(embeddings_ND, dtype=np.float64))
    if not len(residual_ND):
        raise ValueError("no embeddings to fit codebooks on")
    rng = np.random.default_rng(seed)
    tables: list[NDArray[np.float32]] = []
    penalties: list[NDArray[np.float32]] = []
    for level in range(LEVELS):
        # Tables of float32, from which the residual is taken: the next level must see what `assign` will leave.
        done = _counter(f"level {level + 1}", planned(len(residual_ND), codes), tell)
        table_KD, code_N = cluster(residual_ND, codes, rng, done)
        if balanced is not None:
            done = _counter(f"level {level + 1}, balance", 0, tell)
            table_KD, penalty_K, code_N = balance(residual_ND, table_KD, balanced, rng, done)
            penalties.append(penalty_K)
        tables.append(table_KD)
        for start in range(0, len(residual_ND), _PIECE):
            part = slice(start, start + _PIECE)
            residual_ND[part] -= table_KD[code_N[part]]
    return Codebooks(tuple(tables), tuple(penalties))


def _counter(what: str, in_all: int, tell: Tell | None) -> Callable[[int], None]:
    """Progress in points; `in_all` grows where more come than were planned."""
    so_far = 0

    def done(more: int) -> None:
        nonlocal so_far
        so_far += more
        if tell is not None:
            tell(what, so_far, max(in_all, so_far))

    return done


def _checked(embeddings_ND: NDArray[np.floating]) -> _Floats:
    array = np.asarray(embeddings_ND, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"embeddings must be [items, width], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("embeddings hold values that are not finite")
    return array

"""What semantic IDs are worth: how evenly codes are used, what they keep of the embeddings, who shares an ID.

Notable choices
- Beside them belong the figures of `random_codebooks`, whose centroids are residuals of items drawn
  by lot, assigned like any others: they differ from fitted ones in the fitting alone. Codes drawn
  by lot for each item would be no opponent: evenly used by construction, and saying nothing.
- Reconstruction is relative: squared error over the squared deviation from the mean, so 1 is what
  one centroid for all would give, whatever the embeddings' scale.

Shapes: N items, d embedding width, K codes of a level.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from learner.nearest import keys_of
from learner.semantic_ids import Codebooks
from streams.events import LEVELS

_PIECE: Final = 1 << 16


@dataclass(frozen=True)
class LevelQuality:
    """One level of the IDs."""

    utilisation: float
    """Share of the codes that any item has."""
    entropy: float
    """Nats, of the codes' distribution over items; at most ln K."""
    perplexity: float
    """exp(entropy): as many codes, used evenly, would have this entropy."""
    largest: float
    """Items of the largest code over the mean of all codes."""
    largest_apart: float
    """The same, where items that this level cannot tell apart count as one: those whose residuals are equal."""
    gini: float
    """Gini coefficient of the codes' sizes: 0 where all are equal."""
    reconstruction: float
    """Relative squared error of what this level and those before it say."""


@dataclass(frozen=True)
class Quality:
    """The IDs of all items, level by level and whole."""

    levels: tuple[LevelQuality, ...]
    distinct: int
    """IDs that any item has."""
    sharing: float
    """Share of the items whose ID another item has, too."""
    largest_group: int
    """Items of the most common ID."""


def quality(
    books: Codebooks, embeddings_ND: NDArray[np.floating], sids_N3: NDArray[np.int64]
) -> Quality:
    """Measure IDs that these codebooks gave to these embeddings; raises `ValueError` without any."""
    if not len(sids_N3):
        raise ValueError("no items to measure semantic IDs on")
    mean_D = np.asarray(embeddings_ND).mean(axis=0, dtype=np.float64)
    deviation, error_L = 0.0, np.zeros(LEVELS)
    key_NL = np.empty(sids_N3.shape, dtype=np.uint64)
    for start in range(0, len(sids_N3), _PIECE):
        part = slice(start, start + _PIECE)
        residual_nD = np.array(embeddings_ND[part], dtype=np.float64)
        deviation += float(np.square(residual_nD - mean_D).sum())
        for level, table_KD in enumerate(books.centroids):
            key_NL[part, level] = keys_of(residual_nD)
            residual_nD -= table_KD[sids_N3[part, level]]
            error_L[level] += np.square(residual_nD).sum()
    levels = []
    for level in range(LEVELS):
        apart_n = np.unique(key_NL[:, level], return_index=True)[1]
        relative = error_L[level] / deviation if deviation > 0.0 else float(error_L[level] > 0.0)
        code_N = sids_N3[:, level]
        levels.append(_level(code_N, code_N[apart_n], books.codes, float(relative)))
    key_N = (sids_N3[:, 0] * books.codes + sids_N3[:, 1]) * books.codes + sids_N3[:, 2]
    size_n = np.unique(key_N, return_counts=True)[1]
    sharing = float(size_n[size_n > 1].sum() / len(sids_N3))
    return Quality(tuple(levels), len(size_n), sharing, int(size_n.max()))


def random_codebooks(embeddings_ND: NDArray[np.floating], codes: int, seed: int) -> Codebooks:
    """Codebooks whose centroids are residuals of different items, drawn by lot; at least `codes` items."""
    rng = np.random.default_rng(seed)
    tables: list[NDArray[np.float32]] = []
    for level in range(LEVELS):
        drawn_KD = np.asarray(embeddings_ND)[rng.choice(len(embeddings_ND), codes, replace=False)]
        unused = (np.zeros((codes, drawn_KD.shape[1]), dtype=np.float32),) * (LEVELS - level)
        so_far = Codebooks((*tables, *unused))
        residual_KD = drawn_KD - so_far.decode(so_far.assign(drawn_KD))
        tables.append(residual_KD.astype(np.float32))
    return Codebooks(tuple(tables))


def _level(
    code_N: NDArray[np.int64], apart_n: NDArray[np.int64], codes: int, reconstruction: float
) -> LevelQuality:
    size_K, apart_K = (np.bincount(code, minlength=codes) for code in (code_N, apart_n))
    share_k = size_K[size_K > 0] / size_K.sum()
    entropy = float(-(share_k * np.log(share_k)).sum())
    rank_K = np.arange(1, codes + 1)
    gini = float((2 * rank_K - codes - 1) @ np.sort(size_K) / (codes * size_K.sum()))
    return LevelQuality(
        utilisation=float((size_K > 0).mean()),
        entropy=entropy,
        perplexity=float(np.exp(entropy)),
        largest=float(size_K.max() / size_K.mean()),
        largest_apart=float(apart_K.max() / apart_K.mean()),
        gini=gini,
        reconstruction=reconstruction,
    )

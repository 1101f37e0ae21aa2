"""Item vectors from what users watched one after the other, for logs that bring no embeddings.

Notable choices
- Positive pointwise mutual information of co-occurrence, then a truncated SVD with the singular
  values split evenly, U sqrt(S): word2vec's implicit factorisation (Levy and Goldberg, NeurIPS
  2014). Contract of evidence, "Real logs": 64 dimensions.
- Co-occurrence is symmetric, within 5 places of a user's list; a video with itself does not count.
  On the held-out last play of the history (never the log) windows of 5, 10 and the whole list did
  equally well within noise, 2 was worse at neighbours of one tag; 5 is the fastest of the good.
- For k-means every vector is scaled to length 1 (length mostly says popularity), the mean is taken
  off (PPMI is never negative, so all share one direction), and it is scaled to length 1 again.
- An item that was never watched beside another takes the mean of its tags' means, without any
  known tag the global mean, which is 0 after centring. These means are not scaled up: being near
  the centre is what is known of such an item.

Shapes: V videos, N videos watched beside another more often than by chance, D dimensions.
"""

from typing import Final

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

from ops.errors import UserError
from ops.feedlog import Videos, WatchHistory

DIMENSIONS: Final = 64
WINDOW: Final = 5


def item_vectors(
    history: WatchHistory, videos: Videos, dimensions: int = DIMENSIONS, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids `[V]` (those of `videos`) and their vectors `[V, D]`, the same for the same seed.

    Dimensions that a small history cannot fill are 0.
    Raises `UserError` if no two videos were watched near each other.
    """
    count_VV = cooccurrence(videos.positions(history.video), history.start, len(videos.id), WINDOW)
    x_VV = ppmi(count_VV)
    known_N = np.flatnonzero(np.diff(x_VV.indptr))
    if not len(known_N):
        raise UserError(
            "no user's watch history holds two different known videos; "
            "item vectors are made from watch_history_*.csv with at least some such users"
        )
    x_ND = _unit(_factorise(sp.csr_array(x_VV[known_N][:, known_N]), dimensions, seed))
    x_ND = _unit(x_ND - x_ND.mean(axis=0))
    x_VD = np.zeros((len(videos.id), dimensions))
    x_VD[known_N] = x_ND
    _fill_by_tag(x_VD, known_N, videos.tags)
    return videos.id, x_VD.astype(np.float32)


def cooccurrence(
    item: NDArray[np.int64], start: NDArray[np.int64], n_items: int, window: int
) -> sp.csr_array:
    """How often two items stand within `window` places of one list, `[n_items, n_items]`.

    List k is `item[start[k]:start[k + 1]]`; an item of -1 is a place without an item.
    Symmetric, 0 on the diagonal.
    """
    of_list = np.repeat(np.arange(len(start) - 1), np.diff(start))
    left, right = [], []
    for distance in range(1, window + 1):
        a, b = item[:-distance], item[distance:]
        pair = (of_list[:-distance] == of_list[distance:]) & (a != b) & (a >= 0) & (b >= 0)
        left.append(a[pair])
        right.append(b[pair])
    a, b = np.concatenate(left), np.concatenate(right)
    count = sp.csr_array(sp.coo_array((np.ones(len(a)), (a, b)), shape=(n_items, n_items)))
    return sp.csr_array(count + count.T)


def ppmi(count_NN: sp.csr_array) -> sp.csr_array:
    """max(0, log of p(a, b) / (p(a) p(b))) of symmetric counts; absent pairs stay absent."""
    pairs = count_NN.tocoo()
    total_N = np.asarray(count_NN.sum(axis=1), np.float64)
    row, column = pairs.coords
    value = np.log(pairs.data * total_N.sum() / (total_N[row] * total_N[column]))
    more = value > 0
    return sp.csr_array((value[more], (row[more], column[more])), shape=count_NN.shape)


def _factorise(x_NN: sp.csr_array, dimensions: int, seed: int) -> NDArray[np.float64]:
    """U sqrt(S) `[N, D]`, largest singular value first, the largest entry of a column positive."""
    size = x_NN.shape[0]
    x_ND = np.zeros((size, dimensions))
    if size <= dimensions + 1:  # the iterative method needs D < N
        u, s, _ = np.linalg.svd(x_NN.toarray())
        u, s = u[:, :dimensions], s[:dimensions]
    else:
        start = np.random.default_rng(seed).standard_normal(size)
        u, s, _ = svds(x_NN, k=dimensions, v0=start)
        u, s = u[:, ::-1], s[::-1]
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
    x_ND[:, : len(s)] = u * sign * np.sqrt(np.maximum(s, 0))
    return x_ND


def _unit(x_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    length_N1 = np.sqrt(np.square(x_ND).sum(axis=1, keepdims=True))
    unit_ND: NDArray[np.float64] = x_ND / np.maximum(length_N1, 1e-9)
    return unit_ND


def _fill_by_tag(
    x_VD: NDArray[np.float64], known_N: NDArray[np.int64], tags: list[tuple[str, ...]]
) -> None:
    """Give every video that is not known the mean of its tags' means over the known ones."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for v in known_N.tolist():
        for tag in tags[v]:
            sums[tag] = sums[tag] + x_VD[v] if tag in sums else x_VD[v]
            counts[tag] = counts.get(tag, 0) + 1
    for v in np.setdiff1d(np.arange(len(tags)), known_N).tolist():
        means = [sums[tag] / counts[tag] for tag in tags[v] if tag in sums]
        if means:
            x_VD[v] = np.mean(means, axis=0)

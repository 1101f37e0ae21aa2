"""The tree of valid semantic IDs at one catalogue version, and what a request's exclusions take from it.

Notable choices
- A level is the sorted keys of its nodes, and where the children of each begin in the next: 8 bytes a leaf, and 16
  a node above. Everything is asked by row: a node's children are a range, found without any search.
- A `Tree` is immutable and may be shared between threads.
- Excluded leaves go exactly and on all three levels: a node goes when the number of its excluded live leaves equals
  its number of live leaves. Actor, learner and audit share `children`.
- Nothing here is of the codebook's size: children come as lists, and a mask is made of them where one is asked for.

Shapes: B requests, M prefixes (padding -1) of a request, N = B * M of them, n children, g nodes that are gone,
k targets, K codes of a level. Node keys: the root is 0; below it c1, then c1 * K + c2, then
(c1 * K + c2) * K + c3, as int64. Rows: a node's place among its level's nodes; the root is row 0 of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.events import LEVELS, SemanticId

Keys = NDArray[np.int64]


def keys_of(sids_n3: NDArray[np.integer[Any]], codes: int) -> Keys:
    """Leaf keys `[n]` of semantic IDs `[n, 3]`; raises `ValueError` on a code outside 0..codes-1."""
    sids = np.asarray(sids_n3, dtype=np.int64).reshape(-1, LEVELS)
    if sids.size and (sids.min() < 0 or sids.max() >= codes):
        raise ValueError(f"semantic IDs hold a code outside 0..{codes - 1}")
    return (sids[:, 0] * codes + sids[:, 1]) * codes + sids[:, 2]


def sids_of(keys_n: Keys, codes: int) -> NDArray[np.int64]:
    """Semantic IDs `[n, 3]` of leaf keys `[n]`."""
    upper, c3 = np.divmod(np.asarray(keys_n, dtype=np.int64), codes)
    c1, c2 = np.divmod(upper, codes)
    return np.stack([c1, c2, c3], axis=-1)


def sid_of(key: int, codes: int) -> SemanticId:
    """The semantic ID of one leaf key."""
    upper, c3 = divmod(key, codes)
    return (*divmod(upper, codes), c3)


class Children(NamedTuple):
    """Valid children of some prefixes: those of one prefix stand together, by ascending code."""

    place_n: Keys
    """The prefix's place among all N."""
    row_n: Keys
    """The child's row in its level."""
    code_n: Keys


@dataclass(frozen=True)
class Exclusions:
    """Nodes that lost all their live leaves, found once for the three levels of a slate.

    Per level parallel arrays of request and node row, ascending.
    """

    requests: int
    gone: tuple[tuple[Keys, Keys], ...]


def run_starts(values_n: Keys) -> NDArray[np.intp]:
    """Where runs of equal values start."""
    if not len(values_n):
        return np.empty(0, dtype=np.intp)
    return np.flatnonzero(np.concatenate([[True], values_n[1:] != values_n[:-1]]))


def ranges(low_N: Keys, size_N: Keys) -> Keys:
    """The numbers of all ranges [low, low + size), one range after the other."""
    before_N = size_N.cumsum() - size_N
    return np.arange(int(size_N.sum())) + np.repeat(low_N - before_N, size_N)


class Tree:
    """The live leaves of one catalogue version; immutable."""

    def __init__(self, codes: int, leaves: Keys) -> None:
        """`leaves` must be sorted and without repeats."""
        self.codes: Final = codes
        upper, start_2 = _parents(leaves, codes)
        top, start_1 = _parents(upper, codes)
        self._nodes: Final = (top, upper, leaves)
        self._first: Final = (np.array([0, len(top)]), start_1, start_2)
        """Per level of the child: where the children of each parent begin, and at last where they end."""
        self._first_leaf: Final = (start_2[start_1], start_2)
        for table in (*self._nodes, *self._first, *self._first_leaf):
            table.flags.writeable = False

    def __len__(self) -> int:
        return len(self._nodes[-1])

    def leaves(self) -> Keys:
        """Keys of the live leaves, ascending; read-only."""
        return self._nodes[-1]

    def locate(self, excluded: Sequence[Keys]) -> Exclusions:
        """Find what a request's excluded leaf keys remove; one array a request, any order, repeats
        and leaves that do not live are ignored."""
        leaves = self.leaves()
        request_n = np.repeat(np.arange(len(excluded)), [len(keys) for keys in excluded])
        if not len(leaves) or not len(request_n):
            nothing = np.empty(0, dtype=np.int64)
            return Exclusions(len(excluded), ((nothing, nothing),) * LEVELS)
        key_n = np.concatenate(excluded)
        row_n = np.minimum(np.searchsorted(leaves, key_n), len(leaves) - 1)
        lives_n = leaves[row_n] == key_n
        # Sorted by request, then leaf: a node's excluded leaves stand together on every level.
        place_n = np.unique(request_n[lives_n] * len(leaves) + row_n[lives_n])
        request_n, row_n = np.divmod(place_n, len(leaves))
        gone = [(request_n, row_n)]
        for first in reversed(self._first_leaf):
            node_n = np.searchsorted(first, row_n, side="right") - 1
            starts = run_starts(request_n * len(first) + node_n)
            sizes = np.diff(starts, append=len(node_n))
            node_n = node_n[starts]
            emptied = sizes == first[node_n + 1] - first[node_n]
            gone.insert(0, (request_n[starts][emptied], node_n[emptied]))
        return Exclusions(len(excluded), tuple(gone))

    def rows_of(self, prefix_BM: Keys, level: int) -> Keys:
        """Rows of the nodes whose children are of `level`, by their keys; -1 where none lives."""
        if level == 0:
            return np.where(prefix_BM == 0, 0, -1)
        nodes = self._nodes[level - 1]
        if not len(nodes):
            return np.full_like(prefix_BM, -1)
        row_BM = np.minimum(np.searchsorted(nodes, prefix_BM), len(nodes) - 1)
        return np.where(nodes[row_BM] == prefix_BM, row_BM, -1)

    def children(self, row_BM: Keys, level: int, excluded: Exclusions | None = None) -> Children:
        """Valid children, at `level`, of the nodes in these rows; a padding row (-1) has none."""
        row_N = row_BM.reshape(-1)
        if not len(self):
            nothing = np.empty(0, dtype=np.int64)
            return Children(nothing, nothing, nothing)
        first = self._first[level]
        low_N = first[row_N]
        size_N = np.where(row_N >= 0, first[row_N + 1] - low_N, 0)
        row_n = ranges(low_N, size_N)
        place_n = np.repeat(np.arange(len(row_N)), size_N)
        code_n = self._nodes[level][row_n]
        if level:
            code_n -= np.repeat(self._nodes[level - 1][row_N] * self.codes, size_N)
        children = Children(place_n, row_n, code_n)
        if excluded is None:
            return children
        if excluded.requests != len(row_BM):
            raise ValueError(
                f"{excluded.requests} lists of excluded leaves for {len(row_BM)} requests"
            )
        gone = self._gone_among(row_BM, level, low_N, size_N, excluded)
        if not len(gone):
            return children
        kept_n = np.ones(len(row_n), dtype=bool)
        kept_n[gone] = False
        return Children(*(part[kept_n] for part in children))

    def _gone_among(
        self, row_BM: Keys, level: int, low_N: Keys, size_N: Keys, excluded: Exclusions
    ) -> Keys:
        """Places, among all children of these rows, of those that a request's exclusions took."""
        request_g, row_g = excluded.gone[level]
        first = self._first[level]
        parent_g = np.searchsorted(first, row_g, side="right") - 1
        asked_N = (np.arange(len(row_BM))[:, None] * len(first) + row_BM).reshape(-1)
        asked_N[row_BM.reshape(-1) < 0] = -1
        order_N = np.argsort(asked_N, kind="stable")
        wanted_g = request_g * len(first) + parent_g
        # A prefix may be asked for several times in a request: targets share them.
        low_g = np.searchsorted(asked_N, wanted_g, side="left", sorter=order_N)
        times_g = np.searchsorted(asked_N, wanted_g, side="right", sorter=order_N) - low_g
        at_h = order_N[ranges(low_g, times_g)]
        before_N = size_N.cumsum() - size_N
        return before_N[at_h] + np.repeat(row_g, times_g) - low_N[at_h]

    def child_mask(
        self,
        prefix_BM: Keys,
        level: int,
        excluded: Sequence[Keys] | Exclusions | None = None,
    ) -> NDArray[np.bool_]:
        """Valid children `[B, M, K]` of the nodes `prefix_BM` at `level` (0: the root, key 0).

        A padding prefix (-1) and a node that does not live have none. `excluded` holds leaf keys,
        one array a request; who asks for several levels of a slate passes `locate(excluded)`.
        """
        if excluded is not None and not isinstance(excluded, Exclusions):
            excluded = self.locate(excluded)
        place_n, _, code_n = self.children(self.rows_of(prefix_BM, level), level, excluded)
        mask_NK = np.zeros((prefix_BM.size, self.codes), dtype=bool)
        mask_NK.reshape(-1)[place_n * self.codes + code_n] = True
        return mask_NK.reshape(*prefix_BM.shape, self.codes)

    def path_masks(
        self,
        sids_Bk3: NDArray[np.integer[Any]],
        excluded: Sequence[Keys] | Exclusions | None = None,
    ) -> NDArray[np.bool_]:
        """Valid children along each target's path, `[B, k, 3, K]`; padding targets (-1) have none.

        Raises `ValueError` on a code outside the codebook.
        """
        sids = np.asarray(sids_Bk3, dtype=np.int64)
        real_Bk = (sids >= 0).all(axis=-1)
        if sids.size and (sids.max() >= self.codes or sids[~real_Bk].max(initial=-1) > -1):
            raise ValueError(f"targets hold a code outside 0..{self.codes - 1}")
        if excluded is not None and not isinstance(excluded, Exclusions):
            excluded = self.locate(excluded)
        masks = np.empty((*real_Bk.shape, LEVELS, self.codes), dtype=bool)
        prefix_Bk = np.where(real_Bk, 0, -1)
        for level in range(LEVELS):
            masks[:, :, level] = self.child_mask(prefix_Bk, level, excluded)
            prefix_Bk = np.where(real_Bk, prefix_Bk * self.codes + sids[:, :, level], -1)
        return masks


def _parents(keys: Keys, codes: int) -> tuple[Keys, Keys]:
    """Keys of the parents of sorted nodes, and where each one's children begin, with their end at last."""
    upper = keys // codes
    starts = run_starts(upper)
    return upper[starts], np.append(starts, len(keys))

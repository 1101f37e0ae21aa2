"""The tree of valid semantic IDs at one catalogue version, and what a request's exclusions take from it.

Notable choices
- Everything is asked by row: a node's children are a range in the arena (learner/valid_arena.py), found without any
  search.
- A `Tree` is immutable and may be shared between threads. `changed` gives the tree of the next version: few changes
  cost their buckets, many are merged.
- Excluded leaves go exactly and on all three levels: a node goes when the number of its excluded live leaves equals
  its number of live leaves. Actor, learner and audit share `children`.
- Nothing here is of the codebook's size: children come as lists, and a mask is made of them where one is asked for.

Shapes: B requests, M prefixes (padding -1) of a request, N = B * M of them, n children, g nodes that are gone,
k targets, K codes of a level, T buckets. Node keys: the root is 0; below it c1, then c1 * K + c2, then
(c1 * K + c2) * K + c3, as int64. Rows: on the first level a bucket's place in the tree's table, below it a place in
the arena; the root is row 0 of its own.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from learner.sorted_keys import Keys as Keys
from learner.sorted_keys import find, merged, none, ranges, run_starts
from learner.valid_arena import Arena, Buckets, Places
from streams.events import LEVELS, SemanticId

PART: Final = 2
"""Buckets that are touched are written anew while they hold less than one in so many of the leaves; else all are."""
WASTE: Final = 2
"""Leaves in the arena over those that live, beyond `SLACK`, before it is written anew."""
SLACK: Final = 1 << 16


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


class Gone(NamedTuple):
    """Nodes of one level that lost all their live leaves: whose, where, and below which node."""

    request_g: Keys
    row_g: Keys
    parent_g: Keys


@dataclass(frozen=True)
class Exclusions:
    """What a batch's excluded leaves take, found once for the three levels of a slate."""

    requests: int
    gone: tuple[Gone, ...]


class Tree:
    """The live leaves of one catalogue version; immutable."""

    def __init__(self, codes: int, leaves: Keys, room: int = 0) -> None:
        """`leaves` must be sorted and without repeats; `room` is for so many, those of later versions among them."""
        self.codes: Final = codes
        self._arena = Arena(max(room, len(leaves)))
        self._take(self._arena.add(leaves, codes))

    def _take(self, table: Buckets) -> None:
        """These buckets are the tree."""
        self._table = table
        self._count = int(table.leaves_T.sum())
        self._leaves: Keys | None = None
        self._before_T: Keys | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Memory of the tree and of what it shares with other versions."""
        return self._arena.nbytes + sum(part.nbytes for part in self._table)

    def leaves(self) -> Keys:
        """Keys of the live leaves, ascending; read-only."""
        if self._leaves is None:
            leaves = self._arena.leaf_key[ranges(self._table.leaf_T, self._table.leaves_T)]
            leaves.flags.writeable = False
            self._leaves = leaves
        return self._leaves

    def key_at(self, rank: int) -> int:
        """The key of the leaf before which so many others stand."""
        before_T = self._before()
        bucket = int(np.searchsorted(before_T, rank, side="right")) - 1
        return int(self._arena.leaf_key[self._table.leaf_T[bucket] + rank - before_T[bucket]])

    def ranks_of(self, keys_n: Keys) -> Keys:
        """How many leaves stand before each of these; -1 for what is not a live leaf."""
        top_n, _, leaf_n = self._path(keys_n, LEVELS)
        lives = leaf_n >= 0
        ranks_n = np.full_like(keys_n, -1)
        top = top_n[lives]
        ranks_n[lives] = self._before()[top] + leaf_n[lives] - self._table.leaf_T[top]
        return ranks_n

    def _before(self) -> Keys:
        """How many leaves stand before each bucket."""
        if self._before_T is None:
            self._before_T = self._table.leaves_T.cumsum() - self._table.leaves_T
        return self._before_T

    def changed(self, added: Keys, removed: Keys) -> Self:
        """The tree with leaves added and removed (distinct keys; what is there or missing already is no change).

        Of all trees that share an arena only one thread may ask this.
        """
        table = self._table
        touched = np.unique(np.concatenate([added, removed]) // self.codes**2)
        at, until = (np.searchsorted(table.code_T, touched, side) for side in ("left", "right"))
        own = at[at < until]
        written = int(table.leaves_T[own].sum()) + len(added)
        if written * PART > self._count or self._arena.leaves + written > self._arena.room:
            room = WASTE * (self._count + len(added)) + SLACK
            return type(self)(self.codes, merged(self.leaves(), added, removed), room)
        leaves = self._arena.leaf_key[ranges(table.leaf_T[own], table.leaves_T[own])]
        block = self._arena.add(merged(leaves, added, removed), self.codes)
        tree = copy(self)
        tree._take(table.replaced(own, block))
        return tree

    def locate(self, excluded: Sequence[Keys]) -> Exclusions:
        """Find what a request's excluded leaf keys remove; one array a request, any order, repeats
        and leaves that do not live are ignored."""
        request_n = np.repeat(np.arange(len(excluded)), [len(keys) for keys in excluded])
        key_n = np.concatenate(excluded) if len(excluded) else none()
        top_n, node_n, leaf_n = self._path(key_n, LEVELS)
        lives = leaf_n >= 0
        # Sorted by request, then leaf: a node's excluded leaves stand together on every level.
        _, once = np.unique(
            request_n[lives] * (self._arena.leaves + 1) + leaf_n[lives], return_index=True
        )
        request_n, top_n, node_n, leaf_n = (
            part[lives][once] for part in (request_n, top_n, node_n, leaf_n)
        )
        gone = [Gone(request_n, leaf_n, node_n)]
        for row_n, parent_n, leaves in (
            (node_n, top_n, self._arena.node_leaves),
            (top_n, np.zeros_like(top_n), self._table.leaves_T),
        ):
            starts = run_starts(request_n * (self._arena.nodes + 1) + row_n)
            sizes = np.diff(starts, append=len(row_n))
            starts = starts[sizes == leaves[row_n[starts]]]
            gone.insert(0, Gone(request_n[starts], row_n[starts], parent_n[starts]))
        return Exclusions(len(excluded), tuple(gone))

    def rows_of(self, prefix_BM: Keys, level: int) -> Keys:
        """Rows of the nodes with these keys of `level` codes; -1 where none lives."""
        if level == 0:
            return np.where(prefix_BM == 0, 0, -1)
        return self._path(prefix_BM.reshape(-1), level)[-1].reshape(prefix_BM.shape)

    def _path(self, key_n: Keys, level: int) -> list[Keys]:
        """Rows, down to `level`, of the nodes on the way to keys of so many codes; -1 where none lives."""
        table, arena = self._table, self._arena
        if not self._count:
            return [np.full_like(key_n, -1)] * level
        wanted_n = key_n // self.codes ** (level - 1)
        row_n = np.minimum(np.searchsorted(table.code_T, wanted_n), len(table.code_T) - 1)
        rows = [np.where(table.code_T[row_n] == wanted_n, row_n, -1)]
        below: list[tuple[Keys, Keys | Places, Keys | Places]] = [
            (arena.node_key, table.node_T, table.nodes_T),
            (arena.leaf_key, arena.node_leaf, arena.node_leaves),
        ]
        for depth, (keys, low, size) in enumerate(below[: level - 1], start=2):
            above = rows[-1]
            low_n = np.where(above >= 0, low[above], 0)
            size_n = np.where(above >= 0, size[above], 0)
            rows.append(find(keys, low_n, size_n, key_n // self.codes ** (level - depth)))
        return rows

    def children(self, row_BM: Keys, level: int, excluded: Exclusions | None = None) -> Children:
        """Valid children, at `level`, of the nodes in these rows; a padding row (-1) has none."""
        row_N = row_BM.reshape(-1)
        if not self._count:
            return Children(none(), none(), none())
        table, arena = self._table, self._arena
        low: Keys | Places
        size: Keys | Places
        if level == 0:
            keys, parent_N = table.code_T, np.zeros_like(row_N)
            low, size = parent_N, np.full_like(row_N, len(table.code_T))
        elif level == 1:
            keys, parent_N = arena.node_key, table.code_T[row_N]
            low, size = table.node_T[row_N], table.nodes_T[row_N]
        else:
            keys, parent_N = arena.leaf_key, arena.node_key[row_N]
            low, size = arena.node_leaf[row_N], arena.node_leaves[row_N]
        low_N = low.astype(np.int64)
        size_N = np.where(row_N >= 0, size, 0).astype(np.int64)
        row_n = ranges(low_N, size_N)
        place_n = np.repeat(np.arange(len(row_N)), size_N)
        code_n = keys[row_n]
        if level:
            code_n -= np.repeat(parent_N * self.codes, size_N)
        children = Children(place_n, row_n, code_n)
        if excluded is None:
            return children
        if excluded.requests != len(row_BM):
            raise ValueError(
                f"{excluded.requests} lists of excluded leaves for {len(row_BM)} requests"
            )
        gone = _among(excluded.gone[level], row_BM, low_N, size_N)
        if not len(gone):
            return children
        kept_n = np.ones(len(row_n), dtype=bool)
        kept_n[gone] = False
        return Children(*(part[kept_n] for part in children))

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


def _among(gone: Gone, row_BM: Keys, low_N: Keys, size_N: Keys) -> Keys:
    """Places, among all children of these rows, of those that the requests' exclusions took."""
    most = max(row_BM.max(initial=0), gone.parent_g.max(initial=0)) + 1
    asked_N = (np.arange(len(row_BM))[:, None] * most + row_BM).reshape(-1)
    asked_N[row_BM.reshape(-1) < 0] = -1
    order_N = np.argsort(asked_N, kind="stable")
    wanted_g = gone.request_g * most + gone.parent_g
    # A prefix may be asked for several times in a request: targets share them.
    low_g = np.searchsorted(asked_N, wanted_g, side="left", sorter=order_N)
    times_g = np.searchsorted(asked_N, wanted_g, side="right", sorter=order_N) - low_g
    at_h = order_N[ranges(low_g, times_g)]
    before_N = size_N.cumsum() - size_N
    return before_N[at_h] + np.repeat(gone.row_g, times_g) - low_N[at_h]

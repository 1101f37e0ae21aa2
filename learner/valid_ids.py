"""The index of valid semantic IDs: which leaves live at a catalogue version, less a request's own.

Notable choices
- A leaf is a semantic ID that at least one live item has. The index holds the *stays* of items in
  leaves, (item, key, born, died), and derives leaves from them: a leaf lives while one member does.
  A key that died and was born again is two stays, so the row alive at the version is taken.
- A catalogue version is the offset of the last applied catalogue record; a record takes effect at
  its own version: alive at v means born <= v < died.
- A `Tree` is what lives at one version: sorted node keys per level with counts of live leaves. It is
  immutable and may be shared between threads. The index itself has one writer and one thread.
- Excluded leaves go exactly and on all three levels: a node goes when the number of its excluded
  live leaves equals its number of live leaves. Actor, learner and audit share `child_mask`.

Shapes: B requests, M prefixes (padding -1) of a request, k targets, K codes of a level.
Node keys: the root is 0; below it c1, then c1 * K + c2, then (c1 * K + c2) * K + c3, as int64.
"""

from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streams.events import LEVELS, SemanticId

FOREVER: Final = np.iinfo(np.int64).max
"""`died` of what lives."""
KEPT_TREES: Final = 8
"""Trees kept for repeated questions about the same version."""

Keys = NDArray[np.int64]


class UnknownVersionError(LookupError):
    """A catalogue version that is pruned, or not applied yet."""


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


@dataclass(frozen=True)
class Exclusions:
    """Nodes that lost all their live leaves, found once for the three masks of a slate.

    Per level of the *parent*: parallel arrays of request, parent's node key, and code of the child.
    """

    requests: int
    gone: tuple[tuple[Keys, Keys, Keys], ...]


def _runs(values_n: Keys) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where runs of equal values start, and how long they are."""
    starts = np.flatnonzero(
        np.concatenate([[True], values_n[1:] != values_n[:-1]])[: len(values_n)]
    )
    return starts, np.diff(starts, append=len(values_n))


class Tree:
    """The live leaves of one catalogue version; immutable."""

    def __init__(self, codes: int, leaves: Keys) -> None:
        """`leaves` must be sorted and without repeats."""
        self.codes: Final = codes
        nodes: list[Keys] = []
        self._live: list[Keys] = []
        self._node_of_leaf: list[Keys] = []
        for level in range(LEVELS):
            key_of_leaf = leaves // codes ** (LEVELS - 1 - level)
            starts, sizes = _runs(key_of_leaf)
            nodes.append(key_of_leaf[starts])
            self._live.append(sizes)
            self._node_of_leaf.append(np.repeat(np.arange(len(starts)), sizes))
        self._nodes: Final = tuple(nodes)
        for table in (*self._nodes, *self._live, *self._node_of_leaf):
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
            return Exclusions(len(excluded), ((nothing, nothing, nothing),) * LEVELS)
        key_n = np.concatenate(excluded)
        row_n = np.minimum(np.searchsorted(leaves, key_n), len(leaves) - 1)
        lives_n = leaves[row_n] == key_n
        # Sorted by request, then leaf: a node's excluded leaves stand together on every level.
        place_n = np.sort(request_n[lives_n] * len(leaves) + row_n[lives_n])
        request_n, row_n = np.divmod(place_n[_runs(place_n)[0]], len(leaves))
        gone: list[tuple[Keys, Keys, Keys]] = []
        for level in range(LEVELS):
            node_n = self._node_of_leaf[level][row_n]
            starts, sizes = _runs(request_n * len(self._nodes[level]) + node_n)
            emptied = starts[sizes == self._live[level][node_n[starts]]]
            parent, code = np.divmod(self._nodes[level][node_n[emptied]], self.codes)
            gone.append((request_n[emptied], parent, code))
        return Exclusions(len(excluded), tuple(gone))

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
        requests, width = prefix_BM.shape
        prefix_N = prefix_BM.reshape(-1)
        nodes = self._nodes[level]
        low_N, high_N = np.searchsorted(
            nodes, np.stack([prefix_N * self.codes, prefix_N * self.codes + self.codes])
        )
        size_N = high_N - low_N
        # Flat position of (prefix, code) for every live child: row * K + (child - prefix * K).
        origin_N = (np.arange(len(prefix_N)) - prefix_N) * self.codes
        child_n = np.arange(size_N.sum()) + np.repeat(low_N - (size_N.cumsum() - size_N), size_N)
        mask_flat = np.zeros(requests * width * self.codes, dtype=bool)
        mask_flat[nodes[child_n] + np.repeat(origin_N, size_N)] = True
        mask_BMK = mask_flat.reshape(requests, width, self.codes)
        if excluded is None:
            return mask_BMK
        located = excluded if isinstance(excluded, Exclusions) else self.locate(excluded)
        if located.requests != requests:
            raise ValueError(f"{located.requests} lists of excluded leaves for {requests} requests")
        request_n, parent_n, code_n = located.gone[level]
        hit, beam = np.nonzero(prefix_BM[request_n] == parent_n[:, None])
        mask_BMK[request_n[hit], beam, code_n[hit]] = False
        return mask_BMK

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


class ValidIds:
    """Items' stays in leaves over catalogue versions; one writer, one thread."""

    def __init__(self, codes: int) -> None:
        self.codes: Final = codes
        self.version = -1
        """Version of the last applied record; -1 before the first."""
        self.oldest = -1
        """Smallest version that is not pruned."""
        self._item: list[str] = []
        self._key = array("q")
        self._born = array("q")
        self._died = array("q")
        self._rows_of_item: dict[str, list[int]] = {}
        self._rows_of_key: dict[int, list[int]] = {}
        self._trees: OrderedDict[int, Tree] = OrderedDict()

    def upsert(self, version: int, item: str, sid: SemanticId) -> None:
        """Apply one upsert: the item has this semantic ID from `version` on.

        Versions must not decrease (a bulk load may share one). Raises `ValueError` on an older
        version or a code outside the codebook.
        """
        c1, c2, c3 = sid
        if not (0 <= c1 < self.codes and 0 <= c2 < self.codes and 0 <= c3 < self.codes):
            raise ValueError(f"item {item!r} has semantic ID {sid}, outside 0..{self.codes - 1}")
        self.advance(version)
        key = (c1 * self.codes + c2) * self.codes + c3
        row = self._live_row(item)
        if row is not None:
            if self._key[row] == key:
                return
            self._died[row] = version
        self._trees.pop(version, None)
        self._append(item, key, version, FOREVER)

    def delete(self, version: int, item: str) -> None:
        """Apply one tombstone; an item that does not live only advances the version."""
        self.advance(version)
        row = self._live_row(item)
        if row is not None:
            self._trees.pop(version, None)
            self._died[row] = version

    def advance(self, version: int) -> None:
        """Go on to a version whose record changes no leaf; raises `ValueError` on an older one."""
        if version < self.version:
            raise ValueError(f"catalogue version {version} comes after {self.version}")
        self.version = version

    def tree(self, version: int) -> Tree:
        """The tree valid at `version`; raises `UnknownVersionError`. The last few are kept."""
        self._check(version)
        tree = self._trees.get(version)
        if tree is None:
            born, died = np.array(self._born), np.array(self._died)
            alive = (born <= version) & (version < died)
            keys = np.sort(np.array(self._key)[alive])
            tree = Tree(self.codes, keys[_runs(keys)[0]])
            self._trees[version] = tree
            if len(self._trees) > KEPT_TREES:
                self._trees.popitem(last=False)
        self._trees.move_to_end(version)
        return tree

    def members(self, key: int, version: int) -> list[str]:
        """Items that live in the leaf at `version`, sorted by name; raises `UnknownVersionError`."""
        self._check(version)
        rows = self._rows_of_key.get(int(key), ())
        return sorted(self._item[row] for row in rows if self._alive(row, version))

    def key_of(self, item: str, version: int | None = None) -> int | None:
        """The item's leaf key at `version` (default: now), or None where it does not live."""
        if version is None:
            version = self.version
        self._check(version)
        for row in reversed(self._rows_of_item.get(item, ())):
            if self._alive(row, version):
                return self._key[row]
        return None

    def sid_of(self, item: str, version: int | None = None) -> SemanticId | None:
        """The item's semantic ID at `version` (default: now), or None where it does not live."""
        key = self.key_of(item, version)
        if key is None:
            return None
        upper, c3 = divmod(key, self.codes)
        return (*divmod(upper, self.codes), c3)

    def exhausted(self, items: Collection[str], version: int) -> Keys:
        """Leaf keys, ascending, of which *all* members live at `version` are among `items`.

        These are the leaves to exclude from a request that must not show `items`.
        """
        left: dict[int, int] = {}
        for item in set(items):
            key = self.key_of(item, version)
            if key is not None:
                left[key] = left.get(key, 0) + 1
        full = [
            key
            for key, count in left.items()
            if count == sum(self._alive(row, version) for row in self._rows_of_key[key])
        ]
        return np.array(sorted(full), dtype=np.int64)

    def prune(self, before_version: int) -> None:
        """Forget what can only be seen from versions below `before_version`."""
        self.oldest = max(self.oldest, min(before_version, self.version))
        kept = [row for row, died in enumerate(self._died) if died > self.oldest]
        stays = [
            (self._item[row], self._key[row], self._born[row], self._died[row]) for row in kept
        ]
        self._clear()
        for stay in stays:
            self._append(*stay)
        for version in [version for version in self._trees if version < self.oldest]:
            del self._trees[version]

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """The whole index as arrays, for a checkpoint."""
        names = [item.encode() for item in self._item]
        return {
            "valid_ids.span": np.array([self.codes, self.version, self.oldest], dtype=np.int64),
            "valid_ids.stays": np.array([self._key, self._born, self._died], dtype=np.int64),
            "valid_ids.names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "valid_ids.name_bytes": np.array([len(name) for name in names], dtype=np.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[Any]]) -> "ValidIds":
        """The inverse of `to_tensors`; other names are ignored, a missing one is a `KeyError`."""
        codes, version, oldest = (int(value) for value in tensors["valid_ids.span"])
        index = cls(codes)
        index.version, index.oldest = version, oldest
        names = tensors["valid_ids.names"].tobytes()
        ends = np.cumsum(tensors["valid_ids.name_bytes"]).tolist()
        for start, end, stay in zip(
            [0, *ends], ends, tensors["valid_ids.stays"].T.tolist(), strict=False
        ):
            index._append(names[start:end].decode(), *stay)
        return index

    def _check(self, version: int) -> None:
        if version < self.oldest:
            raise UnknownVersionError(
                f"catalogue version {version} is pruned, the oldest kept is {self.oldest}"
            )
        if version > self.version:
            raise UnknownVersionError(
                f"catalogue version {version} is not applied yet, the last is {self.version}"
            )

    def _alive(self, row: int, version: int) -> bool:
        return self._born[row] <= version < self._died[row]

    def _live_row(self, item: str) -> int | None:
        rows = self._rows_of_item.get(item)
        return rows[-1] if rows and self._died[rows[-1]] == FOREVER else None

    def _append(self, item: str, key: int, born: int, died: int) -> None:
        row = len(self._item)
        self._item.append(item)
        self._key.append(key)
        self._born.append(born)
        self._died.append(died)
        self._rows_of_item.setdefault(item, []).append(row)
        self._rows_of_key.setdefault(key, []).append(row)

    def _clear(self) -> None:
        self._item = []
        self._key, self._born, self._died = array("q"), array("q"), array("q")
        self._rows_of_item, self._rows_of_key = {}, {}

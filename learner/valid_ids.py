"""The index of valid semantic IDs: which leaves live at a catalogue version.

Notable choices
- A leaf is a semantic ID that at least one live item has. The index holds the *stays* of items in
  leaves, (item, key, born, died), and derives leaves from them: a leaf lives while one member does.
  A key that died and was born again is two stays, so the row alive at the version is taken.
- A catalogue version is the offset of the last applied catalogue record; a record takes effect at
  its own version: alive at v means born <= v < died.
- What lives at one version is a `Tree` (learner/valid_tree.py), which may be shared between threads.
  The last version's is made from the one before, at the cost of what changed; an earlier one's from
  all stays. The index itself has one writer and one thread.
"""

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from learner.valid_tree import Keys, Tree, sid_of
from streams.events import SemanticId

FOREVER: Final = np.iinfo(np.int64).max
"""`died` of what lives."""
KEPT_TREES: Final = 8
"""Trees kept for repeated questions about the same version."""


class UnknownVersionError(LookupError):
    """A catalogue version that is pruned, or not applied yet."""


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
        self._newborn: tuple[tuple[int, int], Tree] | None = None
        self._newest: Tree | None = None
        self._pending: dict[int, bool] = {}
        """Leaves touched since the newest tree, and whether they live."""

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
            self._die(row, version)
        self._append(item, key, version, FOREVER)
        self._changed(version, key, True)

    def delete(self, version: int, item: str) -> None:
        """Apply one tombstone; an item that does not live only advances the version."""
        self.advance(version)
        row = self._live_row(item)
        if row is not None:
            self._die(row, version)

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
            tree = self._present() if version == self.version else self._past(version)
            self._trees[version] = tree
            if len(self._trees) > KEPT_TREES:
                self._trees.popitem(last=False)
        self._trees.move_to_end(version)
        return tree

    def _present(self) -> Tree:
        """The tree of the last version: the one before, with what has changed since."""
        if self._newest is None:
            self._newest = self._past(self.version)
        elif self._pending:
            key_n = np.fromiter(self._pending.keys(), np.int64, len(self._pending))
            lives_n = np.fromiter(self._pending.values(), np.bool_, len(self._pending))
            self._newest = self._newest.changed(key_n[lives_n], key_n[~lives_n])
        self._pending.clear()
        return self._newest

    def _past(self, version: int) -> Tree:
        """The tree of any version, from all stays."""
        born, died = np.array(self._born), np.array(self._died)
        alive = (born <= version) & (version < died)
        return Tree(self.codes, np.unique(np.array(self._key)[alive]))

    def newborn(self, version: int, span: int) -> Tree:
        """The leaves with a member alive at `version` that came with one of the last `span`
        versions; raises `UnknownVersionError`. The latest answer is kept."""
        self._check(version)
        asked = (version, span)
        if self._newborn is None or self._newborn[0] != asked:
            first = bisect_right(
                self._born, version - span
            )  # stays stand in the order of their birth
            born, died = np.array(self._born[first:]), np.array(self._died[first:])
            alive = (born <= version) & (version < died)
            keys = np.unique(np.array(self._key[first:])[alive])
            self._newborn = asked, Tree(self.codes, keys)
        return self._newborn[1]

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
        return None if key is None else sid_of(key, self.codes)

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

    def _die(self, row: int, version: int) -> None:
        self._died[row] = version
        key = self._key[row]
        lives = any(self._died[other] == FOREVER for other in self._rows_of_key[key])
        self._changed(version, key, lives)

    def _changed(self, version: int, key: int, lives: bool) -> None:
        """A record touched this leaf, of a version about which something may have been asked before."""
        self._trees.pop(version, None)
        self._newborn = None
        self._pending[key] = lives

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

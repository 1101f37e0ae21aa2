"""The index of valid semantic IDs: which leaves live at a catalogue version.

Notable choices
- A leaf is a semantic ID that at least one live item has. The index holds the *stays* of items in
  leaves, (item, key, born, died), and derives leaves from them: a leaf lives while one member does.
  A key that died and was born again is two stays, so the row alive at the version is taken.
- A catalogue version is the offset of the last applied catalogue record; a record takes effect at
  its own version: alive at v means born <= v < died.
- `prune` costs what it forgets: the rows of forgotten stays are taken by later births. So there are never more rows
  than items lived and stays ended since the oldest version kept, at the worst moment (docs/catalogue.md).
- What lives at one version is a `Tree` (learner/valid_tree.py), which may be shared between threads.
  The last version's is made from the one before, at the cost of what changed; an earlier one's from
  all stays. The index itself has one writer and one thread.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Collection
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from learner.valid_tree import Keys, Tree, sid_of
from streams.events import SemanticId

FOREVER: Final = np.iinfo(np.int64).max
"""`died` of what lives."""
FORGOTTEN: Final = -2
"""`died` of a row that is free."""
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
        self._dead: deque[int] = deque()
        """Rows of stays that have ended, in the order of their ends."""
        self._free: list[int] = []
        """Rows of stays that are forgotten; the next births take them."""
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
        alive = (_view(self._born) <= version) & (version < _view(self._died))
        return Tree(self.codes, np.unique(_view(self._key)[alive]))

    def newborn(self, version: int, span: int) -> Tree:
        """The leaves with a member alive at `version` that came with one of the last `span`
        versions; raises `UnknownVersionError`. The latest answer is kept."""
        self._check(version)
        asked = (version, span)
        if self._newborn is None or self._newborn[0] != asked:
            recent = np.flatnonzero(_view(self._born) > version - span)
            born, died = _view(self._born)[recent], _view(self._died)[recent]
            alive = (born <= version) & (version < died)
            keys = np.unique(_view(self._key)[recent][alive])
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

    def left_since(self, item: str, version: int) -> bool:
        """Whether the item lived at `version` and has left its leaf since; raises `UnknownVersionError`."""
        self._check(version)
        rows = self._rows_of_item.get(item, ())
        return any(self._alive(row, version) and self._died[row] != FOREVER for row in rows)

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
        while self._dead and self._died[self._dead[0]] <= self.oldest:
            self._forget(self._dead.popleft())
        for version in [version for version in self._trees if version < self.oldest]:
            del self._trees[version]

    def to_tensors(self) -> dict[str, NDArray[Any]]:
        """The whole index as arrays, for a checkpoint."""
        kept = [row for row, died in enumerate(self._died) if died != FORGOTTEN]
        names = [self._item[row].encode() for row in kept]
        stays = np.array([self._key, self._born, self._died], dtype=np.int64)[:, kept]
        return {
            "valid_ids.span": np.array([self.codes, self.version, self.oldest], dtype=np.int64),
            "valid_ids.stays": stays,
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
        index._dead = deque(sorted(index._dead, key=index._died.__getitem__))
        return index

    @property
    def rows(self) -> int:
        """Items that live, and stays that ended and are not forgotten."""
        return len(self._item) - len(self._free)

    def _die(self, row: int, version: int) -> None:
        self._died[row] = version
        self._dead.append(row)
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
        if self._free:
            row = self._free.pop()
            self._item[row] = item
            self._key[row], self._born[row], self._died[row] = key, born, died
        else:
            row = len(self._item)
            self._item.append(item)
            self._key.append(key)
            self._born.append(born)
            self._died.append(died)
        self._rows_of_item.setdefault(item, []).append(row)
        self._rows_of_key.setdefault(key, []).append(row)
        if died != FOREVER:
            self._dead.append(row)

    def _forget(self, row: int) -> None:
        """Free the row of a stay that nobody can ask about any more: it lives at no version."""
        item, key = self._item[row], self._key[row]
        of_item, of_key = self._rows_of_item[item], self._rows_of_key[key]
        of_item.remove(row)
        of_key.remove(row)
        if not of_item:
            del self._rows_of_item[item]
        if not of_key:
            del self._rows_of_key[key]
        self._item[row], self._born[row], self._died[row] = "", FOREVER, FORGOTTEN
        self._free.append(row)


def _view(column: "array[int]") -> NDArray[np.int64]:
    """A column without a copy; to be let go before the column grows."""
    return np.frombuffer(column, dtype=np.int64) if column else np.empty(0, dtype=np.int64)

"""Where the leaves of trees are kept: buckets in append-only arrays, shared by the trees of successive versions.

Notable choices
- A bucket is everything below one code of the first level: its leaves, ascending, and the second-level nodes above
  them. A change of the catalogue writes the buckets that it touches anew, at the end; the buckets of older trees stay
  where they are, so that a tree never changes under its reader and a new one costs a bucket and a small table.
- Rows are places in these arrays, so they mean the same in every tree that shares them.
- When an array is full it is copied into one half as large again; readers may go on in the old one.
"""

from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from learner.sorted_keys import Keys, run_starts

Places = NDArray[np.int32]

_T = TypeVar("_T", np.int64, np.int32)

SPARE: Final = 1.5
"""Room of an array over what it must hold, when it has become too small."""


class Buckets(NamedTuple):
    """A tree's table of buckets, by ascending code of the first level."""

    code_T: Keys
    node_T: Keys
    """Where the bucket's second-level nodes begin."""
    nodes_T: Keys
    """How many they are."""
    leaf_T: Keys
    """Where its leaves begin."""
    leaves_T: Keys
    """How many they are."""

    def replaced(self, own: Keys, block: "Buckets") -> "Buckets":
        """The table with these rows, ascending, replaced by those of `block`; codes may come and go."""
        if np.array_equal(self.code_T[own], block.code_T):
            parts = tuple(part.copy() for part in self)
            for part, new in zip(parts, block, strict=True):
                part[own] = new
            return Buckets(*parts)
        kept = Buckets(*(np.delete(part, own) for part in self))
        at = np.searchsorted(kept.code_T, block.code_T)
        return Buckets(*(np.insert(part, at, new) for part, new in zip(kept, block, strict=True)))


class Arena:
    """Leaves and second-level nodes; one writer."""

    def __init__(self, room: int) -> None:
        """`room` is for so many leaves, and takes no memory before they come."""
        self.leaf_key = np.empty(room, dtype=np.int64)
        self.node_key = np.empty(room, dtype=np.int64)
        self.node_leaf: Places = np.empty(room, dtype=np.int32)
        """Where a node's leaves begin."""
        self.node_leaves: Places = np.empty(room, dtype=np.int32)
        """How many they are."""
        self.leaves = self.nodes = 0
        """How much is used."""

    @property
    def nbytes(self) -> int:
        """Memory of what is used."""
        nodes = (self.node_key, self.node_leaf, self.node_leaves)
        return self.leaves * self.leaf_key.itemsize + self.nodes * sum(of.itemsize for of in nodes)

    def add(self, keys: Keys, codes: int) -> Buckets:
        """Write whole buckets: the sorted keys of all their leaves. Returns their table."""
        upper = keys // codes
        starts = run_starts(upper)
        node_key = upper[starts]
        top = node_key // codes
        top_starts = run_starts(top)
        leaf_0, node_0 = self.leaves, self.nodes
        self._room(len(keys), len(starts))
        self.leaf_key[leaf_0 : self.leaves] = keys
        self.node_key[node_0 : self.nodes] = node_key
        self.node_leaf[node_0 : self.nodes] = starts + leaf_0
        self.node_leaves[node_0 : self.nodes] = np.diff(starts, append=len(keys))
        leaf_T = starts[top_starts]
        return Buckets(
            top[top_starts],
            top_starts + node_0,
            np.diff(top_starts, append=len(node_key)),
            leaf_T + leaf_0,
            np.diff(leaf_T, append=len(keys)),
        )

    def _room(self, leaves: int, nodes: int) -> None:
        """Make the arrays as long as they must be, and count what will be used."""
        self.leaves += leaves
        self.nodes += nodes
        if self.leaves > len(self.leaf_key):
            self.leaf_key = _longer(self.leaf_key, self.leaves)
        if self.nodes > len(self.node_key):
            # All three first, and only then in their places: a reader takes one after the other.
            key, leaf, leaves_of = (
                _longer(self.node_key, self.nodes),
                _longer(self.node_leaf, self.nodes),
                _longer(self.node_leaves, self.nodes),
            )
            self.node_key, self.node_leaf, self.node_leaves = key, leaf, leaves_of


def _longer(array: NDArray[_T], length: int) -> NDArray[_T]:
    copy = np.empty(int(length * SPARE), dtype=array.dtype)
    copy[: len(array)] = array
    return copy

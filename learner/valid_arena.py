"""Where the leaves of trees are kept: buckets in append-only arrays, shared by the trees of successive versions.

Notable choices
- A bucket is everything below one code of the first level: its leaves, ascending, and the second-level nodes above
  them. A change of the catalogue writes the buckets that it touches anew, at the end; the buckets of older trees stay
  where they are, so that a tree never changes under its reader and a new one costs a bucket and a small table.
- Rows are places in these arrays, so they mean the same in every tree that shares them.
- An arena does not grow: who finds it full writes the tree into another, once, and readers may go on in this one.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.sorted_keys import Keys, run_starts

Places = NDArray[np.int32]


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
        self.room: Final = room
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
        """Write whole buckets: the sorted keys of all their leaves, for which there is room. Returns their table."""
        upper = keys // codes
        starts = run_starts(upper)
        node_key = upper[starts]
        top = node_key // codes
        top_starts = run_starts(top)
        leaf_0, node_0 = self.leaves, self.nodes
        self.leaves += len(keys)
        self.nodes += len(starts)
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

"""Sorted arrays of keys: runs, ranges, merging and searching, without Python for each key.

Shapes: n keys, N ranges of them.
"""

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]


def none() -> Keys:
    """No keys."""
    return np.empty(0, dtype=np.int64)


def run_starts(values_n: Keys) -> NDArray[np.intp]:
    """Where runs of equal values start."""
    if not len(values_n):
        return np.empty(0, dtype=np.intp)
    return np.flatnonzero(np.concatenate([[True], values_n[1:] != values_n[:-1]]))


def ranges(low_N: Keys, size_N: Keys) -> Keys:
    """The numbers of all ranges [low, low + size), one range after the other."""
    before_N = size_N.cumsum() - size_N
    return np.arange(int(size_N.sum())) + np.repeat(low_N - before_N, size_N)


def merged(own: Keys, added: Keys, removed: Keys) -> Keys:
    """Sorted keys with others added and removed."""
    if len(own) and len(removed):
        at = np.minimum(np.searchsorted(own, removed), len(own) - 1)
        kept = np.ones(len(own), dtype=bool)
        kept[at[own[at] == removed]] = False
        own = own[kept]
    added = np.sort(added)
    if not len(own):
        return added
    at = np.searchsorted(own, added)
    fresh = own[np.minimum(at, len(own) - 1)] != added
    return np.insert(own, at[fresh], added[fresh])


def find(values: Keys, low_n: Keys, size_n: Keys, wanted_n: Keys) -> Keys:
    """Where each wanted value stands in its own sorted slice [low, low + size) of `values`; -1 where not."""
    end_n = low_n + size_n
    at_n, until_n = low_n, end_n
    last = len(values) - 1
    for _ in range(int(size_n.max(initial=0)).bit_length()):
        middle_n = (at_n + until_n) >> 1
        less_n = (at_n < until_n) & (values[np.minimum(middle_n, last)] < wanted_n)
        at_n, until_n = np.where(less_n, middle_n + 1, at_n), np.where(less_n, until_n, middle_n)
    found_n = (at_n < end_n) & (values[np.minimum(at_n, last)] == wanted_n)
    return np.where(found_n, at_n, -1)

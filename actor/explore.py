"""Reserved slots: leaves that are shown so that they become known, by a law of their own.

Notable choices (contract of the policy, "Probabilities on an exposure")
- They stand after the policy's own slots and mix with none of them, whose log-probabilities stay the policy's. In
  learning their pi_old is the policy's own probability, as with everything that another law has shown.
- Each is a draw without replacement: with probability `explore_new` uniform over the new leaves that are left,
  otherwise, and where no new one is left, uniform over all that are left. So a new item has a floor, whatever the
  policy thinks of it.
- A leaf is new while a member of it came with one of the last `explore_span` versions of the catalogue. The law
  depends on the request, the catalogue version and the settings alone: anybody can compute it again.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actor.settings import ActorSettings
from learner.valid_tree import Keys, Tree


@dataclass(frozen=True)
class Exploration:
    """What `actor.explore_*` say."""

    slots: int = 0
    new: float = 0.5
    span: int = 1_000

    @classmethod
    def of(cls, settings: ActorSettings) -> "Exploration":
        """That of an actor."""
        return cls(settings.explore_slots, settings.explore_new, settings.explore_span)


def alike(tree: Tree, taken: Keys, slots: int, rng: np.random.Generator) -> list[tuple[int, float]]:
    """Leaves drawn without replacement, every one alike, and their log-probabilities; fewer where not so many are
    left. As a `Pool` in which all are new would, but all slots at once: it is asked when there is no time."""
    ranks = np.unique(tree.ranks_of(taken))
    gone = ranks[ranks >= 0]
    left = len(tree) - len(gone)
    drawn = rng.choice(left, min(slots, left), replace=False)
    ranks = drawn + np.searchsorted(gone - np.arange(len(gone)), drawn, side="right")
    return [
        (tree.key_at(rank), -float(np.log(left - slot))) for slot, rank in enumerate(ranks.tolist())
    ]


class _Uniform:
    """A tree's leaves of which some are gone; draws among the others, at the cost of those that are gone."""

    def __init__(self, tree: Tree, gone: Keys) -> None:
        self._tree = tree
        ranks = np.unique(tree.ranks_of(gone))
        self._gone: list[int] = ranks[ranks >= 0].tolist()

    @property
    def left(self) -> int:
        return len(self._tree) - len(self._gone)

    def draw(self, rng: np.random.Generator) -> int:
        rank = int(rng.integers(self.left))
        for gone in self._gone:
            if gone > rank:
                break
            rank += 1
        return self._tree.key_at(rank)

    def rank_of(self, key: int) -> int:
        """The leaf's rank, or -1 where it is not among those left."""
        rank = int(self._tree.ranks_of(np.array([key]))[0])
        at = bisect_left(self._gone, rank)
        return -1 if at < len(self._gone) and self._gone[at] == rank else rank

    def take(self, key: int) -> None:
        rank = self.rank_of(key)
        if rank >= 0:
            insort(self._gone, rank)


class Pool:
    """What the reserved slots of one request are drawn from."""

    def __init__(self, live: Tree, new: Tree, taken: Keys, share: float) -> None:
        """`new` holds leaves of `live`; `taken` are keys of any that must not be shown."""
        self._live = _Uniform(live, taken)
        self._new = _Uniform(new, taken)
        self._share = share

    @property
    def left(self) -> int:
        """Leaves that can still be shown."""
        return self._live.left

    def logp(self, key: int) -> float:
        """Log-probability that the next slot shows this leaf; -inf where it cannot."""
        if self._live.rank_of(key) < 0:
            return -np.inf
        share = self._share if self._new.left else 0.0
        p = (1.0 - share) / self._live.left
        if self._new.rank_of(key) >= 0:
            p += share / self._new.left
        return float(np.log(p))

    def draw(self, slots: int, rng: np.random.Generator) -> Iterator[tuple[int, float]]:
        """The next slots' leaves and their log-probabilities; fewer where not so many are left."""
        for _ in range(min(slots, self._live.left)):
            of_new = self._new.left and rng.random() < self._share
            key = (self._new if of_new else self._live).draw(rng)
            yield key, self.logp(key)
            self.take(key)

    def take(self, key: int) -> None:
        """This leaf has been shown."""
        self._live.take(key)
        self._new.take(key)

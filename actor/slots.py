"""The slots of a slate as they are filled: leaves are looked at in the order of their draw, and shown or skipped.

Notable choices (contract of the policy, "The valid tree")
- A cap depends on earlier slots, so it cannot prune the tree. What it forbids is drawn all the same, skipped and
  logged: every slot's law is that of the draw given all that was drawn before, shown or not, and no log-probability
  changes.
- An item deleted since its request was prepared is skipped and logged, too.
- Under a cap more is drawn than asked for (`spare_of`). Where even that does not do, the slate is shorter.
- A full slate looks on past what it would have skipped. The score after that is the one to beat: an item would not
  have been shown with a score below it or, where one of its author's was skipped, below the first such. These
  thresholds do not depend on the item's own noise, so inclusion weights formed with them are unbiased.
- The author is that of the request's catalogue version: who reads the exposure knows it, too.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
from msgspec.structs import asdict

from actor.sampling import last_hop
from learner.catalogue import Catalogue
from learner.valid_tree import sid_of
from streams.events import LogpLevels, ShownItem, SkippedItem, Source

AUTHOR: Final = "author"
"""Skipped: the slate shows as many items of its author as it may."""
DELETED: Final = "deleted"
"""Skipped: it was deleted since the request was prepared."""
LEAST_SPARE: Final = 8


def spare_of(slots: int, asked: int, cap: int) -> int:
    """How many leaves are drawn beyond `slots` of a slate of `asked`, since a cap may skip some: as many again."""
    return max(slots, LEAST_SPARE) if 0 < cap < asked else 0


class Leaf(NamedTuple):
    """A drawn leaf."""

    key: int
    logp: float
    """Log of its law in its place of the draw."""
    levels: LogpLevels | None = None
    score: float | None = None


class Slots:
    """A slate in the making."""

    def __init__(
        self,
        catalogue: Catalogue,
        version: int,
        avoided: frozenset[str],
        cap: int,
        rng: np.random.Generator,
    ) -> None:
        """`version` of the catalogue is the request's; `avoided` members of a leaf are not chosen; `cap` is the most
        of one author, 0 any number."""
        self.items: Final[list[ShownItem]] = []
        self.skipped: Final[list[SkippedItem]] = []
        self._catalogue = catalogue
        self._version = version
        self._avoided = avoided
        self._cap = cap
        self._rng = rng
        self._shown_of: Counter[str] = Counter()

    def fill(self, source: Source, slots: int, leaves: Iterable[Leaf]) -> int:
        """Show items of so many of these leaves, in their order; returns how many were looked at."""
        full, looked = len(self.items) + slots, 0
        for leaf in leaves:
            members = self._catalogue.valid.members(leaf.key, self._version)
            item, logp_hop = last_hop(
                members, lambda member: member not in self._avoided, self._rng
            )
            author = self._catalogue.author(item, self._version)
            reason = self._reason(item, author)
            if len(self.items) == full and not reason:
                break
            looked += 1
            entry = self._catalogue.items.get(item)
            slot = ShownItem(
                item=item,
                sid=sid_of(leaf.key, self._catalogue.valid.codes),
                position=len(self.items),
                duration_ms=0 if entry is None else entry.duration_ms,
                source=source,
                logp_levels=leaf.levels,
                logp_decision=leaf.logp + logp_hop,
                score=leaf.score,
            )
            if reason:
                self.skipped.append(SkippedItem(**asdict(slot), reason=reason))
            else:
                self.items.append(slot)
                self._shown_of[author] += 1
            if len(self.items) == full and leaf.score is None:
                break
        return looked

    def _reason(self, item: str, author: str) -> str:
        """Why this item is skipped; empty where it is not."""
        if item not in self._catalogue.items:
            return DELETED
        if self._cap and author and self._shown_of[author] >= self._cap:
            return AUTHOR
        return ""

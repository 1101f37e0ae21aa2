"""The catalogue as a fold over its topic: items, their semantic IDs, and the index of valid IDs.

Catalogue version = offset of the last record applied, so learner, actor and audit that have read as far agree.
A tombstone counts also where its item is not known: who reads the log after its compaction meets only that.
An item's author is known for every version not pruned, as its leaf is: a slate's caps are those of its version.
"""

from collections import deque

from learner.valid_ids import ValidIds
from streams.events import UnreadableError, Upsert, decode, upsert_decoder


class CatalogueError(ValueError):
    """An entry that this policy cannot use, by name."""


class Catalogue:
    """Items alive now, and the valid IDs of every version not yet pruned."""

    def __init__(self, codes: int) -> None:
        self.valid = ValidIds(codes)
        self.items: dict[str, Upsert] = {}
        self.version = -1
        self.codebook = ""
        self._authors: dict[str, list[tuple[int, str]]] = {}
        """Of items that were deleted or changed hands: until which version, whose; ascending."""
        self._ended: deque[tuple[int, str]] = deque()

    def author(self, item: str, version: int) -> str:
        """Whose the item was at `version`, where it lived then and that is not pruned; empty: nobody's."""
        for until, author in self._authors.get(item, ()):
            if version < until:
                return author
        entry = self.items.get(item)
        return entry.author if entry is not None else ""

    def prune(self, before_version: int) -> None:
        """Forget what can only be seen from versions below `before_version`."""
        self.valid.prune(before_version)
        while self._ended and self._ended[0][0] <= self.valid.oldest:
            _, item = self._ended.popleft()
            ends = self._authors[item]
            del ends[0]
            if not ends:
                del self._authors[item]

    def take(self, offset: int, key: bytes | None, value: bytes | None) -> None:
        """Apply one record in the order of the log; raises `CatalogueError` and skips what is unusable."""
        item = (key or b"").decode(errors="replace")
        if value is None:
            self._ends(offset, self.items.pop(item, None))
            self.valid.delete(offset, item)
            self.version = offset
            return
        try:
            upsert = decode(upsert_decoder, value)
        except UnreadableError as error:
            raise CatalogueError(f"catalogue offset {offset}, item {item!r}: {error}") from None
        if not item or upsert.item != item:
            raise CatalogueError(f"catalogue offset {offset}: key {item!r}, item {upsert.item!r}")
        if not all(0 <= code < self.valid.codes for code in upsert.sid):
            raise CatalogueError(
                f"catalogue offset {offset}, item {item!r}: semantic ID {upsert.sid}, "
                f"codes allowed 0..{self.valid.codes - 1}"
            )
        if not 0 <= upsert.duration_ms < 1 << 32:
            raise CatalogueError(
                f"catalogue offset {offset}, item {item!r}: duration_ms {upsert.duration_ms}, "
                f"allowed 0..2^32-1"
            )
        if self.codebook and upsert.codebook != self.codebook:
            raise CatalogueError(
                f"catalogue offset {offset}, item {item!r}: codebook {upsert.codebook}, "
                f"this lineage uses {self.codebook}"
            )
        self.codebook = upsert.codebook
        before = self.items.get(item)
        if before is not None and before.author != upsert.author:
            self._ends(offset, before)
        upsert.embedding = b""  # the tokeniser's affair; thousands of them would only fill memory
        self.items[item] = upsert
        self.valid.upsert(offset, item, upsert.sid)
        self.version = offset

    def _ends(self, offset: int, entry: Upsert | None) -> None:
        """From here on the item is not that author's."""
        if entry is not None:
            self._authors.setdefault(entry.item, []).append((offset, entry.author))
            self._ended.append((offset, entry.item))

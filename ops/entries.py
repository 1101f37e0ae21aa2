"""Lines of JSON become catalogue entries, or faults that name the line, the field, and what would be right. Pure.

Notable choices
- A line gives an embedding, which the lineage's codebooks turn into a semantic ID; or the ID itself; or neither,
  where the item is in the catalogue: then it keeps the one it has, and only what is said of it changes.
- An embedding is taken as the float32 that the entry keeps, so that anybody who reads it gets the same ID.
- Embeddings are assigned together: one at a time would cost a pass over the codebooks each.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
import numpy as np

from learner.semantic_ids import Codebooks
from streams.events import SemanticId, Upsert, encode
from streams.topics import MAX_MESSAGE_BYTES

FAULTS_KEPT: Final = 20
"""Faults told one by one; the rest are counted."""
ROOM: Final = 1000
"""Bytes of a message beside the entry itself."""


class Line(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a file of entries."""

    item: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    duration_ms: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
    author: str = ""
    tags: list[str] = []
    embedding: list[float] | None = None
    sid: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Lineage:
    """What gives semantic IDs their meaning."""

    codebook: str
    codes: int
    codebooks: Codebooks | None
    """None where they are not at hand."""


@dataclass
class Entries:
    """Takes lines in pieces; holds the faults, and no entry longer than its piece."""

    lineage: Lineage
    present: Callable[[str], Upsert | None]
    """The catalogue's entry of an item, with its embedding."""
    faults: list[str] = field(default_factory=list)
    faulty: int = 0
    """All faults, also those that are not told."""
    lines: int = 0
    """Entries read, good or not."""
    _line_of: dict[str, int] = field(default_factory=dict)

    def take(self, numbered: Iterable[tuple[int, bytes]]) -> list[tuple[str, bytes]]:
        """Item and record of each good line of a piece, in order."""
        read = [(number, line) for number, text in numbered if (line := self._read(number, text))]
        sids = self._assigned(read)
        entries = []
        for (number, line), sid in zip(read, sids, strict=True):
            entry = self._entry(number, line, sid)
            if entry is None:
                continue
            value = encode(entry)
            if len(value) > MAX_MESSAGE_BYTES - ROOM:
                most = (
                    f"at most {MAX_MESSAGE_BYTES - ROOM:,} are allowed: shorten tags or embedding"
                )
                self._fault(number, "", f"the entry has {len(value):,} bytes, {most}")
            else:
                entries.append((line.item, value))
        return entries

    def _read(self, number: int, text: bytes) -> Line | None:
        """A line as far as it can be judged alone."""
        if not text.strip():
            return None
        self.lines += 1
        try:
            line = _decoder.decode(text)
        except msgspec.ValidationError as error:
            self._fault(number, *_named(str(error)))
            return None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            says = f"not JSON: {error}; a line is an object such as {EXAMPLE}"
            self._fault(number, "", says)
            return None
        first = self._line_of.setdefault(line.item, number)
        if first != number:
            self._fault(number, "item", f"{line.item!r} stands in line {first} already; keep one")
            return None
        if line.embedding is not None and line.sid is not None:
            self._fault(number, "sid", "give `embedding` or `sid`, not both")
            return None
        return line

    def _assigned(self, read: list[tuple[int, Line]]) -> list[SemanticId | None]:
        """The ID of each line whose embedding the codebooks can read."""
        sids: list[SemanticId | None] = [None] * len(read)
        books, places, rows = self.lineage.codebooks, [], []
        for place, (number, line) in enumerate(read):
            if line.embedding is None:
                continue
            fault = _misfit(line.embedding, books)
            if fault:
                self._fault(number, "embedding", fault)
            else:
                places.append(place)
                rows.append(np.asarray(line.embedding, np.float32))
        if books is not None and rows:
            for place, sid in zip(places, books.assign(np.stack(rows)).tolist(), strict=True):
                sids[place] = (sid[0], sid[1], sid[2])
        return sids

    def _entry(self, number: int, line: Line, sid: SemanticId | None) -> Upsert | None:
        packed = b""
        if line.embedding is not None:
            if sid is None:
                return None  # its fault is told
            packed = np.asarray(line.embedding, "<f4").tobytes()
        elif line.sid is not None:
            sid, codes = line.sid, self.lineage.codes
            if not all(0 <= code < codes for code in sid):
                self._fault(number, "sid", f"{list(sid)}, codes allowed are 0..{codes - 1}")
                return None
        else:
            before = self.present(line.item)
            if before is None:
                new = f"{line.item!r} is not in the catalogue yet: give `embedding` or `sid`"
                self._fault(number, "embedding", new)
                return None
            sid, packed = before.sid, before.embedding
        return Upsert(
            item=line.item,
            sid=sid,
            codebook=self.lineage.codebook,
            duration_ms=line.duration_ms,
            author=line.author,
            tags=line.tags,
            embedding=packed,
        )

    def _fault(self, number: int, name: str, says: str) -> None:
        self.faulty += 1
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(f"line {number}{f', {name}' if name else ''}: {says}")


EXAMPLE: Final = '{"item": "a", "duration_ms": 30000, "embedding": [0.5, -1.25]}'

_decoder: Final = msgspec.json.Decoder(Line)
_FIELD: Final = re.compile(r"(?:missing required|contains unknown) field `([^`]+)`")


def _named(message: str) -> tuple[str, str]:
    """The field that a message of msgspec is about, and what it says of it."""
    says, _, path = message.partition(" - at `$")
    named = _FIELD.search(says)
    name = named[1] if named else path.strip("`.")
    if named and "unknown" in says:
        says = f"there is no such field; there are: {', '.join(Line.__struct_fields__)}"
    elif named:
        says = f"it is missing; a line is an object such as {EXAMPLE}"
    return name, says


def _misfit(embedding: list[float], books: Codebooks | None) -> str:
    """Why the codebooks cannot read an embedding; empty where they can."""
    if books is None:
        return (
            "the lineage's codebooks are not at hand: name a checkpoint or a start with --codebooks, "
            "or give `sid`"
        )
    if len(embedding) != books.width:
        return f"it has {len(embedding)} numbers, the codebooks read {books.width}"
    if not (np.abs(embedding) <= np.finfo(np.float32).max).all():
        return "it holds a number that is not finite in 32 bits"
    return ""

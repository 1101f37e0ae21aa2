"""`dwell catalogue list` and `show`: what can be recommended, as the log says, and how far the actors have come."""

import time
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime

from rich.console import Console
from rich.table import Table

from learner.catalogue import Catalogue, CatalogueError
from ops.config import Config
from ops.errors import UserError
from ops.present import Heard, following
from streams.clients import records
from streams.events import Upsert, decode, upsert_decoder
from streams.topics import CATALOGUE


@dataclass(frozen=True)
class Written:
    """An item's last record on the log."""

    offset: int
    time_ms: int
    value: bytes | None
    """None where it deletes the item."""


@dataclass
class Standing:
    """The core: the catalogue as its log says, and where each item's last record stands."""

    catalogue: Catalogue
    last: dict[str, Written] = field(default_factory=dict)
    unusable: int = 0
    """Records that every process passes over."""

    def take(self, offset: int, time_ms: int, key: bytes | None, value: bytes | None) -> None:
        """One record, in the order of the log."""
        try:
            self.catalogue.take(offset, key, value)
        except CatalogueError:
            self.unusable += 1
            return
        self.last[(key or b"").decode(errors="replace")] = Written(offset, time_ms, value)

    def entry(self, item: str) -> Upsert | None:
        """The entry of an item that can be recommended, with its embedding."""
        written = self.last.get(item)
        if written is None or written.value is None:
            return None
        return decode(upsert_decoder, written.value)

    def sharers(self, item: str) -> list[str]:
        """The items that have this one's semantic ID, itself among them."""
        valid = self.catalogue.valid
        key = valid.key_of(item)
        return [] if key is None else valid.members(key, valid.version)


def standing(config: Config) -> Standing:
    """Read the catalogue's log."""
    here = Standing(Catalogue(config.policy.codes))
    with closing(records(config.kafka.bootstrap, CATALOGUE)) as log:
        for record in log:
            here.take(record.offset, record.timestamp, record.key, record.value)
    return here


def show_all(config: Config, most: int) -> int:
    """Print the newest `most` items, what the catalogue is, and how far actors have come; exit status 0."""
    console = Console()
    with console.status("reading the catalogue"):
        here = standing(config)
    catalogue = here.catalogue
    live = [(item, written) for item, written in here.last.items() if written.value is not None]
    table = Table("item", "semantic ID", "shared by", "s", "author", "tags", "version", "written")
    for item, written in sorted(live, key=lambda one: one[1].offset)[-most:]:
        entry = catalogue.items[item]
        table.add_row(
            item,
            _sid(entry),
            str(len(here.sharers(item))),
            f"{entry.duration_ms / 1000:.1f}",
            entry.author,
            ", ".join(entry.tags),
            str(written.offset),
            _time(written.time_ms),
        )
    console.print(table)
    leaves = len(catalogue.valid.tree(catalogue.version)) if live else 0
    told = f"{len(live)} items, {leaves} semantic IDs, version {catalogue.version}"
    console.print(told + (f", codebook {catalogue.codebook}" if catalogue.codebook else ""))
    if here.unusable:
        console.print(f"{here.unusable} records that cannot be used are passed over")
    for one in _live(config):
        console.print(f"{one.actor} has applied version {one.version}", markup=False)
    return 0


def show_one(config: Config, item: str) -> int:
    """Print an item; exit status 0. Raises `UserError` where there was never one of this name."""
    console = Console()
    with console.status("reading the catalogue"):
        here = standing(config)
    written = here.last.get(item)
    if written is None:
        raise UserError(unknown([item]))
    entry = here.entry(item)
    if entry is None:
        when = f"version {written.offset}, {_time(written.time_ms)}"
        console.print(f"{item} was deleted: {when}", markup=False)
        return 0
    others = [other for other in here.sharers(item) if other != item]
    table = Table("field", "value")
    said = {
        "semantic ID": _sid(entry),
        "shared with": ", ".join(others) or "none",
        "codebook": entry.codebook,
        "duration": f"{entry.duration_ms / 1000:.3f} s",
        "author": entry.author,
        "tags": ", ".join(entry.tags),
        "embedding": f"{len(entry.embedding) // 4} numbers",
        "version": str(written.offset),
        "written": _time(written.time_ms),
    }
    for name, value in said.items():
        table.add_row(name, value)
    console.print(table)
    return 0


def _live(config: Config) -> list[Heard]:
    with following(config.kafka.bootstrap, 60.0) as signs:
        return signs.roll.live(time.time())


def unknown(items: list[str]) -> str:
    """That the catalogue has never had these items."""
    named = ", ".join(repr(item) for item in items[:10])
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return f"{named}{more} is not in the catalogue; `dwell catalogue list` shows what is."


def _sid(entry: Upsert) -> str:
    return " ".join(str(code) for code in entry.sid)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000).isoformat(" ", "seconds")

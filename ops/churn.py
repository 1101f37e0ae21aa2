"""A catalogue that moves: items leave it and come back, at a steady rate.

Notable choices
- At most a tenth of the items is away at a time; which one goes or returns next is chosen by the seed alone.
- What came before is read from the log: items that were away when a run ended may return in the next.
- A returning item has its own semantic ID again, so its leaf is reborn: the hardest case of the index of valid IDs.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import numpy as np

from ops.errors import UserError
from ops.settings import SimulateSettings
from streams.clients import producer, records
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE

AWAY: Final = 0.1
"""Largest share of the items that is away."""


class Churn:
    """Which item leaves or returns next."""

    def __init__(self, entries: dict[str, bytes], away: set[str], seed: int) -> None:
        """`entries` holds the catalogue record of every item, of those `away`, too."""
        self._entries = entries
        self._away = sorted(away)
        self._there = sorted(entries.keys() - away)
        self._rng = np.random.default_rng(seed)

    def next(self) -> tuple[str, bytes | None]:
        """An item and its new record; None deletes it."""
        full = len(self._away) >= AWAY * len(self._entries)
        back = bool(self._away) and (full or bool(self._rng.random() < 0.5))
        source, target = (self._away, self._there) if back else (self._there, self._away)
        at = int(self._rng.integers(len(source)))
        source[at], source[-1] = source[-1], source[at]
        item = source.pop()
        target.append(item)
        return item, self._entries[item] if back else None


def known(kafka: KafkaSettings) -> tuple[dict[str, bytes], set[str]]:
    """Every item's last record on the log, and the items that are deleted now."""
    entries: dict[str, bytes] = {}
    away: set[str] = set()
    for record in records(kafka.bootstrap, CATALOGUE):
        item = (record.key or b"").decode()
        if record.value is not None:
            entries[item] = record.value
            away.discard(item)
        elif item in entries:
            away.add(item)
    return entries, away


def churn(kafka: KafkaSettings, per_s: float, seed: int, over: threading.Event) -> int:
    """Change the catalogue `per_s` times a second until `over`; returns the changes made. Raises `UserError`."""
    if not kafka.bootstrap:
        raise UserError(
            "simulate.churn_per_s changes the catalogue on Kafka: name the cluster with kafka.bootstrap."
        )
    catalogue = Churn(*known(kafka), seed)
    client = producer(kafka.bootstrap, linger_ms=0)
    made = 0
    began = time.monotonic()
    try:
        while not over.wait(max(0.0, began + (made + 1) / per_s - time.monotonic())):
            item, value = catalogue.next()
            client.send(CATALOGUE, value, item.encode(), partition=0)
            made += 1
        client.flush()
    finally:
        client.close()
    return made


@asynccontextmanager
async def moving(
    kafka: KafkaSettings, settings: SimulateSettings, ended: Callable[[], None]
) -> AsyncIterator[None]:
    """Meanwhile the catalogue moves as `simulate.churn_per_s` says; `ended` is called when it no longer does.

    Raises on leaving what ended it before its time.
    """
    if not settings.churn_per_s:
        yield
        return
    over = threading.Event()
    task = asyncio.create_task(
        asyncio.to_thread(churn, kafka, settings.churn_per_s, settings.seed, over)
    )
    task.add_done_callback(lambda _: ended())
    try:
        yield
    finally:
        over.set()
        await task

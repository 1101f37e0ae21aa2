"""Which actors are there, and which catalogue version each of them has applied, by their signs of life.

Notable choices
- An actor is live for `LIVE_S` after its last sign, unless that said that it leaves; it gives one every few seconds
  (actor/presence.py). A process that died is waited for no longer than that.
- An actor that is cut off from Kafka gives no signs, but serves what it has until `actor.max_catalogue_age_s`: who
  waits is told of those that fell silent within it.
- What was written before the wait is as old as its record's timestamp says, what comes meanwhile is of now: clocks of
  machines must agree within some seconds, and where they do not an actor that lives is heard all the same.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from kafka import KafkaConsumer, TopicPartition

from streams.clients import consumer
from streams.events import CatalogueAck, UnreadableError, catalogue_ack_decoder, decode
from streams.topics import CATALOGUE_ACKS

LIVE_S: Final = 10.0
"""Since its last sign an actor counts as live for this long."""
PLACE: Final = TopicPartition(CATALOGUE_ACKS, 0)


@dataclass(frozen=True)
class Heard:
    """The last sign of one actor."""

    actor: str
    version: int
    at_s: float
    leaving: bool


class Roll:
    """The core: who was heard of, when, and at which version."""

    def __init__(self) -> None:
        self._heard: dict[tuple[str, str], Heard] = {}

    def take(self, ack: CatalogueAck, at_s: float) -> None:
        """One sign, in the order of the log."""
        who = (ack.actor, ack.run)
        self._heard[who] = Heard(ack.actor, ack.catalogue_version, at_s, ack.leaving)

    def live(self, now_s: float) -> list[Heard]:
        """The actors that are live, by name."""
        return [one for one in self._there() if now_s - one.at_s <= LIVE_S]

    def behind(self, version: int, now_s: float) -> list[Heard]:
        """The live actors that have not applied this version."""
        return [one for one in self.live(now_s) if one.version < version]

    def silent(self, version: int, now_s: float, within_s: float) -> list[Heard]:
        """The actors that are no longer live and were before, `within_s`, without this version."""
        return [
            one
            for one in self._there()
            if LIVE_S < now_s - one.at_s <= within_s and one.version < version
        ]

    def _there(self) -> list[Heard]:
        named = sorted(self._heard.items())
        return [one for _, one in named if not one.leaving]


@dataclass(frozen=True)
class Waited:
    """What became of waiting for a version."""

    took_s: float
    live: list[Heard]
    behind: list[Heard]
    """Live actors that have not applied it: empty where the wait succeeded."""
    silent: list[Heard]


class Signs:
    """The shell: follows the signs of life on a cluster; `following` opens one."""

    def __init__(self, client: KafkaConsumer, since_s: float) -> None:
        self._client = client
        self._began_s = time.time()
        self.roll = Roll()
        client.assign([PLACE])
        found = client.offsets_for_times({PLACE: int((self._began_s - since_s) * 1000)})[PLACE]
        end = client.end_offsets([PLACE])[PLACE]
        client.seek(PLACE, end if found is None else found.offset)
        while client.position(PLACE) < end:
            self.poll(200)

    def poll(self, timeout_ms: int) -> None:
        """Take the signs that come."""
        for records in self._client.poll(timeout_ms=timeout_ms).values():
            for record in records:
                written_s = record.timestamp / 1000
                at_s = written_s if written_s < self._began_s else time.time()
                try:
                    self.roll.take(decode(catalogue_ack_decoder, record.value), at_s)
                except UnreadableError:
                    continue  # of a later release, or not ours


@contextmanager
def following(bootstrap: str, since_s: float) -> Iterator[Signs]:
    """The signs of life of the last `since_s`, and those to come while inside."""
    client = consumer(bootstrap)
    try:
        yield Signs(client, since_s)
    finally:
        client.close()


def wait(
    bootstrap: str,
    version: int,
    limit_s: float,
    silent_s: float,
    told: Callable[[list[Heard]], None] = lambda _: None,
) -> Waited:
    """Wait until all live actors have applied a catalogue version, at most `limit_s`.

    `silent_s` is how long an actor that fell silent may still serve; `told` hears who is waited for.
    """
    began = time.monotonic()
    with following(bootstrap, silent_s) as signs:
        while True:
            now_s, took_s = time.time(), time.monotonic() - began
            behind = signs.roll.behind(version, now_s)
            if not behind or took_s >= limit_s:
                silent = signs.roll.silent(version, now_s, silent_s)
                return Waited(took_s, signs.roll.live(now_s), behind, silent)
            told(behind)
            signs.poll(50)

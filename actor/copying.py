"""Keeping the copy (actor/kept.py) while an actor serves: what has come since, once a second; weights now and then.

Notable choices
- All work on the disk is done in a thread of its own; requests neither wait for it nor fail with it. A copy that
  cannot be written is told once, counted, and tried again.
- A version that arms follow is copied when it has passed its first seconds, or has been served for
  `actor.copy_every_s` without a return: what an actor restarts from must be the last good one, not the last. The
  first of all is copied at once. What an arm is pinned to is copied at once too, or that arm could not be served.
- What is copied is what was *taken*: records that this actor refused are not in it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Set
from typing import Final

from aiokafka import TopicPartition
from aiokafka.structs import ConsumerRecord
from prometheus_client import Counter, Gauge

from actor.disk import DiskThread
from actor.kept import COMMAND, HISTORY, ITEM, Change, Copy, Cut
from actor.policy import Arms
from learner.catalogue import Catalogue
from storage.kv import StoreError
from streams.chain import Version
from streams.control import ControlState, is_condemned
from streams.settings import KafkaSettings
from streams.weights import Seal

log = logging.getLogger("dwell.actor")

COPIED_AT = Gauge("dwell_actor_copy_timestamp_seconds", "Moment of which the copy's catalogue is")
COPIED_VERSION = Gauge("dwell_actor_copy_policy_version", "Newest version in the copy")
FAILURES = Counter("dwell_actor_copy_failures_total", "Times that the copy could not be written")

RECORDS_S: Final = 1.0


class Copying:
    """What is to be copied of one actor; told by its subscription, run beside its requests."""

    def __init__(
        self,
        copy: Copy,
        kafka: KafkaSettings,
        arms: Arms,
        catalogue: Catalogue,
        passed: Callable[[str], int],
        complete_ms: Callable[[], int],
        every_s: float,
    ) -> None:
        """`passed` gives the newest version that passed its first seconds with an arm, `complete_ms` is of the
        catalogue."""
        self._copy = copy
        self._kafka = kafka
        self._arms = arms
        self._catalogue = catalogue
        self._passed = passed
        self._complete_ms = complete_ms
        self._every_s = every_s
        self._disk = DiskThread("copy")
        self.positions: dict[TopicPartition, int] = {}
        """What is to be read next of `control`, `catalogue` and `histories`."""
        self._cluster = ""
        self._changes: dict[bytes, Change] = {}
        self._last: Cut | None = None
        self._read_to_end = self._whole = False
        self._built: dict[int, tuple[Version, Seal]] = {}
        """Versions that may have to be copied."""
        self._on_disk: set[int] = set()
        self._good = 0
        """The newest version in the copy that arms follow; 0 for none."""
        self._candidate = 0
        self._chosen_s = -float("inf")
        self._failing = False

    def begin(self, cluster: str) -> None:
        """Kafka is there: make a new copy. Raises `StoreError` and `OSError`."""
        self._cluster = cluster
        self._copy.begin(cluster)

    def resume(self, cut: Cut, good: int) -> None:
        """The actor serves from the copy: go on with it."""
        self._cluster, self._last = cut.cluster, cut
        self._read_to_end = self._whole = True
        self.positions = {
            TopicPartition(topic, partition): offset for topic, partition, offset in cut.positions
        }
        self._on_disk, self._good = set(self._copy.versions()), good

    def complete(self) -> None:
        """All logs have been read to their ends: what has been taken until now makes the copy whole."""
        self._read_to_end = True

    def command(self, record: ConsumerRecord) -> None:
        """A record of `control` was taken."""
        key = COMMAND + int(record.offset).to_bytes(8)
        self._changes[key] = Change(record.offset, record.value)

    def history(self, record: ConsumerRecord) -> None:
        """A record of `histories` was taken."""
        key = HISTORY + (record.key or b"")
        self._changes[key] = Change(record.offset, record.value)

    def item(self, record: ConsumerRecord, moved: bool) -> None:
        """A record of `catalogue` was taken; whether its item came into a leaf by it."""
        key = ITEM + (record.key or b"")
        change = Change(record.offset, record.value, record.offset if moved else None)
        self._changes[key] = _after(self._changes.get(key), change)

    def built(self, version: Version, seal: Seal) -> None:
        """A version is at hand; what can no longer be asked for is let go."""
        self._built[version.number] = version, seal
        served = {policy.version for arm in self._shares if (policy := self._arms.served(arm))}
        pinned = self._arms.control.pinned.values()
        newest = self._arms.newest.version if self._arms.newest else 0
        wanted = {version.number, newest, self._candidate, *served, *pinned}
        self._built = {number: one for number, one in self._built.items() if number in wanted}

    async def run(self) -> None:
        """Copy until cancelled."""
        while True:
            await asyncio.sleep(RECORDS_S)
            await self._step()

    async def close(self) -> None:
        """Copy what has come since, and leave the copy."""
        await self._step()
        self._disk.end()

    async def _step(self) -> None:
        try:
            await self._write_records()
            if self._whole:
                await self._write_versions(time.monotonic())
        except (StoreError, OSError) as error:
            FAILURES.inc()
            if not self._failing:
                log.error("the copy for a start without Kafka cannot be written: %s", error)
            self._failing = True
        else:
            self._failing = False

    async def _write_records(self) -> None:
        cut = Cut(
            cluster=self._cluster,
            bootstrap=self._kafka.bootstrap,
            partitions=self._kafka.partitions,
            positions=[(*place, offset) for place, offset in self.positions.items()],
            catalogue_version=self._catalogue.version,
            complete_ms=self._complete_ms(),
            digest=self._last.digest if self._last else 0,
        )
        changes, self._changes = self._changes, {}
        whole = self._read_to_end
        if not changes and cut == self._last and whole == self._whole:
            return
        try:
            await self._disk.do(self._copy.write, changes, cut)
        except StoreError:
            later, self._changes = self._changes, changes
            for key, change in later.items():
                self._changes[key] = _after(changes.get(key), change)
            raise
        self._last = cut
        if whole and not self._whole:
            await self._disk.do(self._copy.adopt)
            self._whole = True
        if whole:
            COPIED_AT.set(cut.complete_ms / 1000)

    async def _write_versions(self, now_s: float) -> None:
        control = self._arms.control
        pinned = {control.pinned[arm] for arm in self._shares if arm in control.pinned}
        following = [arm for arm in self._shares if arm not in control.pinned]
        before = set(self._on_disk)
        for number in pinned - self._on_disk:
            await self._save(number)
        if harmful(self._good, control):
            self._good = 0
        await self._follow(following, now_s)
        wanted = pinned | {self._good}
        if wanted & self._on_disk and before | self._on_disk != wanted & self._on_disk:
            await self._disk.do(self._copy.keep, wanted)
            self._on_disk &= wanted

    async def _follow(self, following: list[str], now_s: float) -> None:
        """Choose, wait, and copy what arms follow."""
        control = self._arms.control
        served = [policy.version for arm in following if (policy := self._arms.served(arm))]
        newest = max(served, default=0)
        if self._candidate and (not following or harmful(self._candidate, control)):
            self._candidate = 0
        waited = now_s - self._chosen_s >= self._every_s
        passed = any(self._passed(arm) >= self._candidate for arm in following)
        chosen = 0
        if self._candidate and (passed or waited):
            chosen, self._candidate = self._candidate, 0
        elif not self._good and newest and not harmful(newest, control):
            chosen, self._chosen_s = newest, now_s
        if chosen and await self._save(chosen):
            self._good = chosen
            COPIED_VERSION.set(chosen)
        if not self._candidate and waited and newest > self._good:
            self._candidate, self._chosen_s = newest, now_s

    async def _save(self, number: int) -> bool:
        """Copy a version; whether it was at hand."""
        if number in self._on_disk:
            return True
        found = self._built.get(number)
        if found is None:
            return False
        await self._disk.do(self._copy.write_version, *found)
        self._on_disk.add(number)
        self._built.pop(number, None)
        return True

    @property
    def _shares(self) -> Set[str]:
        return self._arms.control.shares.keys()


def harmful(version: int, control: ControlState) -> bool:
    """Whether a return has left a version behind, or is about to."""
    pending = control.rollbacks.values()
    return is_condemned(version, control.condemned) or any(
        return_.version < version <= return_.upto for return_ in pending
    )


def _after(before: Change | None, change: Change) -> Change:
    """The change that comes of two of the same key."""
    return change._replace(born=before.born) if before and change.born is None else change

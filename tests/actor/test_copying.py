"""Which versions are copied, and when: the last good ones, and what arms are pinned to."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from aiokafka.structs import ConsumerRecord

from actor.copying import Copying
from actor.kept import Copy
from actor.policy import Arms, ServedPolicy
from learner.catalogue import Catalogue
from storage.kv import StoreError
from streams.control import LEARNING_ARM
from streams.events import Command
from streams.settings import KafkaSettings
from tests.actor.test_kept import restored, sealed
from tests.actor.world import CODES
from tests.learner.makers import CODEBOOK, upsert

EVERY_S = 10.0


class One:
    """An actor's copying, with a clock of its own."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.arms = Arms()
        self.catalogue = Catalogue(CODES)
        self.passed = 0
        self.now_s = 100.0
        self.copying = Copying(
            copy,
            KafkaSettings(bootstrap="here:1", partitions=2),
            self.arms,
            self.catalogue,
            lambda arm: self.passed if arm == LEARNING_ARM else 0,
            lambda: 1000,
            EVERY_S,
        )
        self.copying.begin("c1")
        self.copying.complete()

    def serve(self, version: int) -> None:
        """A version is built and served by all arms that follow."""
        found, seal = sealed(version)
        self.copying.built(found, seal)
        self.arms.newest = policy(version)
        self.arms.settle({})

    def pin(self, version: int) -> None:
        """The control arm is pinned; the version is read from the log."""
        self.arms.control.pinned["control"] = version
        self.copying.built(*sealed(version))
        self.arms.settle({version: policy(version)})

    async def later(self, seconds: float) -> list[int]:
        """What versions are in the copy then."""
        self.now_s += seconds
        await self.copying._step()
        return self.copy.versions()


def policy(version: int) -> ServedPolicy:
    return ServedPolicy(version, cast(Any, None), cast(Any, None))


@pytest.fixture
async def one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[One]:
    copy = Copy(tmp_path / "copy")
    made = One(copy)
    monkeypatch.setattr("actor.copying.time.monotonic", lambda: made.now_s)
    yield made
    await made.copying.close()
    copy.close()


def record(offset: int, key: bytes, value: bytes | None) -> ConsumerRecord[bytes, bytes]:
    return ConsumerRecord("catalogue", 0, offset, 0, 0, key, value, None, 0, 0, ())


async def test_the_first_version_is_copied_at_once_and_the_next_when_it_has_passed(
    one: One,
) -> None:
    one.serve(1)
    assert await one.later(1) == [1]
    one.serve(2)
    assert await one.later(EVERY_S) == [1], "chosen"
    assert await one.later(1) == [1], "it has not passed"
    one.serve(3)
    one.passed = 2
    assert await one.later(1) == [2], "that one, not its successor, and the one before is gone"


async def test_a_version_that_nobody_objected_to_is_copied_in_the_end(one: One) -> None:
    one.serve(1)
    await one.later(1)
    one.serve(2)
    await one.later(EVERY_S)
    assert await one.later(EVERY_S - 1) == [1]
    assert await one.later(1) == [2]


async def test_versions_are_copied_at_most_every_so_often(one: One) -> None:
    one.serve(1)
    await one.later(1)
    copied = set()
    for version in range(2, 62):
        one.serve(version)
        one.passed = version
        copied |= set(await one.later(1))
    assert len(copied - {1}) <= 60 / EVERY_S


async def test_a_version_that_is_returned_is_never_copied_and_what_was_returned_to_is(
    one: One,
) -> None:
    one.serve(1)
    await one.later(1)
    one.serve(2)
    await one.later(EVERY_S)
    one.arms.control.apply(
        Command(
            id="", time_ms=0, who="", why="", action="rollback", arm="learning", version=1, upto=2
        )
    )
    one.arms.settle({1: policy(1)})
    assert await one.later(EVERY_S) == [1]
    assert await one.later(10 * EVERY_S) == [1]


async def test_what_arms_are_pinned_to_is_copied_at_once_and_beside(one: One) -> None:
    one.serve(4)
    one.pin(1)
    assert await one.later(1) == [1, 4]
    one.serve(5)
    one.passed = 5
    await one.later(EVERY_S)
    assert await one.later(1) == [1, 5]


async def test_few_versions_are_held_for_it(one: One) -> None:
    one.serve(1)
    await one.later(1)
    for version in range(2, 30):
        one.serve(version)
        await one.later(0.1)
    assert len(one.copying._built) <= 3


async def test_a_disk_that_fails_is_told_once_and_nothing_is_missing_when_it_works_again(
    one: One, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def took(offset: int, moved: bool) -> None:
        value = upsert("a", (1, 1, 1), CODEBOOK, 1000)
        one.catalogue.take(offset, b"a", value)
        one.copying.item(record(offset, b"a", value), moved)

    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    one.serve(1)
    with monkeypatch.context() as broken:
        broken.setattr(one.copy, "write", full)
        took(3, moved=True)
        await one.later(1)
        took(6, moved=False)
        await one.later(1)
    assert caplog.text.count("cannot be written: the disk is full") == 1
    assert one.copy.cut() is None
    await one.later(1)
    catalogue = restored(one.copy)[0]
    assert catalogue.version == 6
    assert len(catalogue.valid.newborn(6, 3)) == 0, "it came at 3"
    assert len(catalogue.valid.newborn(6, 4)) == 1

"""Requests that wait are decoded together, and nothing else is shared between them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from actor.batching import Batcher, Newest
from actor.policy import ServedPolicy
from actor.recommend import Prepared
from actor.sampling import Slates
from learner.valid_tree import Tree

TREE = Tree(2, np.array([0, 3]))
OTHER_TREE = Tree(2, np.array([1]))


def policy(version: int) -> ServedPolicy:
    return ServedPolicy(version, cast(Any, None), cast(Any, None))


def asked(request: str, tree: Tree = TREE) -> Prepared:
    return Prepared(request, "u", "learning", 1, b"", tree, 0, cast(Any, None), frozenset())


def unmoved(served: ServedPolicy, one: Prepared) -> tuple[ServedPolicy, Prepared]:
    """Nothing comes meanwhile."""
    return served, one


class Decoder:
    """Remembers what it was given; may be held, and may fail."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, list[str]]] = []
        self.fails_on = ""
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()

    def __call__(self, served: ServedPolicy, batch: list[Prepared]) -> Slates:
        self.begun.set()
        self.go.wait(10)
        requests = [one.request for one in batch]
        self.batches.append((served.version, requests))
        if self.fails_on in requests:
            raise ValueError(f"cannot decode {self.fails_on}")
        return cast(Slates, [(served.version, request) for request in requests])

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, a decode does not end."""
        self.go.clear()
        self.begun.clear()
        try:
            yield
        finally:
            self.go.set()


@asynccontextmanager
async def running(
    decoder: Decoder, max_batch: int = 64, newest: Newest = unmoved
) -> AsyncIterator[Batcher]:
    batcher = Batcher(decoder, max_batch, newest)
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
        assert not task.done(), "the loop has ended"
    finally:
        decoder.go.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def drawn(batcher: Batcher, version: ServedPolicy, one: Prepared) -> tuple[int, str]:
    found = await batcher.draw(version, one)
    assert found.policy is version
    return cast(Any, found.slates)[found.row]  # type: ignore[no-any-return]


async def waits(decoder: Decoder) -> None:
    """Until a decode has begun, and everything else has come to rest."""
    while not decoder.begun.is_set():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)


async def test_what_came_during_a_decode_is_decoded_together_and_answers_keep_apart() -> None:
    decoder, one = Decoder(), policy(1)
    async with running(decoder) as batcher:
        with decoder.held():
            first = asyncio.create_task(drawn(batcher, one, asked("r0")))
            await waits(decoder)
            rest = [asyncio.create_task(drawn(batcher, one, asked(f"r{n}"))) for n in range(1, 9)]
            await asyncio.sleep(0.01)
            assert batcher.waiting == 8
        assert await first == (1, "r0")
        assert await asyncio.gather(*rest) == [(1, f"r{n}") for n in range(1, 9)]
    assert decoder.batches == [(1, ["r0"]), (1, [f"r{n}" for n in range(1, 9)])]


async def test_no_batch_is_larger_than_allowed() -> None:
    decoder, one = Decoder(), policy(1)
    async with running(decoder, max_batch=3) as batcher:
        with decoder.held():
            first = asyncio.create_task(drawn(batcher, one, asked("r0")))
            await waits(decoder)
            rest = [asyncio.create_task(drawn(batcher, one, asked(f"r{n}"))) for n in range(1, 8)]
            await asyncio.sleep(0.01)
        await asyncio.gather(first, *rest)
    assert [len(requests) for _, requests in decoder.batches] == [1, 3, 3, 1]


async def test_versions_and_trees_are_decoded_apart() -> None:
    decoder, old, new = Decoder(), policy(1), policy(2)
    async with running(decoder) as batcher:
        with decoder.held():
            first = asyncio.create_task(drawn(batcher, old, asked("r0")))
            await waits(decoder)
            rest = [
                asyncio.create_task(drawn(batcher, served, asked(name, tree)))
                for served, name, tree in [
                    (old, "a", TREE),
                    (new, "b", TREE),
                    (old, "c", OTHER_TREE),
                    (new, "d", TREE),
                    (old, "e", TREE),
                ]
            ]
            await asyncio.sleep(0.01)
        assert await asyncio.gather(first, *rest) == [
            (1, "r0"),
            (1, "a"),
            (2, "b"),
            (1, "c"),
            (2, "d"),
            (1, "e"),
        ]
    assert decoder.batches[1:] == [(1, ["a", "e"]), (2, ["b", "d"]), (1, ["c"])]


async def test_who_waits_while_a_version_comes_is_drawn_by_it_with_those_who_come_after() -> None:
    decoder, old, new, other = Decoder(), policy(1), policy(2), policy(7)
    serves = {1: old}

    def newest(served: ServedPolicy, one: Prepared) -> tuple[ServedPolicy, Prepared]:
        return serves.get(served.version, served), one

    async with running(decoder, newest=newest) as batcher:
        with decoder.held():
            first = asyncio.create_task(batcher.draw(old, asked("r0")))
            await waits(decoder)
            rest = [asyncio.create_task(batcher.draw(old, asked("a")))]
            await asyncio.sleep(0.01)
            serves[1] = new
            rest += [
                asyncio.create_task(batcher.draw(served, asked(name)))
                for served, name in [(other, "b"), (new, "c")]
            ]
            await asyncio.sleep(0.01)
        assert (await first).policy is old, "its decode had begun"
        answers = await asyncio.gather(*rest)
    assert [answer.policy for answer in answers] == [new, other, new]
    assert decoder.batches == [(1, ["r0"]), (2, ["a", "c"]), (7, ["b"])]


async def test_who_waits_while_the_catalogue_moves_is_decoded_with_those_who_come_after() -> None:
    decoder, one = Decoder(), policy(1)

    def newest(served: ServedPolicy, waiting: Prepared) -> tuple[ServedPolicy, Prepared]:
        return served, replace(waiting, tree=OTHER_TREE)

    async with running(decoder, newest=newest) as batcher:
        with decoder.held():
            first = asyncio.create_task(batcher.draw(one, asked("r0")))
            await waits(decoder)
            rest = [
                asyncio.create_task(batcher.draw(one, asked(name, tree)))
                for name, tree in [("a", TREE), ("b", OTHER_TREE), ("c", Tree(2, np.array([2])))]
            ]
            await asyncio.sleep(0.01)
        await first
        answers = await asyncio.gather(*rest)
    assert decoder.batches == [(1, ["r0"]), (1, ["a", "b", "c"])]
    assert [answer.prepared.tree for answer in answers] == [OTHER_TREE] * 3


async def test_a_failure_reaches_its_own_batch_only() -> None:
    decoder, old, new = Decoder(), policy(1), policy(2)
    decoder.fails_on = "bad"
    async with running(decoder) as batcher:
        with decoder.held():
            first = asyncio.create_task(drawn(batcher, old, asked("r0")))
            await waits(decoder)
            rest = [
                asyncio.create_task(drawn(batcher, served, asked(name)))
                for served, name in [(old, "bad"), (old, "beside"), (new, "other")]
            ]
            await asyncio.sleep(0.01)
        answers = await asyncio.gather(first, *rest, return_exceptions=True)
        assert answers[0] == (1, "r0")
        assert [str(answer) for answer in answers[1:3]] == ["cannot decode bad"] * 2
        assert answers[3] == (2, "other")
        assert await drawn(batcher, old, asked("after")) == (1, "after")


@pytest.mark.parametrize("fails", [False, True])
async def test_a_request_given_up_while_it_is_decoded_hurts_nobody(fails: bool) -> None:
    decoder, one = Decoder(), policy(1)
    decoder.fails_on = "gone" if fails else ""
    async with running(decoder) as batcher:
        with decoder.held():
            gone = asyncio.create_task(drawn(batcher, one, asked("gone")))
            await waits(decoder)
            gone.cancel()
            await asyncio.sleep(0)
        assert await drawn(batcher, one, asked("next")) == (1, "next")
    assert gone.cancelled()


async def test_a_request_given_up_while_it_waits_is_not_decoded() -> None:
    decoder, one = Decoder(), policy(1)
    async with running(decoder) as batcher:
        with decoder.held():
            first = asyncio.create_task(drawn(batcher, one, asked("r0")))
            await waits(decoder)
            gone = asyncio.create_task(drawn(batcher, one, asked("gone")))
            kept = asyncio.create_task(drawn(batcher, one, asked("kept")))
            await asyncio.sleep(0.01)
            gone.cancel()
            await asyncio.sleep(0)
        assert [await first, await kept] == [(1, "r0"), (1, "kept")]
    assert decoder.batches[1:] == [(1, ["kept"])]


async def test_nobody_waits_for_a_batcher_that_has_ended() -> None:
    decoder, one = Decoder(), policy(1)
    batcher = Batcher(decoder, 1, unmoved)
    task = asyncio.create_task(batcher.run())
    with decoder.held():
        waiting = [asyncio.create_task(drawn(batcher, one, asked(f"r{n}"))) for n in range(3)]
        await waits(decoder)
        task.cancel()
        answers = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers)
    with pytest.raises(asyncio.CancelledError):
        await task

"""Whatever thread computes keeps to the number of threads that was set: sums of several end in other bits."""

import asyncio
import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch

from actor.batching import Batcher
from actor.policy import ServedPolicy
from actor.recommend import Prepared
from actor.sampling import Slates
from tests.actor.test_batching import asked, policy, unmoved
from tests.learner.makers import SMALL, random_model

THREADS = 3
"""Neither one nor what a machine has."""


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield THREADS
    torch.set_num_threads(before)


def of_products() -> int:
    """How many threads the calling one would use in a product of matrices."""
    (library,) = (Path(torch.__file__).parent / "lib").glob("libgomp*")
    return int(ctypes.CDLL(str(library)).omp_get_max_threads())


async def test_the_thread_that_decodes_keeps_to_the_threads_set(threads: int) -> None:
    seen = []

    def decode(_: ServedPolicy, __: list[Prepared]) -> Slates:
        seen.append(of_products())
        return cast(Slates, None)

    batcher = Batcher(decode, 1, unmoved)
    running = asyncio.create_task(batcher.run())
    await batcher.draw(policy(1), asked("r"))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert seen == [threads]


async def test_a_thread_that_makes_tables_keeps_to_the_threads_set(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def tables(*_: object) -> None:
        seen.append(of_products())

    monkeypatch.setattr("learner.decoder.CodeTables", tables)
    model = random_model(SMALL, 5, 64, seed=1).eval().requires_grad_(False)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(model.prepare).result()
    assert seen == [threads]

"""The bench of serving: its client, its search for rates, and a tiny run of the whole on a real broker."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from ops.bench_serve import Extent, Search, checks_of, run, within
from ops.bench_serve_load import Outcome, Plan
from ops.bench_serve_load import run as asked
from ops.bench_serve_parts import MOST_BEHAVIOURS, users_of
from ops.config import Config

ANSWER = {"items": [{"item": "i1"}, {"item": "i2"}], "fallback": False}


@asynccontextmanager
async def service(stall_s: float = 0.0, at: int = 0, **answer: object) -> AsyncIterator[str]:
    """Answers at once, but that its `at`-th request stops everything for `stall_s`."""
    seen = 0

    async def recommend(_: web.Request) -> web.Response:
        nonlocal seen
        seen += 1
        if seen == at:
            time.sleep(stall_s)
        status = answer.get("status", 200)
        assert isinstance(status, int)
        return web.json_response(ANSWER | answer, status=status)

    made = web.Application()
    made.router.add_post("/recommend", recommend)
    runner = web.AppRunner(made)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        host, port = runner.addresses[0]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def plan(url: str, **more: float) -> Plan:
    made = Plan(url=url, users=["a", "b"], count=2, seconds=0.6, warm_s=0.1)
    return msgspec.structs.replace(made, **more)


async def test_a_stall_is_charged_to_all_who_would_have_come_meanwhile() -> None:
    async with service(stall_s=0.3, at=30) as url:
        outcome = await asked(plan(url, rate=200.0))
    # 60 of some 120 requests were due in the stall, and waited for .15 s in the mean
    assert outcome.max_s > 0.25
    assert outcome.p90_s > 0.15
    assert outcome.answered == outcome.offered > 80


async def test_a_closed_loop_has_as_many_requests_under_way_as_clients() -> None:
    most = now = 0

    async def recommend(_: web.Request) -> web.Response:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return web.json_response(ANSWER)

    made = web.Application()
    made.router.add_post("/recommend", recommend)
    runner = web.AppRunner(made)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        host, port = runner.addresses[0]
        outcome = await asked(plan(f"http://{host}:{port}", clients=3))
    finally:
        await runner.cleanup()
    assert most == 3
    assert outcome.p50_s > 0.02
    assert outcome.late_p99_s == 0.0


async def test_a_service_slower_than_the_cell_is_measured_all_the_same() -> None:
    async with service(stall_s=0.5, at=1) as url:
        outcome = await asked(plan(url, clients=1, seconds=0.1))
    assert outcome.answered == outcome.offered >= 1


@pytest.mark.parametrize(
    ("answer", "counted"),
    [
        ({"fallback": True}, "fallbacks"),
        ({"items": [{"item": "i1"}]}, "short"),
        ({"status": 429}, "refused"),
        ({"status": 500}, "failed"),
    ],
)
async def test_what_is_no_slate_of_the_policy_is_not_an_answer(
    answer: dict[str, object], counted: str
) -> None:
    async with service(**answer) as url:  # type: ignore[arg-type]
        outcome = await asked(plan(url, clients=2))
    assert outcome.answered == 0
    assert getattr(outcome, counted) == outcome.offered > 0
    assert not within(outcome, 1e9)


async def test_nobody_there_is_a_failure_and_not_an_error() -> None:
    outcome = await asked(plan("http://127.0.0.1:9", rate=20.0))
    assert outcome.failed == outcome.offered > 0


def outcome_at(rate: float, capacity: float) -> Outcome:
    """Of a service that holds so much."""
    within_it = rate <= capacity
    return Outcome(
        offered=100,
        answered=100 if within_it else 60,
        fallbacks=0,
        short=0,
        refused=0 if within_it else 40,
        failed=0,
        per_second=min(rate, capacity),
        p50_s=0.01,
        p90_s=0.02,
        p99_s=0.05,
        max_s=0.06,
        late_p99_s=0.0,
        client_cpu=0.1,
    )


def test_halving_finds_the_highest_rate_that_is_held() -> None:
    search = Search(0.0, 1000.0)
    for _ in range(12):
        search.took(outcome_at(search.rate, 731.0), 0.1)
    assert 725 < search.held <= 731
    slow = Search(0.0, 1000.0)
    slow.took(outcome_at(slow.rate, 731.0), 0.04)
    assert slow.held == 0.0


def test_long_histories_come_in_fewer_users() -> None:
    assert len(users_of(50)) > len(users_of(3000)) >= 16
    assert len(users_of(3000)) * 3000 <= MOST_BEHAVIOURS
    assert not set(users_of(50)) & set(users_of(512))


def test_a_slate_that_is_short_or_a_failure_fails_the_bench() -> None:
    results = {
        "batched_over_unbatched": 1.0,
        "cells": [{"failed": 0, "short": 0}],
        "contexts": [{"recomputed_over_tables": 2.0}],
    }
    assert [check.ok for check in checks_of(results)] == [True, False, True]
    results["cells"] = [{"failed": 0, "short": 1}]
    failed = checks_of(results)[0]
    assert not failed.ok and failed.correctness


def test_a_tiny_run_measures_every_cell(tmp_path: Path) -> None:
    config = Config()
    config = replace(config, storage=replace(config.storage, data_dir=str(tmp_path / "data")))
    extent = Extent(
        max_batches=(1, 8),
        histories=(5, 40),
        slates=(1, 12),
        beams=(4,),
        clients=(8,),
        halvings=1,
        seconds=0.5,
        budget_s=1.0,
    )
    out = tmp_path / "results.json"
    assert run(config, 1000, extent, out) == 0
    document = json.loads(out.read_text())
    results = document["results"]
    assert document["command"] == "dwell bench serve"
    assert list(results["held_per_second"]) == ["max_batch_1", "max_batch_8"]
    cells = results["cells"]
    assert len(cells) == 2 + 2 + 2 + 1 + 1  # closed, open, slates, the longer history, beams
    assert all(cell["offered"] and not cell["failed"] for cell in cells)
    assert {cell["history"] for cell in cells} == {5, 40}
    (of_beam,) = [cell for cell in cells if cell["beam"]]
    assert (of_beam["beam"], of_beam["slate"]) == (4, 4)
    assert of_beam["answered"] == of_beam["offered"]
    assert {cell["width"] for cell in results["beams"]} == {1, 32, 512}
    assert {cell["history"] for cell in results["contexts"]} == {5, 40}

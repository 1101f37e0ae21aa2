"""The live viewers against a stand-in service: twins, an open loop, posts, retries, restarts."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from ops.errors import UserError
from ops.outbox import Outbox, OutboxCounts, Report
from ops.served import Served, append_lines, encode_line, read_lines
from ops.settings import SimulateSettings
from ops.simulate import simulate
from ops.viewer import watch
from ops.visits import Counts
from ops.world import World

PEOPLE = 40
TWINS = [{"control": f"p{at:04d}-0", "learning": f"p{at:04d}-1"} for at in range(PEOPLE)]
QUICK = SimulateSettings(requests_per_s=60, slate=6, pace=2000, seed=1)


@pytest.fixture(scope="module")
def world() -> World:
    return World.easy(seed=7, items=300, people=PEOPLE)


class Service:
    """Stands in for the actor: random slates, and a memory of what it was asked and told."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = np.random.default_rng(0)
        self.asked: list[tuple[float, str]] = []
        self.posts: list[list[dict[str, Any]]] = []
        self.refused: list[list[dict[str, Any]]] = []
        self.recommend_status: Callable[[], int] = lambda: 200
        self.feedback_status: Callable[[], int] = lambda: 202
        self.delay_s = 0.0

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for post in self.posts for event in post]

    async def recommend(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append((time.monotonic(), body["user"]))
        number = len(self.asked)
        if self.recommend_status() != 200:
            return web.json_response({}, status=self.recommend_status())
        await asyncio.sleep(self.delay_s)
        places = self.rng.permutation(len(self.world.item_ids))[: body["count"]]
        items = [self.world.item_ids[at] for at in places]
        return web.json_response(
            {
                "request": f"r{number}",
                "user": body["user"],
                "arm": "learning" if body["user"].endswith("1") else "control",
                "policy_version": 3,
                "catalogue_version": 1,
                "items": [
                    {"item": item, "position": at, "logp": None} for at, item in enumerate(items)
                ],
            }
        )

    async def feedback(self, request: web.Request) -> web.Response:
        events = (await request.json())["events"]
        status = self.feedback_status()
        (self.posts if status == 202 else self.refused).append(events)
        return web.json_response({"accepted": len(events)}, status=status)


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/recommend", service.recommend)
    app.router.add_post("/feedback", service.feedback)
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("/"))
    finally:
        await server.close()


async def visit(
    service: Service,
    out: Path,
    for_s: float = 0.7,
    settings: SimulateSettings = QUICK,
    counts: Counts | None = None,
    drain_s: float = 10.0,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> Counts:
    """Let viewers come to the service for a while."""
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(for_s, until.set)
    async with serving(service) as url:
        run = asyncio.create_task(
            simulate(url, service.world, TWINS, settings, out, until, counts, drain_s=drain_s)
        )
        if meanwhile is not None:
            await meanwhile()
        return await run


async def test_twins_come_together_and_each_leaves_a_line(world: World, tmp_path: Path) -> None:
    service = Service(world)
    counts = await visit(service, tmp_path / "lines")
    lines, _ = read_lines(tmp_path / "lines")
    assert counts.requests == counts.viewings == len(lines) == len(service.asked) > 40
    pairs: dict[tuple[str, int], list[Served]] = defaultdict(list)
    for line in lines:
        pairs[line.person, line.visit].append(line)
    for (person, _), pair in pairs.items():
        assert {line.arm for line in pair} == {"control", "learning"}
        assert {line.user for line in pair} == {f"{person}-0", f"{person}-1"}
        assert abs(pair[0].time_ms - pair[1].time_ms) < 100


async def test_a_line_tells_the_truth_about_its_slate(world: World, tmp_path: Path) -> None:
    await visit(Service(world), tmp_path / "lines")
    lines, _ = read_lines(tmp_path / "lines")
    shown: dict[str, set[str]] = defaultdict(set)
    for line in sorted(lines, key=lambda line: line.visit):
        person = world.person_ids.index(line.person)
        viewing = watch(world, person, line.visit, line.items, QUICK.pace)
        assert line.satisfaction == pytest.approx(sum(viewing.satisfaction), abs=1e-5)
        assert line.dwell_s == pytest.approx(sum(viewing.dwell_ms) / 1000)
        assert line.dislikes == viewing.dislikes
        assert line.seen == sum(dwell > 0 for dwell in viewing.dwell_ms)
        permuted = world.permuted_satisfaction(person, line.items).sum()
        assert line.permuted == pytest.approx(permuted, abs=1e-5)
        assert line.oracle == pytest.approx(world.oracle(person, shown[line.user]), abs=1e-5)
        assert line.complete
        assert line.asked == 6
        shown[line.user].update(line.items)


async def test_all_events_of_all_viewings_reach_the_service(world: World, tmp_path: Path) -> None:
    service = Service(world)
    counts = await visit(service, tmp_path / "lines")
    told: dict[str, set[tuple[str, int, int]]] = defaultdict(set)
    for event in service.events:
        told[event["request"]].add((event["kind"], event["position"], event["play_ms"]))
    lines, _ = read_lines(tmp_path / "lines")
    for line in lines:
        person = world.person_ids.index(line.person)
        viewing = watch(world, person, line.visit, line.items, QUICK.pace)
        expected = {(e.kind, e.position, e.play_ms) for e in viewing.events}
        assert told[line.request] == expected
    # One id, one event: only copies share an id.
    by_id: dict[str, set[str]] = defaultdict(set)
    for event in service.events:
        by_id[event["event"]].add(str(event))
    assert all(len(same) == 1 for same in by_id.values())
    assert len(service.events) == counts.events >= len(by_id)
    assert counts.events_dropped == counts.events_rejected == 0


async def test_events_are_gathered_into_few_posts_of_bounded_size(
    world: World, tmp_path: Path
) -> None:
    service = Service(world)
    settings = SimulateSettings(requests_per_s=200, slate=12, pace=2000, seed=1)
    await visit(service, tmp_path / "lines", settings=settings)
    sizes = [len(post) for post in service.posts]
    assert min(sizes) >= 1
    assert max(sizes) <= 256
    assert len(sizes) <= 40
    assert sum(sizes) > 1000


async def test_requests_keep_their_rate_when_the_service_is_slow(
    world: World, tmp_path: Path
) -> None:
    service = Service(world)
    service.delay_s = 0.4
    settings = SimulateSettings(requests_per_s=40, pace=2000, seed=1)
    await visit(service, tmp_path / "lines", for_s=1.5, settings=settings)
    assert 50 <= len(service.asked) <= 64


async def test_a_person_who_watches_does_not_come_again(world: World, tmp_path: Path) -> None:
    service = Service(world)
    settings = SimulateSettings(requests_per_s=200, pace=0.001, seed=1)
    counts = await visit(service, tmp_path / "lines", settings=settings, drain_s=0)
    users = [user for _, user in service.asked]
    assert sorted(users) == sorted(user for ids in TWINS for user in ids.values())
    assert counts.pairs_skipped > 20


async def test_feedback_is_tried_again_until_it_is_taken(world: World, tmp_path: Path) -> None:
    service = Service(world)
    since = time.monotonic()
    service.feedback_status = lambda: 503 if time.monotonic() < since + 0.7 else 202
    counts = await visit(service, tmp_path / "lines")
    assert counts.posts_retried == len(service.refused) > 0
    taken = {event["event"] for event in service.events}
    assert {event["event"] for post in service.refused for event in post} <= taken
    assert counts.events_dropped == 0
    # A pause between tries: not a hail of them.
    assert len(service.refused) < 40


async def test_feedback_called_wrong_is_counted_and_not_sent_again(
    world: World, tmp_path: Path
) -> None:
    service = Service(world)
    service.feedback_status = lambda: 422
    counts = await visit(service, tmp_path / "lines")
    ids = [event["event"] for post in service.refused for event in post]
    assert counts.events_rejected == len(ids) > 0
    assert counts.events == counts.posts_retried == 0
    assert len(set(ids)) > 0.98 * len(ids)  # the network's own copies only


async def test_a_refused_recommendation_is_counted_and_the_others_go_on(
    world: World, tmp_path: Path
) -> None:
    service = Service(world)
    since = time.monotonic()
    service.recommend_status = lambda: 503 if time.monotonic() < since + 0.5 else 200
    counts = await visit(service, tmp_path / "lines")
    lines, _ = read_lines(tmp_path / "lines")
    assert counts.requests_failed > 10
    assert counts.requests == len(lines) > 10
    assert counts.requests + counts.requests_failed == len(service.asked)


async def test_without_a_service_requests_are_counted_as_failed(
    world: World, tmp_path: Path
) -> None:
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(0.4, until.set)
    url = f"http://127.0.0.1:{unused_port()}"
    counts = await simulate(url, world, TWINS, QUICK, tmp_path / "lines", until)
    assert counts.requests_failed > 10
    assert counts.requests == 0


async def test_a_restart_goes_on_with_the_next_visit_and_remembers_what_was_shown(
    world: World, tmp_path: Path
) -> None:
    out = tmp_path / "lines"
    await visit(Service(world), out)
    first, _ = read_lines(out)
    with out.open("ab") as file:
        file.write(encode_line(first[0])[:50])  # a crash in the middle of a line
    await visit(Service(world), out)
    both, _ = read_lines(out)
    assert both[: len(first)] == first
    second = both[len(first) :]
    assert second
    highest: dict[str, int] = defaultdict(lambda: -1)
    shown: dict[str, set[str]] = defaultdict(set)
    for line in first:
        highest[line.person] = max(highest[line.person], line.visit)
        shown[line.user].update(line.items)
    for line in sorted(second, key=lambda line: line.visit):
        assert line.visit > highest[line.person]
        person = world.person_ids.index(line.person)
        assert line.oracle == pytest.approx(world.oracle(person, shown[line.user]), abs=1e-5)
        shown[line.user].update(line.items)


async def test_the_end_writes_down_what_was_watched_until_then(
    world: World, tmp_path: Path
) -> None:
    service = Service(world)
    settings = SimulateSettings(requests_per_s=60, pace=20, seed=1)
    await visit(service, tmp_path / "lines", settings=settings, drain_s=0)
    lines, _ = read_lines(tmp_path / "lines")
    assert len(lines) == len(service.asked)
    under_way = [line for line in lines if not line.complete]
    assert len(under_way) > 20
    told: dict[tuple[str, int], int] = defaultdict(int)
    for event in service.events:
        key = event["request"], event["position"]
        told[key] = max(told[key], event["play_ms"])
    for line in under_way:
        watched = sum(told[line.request, position] for position in range(6)) / 1000
        assert line.dwell_s == pytest.approx(watched)


async def test_items_of_another_world_end_the_run_with_one_sentence(tmp_path: Path) -> None:
    service = Service(World.easy(seed=7, items=400, people=PEOPLE))
    smaller = World.easy(seed=7, items=10, people=PEOPLE)
    async with serving(service) as url:
        with pytest.raises(UserError, match="which the simulated world does not hold"):
            await simulate(url, smaller, TWINS, QUICK, tmp_path / "lines", asyncio.Event())


async def test_a_file_of_another_kind_is_refused_and_left_alone(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    path.write_text("buy milk\nand bread")
    with pytest.raises(UserError, match=r"notes, line 1, is not a line of the simulator's output"):
        await simulate("http://127.0.0.1:1", world, TWINS, QUICK, path, asyncio.Event())
    assert path.read_text() == "buy milk\nand bread"


async def test_metrics_tell_the_counts(world: World, tmp_path: Path) -> None:
    port = unused_port()
    until = asyncio.Event()
    async with serving(Service(world)) as url:
        run = asyncio.create_task(
            simulate(url, world, TWINS, QUICK, tmp_path / "lines", until, metrics_port=port)
        )
        await asyncio.sleep(0.5)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{port}/metrics") as response,
        ):
            text = await response.text()
        until.set()
        await run
    value = next(
        float(line.split()[1])
        for line in text.splitlines()
        if line.startswith("dwell_simulator_requests_total")
    )
    assert value > 0


async def test_the_outbox_drops_the_oldest_events_beyond_its_bound() -> None:
    counts = OutboxCounts()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{unused_port()}") as session:
        outbox = Outbox(session, counts, bound=100)
        outbox.push([Report(f"e{n}", "u", "r", 0, "i", "begin", 0, False) for n in range(130)])
        assert counts.events_dropped == 30
        assert not await outbox.flush(0.3)
        await outbox.close()
    # At the end whatever was not taken is counted, under way or not.
    assert counts.events_dropped == 130


def test_lines_are_read_from_where_reading_stopped(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_lines(path) == ([], 0)
    line = Served(
        person="p0001",
        user="p0001-0",
        arm="control",
        visit=0,
        time_ms=1,
        request="r1",
        policy_version=1,
        asked=6,
        items=["i0001"],
        satisfaction=0.5,
        permuted=0.1,
        oracle=0.9,
        dwell_s=3.0,
        seen=1,
        dislikes=0,
        complete=True,
    )
    with append_lines(path, 0) as out:
        out.write(encode_line(line) + encode_line(line)[:10])
    first, offset = read_lines(path)
    assert first == [line]
    with append_lines(path, offset) as out:
        out.write(encode_line(line))
    assert read_lines(path, offset) == ([line], path.stat().st_size)

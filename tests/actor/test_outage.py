"""A broker that is killed under load: requests go on, and once it is back every event is on the log, in order."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ops.broker import EmbeddedBroker
from tests.actor.world import Actor, World, acting, until, user_of
from tests.learner.cluster import refused

USERS = [user_of(arm, number) for arm in ("learning", "control") for number in range(5)]
AWAY_S = 4.0


@dataclass
class Answered:
    """What one user was told, in order."""

    requests: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    slowest_s: float = 0.0


async def visit(actor: Actor, user: str, ended: asyncio.Event) -> Answered:
    """Slates and what the user does with them, one after another."""
    told = Answered()
    while not ended.is_set():
        began = time.monotonic()
        slate = await actor.recommend(user, 3)
        told.statuses.append(slate.status)
        if slate.status == 200:
            request = slate.json["request"]
            told.requests.append(request)
            events = [event_of(user, request, position) for position in range(3)]
            fed = await actor.feed(*events)
            told.statuses.append(fed.status)
            told.events += [str(event["event"]) for event in events]
        told.slowest_s = max(told.slowest_s, time.monotonic() - began)
        await asyncio.sleep(0.05)
    return told


def event_of(user: str, request: str, position: int) -> dict[str, Any]:
    return {
        "event": f"{request}-{position}",
        "user": user,
        "request": request,
        "kind": "end",
        "position": position,
        "play_ms": 900,
    }


def by_user(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Each user's ids once, in the order of their first copies on the log."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for user, one in pairs:
        found[user].setdefault(one)
    return {user: list(ids) for user, ids in found.items()}


@refused
async def test_a_broker_killed_under_load_fails_no_request_and_then_has_every_event_in_order(
    world: World, own_broker: EmbeddedBroker, tmp_path: Path
) -> None:
    world.fill_catalogue()
    world.publish(1)
    settings = {"kafka_patience_s": 0.5, "exclude_shown": 12}
    async with acting(world, tmp_path, **settings) as actor:
        ended = asyncio.Event()
        visits = [asyncio.create_task(visit(actor, user, ended)) for user in USERS]
        await asyncio.sleep(1.0)
        world.close()
        await asyncio.to_thread(own_broker.kill)
        await asyncio.sleep(AWAY_S)
        assert await actor.ready() == []
        spooled = actor.service.spooled
        assert spooled > len(USERS)
        await asyncio.to_thread(own_broker.start)
        await until(lambda: actor.service.spooled == 0)
        await asyncio.sleep(1.0)
        ended.set()
        told = dict(zip(USERS, await asyncio.gather(*visits), strict=True))
        await asyncio.to_thread(world.publish, 2)
        await until(lambda: newest(actor))
        assert not actor.service.fault
    exposures = by_user((one.user, one.request) for one in world.exposures())
    feedback = by_user((one.user, one.event) for one in world.feedback())
    assert {status for one in told.values() for status in one.statuses} == {200}
    assert exposures == {user: one.requests for user, one in told.items()}
    assert feedback == {user: one.events for user, one in told.items()}
    assert max(one.slowest_s for one in told.values()) < 5.0


async def newest(actor: Actor) -> bool:
    return (await actor.arms())["learning"] == 2

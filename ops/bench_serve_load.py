"""The load of `dwell bench serve`: a client process of its own, over HTTP.

Notable choices
- *Open loop*: requests come at times fixed beforehand (exponential gaps), whether earlier ones were answered or not,
  and latency counts from that time. So a service that stalls is charged for all who would have come meanwhile
  (no coordinated omission), and a client that is late charges itself, not the schedule; `late_p99_s` says how late.
- *Closed loop*: so many clients, each with one request at a time: what the service can do at most.
- Answers are counted by status; a fallback slate, or one shorter than asked for, is no answer of the policy.
"""

import asyncio
import gc
import resource
import subprocess
import sys
import time
from typing import Final

import aiohttp
import msgspec
import numpy as np

from ops.errors import UserError

JSON: Final = {"Content-Type": "application/json"}
PATIENCE_S: Final = 10.0
"""An answer that takes longer is none."""


class Plan(msgspec.Struct, kw_only=True, frozen=True):
    """What a client process shall do."""

    url: str
    users: list[str]
    count: int
    """Items asked for."""
    seconds: float
    warm_s: float = 0.5
    """Requests of the beginning are made, and not counted."""
    rate: float = 0.0
    """Requests a second of an open loop; 0 is a closed one."""
    clients: int = 0
    """Of a closed loop."""
    seed: int = 1


class Outcome(msgspec.Struct, kw_only=True, frozen=True):
    """What came of it."""

    offered: int
    """Requests that fell into the counted time."""
    answered: int
    """By the policy, in full."""
    fallbacks: int
    short: int
    refused: int
    """429 or 503."""
    failed: int
    """Another status, no connection, or no answer in time."""
    per_second: float
    """Answered by the policy, over the time from the first counted request to the last answer."""
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    late_p99_s: float
    """How far behind its schedule the client itself was; 0 in a closed loop."""
    client_cpu: float
    """CPU seconds of the client a second."""


class _Item(msgspec.Struct):
    item: str


class _Slate(msgspec.Struct):
    items: list[_Item]
    fallback: bool


_slate: Final = msgspec.json.Decoder(_Slate)


def load(plan: Plan) -> Outcome:
    """Run a plan in a process of its own; raises `UserError` where that ends badly."""
    command = [sys.executable, "-m", "ops.bench_serve_load"]
    done = subprocess.run(
        command, input=msgspec.json.encode(plan), capture_output=True, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"the client of the bench ended with {said}.")
    return msgspec.msgpack.decode(done.stdout, type=Outcome)  # which has a word for infinity


class _Client:
    """Makes requests and notes what came of those that count."""

    def __init__(self, session: aiohttp.ClientSession, plan: Plan, counts_from: float) -> None:
        self._session = session
        self._counts_from = counts_from
        rng = np.random.default_rng(plan.seed)
        self._bodies = [
            msgspec.json.encode({"user": user, "count": plan.count})
            for user in rng.permutation(plan.users).tolist()
        ]
        self._count = plan.count
        self._next = 0
        self.took: list[float] = []
        self.late: list[float] = []
        self.statuses: dict[str, int] = {}
        self.ended = counts_from

    async def ask(self, due: float) -> None:
        """One request that was due at this time of the loop."""
        body = self._bodies[self._next % len(self._bodies)]
        self._next += 1
        began = time.perf_counter()
        try:
            async with self._session.post("/recommend", data=body, headers=JSON) as response:
                content, status = await response.read(), response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            content, status = b"", 0
        ended = time.perf_counter()
        if due < self._counts_from:
            return
        what = self._what(status, content)
        self.statuses[what] = self.statuses.get(what, 0) + 1
        self.ended = max(self.ended, ended)
        self.late.append(began - due)
        self.took.append(ended - due)

    def _what(self, status: int, content: bytes) -> str:
        if status != 200:
            return "refused" if status in (429, 503) else "failed"
        slate = _slate.decode(content)
        if slate.fallback:
            return "fallbacks"
        return "answered" if len(slate.items) == self._count else "short"


async def run(plan: Plan) -> Outcome:
    """Make the plan's requests."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(plan.url, connector=connector, timeout=timeout) as session:
        began = time.perf_counter() + 0.05
        client = _Client(session, plan, began + plan.warm_s)
        ends = began + plan.warm_s + plan.seconds
        gc.collect()
        gc.freeze()
        cpu_s = _cpu_s()
        if plan.rate:
            await _open_loop(client, plan, began, ends)
        else:
            await asyncio.gather(*(_closed_loop(client, ends) for _ in range(plan.clients)))
        cpu_s = _cpu_s() - cpu_s
        wall_s = time.perf_counter() - began
    took = np.array(client.took or [np.inf])
    answered = client.statuses.get("answered", 0)
    p50_s, p90_s, p99_s = (float(np.quantile(took, q)) for q in (0.5, 0.9, 0.99))
    return Outcome(
        offered=len(client.took),
        answered=answered,
        fallbacks=client.statuses.get("fallbacks", 0),
        short=client.statuses.get("short", 0),
        refused=client.statuses.get("refused", 0),
        failed=client.statuses.get("failed", 0),
        per_second=answered / max(plan.seconds, client.ended - began - plan.warm_s),
        p50_s=p50_s,
        p90_s=p90_s,
        p99_s=p99_s,
        max_s=float(took.max()),
        late_p99_s=float(np.quantile(client.late, 0.99)) if plan.rate and client.late else 0.0,
        client_cpu=cpu_s / wall_s,
    )


async def _open_loop(client: _Client, plan: Plan, began: float, ends: float) -> None:
    rng = np.random.default_rng([plan.seed, 1])
    under_way: set[asyncio.Task[None]] = set()
    due = began
    while due < ends:
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(client.ask(due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        due += float(rng.exponential(1.0 / plan.rate))
    if under_way:
        await asyncio.gather(*under_way)


async def _closed_loop(client: _Client, ends: float) -> None:
    while (now := time.perf_counter()) < ends or not client.took:  # however slow, one counts
        await client.ask(now)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    made = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    sys.stdout.buffer.write(msgspec.msgpack.encode(asyncio.run(run(made))))

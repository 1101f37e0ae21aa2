"""The simulated viewers as a live client: an open loop of requests, and the events that follow.

It knows the service only by its HTTP interface, and stands where an app's backend stands: the events of all viewers
are gathered for at most 100 ms into posts of at most 256. A catalogue that moves is written to Kafka, as the backend
would (ops/churn.py). Numbers and reasons: docs/simulator.md.
"""

import asyncio
import signal
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ops.churn import moving
from ops.config import Config
from ops.errors import UserError
from ops.served import append_lines, read_lines
from ops.settings import SimulateSettings
from ops.visits import Counts, Visits
from ops.warmup import world_of
from ops.world import World

TIMEOUT_S: Final = 5.0
"""An answer that takes longer counts as none."""
DRAIN_S: Final = 10.0
"""At the end nobody comes anew, and those who watch may go on this long."""
COUNTS_FILE: Final = "counts.json"
"""Beside the output: what happened in the last run, from the client's side."""


async def simulate(
    base_url: str,
    world: World,
    twins: Sequence[Mapping[str, str]],
    settings: SimulateSettings,
    out_path: Path,
    until: asyncio.Event,
    counts: Counts | None = None,
    metrics_port: int | None = None,
    drain_s: float = DRAIN_S,
) -> Counts:
    """Let viewers come to the service until `until` is set; append a line a request to `out_path`.

    `twins[p]` maps each arm to person p's user id there (`ops.world.all_twins`). Visits go on after
    the highest in `out_path`. `counts` may be given, to be watched during the run. Raises UserError
    if the file is of another kind, the metrics port is taken, or the service shows items not of
    this world.
    """
    counts = Counts() if counts is None else counts
    past, whole = read_lines(out_path)
    metrics = None if metrics_port is None else _serve_metrics(counts, metrics_port)
    try:
        with append_lines(out_path, whole) as out:
            async with aiohttp.ClientSession(
                base_url,
                connector=aiohttp.TCPConnector(limit=1024),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            ) as session:
                visits = Visits(session, world, twins, settings, out, counts, past)
                await visits.run(until, drain_s)
    finally:
        if metrics is not None:
            metrics.shutdown()
            metrics.server_close()
    return counts


def run(config: Config, for_s: float | None) -> Counts:
    """`dwell simulate`: viewers of the configured world call the actor until SIGTERM or `for_s` is over."""
    world, twins = world_of(config)
    base_url = f"http://{config.actor.host}:{config.actor.port}"
    out_path = Path(config.storage.data_dir) / "simulator" / "served.jsonl"

    async def main() -> Counts:
        until = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, until.set)
        if for_s is not None:
            loop.call_later(for_s, until.set)
        async with moving(config.kafka, config.simulate, until.set):
            return await simulate(base_url, world, twins, config.simulate, out_path, until)

    counts = asyncio.run(main())
    out_path.with_name(COUNTS_FILE).write_bytes(msgspec.json.encode(counts))
    return counts


def _serve_metrics(counts: Counts, port: int) -> Any:
    registry = CollectorRegistry()
    registry.register(_Metrics(counts))
    try:
        return start_http_server(port, registry=registry)[0]
    except OSError as error:
        raise UserError(
            f"metrics cannot be served on port {port} ({error.strerror}): name a free port"
        ) from None


class _Metrics(Collector):
    """`Counts` as Prometheus counters, read when they are asked for."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def collect(self) -> Iterable[CounterMetricFamily]:
        for name, value in vars(self.counts).items():
            yield CounterMetricFamily(
                f"dwell_simulator_{name}", f"Simulated viewers: {name}.", value=value
            )

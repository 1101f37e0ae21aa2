"""`dwell up`: starts the loop in order, shows it, stops it in order, and reports.

Start: broker, topics, a lineage (made by the demonstration or given), learner, streams, insights, actor, viewers.
Stop: the other way round, each after what feeds it, so that nothing is cut off; what is open stays open and is
finished by the next run on the same data directory.
"""

import math
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import msgspec
from rich.console import Console
from rich.progress import Progress

from ops.account import account
from ops.cluster import Cluster, held, open_cluster
from ops.config import Config
from ops.errors import UserError
from ops.monitor import MonitorThread
from ops.report import live_checks, live_results
from ops.results import exit_status, print_results, write_results
from ops.roles import Role, children_cpu_s, write_config
from ops.served import read_lines
from ops.simulate import COUNTS_FILE
from ops.start import PlacedShaping, Start, is_published, publish, write
from ops.view import View, watch

READY_S = 120.0
CATCH_UP_S = 10.0


def up(
    config: Config,
    demo: bool,
    for_s: float | None,
    json_path: Path | None,
    start_from: Path | None,
) -> int:
    """Run the loop for `for_s` seconds or until Ctrl-C; returns the exit status."""
    console = Console()
    data_dir = Path(config.storage.data_dir)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop in order, as at Ctrl-C
    if config.actor.port and not can_listen(config.actor.host, config.actor.port):
        raise UserError(
            f"port {config.actor.port} on {config.actor.host} is in use: stop what uses it, or choose "
            "another with --set actor.port=PORT (0 takes a free one)."
        )
    if start_from is not None:
        Start.at(start_from)
    with held(data_dir):
        with open_cluster(config, lambda line: console.print(line)) as cluster:
            run = _Run(cluster, demo, start_from, console)
            results = run.live(for_s)
            roles, restarts = run.cpu_seconds(), run.restarts()
            before = children_cpu_s()
        roles["broker"] = children_cpu_s() - before
    if results is None:
        return 0
    results["cpu_seconds"] = {**roles, "up": time.process_time()}
    results["restarts"] = restarts
    checks = live_checks(results)
    print_results(results, checks, console)
    if json_path is not None:
        seeds = [config.learn.seed, config.simulate.seed]
        write_results(json_path, "up --demo" if demo else "up", config, seeds, results, checks)
    return exit_status(checks)


class _Run:
    """The roles of one run on one cluster."""

    def __init__(
        self, cluster: Cluster, demo: bool, start_from: Path | None, console: Console
    ) -> None:
        self._config = cluster.config
        self._broker = cluster.broker
        self._demo = demo
        self._console = console
        self._data_dir = Path(self._config.storage.data_dir)
        self._roles: list[Role] = []
        self._ports = {name: free_port() for name in ("streams", "insights", "learner")}
        self._begin(start_from)

    def _begin(self, start_from: Path | None) -> None:
        """A lineage on the cluster: the one that is there, or a new one."""
        folder = self._data_dir / "start"
        if is_published(self._config.kafka):
            self._start = folder if (folder / "policy.safetensors").exists() else start_from
            return
        if start_from is not None:
            start = Start.at(start_from)
        elif self._demo:
            start = simulated_start(self._config, folder, self._console)
        else:
            raise UserError(
                "there is no policy on this cluster yet: name a start with --start-from DIR "
                "(`dwell pretrain` writes one), or try `dwell up --demo`."
            )
        publish(start, self._config.kafka)
        self._start = start.folder

    def live(self, for_s: float | None) -> dict[str, Any] | None:
        """Start all roles, watch, stop; the demonstration's figures, None without viewers."""
        monitor = MonitorThread(self._config.kafka)
        monitor.start()
        served = self._data_dir / "simulator" / "served.jsonl"
        try:
            port = self._start_roles()
            view = View(
                monitor, self._ports["streams"], served, self._config.simulate.items, self._console
            )
            address = f"http://{self._config.actor.host}:{port}"
            self._console.print(f"actor at {address} (API at {address}/docs)")
            if self._demo:
                self._roles.append(self._role("simulate", "--set", f"actor.port={port}"))
            started_ms = self._first_request(served) if self._demo else int(time.time() * 1000)
            try:
                running_s = time.time() - started_ms / 1000
                until = math.inf if for_s is None else time.monotonic() + for_s - running_s
                watch(view, until, self._check)
            except KeyboardInterrupt:
                pass
            ended_ms = int(time.time() * 1000)
            self._console.print("stopping in order")
            self._stop_roles(monitor)
        finally:
            for role in reversed(self._roles):
                role.stop(patience_s=5)
            observed = monitor.finish()
        if not self._demo:
            return None
        self._console.print("reading the log for the report")
        settled = account(self._config.kafka, self._config.join)
        lines, _ = read_lines(served)
        span = (started_ms, ended_ms)
        results = live_results(observed, settled, lines, self._config.simulate.items, span)
        counts = served.with_name(COUNTS_FILE)
        if counts.exists():
            results["client"] = msgspec.json.decode(counts.read_bytes())
        return results

    def _first_request(self, served: Path) -> int:
        """When the viewers began: their process needs some seconds to come up."""
        since = time.time()
        _, offset = read_lines(served)
        while time.time() - since < READY_S:
            lines, _ = read_lines(served, offset)
            if lines:
                return min(line.time_ms for line in lines)
            self._check()
            time.sleep(0.1)
        raise UserError(
            f"no viewer was served within {READY_S:.0f} s; see {self._data_dir / 'run'}."
        )

    def cpu_seconds(self) -> dict[str, float]:
        """CPU of each role, known after it was stopped."""
        return {role.name: role.cpu_seconds for role in self._roles}

    def restarts(self) -> dict[str, int]:
        """How often each role that was killed has been started again."""
        return {role.name: role.restarts for role in self._roles if role.restarts}

    def _start_roles(self) -> int:
        """Everything that serves and learns; returns the actor's port once it is ready."""
        port = self._config.actor.port or free_port()
        start = () if self._start is None else ("--start-from", str(self._start))
        for name, more in (("learner", start), ("streams", ()), ("insights", ())):
            metrics = ("--metrics-port", str(self._ports[name]))
            self._roles.append(self._role(name, *metrics, *more))
        self._roles.append(self._role("actor", "--set", f"actor.port={port}"))
        with self._console.status("waiting for the actor to be ready"):
            self._await(f"http://{self._config.actor.host}:{port}/ready")
            self._await(f"http://127.0.0.1:{self._ports['streams']}/metrics")
        return port

    def _role(self, name: str, *arguments: str) -> Role:
        folder = self._data_dir / "run"
        path = write_config(self._config, folder)
        return Role(name, ["--config", str(path), *arguments], folder)

    def _await(self, url: str) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            self._check()
            try:
                with urllib.request.urlopen(url, timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (URLError, OSError):
                time.sleep(0.1)
        raise UserError(
            f"{url} did not answer within {READY_S:.0f} s; see {self._data_dir / 'run'}."
        )

    def _check(self) -> None:
        """Start again what was killed; `UserError` when a part of the loop has ended by itself."""
        if self._broker is not None and not self._broker.alive:
            raise UserError(f"the broker ended by itself; {self._broker.log_file} says why.")
        for role in self._roles:
            role.check()

    def _stop_roles(self, monitor: MonitorThread) -> None:
        """Viewers, actor, streams, then, when it has caught up, the learner; insights last."""
        by_name: Mapping[str, Role] = {role.name: role for role in self._roles}
        for name in ("simulate", "actor", "streams"):
            if name in by_name:
                by_name[name].stop()
        deadline = time.monotonic() + CATCH_UP_S
        while time.monotonic() < deadline and not self._learned(monitor):
            time.sleep(0.1)
        for name in ("learner", "insights"):
            by_name[name].stop()

    def _learned(self, monitor: MonitorThread) -> bool:
        with monitor.lock:
            return monitor.monitor.seen.unpublished == 0


def simulated_start(config: Config, folder: Path, console: Console) -> Start:
    """Make the demonstration's start, with progress."""
    from ops.warmup import warm_start

    with Progress(console=console, transient=True) as progress:
        warm = warm_start(config, int(time.time() * 1000), phases(progress))
    console.print(
        f"pre-trained on the log of a mediocre policy: loss {warm.loss:.3f} nats per level"
    )
    return write(
        folder,
        warm.checkpoint(),
        warm.upserts,
        [history for seeds in warm.seeds for history in seeds.histories],
        [
            PlacedShaping(partition, state)
            for partition, seeds in enumerate(warm.seeds)
            for state in seeds.shaping
        ],
    )


def phases(progress: Progress) -> Callable[[str, int, int], None]:
    """One bar per phase; what follows a comma in its name may change."""
    bars: dict[str, Any] = {}

    def tell(what: str, done: int, total: int) -> None:
        name = what.partition(",")[0]
        if name not in bars:
            bars[name] = progress.add_task(what, total=total)
        progress.update(bars[name], completed=done, description=what)

    return tell


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_listen(host: str, port: int) -> bool:
    """Whether the port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True

"""`dwell bench kills`: join and insights under kill -9, freezes and rebalances, then the audit.

Notable choices
- Real parts: an embedded broker, two streams workers as processes, a producer of known truth, a consumer that
  holds what it took together with its position, as a learner does, and the insights' worker. Any of them dies at
  any moment.
- One disturbance at a time, in an order drawn from the seed; the next comes once samples flow again in every
  partition. Resuming = from the disturbance to the first sample after it in the slowest partition. The producer's
  own pauses are part of it. Where the insights' worker was killed, it is the first insight sent after it.
- The changelog of the shaping is kept whole (`keep_changelog`): the audit folds it anew from its beginning.
- A worker that is killed comes back under its name after a pause: shorter than the session (a restart) or longer
  (its partitions are taken over, and given back). A freeze longer than the session makes a zombie.
- Afterwards the producer writes what is left, the last deadlines pass, and everything is counted from the log:
  `missing` are requests that the producer had acknowledged and the log does not hold.
"""

import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from ops.admin import keep_changelog
from ops.audit_samples import audit_samples, figures
from ops.broker import FOLDER
from ops.cluster import Cluster, held, open_cluster
from ops.config import Config
from ops.errors import UserError
from ops.kills_insights import caught_up
from ops.kills_parts import taken
from ops.kills_plan import JOIN
from ops.kills_watch import Flow, Part
from ops.results import Check, report
from ops.roles import write_config
from streams.audit import Findings
from streams.topics import INSIGHTS, SAMPLES

RATE: Final = 40.0
"""Requests a second; about ten times as many events."""
SESSION_S: Final = 4.0
FLOW_S: Final = 90.0
"""Records that do not flow again within this are a failure of the bench itself."""
WORKERS: Final = ("one", "two")
KINDS: Final = (
    *("worker", "insights", "consumer", "producer", "broker"),
    *("worker", "freeze", "rebalance"),
)
"""Shares of the kinds; a short run has at least each death once."""


@dataclass
class Bench:
    """The parts, and what happens to them."""

    cluster: Cluster
    folder: Path
    seed: int
    tell: Callable[[str], None]
    workers: dict[str, Part] = field(default_factory=dict)
    resume_s: dict[str, list[float]] = field(default_factory=dict)
    disturbances: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Everything runs, samples flow, and what they add up to is published."""
        config = self.cluster.config
        bootstrap = config.kafka.bootstrap
        self.rng = random.Random(self.seed)
        self._config_file = str(write_config(config, self.folder / "run"))
        for name in WORKERS:
            self.workers[name] = self._worker_named(name)
        command = [sys.executable, "-m", "ops.cli", "insights", "--config", self._config_file]
        self.insights = Part("insights", command, self.folder)
        part = [sys.executable, "-m", "ops.kills_parts"]
        plan = [str(self.seed), str(int(time.time() * 1000)), str(RATE)]
        folder = str(self.folder)
        self.producer = Part("producer", [*part, "write", bootstrap, folder, *plan], self.folder)
        reads = [*part, "read", bootstrap, folder, str(config.kafka.partitions)]
        self.consumer = Part("consumer", reads, self.folder)
        self.flow = Flow(config.kafka)
        began = time.monotonic()
        for topic in (SAMPLES, INSIGHTS):
            self._resumed(began, topic)

    @property
    def parts(self) -> list[Part]:
        """All processes but the broker."""
        return [*self.workers.values(), self.producer, self.consumer, self.insights]

    def disturb(self, kind: str) -> None:
        """One disturbance, and how long it took until all flowed again."""
        time.sleep(self.rng.uniform(0.3, 1.5))
        self.disturbances[kind] += 1
        began = time.monotonic()
        getattr(self, f"_{kind}")()
        topic = INSIGHTS if kind == "insights" else SAMPLES
        self.resume_s.setdefault(kind, []).append(self._resumed(began, topic))

    def _worker_named(self, name: str) -> Part:
        command = [sys.executable, "-m", "ops.cli", "streams", "--config", self._config_file]
        more = ["--member", name, "--data-dir", str(self.folder / "workers")]
        return Part(name, [*command, *more], self.folder)

    def _worker(self) -> None:
        part = self.rng.choice(list(self.workers.values()))
        part.end(signal.SIGKILL)
        time.sleep(self.rng.choice([0, 0.5, 0.5, SESSION_S + 1.5]))
        part.again()

    def _consumer(self) -> None:
        self.consumer.end(signal.SIGKILL)
        self.consumer.again()

    def _producer(self) -> None:
        self.producer.end(signal.SIGKILL)
        time.sleep(self.rng.uniform(0, 1))
        self.producer.again()

    def _insights(self) -> None:
        self.insights.end(signal.SIGKILL)
        self.insights.again()

    def _broker(self) -> None:
        assert self.cluster.broker is not None
        self.cluster.broker.kill()
        self.cluster.broker.start()

    def _freeze(self) -> None:
        part = self.rng.choice(list(self.workers.values()))
        part.process.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.choice([1.0, SESSION_S + 2]))
        part.process.send_signal(signal.SIGCONT)

    def _rebalance(self) -> None:
        """A third worker joins, takes partitions over and dies: they change hands twice."""
        third = self._worker_named("three")
        self.workers["three"] = third
        time.sleep(self.rng.uniform(2, 2 + SESSION_S))
        third.end(signal.SIGKILL)
        del self.workers["three"]

    def _resumed(self, since: float, topic: str) -> float:
        give_up = time.monotonic() + FLOW_S
        while (took := self.flow.since(since, topic)) is None:
            for part in self.parts:
                part.check()
            if time.monotonic() > give_up:
                raise UserError(
                    f"{topic} did not flow again within {FLOW_S:.0f} s; the logs are in {self.folder}."
                )
            time.sleep(0.05)
        return took

    def finish(self) -> int:
        """The producer writes the rest, all deadlines pass, everything stops; the number of requests."""
        self.producer.process.send_signal(signal.SIGTERM)
        give_up = time.monotonic() + FLOW_S
        while self.producer.process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.1)
        written = self.folder / "requests"
        if not written.exists():
            raise UserError(f"the producer did not finish; see {self.folder / 'producer.log'}.")
        last = JOIN.cap_s + JOIN.lateness_s + self.cluster.config.streams.idle_grace_s
        time.sleep(last + 2)
        return int(written.read_text())

    def stop(self) -> None:
        """End what still runs."""
        if hasattr(self, "flow"):
            self.flow.stop()
        for part in self.workers.values():
            part.end(signal.SIGTERM)
        for name in ("consumer", "producer", "insights"):
            if hasattr(self, name):
                getattr(self, name).end(signal.SIGTERM)


def kinds_of(kills: int, seed: int) -> list[str]:
    """Disturbances in a drawn order, each kind as often as its share says."""
    kinds = [KINDS[number % len(KINDS)] for number in range(kills)]
    random.Random(seed).shuffle(kinds)
    return kinds


def run(config: Config, kills: int, seed: int, json: Path | None) -> int:
    """Bench, print, and return the exit status."""
    console = Console()
    folder = Path(config.storage.data_dir) / "bench-kills"
    if (folder / "requests").exists() or (folder / FOLDER).exists():
        raise UserError(f"{folder} holds an earlier bench; remove it, or name another --data-dir.")
    streams = replace(config.streams, session_s=SESSION_S)
    storage = replace(config.storage, data_dir=str(folder))
    join = replace(JOIN, order=config.join.order)
    config = replace(config, join=join, streams=streams, storage=storage)
    with held(folder), open_cluster(config, console.print) as cluster, console.status("") as status:
        if cluster.broker is None:
            raise UserError("the broker must be its own to be killed: leave --bootstrap out.")
        keep_changelog(cluster.config.kafka)
        bench = Bench(cluster, folder, seed, status.update)
        try:
            bench.start()
            for number, kind in enumerate(kinds_of(kills, seed), 1):
                status.update(f"{number} of {kills}: {kind}")
                bench.disturb(kind)
            status.update("writing the rest")
            requests = bench.finish()
            insights = caught_up(cluster.config.kafka, bench.insights.check)
        finally:
            bench.stop()
        status.update("auditing")
        found = audit_samples(cluster.config)
    results = {**results_of(bench, found, requests), "insights": insights}
    checks = checks_of(results)
    return report("dwell bench kills", config, [seed], results, checks, json, console)


def results_of(bench: Bench, found: Findings, requests: int) -> dict[str, Any]:
    """The figures of one bench."""
    lines = taken(bench.folder)
    at = Counter((line.partition, line.offset) for line in lines)
    results = figures(found)
    results["requests"] = requests
    results["missing"] = requests - found.exposures
    results["learner"] = {
        "taken": len(at),
        "twice": len(lines) - len(at),
        "requests": len({line.request for line in lines}),
    }
    results["disturbances"] = dict(bench.disturbances)
    results["resume"] = {
        kind: {
            "p50_s": float(np.quantile(seconds, 0.5)),
            "p99_s": float(np.quantile(seconds, 0.99)),
        }
        for kind, seconds in sorted(bench.resume_s.items())
    }
    return results


def checks_of(results: dict[str, Any]) -> list[Check]:
    """Nothing lost, doubled, mislabelled or stuck, and back in time."""
    learner = results["learner"]
    none = {
        name: results[name]
        for name in ("lost", "duplicated", "wrong_label", "unaccounted", "missing", "open")
    }
    none["insights.stuck"] = results["insights"]["stuck"]
    none["learner.twice"] = learner["twice"]
    none["learner.missing"] = results["samples"] - learner["requests"]
    checks = [Check(name, value, "0", value == 0) for name, value in none.items()]
    for kind, goal in (("worker", 10.0), ("broker", 30.0)):
        if kind in results["resume"]:
            took = results["resume"][kind]["p99_s"]
            name = f"resume.{kind}.p99_s"
            checks.append(Check(name, took, f"< {goal:.0f}", took < goal, correctness=False))
    return checks

"""`dwell bench join`: how fast join and shape are on a real broker, beside Faust with one table update an event.

Notable choices
- The worker is `dwell streams` as a process; rates come from the timestamps of the samples it committed, so that its
  start is not in them, and CPU seconds from the system. `events_per_cpu_second` is the rate a core could be given.
- The load: requests of four items with begin, heartbeat and end each, one event a record: 13 events a request.
- The baseline counts the same events in a Faust table (memory store, changelog on the same broker), in the same run.
- Open requests: as many as asked for wait, then the worker is killed and comes back. Resident memory is the
  difference to the same worker with none; `resident_growth` is that of ten times the requests.
- Latency: closable -> the sample is read, at a steady rate of events.
"""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from kafka import TopicPartition
from rich.console import Console

from ops.config import Config
from ops.errors import UserError
from ops.results import Check, report
from ops.streams_worker import Worker, Writer, all_read, empty_cluster, until
from streams.clients import consumer, records
from streams.events import (
    Exposure,
    Feedback,
    FeedbackKind,
    ShownItem,
    decode,
    sample_decoder,
)
from streams.settings import JoinSettings, KafkaSettings
from streams.topics import SAMPLES

ITEMS: Final = 4
EVENTS: Final = 1 + 3 * ITEMS
"""Events of a request."""
USERS: Final = 5000
PATIENCE_S: Final = 300.0
KINDS: Final[tuple[FeedbackKind, ...]] = ("begin", "heartbeat", "end")
FAST: Final = JoinSettings(
    window_s=20.0, cap_s=60.0, abandon_s=10.0, lateness_s=0.5, dedupe_horizon_s=3600.0
)
WAITING: Final = JoinSettings(
    window_s=3600.0, cap_s=7200.0, abandon_s=3600.0, lateness_s=10.0, dedupe_horizon_s=86_400.0
)


def request(number: int, time_ms: int) -> tuple[Exposure, list[Feedback]]:
    """One request's events: four plays of 30 ms, one after the other."""
    name, user = f"r{number}", f"user-{number % USERS}"
    items = [
        ShownItem(
            item=f"i{(number + position) % 997}",
            sid=(1, 2, 3),
            position=position,
            duration_ms=30_000,
            source="policy",
            logp_levels=(-1.0, -2.0, -3.0),
        )
        for position in range(ITEMS)
    ]
    shown = Exposure(
        request=name,
        user=user,
        time_ms=time_ms,
        arm="learning",
        policy_version=1,
        catalogue_version=1,
        decode_mode="sample",
        temperature=1.0,
        context=b"",
        excluded=b"",
        items=items,
    )
    feedback = [
        Feedback(
            event=f"{name}/{position}/{kind}",
            user=user,
            request=name,
            position=position,
            time_ms=time_ms + 30 * position + 10 * step,
            kind=kind,
            play_ms=1000 * step * (1 + number % 17),
        )
        for position in range(ITEMS)
        for step, kind in enumerate(KINDS)
    ]
    return shown, feedback


def write_requests(writer: Writer, count: int, t0_ms: int, spacing_ms: float) -> int:
    """Requests in order of time; returns the time after the last."""
    for number in range(count):
        shown, feedback = request(number, t0_ms + int(number * spacing_ms))
        writer.event(shown)
        for event in feedback:
            writer.event(event)
    return t0_ms + int(count * spacing_ms) + 1000


@dataclass
class Bench:
    """One run: each figure on a cluster of its own, below `folder`."""

    config: Config
    folder: Path
    tell: Callable[[str], None]

    def cluster(
        self, name: str, join: JoinSettings, tick: bool
    ) -> AbstractContextManager[tuple[Config, Path]]:
        """An empty cluster."""
        self.tell(name)
        return empty_cluster(self.config, self.folder / name, join, tick)

    def throughput(self, requests: int, workers: int) -> dict[str, float]:
        """Samples of a log that is there already, as fast as it goes."""
        with self.cluster(f"throughput-{workers}", FAST, tick=False) as (config, folder):
            writer = Writer(config.kafka)
            t0_ms = int(time.time() * 1000) - 3_000_000
            writer.tick(write_requests(writer, requests, t0_ms, 2.0) + 100_000)
            writer.flush()
            writer.close()
            running = [Worker(config, f"w{n}", folder) for n in range(workers)]
            try:
                stamps = self._stamps(config.kafka, requests, running)
                cpu_s = sum(worker.cpu_s() for worker in running) - self._idle_cpu_s
            finally:
                for worker in running:
                    worker.end()
        took = (stamps[-1] - stamps[0]) / 1000
        done = int((stamps > stamps[0]).sum())
        return {
            "events_per_second": EVENTS * done / took,
            "events_per_cpu_second": EVENTS * requests / cpu_s,
            "samples": float(len(stamps)),
        }

    def idle(self) -> None:
        """What a worker costs before it has anything to do."""
        with self.cluster("idle", FAST, tick=False) as (config, folder):
            worker = Worker(config, "w0", folder)
            try:
                until(lambda: worker.open_requests() == 0, [worker], PATIENCE_S)
                self._idle_cpu_s, self._idle_bytes = worker.cpu_s(), worker.resident()
            finally:
                worker.end()

    def faust(self, requests: int) -> float:
        """Events a second of the baseline, one table update each."""
        with self.cluster("faust", FAST, tick=False) as (config, folder):
            writer = Writer(config.kafka)
            write_requests(writer, requests, int(time.time() * 1000) - 3_000_000, 2.0)
            writer.flush()
            writer.close()
            command = [sys.executable, "-m", "ops.bench_join_faust", config.kafka.bootstrap]
            rate = folder / "faust-rate"
            more = [str(folder), str(requests * EVENTS), str(rate)]
            done = subprocess.run(
                [*command, *more], capture_output=True, text=True, timeout=PATIENCE_S, check=False
            )
        if done.returncode != 0:
            raise UserError(f"the baseline ended with {done.stderr.strip().splitlines()[-1:]}.")
        return float(rate.read_text())

    def waiting(self, requests: int) -> dict[str, float]:
        """Memory and recovery with many open requests."""
        with self.cluster(f"waiting-{requests}", WAITING, tick=False) as (config, folder):
            writer = Writer(config.kafka)
            t0_ms = int(time.time() * 1000) - 600_000
            for number in range(requests):
                shown, feedback = request(number, t0_ms + number * 500_000 // requests)
                writer.event(shown)
                writer.event(feedback[0])
            writer.flush()
            writer.close()
            worker = Worker(config, "w0", folder)
            try:
                until(lambda: all_read(config.kafka), [worker], PATIENCE_S)
                resident = worker.resident() - self._idle_bytes
                worker.end(signal.SIGKILL)
                began = time.monotonic()
                worker = Worker(config, "w0", folder)
                until(lambda: worker.open_requests() == requests, [worker], PATIENCE_S)
                recovery_s = time.monotonic() - began
            finally:
                worker.end()
            kept = (folder / "streams").rglob("*")
            on_disk = sum(path.stat().st_size for path in kept if path.is_file())
        return {
            "resident_bytes": float(resident),
            "resident_bytes_per_request": resident / requests,
            "state_bytes_per_request": on_disk / requests,
            "recovery_s": recovery_s,
        }

    def latency(self, events_per_second: float, seconds: float) -> dict[str, float]:
        """Closable -> read, while events come steadily."""
        with self.cluster("latency", FAST, tick=True) as (config, folder):
            worker = Worker(config, "w0", folder)
            waits: list[float] = []
            stopped = threading.Event()
            reader = threading.Thread(target=_read_waits, args=(config.kafka, waits, stopped))
            try:
                until(lambda: worker.open_requests() == 0, [worker], PATIENCE_S)
                reader.start()
                writer = Writer(config.kafka)
                count = int(events_per_second / EVENTS * seconds)
                began = time.time()
                for number in range(count):
                    due = began + number * EVENTS / events_per_second
                    time.sleep(max(0.0, due - time.time()))
                    shown, feedback = request(number, int(time.time() * 1000) - 130)
                    writer.event(shown)
                    for event in feedback:
                        writer.event(event)
                writer.flush()
                writer.close()
                until(lambda: len(waits) >= count, [worker], PATIENCE_S)
            finally:
                stopped.set()
                worker.end()
            reader.join()
        steady = np.array(waits[len(waits) // 10 :])
        return {
            "events_per_second": events_per_second,
            "p50_s": float(np.quantile(steady, 0.5)),
            "p99_s": float(np.quantile(steady, 0.99)),
        }

    def _stamps(self, kafka: KafkaSettings, count: int, workers: list[Worker]) -> Any:
        """Record timestamps of all samples, sorted, once there are `count`."""
        found: list[int] = []

        def enough() -> bool:
            found[:] = [
                record.timestamp
                for partition in range(kafka.partitions)
                for record in records(kafka.bootstrap, SAMPLES, partition)
            ]
            return len(found) >= count

        until(enough, workers, PATIENCE_S, pause_s=2.0)
        return np.sort(np.array(found))


def _read_waits(kafka: KafkaSettings, waits: list[float], stopped: threading.Event) -> None:
    client = consumer(kafka.bootstrap)
    places = [TopicPartition(SAMPLES, number) for number in range(kafka.partitions)]
    client.assign(places)
    for place in places:
        client.seek(place, 0)
    while not stopped.is_set():
        for batch in client.poll(timeout_ms=10).values():
            now_ms = time.time() * 1000
            closable = [decode(sample_decoder, record.value).closable_ms for record in batch]
            waits += [(now_ms - at_ms) / 1000 for at_ms in closable]
    client.close()


def run(config: Config, requests: int, waiting: int, json: Path | None) -> int:
    """Bench, print, and return the exit status."""
    if config.kafka.bootstrap:
        raise UserError("the bench fills clusters of its own: leave --bootstrap out.")
    console = Console()
    with console.status("") as status:
        folder = Path(config.storage.data_dir) / "bench-join"
        bench = Bench(config, folder, status.update)
        bench.idle()
        results: dict[str, Any] = {"events_per_request": EVENTS}
        results["workers_1"] = bench.throughput(requests, 1)
        results["faust_table_events_per_second"] = bench.faust(max(200, requests // 20))
        results["workers_2"] = bench.throughput(requests, 2)
        few, many = bench.waiting(waiting // 10), bench.waiting(waiting)
        results["waiting"] = {f"{waiting // 10}": few, f"{waiting}": many}
        results["resident_growth"] = many["resident_bytes"] / few["resident_bytes"]
        results["latency"] = bench.latency(2000.0, 20.0)
    rate = results["workers_1"]["events_per_second"]
    results["ratio_to_faust_table"] = rate / results["faust_table_events_per_second"]
    ratio, p99_s = results["ratio_to_faust_table"], results["latency"]["p99_s"]
    checks = [
        Check(
            "samples",
            results["workers_1"]["samples"],
            str(requests),
            results["workers_1"]["samples"] == requests,
        ),
        Check("ratio_to_faust_table", ratio, ">= 20", ratio >= 20, correctness=False),
        Check("latency.p99_s", p99_s, "< 0.5", p99_s < 0.5, correctness=False),
    ]
    return report("dwell bench join", config, [], results, checks, json, console)

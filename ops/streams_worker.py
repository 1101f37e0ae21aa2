"""The join as a process of its own on a cluster of its own, for benches and evaluations of it alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from kafka import TopicPartition

from ops.account import committed
from ops.cluster import open_cluster
from ops.config import Config
from ops.errors import UserError
from ops.roles import child_environment, write_config
from streams.clients import consumer, producer
from streams.events import Exposure, Feedback, Tick, encode
from streams.intake import partition_of
from streams.settings import JoinSettings, KafkaSettings
from streams.topics import EXPOSURES, FEEDBACK


@contextmanager
def empty_cluster(
    config: Config, folder: Path, join: JoinSettings, tick: bool
) -> Iterator[tuple[Config, Path]]:
    """An embedded broker without a past in `folder`; raises `UserError` where there is one already."""
    if folder.exists():
        raise UserError(f"{folder} holds an earlier run; remove it, or name another --data-dir.")
    folder.mkdir(parents=True)
    config = replace(
        config,
        join=join,
        streams=replace(config.streams, tick=tick, session_s=4.0),
        storage=replace(config.storage, data_dir=str(folder)),
    )
    with open_cluster(config, lambda _: None) as cluster:
        yield cluster.config, folder


class Writer:
    """Writes requests and ticks to a cluster."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._partitions = kafka.partitions
        self._client = producer(kafka.bootstrap, linger_ms=20, batch_size=1 << 17)

    def event(self, event: Exposure | Feedback) -> None:
        """One event, to its user's partition."""
        topic = EXPOSURES if isinstance(event, Exposure) else FEEDBACK
        partition = partition_of(event.user, self._partitions)
        self._client.send(topic, encode(event), event.user.encode(), partition=partition)

    def tick(self, time_ms: int) -> None:
        """All partitions have come to this time."""
        tick = encode(Tick(time_ms=time_ms, writer="bench"))
        for topic in (EXPOSURES, FEEDBACK):
            for partition in range(self._partitions):
                self._client.send(topic, tick, partition=partition)

    def flush(self) -> None:
        """Wait until all is written."""
        self._client.flush()

    def close(self) -> None:
        """Leave."""
        self._client.close()


class Worker:
    """`dwell streams` as a process."""

    def __init__(self, config: Config, name: str, folder: Path) -> None:
        self._partitions = config.kafka.partitions
        path = str(write_config(config, folder / "run"))
        command = [sys.executable, "-m", "ops.cli", "streams", "--config", path]
        more = ["--member", name, "--data-dir", str(folder)]
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *more],
                stdin=subprocess.PIPE,  # its end tells the worker that we are gone
                stdout=log,
                stderr=log,
                env=child_environment(),
            )

    def open_requests(self) -> int | None:
        """What it said it took up, over all partitions; None while it has not said so of each."""
        lines = [line for line in self.log.read_text().splitlines() if "open requests" in line]
        return (
            sum(int(line.split()[-3]) for line in lines) if len(lines) >= self._partitions else None
        )

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        parts = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal that ends it, and wait."""
        self._process.send_signal(how)
        self._process.wait(30)

    def check(self) -> None:
        """Raises `UserError` if it ended by itself."""
        if self._process.poll() is not None:
            raise UserError(f"a worker ended by itself; see {self.log}.")


def until(
    holds: Callable[[], bool], workers: Sequence[Worker], patience_s: float, pause_s: float = 0.2
) -> None:
    """Wait for it; raises `UserError` when a worker ended meanwhile, or it takes too long."""
    give_up = time.monotonic() + patience_s
    while not holds():
        for worker in workers:
            worker.check()
        if time.monotonic() > give_up:
            raise UserError(f"not done within {patience_s:.0f} s; see {workers[0].log}.")
        time.sleep(pause_s)


def all_read(kafka: KafkaSettings) -> bool:
    """Whether the join has committed its inputs to their ends, and with them all that came of them."""
    client = consumer(kafka.bootstrap)
    try:
        places = [
            TopicPartition(topic, number)
            for topic in (EXPOSURES, FEEDBACK)
            for number in range(kafka.partitions)
        ]
        ends = client.end_offsets(places)
    finally:
        client.close()
    upto = committed(kafka)
    return all(
        end <= (upto[number].exposures if topic == EXPOSURES else upto[number].feedback)
        for (topic, number), end in ends.items()
    )

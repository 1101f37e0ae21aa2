"""`dwell replay`: a real feed log through the live loop, tested before it is trained on.

Notable choices (contract of evidence, "Real logs")
- Streams and learner are the processes of a live run; the replayer stands for the actors and their viewers. It
  writes `exposures`, `feedback` and, in log time, the ticks; nothing ticks by the wall clock.
- A block of rows is scored before it is sent, here, with the newest version read from Kafka. Behind it a barrier:
  ticks at the log time reached, then wait until every request that the join's rule closes by then is a sample, and
  every sample is in a version that is applied here. So the figures do not depend on how fast the machine is.
- Without a barrier blocks are small, nothing is waited for, and the figures include the lag.
- All that the replayer knows comes from Kafka, as for an actor: a second log, of later rows, goes on where the
  first one ended. A log that begins before the join's watermark is refused: it would be censored as late.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from actor.users import Users
from learner.catalogue import Catalogue
from learner.presets import preset_of
from ops.account import account
from ops.applied import Applied
from ops.cluster import held, open_cluster
from ops.config import Config
from ops.errors import UserError
from ops.feedlog import EXPOSED, Log, class_counts, classify, open_log
from ops.lineage import begin, moment, refuse_the_past
from ops.log_requests import Block, Requests
from ops.pacing import Clock, Due
from ops.pretrain import bar
from ops.report import quantiles
from ops.results import Check, exit_status, print_results, write_results
from ops.roles import Role, children_cpu_s, write_config
from ops.scoreboard import POLICY, POPULARITY, K, Scoreboard, split_of
from ops.scoring import BATCH, Ranker
from streams.clients import producer, records
from streams.events import Exposure, Tick, UnreadableError, encode
from streams.intake import partition_of
from streams.topics import CATALOGUE, EXPOSURES, FEEDBACK, HISTORIES
from streams.weights import WeightError

WRITER: Final = "replay"
STALL_S: Final = 120.0
"""A barrier that sees nothing new for this long is broken, not slow."""
CATCH_UP_S: Final = 15.0
UNBARRED: Final = 256
"""Rows of a block without barriers: few, because the version may be as old as the block."""


def run(
    config: Config,
    directory: Path,
    speed: float | None,
    barrier: int,
    limit: int | None,
    json_path: Path | None,
    start_from: Path | None,
) -> int:
    """Replay the log in `directory`, or its first `limit` rows; returns the exit status.

    `speed` is log seconds per wall second (None: as fast as it goes), `barrier` requests between two waits
    (0: none).
    """
    console = Console()
    feed = open_log(directory)
    config = replace(config, streams=replace(config.streams, tick=False))
    with console.status("reading the log"):
        log = feed.read_log()
        log = Log(log.rows[:limit], log.malformed)
        codes = classify(log.rows)
    chosen = np.flatnonzero(codes == EXPOSED)
    if not len(chosen):
        raise UserError(f"{feed.directory} holds no exposure with a duration: nothing to replay.")
    cpu: dict[str, float] = {}
    began = time.monotonic()
    mine = time.process_time()
    with ExitStack() as stack:
        stack.enter_context(held(Path(config.storage.data_dir)))
        with open_cluster(config, lambda line: console.print(line)) as cluster:
            first_ms = int(log.rows["time_ms"][chosen[0]])
            refuse_the_past(cluster.config.kafka, first_ms)
            begun, start = begin(cluster, start_from, directory, console)
            replayer = _Replay(begun, start, first_ms, console)
            with console.status("reading the watch history"):
                board = Scoreboard(log.rows[chosen], feed.read_videos(), feed.read_history())
            results = replayer.live(log.rows, chosen, board, speed, barrier)
            cpu.update(replayer.cpu_seconds())
            before = children_cpu_s()
        if cluster.broker is not None:
            cpu["broker"] = children_cpu_s() - before
    cpu["replay"] = time.process_time() - mine
    counts = class_counts(log, codes)
    results = {
        "rows": sum(counts.values()),
        "classes": counts,
        **results,
        "cpu_seconds": cpu,
        "total_s": time.monotonic() - began,
    }
    checks = _checks(results)
    print_results(results, checks, console)
    if json_path is not None:
        write_results(json_path, "replay", begun, [config.learn.seed], results, checks)
    return exit_status(checks)


class _Replay:
    """One run over one log on one cluster."""

    def __init__(self, config: Config, start: Path | None, first_ms: int, console: Console) -> None:
        self._config = config
        self._kafka = config.kafka
        self._start = start
        self._first_ms = first_ms
        self._console = console
        self._folder = Path(config.storage.data_dir) / "run"
        self._roles: list[Role] = []
        self._due = Due(config.join)
        self._reached_ms = 0
        self._applied = Applied(self._kafka, config.shape.prior_plays, first_ms)
        self._producer = producer(self._kafka.bootstrap, linger_ms=10, batch_size=1 << 18)
        self._catalogue = Catalogue(config.policy.codes)
        for record in records(self._kafka.bootstrap, CATALOGUE):
            self._catalogue.take(record.offset, record.key, record.value)

    def live(
        self,
        rows: NDArray[np.void],
        chosen: NDArray[np.integer],
        board: Scoreboard,
        speed: float | None,
        barrier: int,
    ) -> dict[str, Any]:
        """Start the roles, send and score all rows, stop in order; the figures, of what was done if cut short."""
        torch.set_num_threads(1)
        context = preset_of(self._config.policy.shape).context
        requests = Requests(rows, chosen, self._users(), self._catalogue, context)
        ranker = Ranker(self._catalogue, board.number)
        whole = False
        try:
            self._start_roles()
            began = time.monotonic()
            first_version = self._version
            with bar(self._console) as progress, ThreadPoolExecutor(2) as pool:
                task = progress.add_task("replaying", total=len(chosen))
                clock = Clock(speed, self._first_ms)
                try:
                    for block in self._blocks(requests, barrier):
                        if block.rows:
                            board.take(self._rank(block, ranker, pool))
                        self._send(block, clock)
                        if barrier or not block.rows:
                            with clock.stopped():
                                self._barrier(at_end=not block.rows)
                        progress.update(task, completed=board.done, description=self._at(board))
                    whole = True
                except KeyboardInterrupt:
                    self._console.print("stopping in order")
            wall_s = time.monotonic() - began
            self._stop_roles()
            seen = self._applied.seen
        finally:
            for role in reversed(self._roles):
                role.stop(patience_s=5)
            self._applied.close()
            self._producer.close(timeout=5)
        with self._console.status("reading the log on Kafka for the report"):
            settled = account(self._kafka, self._config.join)
        return {
            "finished": whole,
            "requests": settled.requests,
            "samples": settled.samples,
            "open": settled.open,
            "lost": settled.lost,
            "duplicated": settled.duplicated,
            "dead_letters": dict(settled.dead_letters),
            "versions": seen.version,
            "versions_this_run": seen.version - first_version,
            "trained": seen.trained,
            "outcomes": dict(seen.outcomes),
            "barrier": barrier,
            **board.results(split_of(self._first_ms)),
            "own_weight": self._applied.own_weight,
            "freshness": quantiles(seen.freshness_s),
            "wall_s": wall_s,
            "rows_per_s": board.done / wall_s,
        }

    def cpu_seconds(self) -> dict[str, float]:
        """CPU of each role, known after it was stopped."""
        return {role.name: role.cpu_seconds for role in self._roles}

    @property
    def _version(self) -> int:
        policy = self._applied.policy
        return policy.version if policy is not None else 0

    def _blocks(self, requests: Requests, barrier: int) -> Iterator[Block]:
        while True:
            self._poll(0)
            block = requests.take(barrier or UNBARRED, self._version)
            yield block
            if not block.rows:
                return

    def _rank(self, block: Block, ranker: Ranker, pool: ThreadPoolExecutor) -> NDArray[np.int64]:
        """The policy's lists for a block, by two threads: torch and numpy let go of Python's lock."""
        policy = self._applied.policy
        assert policy is not None
        model = policy.model

        def rank(low: int) -> NDArray[np.int64]:
            part = slice(low, low + BATCH)
            return ranker.rank(model, block.users[part], block.contexts[part], K)

        return np.concatenate(list(pool.map(rank, range(0, len(block.rows), BATCH))))

    def _send(self, block: Block, clock: Clock) -> None:
        """Append a block's events, each when its time has come."""
        for event in block.events:
            clock.wait_for(event.time_ms)
            topic = EXPOSURES if isinstance(event, Exposure) else FEEDBACK
            place = partition_of(event.user, self._kafka.partitions)
            self._producer.send(topic, encode(event), event.user.encode(), partition=place)
            self._due.take(event)
            self._reached_ms = event.time_ms

    def _tick(self, time_ms: int) -> None:
        tick = encode(Tick(time_ms=time_ms, writer=WRITER))
        for number in range(self._kafka.partitions):
            for topic in (EXPOSURES, FEEDBACK):
                self._producer.send(topic, tick, partition=number)
        self._producer.flush()

    def _barrier(self, at_end: bool) -> None:
        """Tick, and wait until what can be closed is in an applied version; at the log's end, everything."""
        reached_ms = self._reached_ms
        watermark_ms = self._due.deadline_ms(reached_ms) if at_end else reached_ms
        self._tick(watermark_ms)
        due = self._due.at(watermark_ms)
        seen = self._applied.seen
        quiet = time.monotonic()
        while self._applied.closed < due or seen.unpublished:
            if self._poll(50):
                quiet = time.monotonic()
            elif time.monotonic() - quiet > STALL_S:
                raise UserError(
                    f"nothing has moved for {STALL_S:.0f} s: {self._applied.closed} of {due} requests are samples, "
                    f"version {seen.version} is the newest; see {self._folder}."
                )

    def _poll(self, timeout_ms: int) -> bool:
        """Read on; take a new version if there is one."""
        try:
            moved = self._applied.poll(timeout_ms)
            self._applied.apply(self._catalogue.codebook, self._config.policy.codes)
        except (WeightError, UnreadableError) as error:
            raise UserError(
                f"what the learner or the streams wrote cannot be used: {error}."
            ) from None
        if not moved:
            for role in self._roles:
                role.check()
        return moved

    def _start_roles(self) -> None:
        """Learner and streams; back when the first version is here."""
        path = write_config(self._config, self._folder)
        start = () if self._start is None else ("--start-from", str(self._start))
        for name, more in (("learner", start), ("streams", ())):
            self._roles.append(Role(name, ["--config", str(path), *more], self._folder))
        with self._console.status("waiting for the first version"):
            while self._applied.policy is None:
                self._poll(50)

    def _stop_roles(self) -> None:
        """Streams, then, when it has caught up, the learner."""
        by_name = {role.name: role for role in self._roles}
        by_name["streams"].stop()
        deadline = time.monotonic() + CATCH_UP_S
        while time.monotonic() < deadline:
            if not self._applied.poll(100) and not self._applied.seen.unpublished:
                break
        by_name["learner"].stop()

    def _users(self) -> Users:
        """What an actor knows of the users when it starts."""
        users = Users(self._config.actor)
        for number in range(self._kafka.partitions):
            for record in records(self._kafka.bootstrap, HISTORIES, number):
                users.take_history(record.key.decode(), record.value)
        return users

    def _at(self, board: Scoreboard) -> str:
        ours, theirs = board.recall(POLICY), board.recall(POPULARITY)
        now = f"{moment(self._reached_ms)} v{self._version}"
        return f"{now} recall@{K} {ours:.3f}, popularity {theirs:.3f}"


def _checks(results: dict[str, Any]) -> list[Check]:
    """Lost, doubled and missing samples are errors; the comparison with popularity is a goal."""
    requests, samples, still = results["requests"], results["samples"], results["open"]
    recall = results["recall_50"]
    checks = [
        Check("lost", results["lost"], "0", results["lost"] == 0),
        Check("duplicated", results["duplicated"], "0", results["duplicated"] == 0),
        Check(
            "samples",
            samples,
            f"{requests - still} (requests not open)",
            samples == requests - still,
        ),
    ]
    if not math.isnan(recall[POLICY]):
        least = recall["popularity"]
        ok = recall[POLICY] >= least
        checks.append(
            Check("recall_50.policy", recall[POLICY], f">= {least:.4f} (popularity)", ok, False)
        )
    return checks

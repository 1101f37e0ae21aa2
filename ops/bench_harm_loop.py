"""The loop that `dwell bench harm` does harm to: broker, streams, actor, viewers, and a learner that it may kill.

Notable choices
- Its parts are the roles of `dwell up`, but nobody starts a learner again before the bench says so: between the two
  stands what the bench publishes in the learner's place.
- The loop is well when for `WELL_S` all of the learning arm's answers are by versions newer than a given one, the arm
  follows the newest, and enough of them have come for the actor's own watch to let the version pass.
"""

import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar
from urllib.error import URLError

import msgspec
from rich.console import Console

from ops.bench_harm_log import Reader, Seen
from ops.cluster import Cluster
from ops.errors import UserError
from ops.roles import Role, write_config
from ops.simulate import COUNTS_FILE
from ops.start import publish
from ops.up import free_port, simulated_start
from streams.control import LEARNING_ARM
from streams.weights_log import manifests_after

READY_S: Final = 120.0
WELL_S: Final = 3.0
FEWEST: Final = 20
"""Answers of the learning arm in that time."""
CATCH_UP_S: Final = 2.0

T = TypeVar("T")


class Loop:
    """One run; `start`, then `stop` in any case."""

    def __init__(self, cluster: Cluster, folder: Path, tell: Callable[[str], None]) -> None:
        self.config = cluster.config
        self.folder = folder
        self._tell = tell
        self._roles: dict[str, Role] = {}
        self._learner: Role | None = None
        self.restarts = 0
        self.reader = Reader(self.config.kafka)

    def start(self, console: Console) -> None:
        """Make a lineage and start everything; returns when the first viewers have been served."""
        start = simulated_start(self.config, self.folder / "start", console)
        publish(start, self.config.kafka)
        self._start = start.folder
        self.reader.start()
        port = free_port()
        self._roles["streams"] = self._role("streams")
        self.start_learner()
        self._roles["actor"] = self._role("actor", "--set", f"actor.port={port}")
        self.wait("the actor to be ready", lambda: _answers(f"http://127.0.0.1:{port}/ready"))
        self._roles["simulate"] = self._role("simulate", "--set", f"actor.port={port}")
        self.wait("the first viewers", lambda: self.look(lambda seen: len(seen.answers)))

    def start_learner(self, *more: str) -> None:
        """Start it, or start it again, with `more` arguments."""
        self._learner = self._role("learner", "--start-from", str(self._start), *more)

    def kill_learner(self) -> None:
        """kill -9."""
        assert self._learner is not None
        os.kill(self._learner.pid, signal.SIGKILL)
        self._learner.stop()
        self._learner = None
        self.restarts += 1

    def look(self, at: Callable[[Seen], T]) -> T:
        """What is seen now."""
        with self.reader.lock:
            return at(self.reader.seen)

    def wait(self, what: str, true: Callable[[], object]) -> None:
        """Wait until it is so; raises `UserError` when it does not come to be, or a part ends."""
        if not self.waited(what, true, READY_S):
            raise UserError(f"{what}: not within {READY_S:.0f} s; see {self.folder / 'run'}.")

    def waited(self, what: str, true: Callable[[], object], patience_s: float) -> bool:
        """Wait until it is so, at most so long; whether it came to be. Raises `UserError` when a part ends."""
        self._tell(f"waiting for {what}")
        give_up = time.monotonic() + patience_s
        while not true():
            self._check()
            if time.monotonic() > give_up:
                return False
            time.sleep(0.05)
        return True

    def wait_until_well(self, after: int) -> None:
        """The learning arm serves versions newer than `after`, and has done so for a while."""
        self.wait(f"versions after {after}", lambda: self.look(lambda seen: is_well(seen, after)))

    def newest(self) -> int:
        """The newest version on the log."""
        return manifests_after(self.config.kafka.bootstrap, 0)[-1].version

    def stop(self) -> Seen:
        """Viewers, actor, streams, then the learner; what the log has to say in the end."""
        try:
            for name in ("simulate", "actor", "streams"):
                if name in self._roles:
                    self._roles[name].stop()
            if self._learner is not None:
                time.sleep(CATCH_UP_S)
                self._learner.stop()
        finally:
            seen = self.reader.finish() if self.reader.is_alive() else self.reader.seen
        return seen

    def client(self) -> dict[str, int]:
        """What the viewers' client counted, once it has ended."""
        path = self.folder / "simulator" / COUNTS_FILE
        counts: dict[str, int] = msgspec.json.decode(path.read_bytes())
        return counts

    def _role(self, name: str, *arguments: str) -> Role:
        folder = self.folder / "run"
        path = write_config(self.config, folder)
        return Role(name, ["--config", str(path), *arguments], folder)

    def _check(self) -> None:
        roles = [*self._roles.values(), *([self._learner] if self._learner else [])]
        for role in roles:
            role.check()


def is_well(seen: Seen, after: int, now_ms: int | None = None) -> bool:
    """Whether the learning arm follows the newest version, and for `WELL_S` was only served by newer than `after`."""
    now_ms = round(time.time() * 1000) if now_ms is None else now_ms
    if LEARNING_ARM in seen.control.pinned:
        return False
    late = [
        answer
        for answer in seen.answers[-4000:]
        if answer.arm == LEARNING_ARM and answer.time_ms > now_ms - 1000 * WELL_S
    ]
    return len(late) >= FEWEST and all(answer.version > after for answer in late)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status) == 200
    except (URLError, OSError):
        return False

"""The processes of the loop: started with one configuration, watched, and stopped in order.

A role's output goes to a file below the data directory. Stopping is SIGTERM, and SIGKILL for one that does not
listen. A role that was killed (kill -9, out of memory) is started again: whatever dies, nothing is lost by it. One
that ended by itself has said why, and would say it again.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from ops.config import Config
from ops.config_text import commented_toml
from ops.errors import UserError

PATIENCE_S = 15.0
EARLY_S = 10.0
EARLY_DEATHS = 3
"""So many deaths in a row, each so soon after the start, and it is given up."""
WITH_PARENT = "DWELL_WITH_PARENT"
"""Set in a role's environment: end when standard input ends."""


class Role:
    """One process of the loop."""

    def __init__(self, name: str, arguments: list[str], folder: Path) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        self.cpu_seconds = 0.0
        self.restarts = 0
        self._arguments = arguments
        self._early_deaths = 0
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ops.cli", self.name, *self._arguments],
                stdin=subprocess.PIPE,  # its end tells the role that we are gone
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(),
                start_new_session=True,  # Ctrl-C reaches us alone: we stop the roles in order
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def check(self) -> None:
        """Start it again if it was killed.

        Raises `UserError` with its last word when it has ended by itself, or is killed again and again.
        """
        if self.alive:
            return
        status = self._process.returncode
        if status >= 0:
            raise UserError(
                f"{self.name} ended by itself (status {status}): {last_line(self.log_file)}; "
                f"see {self.log_file}."
            )
        early = time.monotonic() - self._started < EARLY_S
        self._early_deaths = self._early_deaths + 1 if early else 0
        if self._early_deaths == EARLY_DEATHS:
            raise UserError(
                f"{self.name} was killed {EARLY_DEATHS} times within {EARLY_S:.0f} s of its start, last by signal "
                f"{-status}; see {self.log_file}, and whether memory is short."
            )
        if self._process.stdin is not None:
            self._process.stdin.close()
        self.restarts += 1
        self._start()

    def stop(self, patience_s: float = PATIENCE_S) -> None:
        """SIGTERM, then SIGKILL after `patience_s`; `cpu_seconds` is known afterwards."""
        before = children_cpu_s()
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self.cpu_seconds += children_cpu_s() - before


def child_environment() -> dict[str, str]:
    """Of a process that reads a resolved configuration and ends with us."""
    ours = {key: value for key, value in os.environ.items() if not _is_ours(key)}
    return {**ours, WITH_PARENT: "1"}


def end_with_parent() -> None:
    """In a role: when whoever started it is gone (killed, even), end as if told to; called once, early."""
    if os.environ.pop(WITH_PARENT, None) is None:
        return

    def wait() -> None:
        while os.read(0, 1):  # not through sys.stdin: its lock, held here, would abort the exit
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE_S)
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def write_config(config: Config, folder: Path) -> Path:
    """The configuration that the roles of one run share."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(commented_toml(config), encoding="utf-8")
    return path


def last_line(path: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def _is_ours(variable: str) -> bool:
    """The configuration is resolved already; the environment must not be applied twice."""
    return variable.startswith("DWELL_")


def children_cpu_s() -> float:
    """CPU seconds of the child processes reaped so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime

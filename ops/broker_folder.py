"""The embedded broker's folder: its configuration, its ports, its lock and its log.

Notable choices
- The JVM inherits the lock, so the folder stays locked as long as a JVM lives in it, whatever became of the
  process that started it.
- Ports lie below the range from which systems take outgoing ports: clients that knock while the broker is away
  can then not take its port themselves. They are kept, so that clients find a restarted broker where it was.
- Paths in the configuration are relative to the folder: a data directory may be moved or renamed.
"""

import fcntl
import json
import os
import random
import re
import socket
import time
from pathlib import Path
from typing import IO, Final

from ops.errors import UserError

HOST: Final = "127.0.0.1"
PORTS: Final = range(19_000, 32_000)
LOG: Final = "broker.log"
SERVER: Final = "server.properties"
ORPHAN_TIMEOUT_S: Final = 5.0
"""How long a broker whose owner died is given to end by itself."""

_SERVER: Final = """\
# Written at each start.
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=data
auto.create.topics.enable=false
# One node holds the only replica of everything.
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
# Waits that only help larger clusters.
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
# Small: two cores and a heap of 384 MB.
num.network.threads=2
num.io.threads=4
background.threads=2
log.cleaner.dedupe.buffer.size=33554432
log.retention.check.interval.ms=60000
"""

_LOGGING: Final = """\
# Written at each start.
status = error
shutdownHook = disable
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = broker.log
appender.file.filePattern = broker.log.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d %p %m (%c{1})%n
appender.file.policies.type = SizeBasedTriggeringPolicy
appender.file.policies.size = 16MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
logger.config.name = org.apache.kafka.common.config.AbstractConfig
logger.config.level = warn
logger.cleaner.name = org.apache.kafka.storage.internals.log.LogCleaner
logger.cleaner.level = warn
"""

_TELLING: Final = re.compile(r"\b(ERROR|FATAL)\b|Exception|Error\b")
_KEPT_PORTS: Final = "ports.json"


def configure(folder: Path) -> int:
    """Write the configuration and return the broker's port: that of the last start if it is still free."""
    wanted = list(kept_ports(folder) or (0, 0))
    chosen: list[int] = []
    for port in wanted:
        while not port or port in chosen or not _free(port):
            port = random.SystemRandom().choice(PORTS)
        chosen.append(port)
    broker, controller = chosen
    if chosen != wanted:
        (folder / _KEPT_PORTS).write_text(
            json.dumps({"broker": broker, "controller": controller}) + "\n"
        )
    (folder / SERVER).write_text(_SERVER.format(host=HOST, port=broker, controller_port=controller))
    (folder / "log4j2.properties").write_text(_LOGGING)
    return broker


def kept_ports(folder: Path) -> tuple[int, int] | None:
    """Ports of broker and controller at the last start."""
    try:
        kept = json.loads((folder / _KEPT_PORTS).read_text())
        return int(kept["broker"]), int(kept["controller"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_ports(folder: Path) -> None:
    """Let the next start choose others."""
    (folder / _KEPT_PORTS).unlink(missing_ok=True)


def lock(folder: Path) -> IO[str]:
    """The locked lock file of the folder; raises `UserError` naming the process that holds it."""
    file = (folder / "lock").open("a+")
    give_up = time.monotonic() + ORPHAN_TIMEOUT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner, broker = _holder(file)
            owned = _runs(owner)
            if not owned and time.monotonic() < give_up:
                time.sleep(0.1)
                continue
            file.close()
            if owned:
                raise UserError(
                    f"The embedded broker in {folder} is in use by process {owner}; stop that one first, "
                    "or use another data directory."
                ) from None
            raise UserError(
                f"A broker left over by a process that died still runs in {folder} as process {broker}; "
                f"end it with: kill {broker}"
            ) from None
        sign(file, broker=0)
        return file


def sign(file: IO[str], broker: int) -> None:
    """Leave in the locked file who we are, and which process the broker is."""
    file.seek(0)
    file.truncate()
    json.dump({"owner": os.getpid(), "broker": broker}, file)
    file.flush()


def unlock(file: IO[str]) -> None:
    """Give the folder back, also on behalf of forked children that hold the same descriptor."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def log_size(folder: Path) -> int:
    """Bytes of the log as it stands; the mark behind which `telling_line` looks."""
    log = folder / LOG
    return log.stat().st_size if log.exists() else 0


def telling_line(folder: Path, since: int) -> str:
    """The last line of the log behind byte `since` that names an error; else the last line."""
    with (folder / LOG).open("rb") as file:
        file.seek(since if since <= log_size(folder) else 0)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.strip() and not line.startswith("\tat ")]
    errors = [line for line in said if _TELLING.search(line)]
    return (errors or said or ["nothing"])[-1][:400]


def _holder(file: IO[str]) -> tuple[int, int]:
    file.seek(0)
    try:
        signed = json.load(file)
        return int(signed["owner"]), int(signed["broker"])
    except (ValueError, KeyError, TypeError):
        return 0, 0


def _runs(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _free(port: int) -> bool:
    with socket.socket() as probe:
        # As the JVM binds: connections of a killed broker that linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True

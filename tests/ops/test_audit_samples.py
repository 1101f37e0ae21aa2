"""What the audit takes for the beginning of a partition's shaping, on a real broker."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import KafkaAdminClient, TopicPartition

from ops.admin import ensure_topics
from ops.audit_samples import seeds_of
from ops.broker import EmbeddedBroker
from streams.clients import producer
from streams.events import BucketShaping, QuantileShaping, Shaping, UserShaping, encode
from streams.settings import KafkaSettings
from streams.state import shaping_key
from streams.topics import SAMPLES, SHAPING

STATES: list[Shaping] = [
    UserShaping(arm="a", user="u", plays={1: [(5, 6)]}),
    BucketShaping(arm="a", bucket=1, counts={2: 1.0}),
    QuantileShaping(arm="a", weights=b"\x00" * 2048, weight=1.0),
]
NUMBERS = iter(range(8))


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaSettings]:
    with EmbeddedBroker(tmp_path_factory.mktemp("audit")) as running:
        settings = KafkaSettings(bootstrap=running.bootstrap, partitions=8)
        ensure_topics(running.bootstrap, settings)
        yield settings


@pytest.fixture
def number() -> int:
    return next(NUMBERS)


def write(client: Any, number: int, states: list[Shaping]) -> None:
    for state in states:
        key = shaping_key(state).encode()
        client.send(SHAPING, encode(state), key, partition=number).get(timeout=30)


def transaction(kafka: KafkaSettings, number: int, commit: bool) -> int:
    """A sample with its changes; returns when it began."""
    client = producer(kafka.bootstrap, transactional_id=f"join-{number}")
    client.init_transactions()
    client.begin_transaction()
    time.sleep(0.01)
    began_ms = int(time.time() * 1000)
    client.send(SAMPLES, b"a sample", partition=number)
    write(client, number, STATES)
    if commit:
        client.commit_transaction()
    else:
        client.abort_transaction()
    client.close()
    return began_ms


def test_what_a_start_wrote_before_the_first_sample(kafka: KafkaSettings, number: int) -> None:
    client = producer(kafka.bootstrap)
    write(client, number, STATES)
    client.close()
    assert seeds_of(kafka, number, transaction(kafka, number, commit=True)) == STATES


def test_nothing_where_the_first_record_came_with_the_first_sample(
    kafka: KafkaSettings, number: int
) -> None:
    assert seeds_of(kafka, number, transaction(kafka, number, commit=True)) == []


def test_what_was_aborted_is_no_beginning(kafka: KafkaSettings, number: int) -> None:
    """A join that was killed in its first transaction."""
    transaction(kafka, number, commit=False)
    assert seeds_of(kafka, number, transaction(kafka, number, commit=True)) == []


def test_a_beginning_that_is_no_longer_there_is_not_guessed(
    kafka: KafkaSettings, number: int
) -> None:
    client = producer(kafka.bootstrap)
    write(client, number, STATES * 2)
    client.close()
    began_ms = transaction(kafka, number, commit=True)
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap) as admin:
        admin.delete_records({TopicPartition(SAMPLES, number): 1})
    assert seeds_of(kafka, number, began_ms) is None


def test_a_population_without_its_quantile_is_not_a_beginning(
    kafka: KafkaSettings, number: int
) -> None:
    client = producer(kafka.bootstrap)
    write(client, number, STATES[:2])
    client.close()
    assert seeds_of(kafka, number, transaction(kafka, number, commit=True)) is None

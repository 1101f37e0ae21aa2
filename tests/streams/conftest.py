"""A broker of these tests' own: they fill the topics that other tests count in."""

import logging
from collections.abc import Iterator
from itertools import count

import pytest

from streams.intake import partition_of
from streams.settings import KafkaSettings

PARTITIONS = 24


@pytest.fixture(autouse=True)
def own_words(caplog: pytest.LogCaptureFixture) -> None:
    """A test that fails shows what the processes said."""
    caplog.set_level(logging.INFO, "dwell")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaSettings]:
    """A real broker with all topics; each test uses partitions that no other does."""
    from ops.admin import ensure_topics  # not before the filters of ../conftest.py hold
    from ops.broker import EmbeddedBroker

    with EmbeddedBroker(tmp_path_factory.mktemp("streams")) as running:
        settings = KafkaSettings(bootstrap=running.bootstrap, partitions=PARTITIONS)
        ensure_topics(running.bootstrap, settings)
        yield settings


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    """Partition numbers not yet used; where the examples of docs/events.md write is no test's own."""
    return (number for number in count() if number != partition_of("ann", PARTITIONS))


@pytest.fixture
def partition(numbers: Iterator[int]) -> int:
    """A partition for this test alone."""
    number = next(numbers)
    assert number < PARTITIONS, "more tests than partitions: raise PARTITIONS"
    return number

"""A real broker whose topics are new for each test."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import pytest
from kafka import KafkaAdminClient, KafkaConsumer

from ops.admin import ensure_topics
from streams.blocks import State
from streams.clients import producer
from streams.settings import KafkaSettings
from streams.topics import topics
from streams.weights import Manifest, WeightError
from streams.weights_log import walk

if TYPE_CHECKING:
    from kafka import KafkaProducer

    from ops.broker import EmbeddedBroker

P = ParamSpec("P")
T = TypeVar("T")

PARTITIONS = 2

_ignored = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
_outage = pytest.mark.usefixtures("outage")


def refused(test: Callable[P, T]) -> Callable[P, T]:
    """Marks a test that is without a broker for a while: kafka-python leaves it to the garbage to close what was
    refused."""
    return _ignored(_outage(test))


@contextmanager
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Drop kafka-python's log records, which keep its garbage alive; in the end wait for its threads, and collect."""
    with caplog.at_level(logging.CRITICAL, "kafka"):
        yield
        deadline = time.monotonic() + 30
        while _sending() and time.monotonic() < deadline:
            time.sleep(0.05)
        gc.collect()


def _sending() -> bool:
    return any(thread.name.endswith("-network-thread") for thread in threading.enumerate())


def renewed(broker: EmbeddedBroker) -> KafkaSettings:
    """The broker's topics, empty."""
    settings = KafkaSettings(bootstrap=broker.bootstrap, partitions=PARTITIONS)
    names = {topic.name for topic in topics(settings)}
    with (
        closing(KafkaAdminClient(bootstrap_servers=broker.bootstrap)) as admin,
        closing(KafkaConsumer(bootstrap_servers=broker.bootstrap)) as client,
    ):
        there = names & set(client.topics())
        if there:
            admin.delete_topics(list(there))
    ensure_topics(broker.bootstrap, settings)
    return settings


@contextmanager
def writing(kafka: KafkaSettings) -> Iterator[KafkaProducer]:
    """A producer; all is written when the block ends."""
    with closing(producer(kafka.bootstrap)) as client:
        yield client
        client.flush(30)


def published(kafka: KafkaSettings) -> list[tuple[Manifest, State]]:
    """The versions in the log, each whole and verified, in order."""
    found = []
    with closing(walk(kafka.bootstrap)) as versions:
        for manifest, version in versions:
            assert not isinstance(version, WeightError), version
            found.append((manifest, version.state))
    return found

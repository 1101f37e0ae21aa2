"""Fixtures of the learner's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from ops.broker import EmbeddedBroker
    from streams.settings import KafkaSettings
    from tests.learner.lineage import Lineage

torch.set_num_threads(1)  # these policies are small, and other processes work beside


@pytest.fixture(scope="package")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker of this package's own: topics are deleted, and it is stopped and started."""
    from ops.broker import EmbeddedBroker

    with EmbeddedBroker(tmp_path_factory.mktemp("learner-kafka")) as running:
        yield running


@pytest.fixture
def kafka(own_broker: EmbeddedBroker) -> KafkaSettings:
    """A cluster with all topics, empty."""
    from tests.learner.cluster import renewed

    if not own_broker.alive:
        own_broker.start()
    return renewed(own_broker)


@pytest.fixture
def outage(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Of tests marked `refused`."""
    from tests.learner.cluster import quiet

    with quiet(caplog):
        yield


@pytest.fixture
def lineage(kafka: KafkaSettings, tmp_path: Path) -> Lineage:
    """A lineage that has not begun."""
    from tests.learner.lineage import made

    return made(kafka, tmp_path)

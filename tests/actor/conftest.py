"""Fixtures of the actor's tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ops.broker import EmbeddedBroker
    from tests.actor.world import World

torch.set_num_threads(1)  # these policies are small, and other processes work beside


@pytest.fixture(scope="package")
def own_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A broker of this package's own: topics are deleted, and it is stopped and started."""
    from ops.broker import EmbeddedBroker

    with EmbeddedBroker(tmp_path_factory.mktemp("actor-kafka")) as running:
        yield running


@pytest.fixture
def world(own_broker: EmbeddedBroker) -> Iterator[World]:
    """A cluster with empty topics, and what others write to it."""
    from tests.actor.world import World
    from tests.learner.cluster import renewed

    if not own_broker.alive:
        own_broker.start()
    made = World(renewed(own_broker))
    yield made
    made.close()


@pytest.fixture
def outage(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Of tests marked `refused`."""
    from tests.learner.cluster import quiet

    with quiet(caplog):
        yield

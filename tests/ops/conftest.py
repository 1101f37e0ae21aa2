"""A broker for the tests that write a whole log by hand: what they write would mislead the others."""

from collections.abc import Iterator

import pytest

from streams.settings import KafkaSettings


@pytest.fixture(scope="session")
def made_log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaSettings]:
    """A real broker with all topics."""
    from ops.admin import ensure_topics  # not before the filters of ../conftest.py hold
    from ops.broker import EmbeddedBroker

    with EmbeddedBroker(tmp_path_factory.mktemp("log")) as running:
        settings = KafkaSettings(bootstrap=running.bootstrap, partitions=32)
        ensure_topics(running.bootstrap, settings)
        yield settings

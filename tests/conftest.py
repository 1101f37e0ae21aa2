"""Fixtures that more than one package's tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from ops.broker import EmbeddedBroker


def pytest_configure(config: pytest.Config) -> None:
    """What the libraries do and we cannot mend.

    kafka-python reads its schemas through functions that Python 3.11 deprecates; aiokafka drops a connection when
    its client is closed while the connection is made.
    """
    config.addinivalue_line("filterwarnings", "ignore:Unclosed AIOKafkaConnection:ResourceWarning")
    for name in ("read_text", "open_text"):
        config.addinivalue_line("filterwarnings", f"ignore:{name} is deprecated:DeprecationWarning")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # a shell ignores Ctrl-C in what it starts in the background, and all that is started from there inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes tells of the machine.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """A real broker for all tests; those that stop or kill one start their own."""
    from ops.broker import EmbeddedBroker  # not before the filters above hold

    with EmbeddedBroker(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture
def bootstrap(broker: EmbeddedBroker) -> str:
    """Address of the shared broker."""
    return broker.bootstrap

"""The processes of `dwell bench kills`, and what flows between them as it is seen from outside."""

import signal
import subprocess
import threading
import time
from pathlib import Path

from kafka import TopicPartition

from ops.errors import UserError
from ops.roles import child_environment
from streams.clients import consumer
from streams.settings import KafkaSettings
from streams.topics import INSIGHTS, SAMPLES


class Part:
    """A process that is killed and started again; what it says goes into a file."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self._command = command
        self._log = folder / f"{name}.log"
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,  # its end tells the part that we are gone
                stdout=log,
                stderr=log,
                env=child_environment(),
            )

    def check(self) -> None:
        """Raises `UserError` if it ended by itself."""
        if self.process.poll() not in (None, -signal.SIGKILL, -signal.SIGTERM):
            raise UserError(
                f"{self.name} ended by itself with status {self.process.returncode}; see {self._log}."
            )

    def end(self, how: signal.Signals) -> None:
        """Send a signal that ends it, and wait."""
        self.process.send_signal(how)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def again(self) -> None:
        """Start it once more."""
        self.process = self._started()


class Flow:
    """When records last came in each partition of `samples` and `insights`, watched from outside.

    An insight counts from when it was sent: one that was on its way when the worker died says nothing.
    """

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        samples = [TopicPartition(SAMPLES, number) for number in range(kafka.partitions)]
        self._last = dict.fromkeys([*samples, TopicPartition(INSIGHTS, 0)], 0.0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def since(self, moment: float, topic: str) -> float | None:
        """Seconds from `moment` until records had come again in all of a topic; None while they have not."""
        first = min(last for place, last in self._last.items() if place.topic == topic)
        return first - moment if first > moment else None

    def stop(self) -> None:
        """No more watching."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        client = consumer(self._kafka.bootstrap, reconnect_backoff_max_ms=500)
        client.assign(list(self._last))
        for place, end in client.end_offsets(list(self._last)).items():
            client.seek(place, end)
        while not self._stopped.is_set():
            for place, batch in client.poll(timeout_ms=50).items():
                age_s = time.time() - batch[-1].timestamp / 1000 if place.topic == INSIGHTS else 0.0
                self._last[place] = time.monotonic() - age_s
        client.close()

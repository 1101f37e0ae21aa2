"""What `dwell bench weights` publishes: a policy that moves as a learner would move it.

Notable choices
- Every dense value moves at each version, as under AdamW, and of the user table the rows of the requests that a
  version learned from (100 requests/s, 5 versions/s). Sizes and times of a version depend on what moved, not on why.
- How far values move is drawn beforehand, and taken from another place at each version: drawing millions of numbers
  would take longer than publishing them.
- Versions are published by the learner's own publisher, with checkpoints left out: they are the learner's time, not
  the transport's.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from learner.checkpoint import Progress, load
from learner.policy import USERS
from learner.publication import Publisher, Terms
from ops.bench_serve_parts import actors
from ops.broker import running_broker
from ops.config import Config
from ops.start import Start
from streams.blocks import State
from streams.clients import records
from streams.events import decode
from streams.topics import WEIGHTS_ACKS
from streams.weights import Manifest, ack_decoder
from streams.weights_log import version_at

REQUESTS_PER_S: Final = 100
VERSIONS_PER_S: Final = 5
MOVE: Final = np.float32(1e-3)
PLACES: Final = 1 << 12


@dataclass(frozen=True)
class Served:
    """A lineage with one actor."""

    config: Config
    folder: Path
    url: str


@contextmanager
def served(config: Config, folder: Path, items: int, history: int, seed: int) -> Iterator[Served]:
    """An actor on a broker of its own in an empty `folder`; raises `UserError` where there is one already."""
    with actors(config, folder, items, (history,), {"actor": ()}, seed) as urls:
        kafka = replace(config.kafka, bootstrap=running_broker(folder) or "")
        storage = replace(config.storage, data_dir=str(folder))
        yield Served(replace(config, kafka=kafka, storage=storage), folder, urls["actor"])


class Moving:
    """A state that moves."""

    def __init__(self, state: State, seed: int) -> None:
        self.state = state
        self._rng = np.random.default_rng(seed)
        dense = [value.size for name, value in state.items() if name != USERS]
        self._moves = MOVE * self._rng.standard_normal(max(dense) + PLACES, np.float32)

    def step(self) -> State:
        """The next version's state; the arrays are the same."""
        for name, value in self.state.items():
            if name == USERS:
                rows = self._rng.integers(len(value), size=REQUESTS_PER_S // VERSIONS_PER_S)
                value[rows] += MOVE * self._rng.standard_normal(value.shape[1], np.float32)
            else:
                first = self._rng.integers(PLACES)
                value += self._moves[first : first + value.size].reshape(value.shape)
        return self.state


@dataclass
class Mover:
    """A learner that publishes, and does not learn."""

    publisher: Publisher
    moving: Moving
    progress: Progress
    codebook: str
    manifests: list[Manifest] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)

    @classmethod
    def on(cls, lineage: Served, seed: int) -> "Mover":
        """Goes on from the newest version of a lineage."""
        learn, bootstrap = lineage.config.learn, lineage.config.kafka.bootstrap
        path = Start.at(lineage.folder / "start").policy
        _, progress, codebooks = load(path, learn, learn.lr)
        publisher = Publisher(bootstrap, Terms.of(lineage.config.kafka, learn))
        assert publisher.last is not None
        progress.version = publisher.last.version
        found = version_at(bootstrap, progress.version).state
        state = {name: value.copy() for name, value in found.items()}
        publisher.go_on_from(state)
        return cls(publisher, Moving(state, seed), progress, codebooks.digest())

    def publish(self) -> None:
        """The next version."""
        state = self.moving.step()
        self.progress.version += 1
        began = time.perf_counter()
        now_ms = int(time.time() * 1000)
        made = self.publisher.publish(state, self.progress, self.codebook, [], now_ms, set())
        self.took_s.append(time.perf_counter() - began)
        self.manifests.append(made)

    def publish_steadily(self, count: int, every_s: float) -> None:
        """So many versions, at this pace or as fast as it goes."""
        due = time.monotonic()
        for _ in range(count):
            time.sleep(max(0.0, due - time.monotonic()))
            self.publish()
            due = max(due + every_s, time.monotonic() - every_s)


def applied_s(lineage: Served, manifests: list[Manifest]) -> list[float]:
    """From the beginning of each version's publication to the swap at the actor, of those it took."""
    wanted = {manifest.version for manifest in manifests}
    found = []
    for record in records(lineage.config.kafka.bootstrap, WEIGHTS_ACKS):
        ack = decode(ack_decoder, record.value)
        if ack.applied and ack.version in wanted:
            found.append((ack.applied_ms - ack.created_ms) / 1000)
    return found


def transport(lineage: Served, count: int, every_s: float, seed: int) -> dict[str, Any]:
    """Publish to one actor, and say how long each version took to be served."""
    mover = Mover.on(lineage, seed)
    try:
        mover.publish_steadily(count, every_s)
        time.sleep(1.0 + 2 * max(mover.took_s))
        waits = np.array(applied_s(lineage, mover.manifests))
    finally:
        mover.publisher.close()
    full = sum(value.nbytes for value in mover.moving.state.values())
    deltas = [manifest.size_bytes for manifest in mover.manifests]
    return {
        "versions": count,
        "applied": len(waits),
        "p50_s": float(np.quantile(waits, 0.5)),
        "p99_s": float(np.quantile(waits, 0.99)),
        "publish_p50_s": float(np.quantile(mover.took_s, 0.5)),
        "full_bytes": full,
        "delta_bytes": float(np.mean(deltas)),
        "delta_share": float(np.mean(deltas)) / full,
    }

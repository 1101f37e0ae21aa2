"""Versions put on the log past the learner's guard, for `dwell bench harm`.

Notable choices
- What a learner without a guard could publish goes through the project's own `Publisher`, in the learner's place: a
  learner that still ran would be fenced. What the publisher will not write (weights that are not finite, a digest or
  a signature that does not hold) is put together here and committed in the same place, in one transaction.
- A replay is of the bytes of an older version as they stand on both topics, by a producer without any place, while
  the learner goes on: whoever may write to the topic could do so.
- Journals are empty: a poisoned version claims no samples, so the account of samples stays what it was.
"""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from learner.checkpoint import Progress
from learner.fenced import Fenced, Record
from learner.publication import PublicationError, Publisher, Terms
from ops.bench_harm_log import Harm
from ops.config import Config
from ops.errors import UserError
from streams.blocks import State, blocked_state, root
from streams.clients import producer, records
from streams.delta import changes
from streams.signing import Signer, trust
from streams.topics import WEIGHTS, WEIGHTS_ANCHORS
from streams.weights import Manifest, pack
from streams.weights_log import version_at

LIMIT_S = 20.0
LIE = "0" * 32
"""A digest that is of nothing."""


@dataclass(frozen=True)
class Base:
    """What the next version follows."""

    manifest: Manifest
    state: State


class Intruder:
    """In the learner's place, which must have died."""

    def __init__(self, config: Config, named: set[int]) -> None:
        """`named` are the versions that arms name: they must not expire."""
        self._kafka = config.kafka
        self._learn = config.learn
        self._named = named
        self._signer = Signer(Path(config.learn.signing_key))
        self._trust = trust(config.actor.trusted_key)

    def base(self) -> Base:
        """The newest version; whoever published until now cannot any more."""
        with closing(self._publisher()) as publisher:
            assert publisher.last is not None
            last = publisher.last
        return Base(last, version_at(self._kafka.bootstrap, last.version, self._trust).state)

    def publish(self, base: Base, state: State) -> tuple[Harm, str]:
        """As a learner without a guard would; where the publisher refuses, put together here. And why it refused."""
        last = base.manifest
        progress = Progress(
            version=last.version + 1,
            lineage=last.lineage,
            preset=last.preset,
            codes=last.codes,
            user_rows=last.user_rows,
            watermark_ms=last.watermark_ms,
        )
        with closing(self._publisher()) as publisher:
            publisher.go_on_from(base.state)
            now_ms = _now_ms()
            try:
                publisher.publish(state, progress, last.codebook, [], now_ms, self._named)
                return Harm(progress.version, now_ms), ""
            except PublicationError as error:
                refused = str(error)
        return self.forge(base, state), refused

    def forge(
        self, base: Base, state: State, signer: Signer | None = None, digest: str = ""
    ) -> Harm:
        """A version that is put together by hand; with another's signature, or a digest that does not hold."""
        last = base.manifest
        delta, blocks = changes(blocked_state(base.state), state)
        fenced = Fenced(self._kafka.bootstrap)
        try:
            now_ms = _now_ms()
            manifest = structs.replace(
                last,
                version=last.version + 1,
                digest=digest or root(blocks),
                base=last.version,
                journal=[],
                created_ms=now_ms,
                restored=0,
            )
            parts: list[Record] = [
                (WEIGHTS, key.encode(), value)
                for key, value in pack(manifest, delta, signer or self._signer)
            ]
            fenced.commit(parts, LIMIT_S)
        finally:
            fenced.close()
        return Harm(manifest.version, now_ms)

    def _publisher(self) -> Publisher:
        return Publisher(self._kafka.bootstrap, Terms.of(self._kafka, self._learn))


def replayed(config: Config, version: int) -> Harm:
    """Write an older version's records again, as they were, at the end of the log."""
    bootstrap = config.kafka.bootstrap
    found: list[Record] = []
    for topic in (WEIGHTS_ANCHORS, WEIGHTS):
        found += [
            (topic, record.key, record.value)
            for record in records(bootstrap, topic)
            if record.value is not None and (record.key or b"").startswith(b"%d/" % version)
        ]
    if not found:
        raise UserError(f"version {version} is not on the log, and cannot be replayed.")
    client = producer(
        bootstrap, transactional_id="dwell-bench-harm", max_request_size=1 << 20, linger_ms=0
    )
    try:
        client.init_transactions()
        now_ms = _now_ms()
        client.begin_transaction()
        sent = [client.send(topic, value, key, partition=0) for topic, key, value in found]
        client.commit_transaction()
        written = [future.get(timeout=LIMIT_S) for future in sent]
    finally:
        client.close()
    behind = max(one.offset for one in written if one.topic == WEIGHTS) + 1
    return Harm(version, now_ms, behind)


def _now_ms() -> int:
    return int(time.time() * 1000)

"""What the learner reads from Kafka: samples into its journal, the catalogue, and the commands on `control`.

Notable choices
- `control` and `catalogue` are read to their ends before the first sample: what an arm is pinned to must not expire
  before it is known.
- A record that cannot be used costs nothing else: a sample becomes a dead letter, accounted for as without target;
  an entry or a command is passed over with a warning.
- Of the catalogue's past it keeps what the log keeps whole (learner/horizon.py); a sample of an older version becomes
  a dead letter.
- A learner far behind reads no more than it can soon use: the log keeps the rest better.
"""

import logging
import time
from collections.abc import Callable

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import KafkaError, OffsetOutOfRangeError
from prometheus_client import Counter

from learner.catalogue import Catalogue, CatalogueError
from learner.horizon import Horizon
from learner.journal import Journal, Polled
from learner.ranks import Ranks
from streams.clients import consumer
from streams.control import ControlState
from streams.events import (
    DeadLetter,
    Sample,
    UnreadableError,
    command_decoder,
    decode,
    encode,
    sample_decoder,
)
from streams.settings import KafkaSettings
from streams.topics import CATALOGUE, CONTROL, SAMPLES

log = logging.getLogger("dwell.learner")

UNUSABLE = Counter("dwell_learner_unusable_total", "Samples that became dead letters")

POLL_MS = 50
RECONNECT_MS = 1000  # the client would come to wait half a minute between attempts
MOST_WAITING = 5000
CATALOGUE_PLACE = TopicPartition(CATALOGUE, 0)
LOGS = [CATALOGUE_PLACE, TopicPartition(CONTROL, 0)]


class SourceError(RuntimeError):
    """The logs do not hold what is needed; the message says what would help."""


class Source:
    """One reader; `open` before the rest."""

    def __init__(
        self,
        kafka: KafkaSettings,
        journal: Journal,
        codes: int,
        ranks: Ranks,
    ) -> None:
        """Of `samples` it reads the partitions that this rank owns."""
        self.control = ControlState()
        self.catalogue = Catalogue(codes)
        self._horizon = Horizon(round(kafka.retention_s * 1000))
        self._journal = journal
        self._bootstrap = kafka.bootstrap
        self._samples = [
            TopicPartition(SAMPLES, number)
            for number in range(kafka.partitions)
            if ranks.owns(number)
        ]
        self._letters: list[DeadLetter] = []
        self.heard: Callable[[Sample], None] = lambda _: None
        """Called with every sample, of all arms, in the order of the log."""
        self.answered = 0
        """The newest version with which a learner has answered a roll-back."""
        self._client: KafkaConsumer | None = None

    def open(self, codebook: str) -> None:
        """Connect, read `control` and `catalogue`, and stand at the journal's offsets of `samples`.

        Raises `KafkaError`; `SourceError` when samples were deleted before they were learned, or the catalogue is
        of another codebook.
        """
        client = consumer(
            self._bootstrap, max_poll_records=2000, reconnect_backoff_max_ms=RECONNECT_MS
        )
        self._client = client
        places = [*self._samples, *LOGS]
        client.assign(places)
        for place, first in client.beginning_offsets(places).items():
            taken = 0 if place in LOGS else self._journal.offsets.get(place.partition, 0)
            if place not in LOGS and taken < first:
                raise SourceError(
                    _deleted(
                        f"partition {place.partition}: offset {taken} is next, {first} the first"
                    )
                )
            client.seek(place, max(first, taken))
        client.pause(*self._samples)
        for place, end in client.end_offsets(LOGS).items():
            while client.position(place) < end:
                self._poll(client)
        client.resume(*self._samples)
        if self.catalogue.codebook not in ("", codebook):
            raise SourceError(
                f"the catalogue is of codebook {self.catalogue.codebook}, this policy of {codebook}: start from "
                "the policy that the catalogue was made for"
            )
        self.catalogue.codebook = codebook

    def close(self) -> None:
        """Leave the cluster; may be repeated."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def poll(self) -> None:
        """Take what comes within `POLL_MS`; a broker that is away for a while brings nothing.

        Raises `KafkaError`; `SourceError` when samples were deleted before they were read.
        """
        client = self._opened()
        self._hold_back(client)
        self._poll(client)
        self.catalogue.prune(self._horizon.passed(int(time.time() * 1000)))

    def catch_up(self, version: int) -> None:
        """The catalogue as far as the actor of a sample had read it, if the log goes that far."""
        if self.catalogue.version >= version:
            return
        client = self._opened()
        end = client.end_offsets([CATALOGUE_PLACE])[CATALOGUE_PLACE]
        while self.catalogue.version < version and client.position(CATALOGUE_PLACE) < end:
            self._poll(client)

    def bury(self, polled: Polled, why: str) -> None:
        """Make a dead letter of a sample that cannot be learned from."""
        if polled.sample is not None:
            key, value = polled.sample.user.encode(), encode(polled.sample)
            self._bury("bad_value", why, polled.partition, polled.offset, key, value)

    def take_letters(self) -> list[DeadLetter]:
        """The dead letters since the last publication, to be written with the next."""
        letters, self._letters = self._letters, []
        return letters

    def _opened(self) -> KafkaConsumer:
        if self._client is None:
            raise RuntimeError("the source is not open")
        return self._client

    def _poll(self, client: KafkaConsumer) -> None:
        try:
            polled = client.poll(timeout_ms=POLL_MS)
        except OffsetOutOfRangeError as error:
            raise SourceError(_deleted(" ".join(str(error).split()))) from None
        except KafkaError as error:
            if not error.retriable:
                raise
            log.warning("Kafka: %s; trying again", error)
            time.sleep(POLL_MS / 1000)
            return
        for records in polled.values():
            for record in records:
                self._take(record)

    def _hold_back(self, client: KafkaConsumer) -> None:
        held = self._samples[0] in client.paused()
        if not held and self._journal.waiting > MOST_WAITING:
            client.pause(*self._samples)
        elif held and self._journal.waiting < MOST_WAITING // 2:
            client.resume(*self._samples)

    def _take(self, record: ConsumerRecord) -> None:
        try:
            if record.topic == SAMPLES:
                self._journal.add(Polled(record.partition, record.offset, self._sample(record)))
            elif record.topic == CONTROL:
                command = decode(command_decoder, record.value)
                if not self.control.apply(command):
                    log.warning("control offset %d: the command makes no sense", record.offset)
                elif command.action == "follow" and command.restored:
                    self.answered = max(self.answered, command.version)
            else:
                try:
                    self.catalogue.take(record.offset, record.key, record.value)
                finally:
                    self._horizon.see(self.catalogue.version, record.timestamp)
        except CatalogueError as error:
            log.warning("%s", error)
        except UnreadableError as error:
            log.warning("%s offset %d: %s", record.topic, record.offset, error)

    def _sample(self, record: ConsumerRecord) -> Sample | None:
        try:
            sample = decode(sample_decoder, record.value)
            self.heard(sample)
            return sample
        except UnreadableError as error:
            place = (record.partition, record.offset, record.key, record.value or b"")
            self._bury(error.reason, error.detail, *place)
            return None

    def _bury(
        self, reason: str, detail: str, partition: int, offset: int, key: bytes | None, value: bytes
    ) -> None:
        log.warning("samples partition %d offset %d: %s: %s", partition, offset, reason, detail)
        UNUSABLE.inc()
        letter = DeadLetter(
            reason=reason,
            detail=detail,
            topic=SAMPLES,
            partition=partition,
            offset=offset,
            key=key,
            value=value,
        )
        self._letters.append(letter)


def _deleted(detail: str) -> str:
    return (
        f"samples, {detail}: retention deleted samples before they were learned; raise kafka.retention_s and start "
        "a new lineage in an empty data directory"
    )

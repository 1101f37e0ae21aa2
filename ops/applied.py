"""What a serving process learns from Kafka: which requests were closed, and the newest version.

It reads the topics that actors read, at read-committed, and acknowledges on `weights.acks` what it takes, so a
replay's versions are applied in the sense of the contracts.
"""

import time

from kafka import TopicPartition

from actor.policy import ServedPolicy, materialise
from ops.monitor import Monitor, Observed
from streams.chain import Chain, Whole
from streams.clients import consumer, producer
from streams.events import Sample, decode, encode, sample_decoder
from streams.settings import KafkaSettings
from streams.topics import SAMPLES, WEIGHTS, WEIGHTS_ACKS, WEIGHTS_ANCHORS
from streams.weights import Ack, Assembler

READER = "replay"


class Applied:
    """Follows `samples`, from their present end, and the versions."""

    def __init__(self, kafka: KafkaSettings, prior_plays: float, since_ms: int) -> None:
        """`prior_plays` is the weight of the population in a percentile; requests count `since_ms`, log time."""
        self.policy: ServedPolicy | None = None
        """The version applied last."""
        self.closed = 0
        """Requests closed of those since the given time."""
        self._since_ms = since_ms
        self._prior_plays = prior_plays
        self._judged = 0
        self._own_weight = 0.0
        self._chain = Chain()
        self._arrived: list[Whole] = []
        self._assemblers = {topic: Assembler() for topic in (WEIGHTS, WEIGHTS_ANCHORS)}
        self._monitor = Monitor()
        self._consumer = consumer(kafka.bootstrap, max_poll_records=5000)
        self._acks = producer(kafka.bootstrap, linger_ms=0)
        samples = [TopicPartition(SAMPLES, number) for number in range(kafka.partitions)]
        weights = [TopicPartition(topic, 0) for topic in self._assemblers]
        self._consumer.assign([*samples, *weights])
        for place, offset in {
            **self._consumer.end_offsets(samples),
            **self._consumer.beginning_offsets(weights),
        }.items():
            self._consumer.seek(place, offset)

    @property
    def seen(self) -> Observed:
        """What was read so far."""
        return self._monitor.seen

    def poll(self, timeout_ms: int) -> bool:
        """Take what has come; whether there was anything. Raises `WeightError` for an unreadable version."""
        batches = self._consumer.poll(timeout_ms=timeout_ms)
        for place, records in batches.items():
            for record in records:
                if place.topic == SAMPLES:
                    sample = decode(sample_decoder, record.value)
                    self._monitor.sample(record.partition, record.offset, sample)
                    self.closed += sample.time_ms >= self._since_ms
                    self._weigh(sample)
                    continue
                whole = self._assemblers[place.topic].take(record.value)
                if whole is not None:
                    self._arrived.append(whole)
                    if place.topic == WEIGHTS:
                        self._monitor.manifest(whole[0])
        return bool(batches)

    def apply(self, codebook: str, codes: int) -> bool:
        """Take the newest version, if there is a newer one; raises `WeightError` and keeps the present one.

        `codebook` is the catalogue's, `codes` are those of a level, as configured.
        """
        arrived, self._arrived = self._arrived, []
        refused, again = self._chain.follow(arrived)
        if again is not None:
            self._consumer.seek(TopicPartition(WEIGHTS, 0), again)
            self._assemblers[WEIGHTS] = Assembler()
        for _, error in refused:
            raise error
        head = self._chain.head
        if head is None or (self.policy is not None and head.number <= self.policy.version):
            return False
        self.policy = materialise(head, codebook, codes)
        manifest = head.manifest
        ack = Ack(
            actor=READER,
            version=manifest.version,
            applied=True,
            created_ms=manifest.created_ms,
            applied_ms=int(time.time() * 1000),
        )
        self._acks.send(WEIGHTS_ACKS, encode(ack), partition=0)
        self._monitor.ack(ack)
        return True

    @property
    def own_weight(self) -> float:
        """Mean over judged plays of n / (n + prior), the share of the user's own plays in a percentile."""
        return self._own_weight / max(1, self._judged)

    def _weigh(self, sample: Sample) -> None:
        for item in sample.items:
            if item.percentile is not None:
                self._judged += 1
                self._own_weight += item.own_plays / (item.own_plays + self._prior_plays)

    def close(self) -> None:
        """Leave the cluster."""
        self._consumer.close()
        self._acks.close()

"""The topics: names, partitions, retention and compaction, as the contract of the streams fixes them.

Retention acts on a record's age in the log (record timestamps are times of writing, event time is a field), so
a replay of an old log is not deleted as it is written.
"""

from dataclasses import dataclass
from typing import Final

from streams.settings import KafkaSettings

EXPOSURES: Final = "exposures"
FEEDBACK: Final = "feedback"
LATE_FEEDBACK: Final = "feedback.late"
SAMPLES: Final = "samples"
HISTORIES: Final = "histories"
SHAPING: Final = "shaping"
WEIGHTS_ANCHORS: Final = "weights.anchors"
WEIGHTS: Final = "weights"
WEIGHTS_ACKS: Final = "weights.acks"
CATALOGUE: Final = "catalogue"
CATALOGUE_ACKS: Final = "catalogue.acks"
CONTROL: Final = "control"
INSIGHTS: Final = "insights"
DEAD_LETTERS: Final = "dead-letters"

STREAMS_GROUP: Final = "dwell-streams"
"""Consumer group whose committed offsets say how far the join has come."""

MAX_MESSAGE_BYTES: Final = 1_000_000

TRANSACTION_MS: Final = 600_000
"""A transaction may be open for so long, the broker's absence included: who has one open when that goes would else be
fenced when it is back. A successor ends its predecessor's at once, whatever this is. Brokers allow 900,000."""


@dataclass(frozen=True)
class Topic:
    """One topic as it must exist on the broker."""

    name: str
    partitions: int
    config: dict[str, str]


def topics(kafka: KafkaSettings) -> list[Topic]:
    """All topics of the project, in the order of the contract."""
    users = kafka.partitions
    day_ms = int(kafka.retention_s * 1000)
    by_time = {"cleanup.policy": "delete", "retention.ms": str(day_ms)}
    compact = {"cleanup.policy": "compact", "segment.ms": "600000", "segment.bytes": "67108864"}
    signs = {"cleanup.policy": "delete", "retention.ms": "3600000", "segment.ms": "600000"}
    for_ever = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
    return [
        Topic(EXPOSURES, users, by_time),
        Topic(FEEDBACK, users, by_time),
        Topic(LATE_FEEDBACK, users, by_time),
        Topic(SAMPLES, users, by_time),
        Topic(HISTORIES, users, compact),
        Topic(SHAPING, users, compact),
        Topic(WEIGHTS_ANCHORS, 1, {**compact, "delete.retention.ms": "600000"}),
        Topic(WEIGHTS, 1, {**by_time, "retention.bytes": str(kafka.weights_mb << 20)}),
        Topic(WEIGHTS_ACKS, 1, by_time),
        Topic(CATALOGUE, 1, {**compact, "min.compaction.lag.ms": str(day_ms)}),
        Topic(CATALOGUE_ACKS, 1, signs),
        Topic(CONTROL, 1, for_ever),
        Topic(INSIGHTS, 1, by_time),
        Topic(DEAD_LETTERS, 1, by_time),
    ]

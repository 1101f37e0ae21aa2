"""What an operator may set about the streams: times in seconds of event time unless said.

Defaults are those of the join contract: a window of 300 s censors 4.5 % of the plays of videos
above 320 s on a real feed log; a window of 60 s would censor half of the top-quartile plays.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from storage.settings import Count, NotNegative, Positive, Share, Whole

_ADDRESS = r"[^\s,]+:\d{1,5}"
Addresses = Annotated[
    str,
    Meta(
        pattern=rf"^({_ADDRESS}(,{_ADDRESS})*)?$",
        description="empty, or host:port, several separated by commas",
    ),
]


@dataclass(frozen=True)
class KafkaSettings:
    """How to reach Kafka, and how its topics are made."""

    bootstrap: Addresses = ""
    """Address of an existing cluster, host:port; empty starts an embedded single-node broker."""
    partitions: Count = 4
    """Partitions of the per-user topics; fixed at creation."""
    replicas: Count = 1
    """Replicas of every topic; an embedded broker can hold one."""
    retention_s: Positive = 86_400.0
    """Age of the log after which exposures, feedback and samples are deleted (audit horizon)."""
    weights_mb: Count = 4096
    """What versions changed is kept up to this size, MiB; at least eight full versions should fit."""


@dataclass(frozen=True)
class JoinSettings:
    """When a request is decided, and what reaches the log too late."""

    window_s: Positive = 300.0
    """After the latest play start a request waits this long for the plays to end."""
    cap_s: Positive = 900.0
    """A request never stays open longer than this after its start."""
    abandon_s: Positive = 30.0
    """A play without an event for this long is final at what was played."""
    lateness_s: NotNegative = 10.0
    """How far behind the watermark an event may arrive and still count."""
    late: Literal["count", "side"] = "count"
    """Feedback whose request is closed: only counted, or also put on the topic `feedback.late`."""
    order: Literal["closing", "exposure"] = "closing"
    """When a sample is made: once its request is closed, or once all older ones of its partition are closed too."""
    max_skew_s: NotNegative = 5.0
    """An event time further ahead of its record's timestamp is a dead letter."""
    dedupe_horizon_s: Positive = 86_400.0
    """Closed request ids are remembered, and early feedback waits for its exposure, this long."""
    max_open: Count = 1_000_000
    """Requests of a partition open at once; beyond, the one due first is closed as it stands (`memory`)."""


@dataclass(frozen=True)
class ShapeSettings:
    """How dwell becomes a reward that neither long nor short videos are favoured by."""

    bucket_base: Annotated[float, Meta(gt=1)] = 1.3
    """Base of the log-duration buckets, on seconds."""
    plays_per_bucket: Count = 24
    """A user's plays remembered in each bucket."""
    prior_plays: Positive = 6.0
    """Weight of the population's percentile against a user's own plays."""
    threshold_quantile: Share = 0.75
    """Plays above this running quantile of percentiles get advantage +1."""
    threshold_memory: Count = 4096
    """Percentiles after which the memory of the running quantile has faded to 1/e."""


@dataclass(frozen=True)
class StreamsSettings:
    """The process that joins exposures with feedback and shapes the result."""

    batch_ms: Count = 50
    """Longest wait for input before what is there is processed in one transaction."""
    batch_records: Count = 5000
    """Most records of one transaction."""
    tick: bool = True
    """Append wall-clock ticks to idle inputs; a replay in log time brings its own."""
    idle_grace_s: NotNegative = 0.5
    """A tick claims that all events older than this have been written."""
    member: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9._-]{1,200}$", description="letters, digits, . _ -")
    ] = "streams"
    """Name of this process among those that share the partitions; no two may run under one name."""
    session_s: Positive = 6.0
    """A process not heard of for this long loses its partitions to the others."""
    history_behaviours: Count = 64
    """A user's latest plays kept in `histories`."""
    history_shown: Whole = 128
    """A user's last shown items kept in `histories`; they are not shown again."""

"""Which lineage a log is replayed on: the one that lives on the cluster, one that is named, or a new one."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kafka import TopicPartition
from rich.console import Console

from learner.checkpoint import Progress, load
from learner.presets import split_shape
from ops.account import committed
from ops.cluster import Cluster
from ops.config import Config
from ops.errors import UserError
from ops.feedlog import UTC_OFFSET_MS, open_log
from ops.pretrain import pretrained
from ops.start import POLICY_FILE, Start, is_published, publish
from streams.clients import records
from streams.settings import KafkaSettings
from streams.topics import EXPOSURES
from streams.weights import Manifest
from streams.weights_log import manifests_after


def refuse_the_past(kafka: KafkaSettings, first_ms: int) -> None:
    """Raise `UserError` when the cluster's join has gone past the log's first row."""
    reached_ms = _reached_ms(kafka)
    if reached_ms > first_ms:
        raise UserError(
            f"the log begins at {moment(first_ms)}, but this cluster has already come to {moment(reached_ms)}: a "
            "replay is not repeated or resumed on the same data; name a new directory with --data-dir."
        )


def _reached_ms(kafka: KafkaSettings) -> int:
    """The largest watermark committed; -1 where there are no exposures yet."""
    places = [TopicPartition(EXPOSURES, number) for number in range(kafka.partitions)]
    if not any(True for place in places for _ in records(kafka.bootstrap, *place)):
        return -1  # asking for the group would only wait for its coordinator to be made
    return max(standing.watermark_ms for standing in committed(kafka).values())


def begin(
    cluster: Cluster, start_from: Path | None, directory: Path, console: Console
) -> tuple[Config, Path | None]:
    """A lineage on the cluster: the one that is there, the one named, or one pre-trained now.

    Returns the configuration with the lineage's own shape of the policy, and where a new one starts from.
    """
    config = cluster.config
    kept = Path(config.storage.data_dir) / "start"
    if is_published(config.kafka):
        shape = _newest_shape(config.kafka)
        if start_from is not None and shape is not None:
            raise UserError(
                f"a lineage lives on this cluster already, and --start-from {start_from} would begin another: "
                "leave it out to go on, or name a new directory with --data-dir."
            )
        if shape is not None:
            return replace(config, policy=replace(config.policy, **shape)), None
    if start_from is not None:
        start = Start.at(start_from)
    elif (kept / POLICY_FILE).exists():
        start = Start.at(kept)
    else:
        console.print("no start was named: pre-training one on the watch history")
        done = pretrained(config, open_log(directory), kept, console)
        console.print(f"pre-trained; on held-out plays: {done.results['held_out']}")
        start = done.start
    if not is_published(config.kafka):
        with console.status("publishing the start"):
            publish(start, config.kafka)
    progress = load(start.policy, config.learn, config.learn.lr)[1]
    shape = _shape_of(progress)
    return replace(config, policy=replace(config.policy, **shape)), start.folder


def _newest_shape(kafka: KafkaSettings) -> dict[str, Any] | None:
    """What is fixed for the lineage, as its newest published version has it."""
    manifests = manifests_after(kafka.bootstrap, 0)
    if not manifests:
        return None
    return _shape_of(manifests[-1])


def _shape_of(of: Manifest | Progress) -> dict[str, Any]:
    """As settings of `policy`."""
    preset, context = split_shape(of.preset)
    return {"preset": preset, "context": context, "codes": of.codes, "user_rows": of.user_rows}


def moment(time_ms: int) -> str:
    """A time as the log's viewers would write it."""
    then = datetime.fromtimestamp((time_ms + UTC_OFFSET_MS) / 1000, UTC)
    return then.strftime("%d %b %Y %H:%M")

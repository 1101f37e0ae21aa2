"""`dwell eval order`: does the order of arrival decide what a sample says? On a real log and a real broker.

The log's events are written twice, each time to an empty cluster where one streams worker joins and shapes them: once
in the order of their times; once shuffled within the allowed lateness, and every event doubled. The digest covers all
of a sample but what tells where and when it was made: offsets, watermark, closing time.
What order `exposure` costs is how long its samples wait for older requests, and what order `closing` costs is how far
its labels are from those of a fold in the order of exposure.
"""

from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from actor.settings import ActorSettings
from actor.users import Users
from ops.config import Config
from ops.errors import UserError
from ops.feedlog import EXPOSED, classify, open_log
from ops.log_requests import Requests
from ops.results import Check, report
from ops.shaping_fold import videos_of
from ops.streams_worker import Worker, Writer, all_read, empty_cluster, until
from streams.clients import records
from streams.events import Exposure, Feedback, decode, encode, sample_decoder
from streams.settings import KafkaSettings
from streams.topics import SAMPLES

ORDERS: Final[tuple[Literal["exposure", "closing"], ...]] = ("exposure", "closing")
PATIENCE_S: Final = 900.0


def shuffled(
    events: list[Exposure | Feedback], within_ms: float, seed: int
) -> list[Exposure | Feedback]:
    """Each event twice, each copy less than `within_ms` after its time."""
    rng = np.random.default_rng(seed)
    times = np.array([event.time_ms for event in events], np.float64)
    arrivals = np.concatenate([times + rng.uniform(0, within_ms, len(events)) for _ in range(2)])
    return [events[at % len(events)] for at in np.argsort(arrivals, kind="stable").tolist()]


@dataclass
class Made:
    """What a worker made of the events."""

    digest: str
    samples: int
    waits_s: NDArray[np.float64]
    """How long each sample waited for older requests, in event time."""
    labels: dict[str, list[tuple[float, int | None]]]
    """By request, the (percentile, advantage) of its judged items."""


def made(kafka: KafkaSettings) -> Made:
    """All samples in their order, partition by partition.

    A sample that waited stands behind the one that let it go, whose watermark is the larger.
    """
    hashed, waits_s = blake2b(digest_size=16), []
    labels: dict[str, list[tuple[float, int | None]]] = {}
    for partition in range(kafka.partitions):
        now_ms = 0
        for record in records(kafka.bootstrap, SAMPLES, partition):
            sample = decode(sample_decoder, record.value)
            now_ms = max(now_ms, sample.watermark_ms)
            waits_s.append((now_ms - sample.watermark_ms) / 1000)
            judged = [(i.percentile, i.advantage) for i in sample.items if i.percentile is not None]
            labels[sample.request] = judged
            label = msgspec.structs.replace(
                sample, watermark_ms=0, closable_ms=0, exposure_offset=0, feedback_upto=0
            )
            hashed.update(encode(label))
    return Made(hashed.hexdigest(), len(waits_s), np.array(waits_s), labels)


def difference(closing: Made, exposure: Made) -> dict[str, float]:
    """What the order of the fold changes in the labels: the outcomes are the same, the past is another."""
    pairs = [
        (mine, other)
        for request, judged in closing.labels.items()
        for mine, other in zip(judged, exposure.labels[request], strict=True)
    ]
    shifts = np.array([mine[0] - other[0] for mine, other in pairs])
    return {
        "judged": float(len(pairs)),
        "other_advantage": float(np.mean([mine[1] != other[1] for mine, other in pairs])),
        "positives_closing": float(np.mean([mine[1] == 1 for mine, _ in pairs])),
        "positives_exposure": float(np.mean([other[1] == 1 for _, other in pairs])),
        "percentile_bias": float(shifts.mean()),
        "percentile_shift": float(np.abs(shifts).mean()),
    }


def joined(config: Config, folder: Path, events: list[Exposure | Feedback]) -> Made:
    """What a worker makes of the events; ticks pass the last deadline."""
    with empty_cluster(config, folder, config.join, tick=False) as (config, folder):
        writer = Writer(config.kafka)
        for event in events:
            writer.event(event)
        last_ms = max(event.time_ms for event in events)
        end_ms = last_ms + round(1000 * (config.join.cap_s + config.join.lateness_s)) + 1
        writer.tick(end_ms)
        writer.tick(end_ms + 1)
        writer.close()
        worker = Worker(config, "order", folder)
        try:
            until(lambda: all_read(config.kafka), [worker], PATIENCE_S, pause_s=1.0)
        finally:
            worker.end()
        return made(config.kafka)


def run(
    config: Config, directory: Path, limit: int | None, seed: int, json_path: Path | None
) -> int:
    """Evaluate, print, and return the exit status."""
    console = Console()
    feed = open_log(directory)
    log = feed.read_log()
    chosen = np.flatnonzero(classify(log.rows) == EXPOSED)[:limit]
    if not len(chosen):
        raise UserError(f"{feed.directory} holds no exposure with a duration: nothing to join.")
    requests = Requests(
        log.rows, chosen, Users(ActorSettings()), videos_of(log.rows, chosen), context=1
    )
    events = requests.take(len(chosen) + 1, policy_version=0).events
    within_ms = 999 * config.join.lateness_s
    mixed = shuffled(events, within_ms, seed)
    results: dict[str, Any] = {"requests": len(chosen), "events": len(events), "twice": len(mixed)}
    checks = []
    straight: dict[str, Made] = {}
    for order in ORDERS:
        ordered = replace(config, join=replace(config.join, order=order))
        folder = Path(config.storage.data_dir) / "eval-order"
        digests = {}
        for name, said in (("straight", events), ("shuffled", mixed)):
            with console.status(f"order {order}, {name}"):
                found = joined(ordered, folder / f"{order}-{name}", said)
            straight.setdefault(order, found)
            digests[name] = found.digest
            right = found.samples == len(chosen)
            checks.append(Check(f"{order}.{name}.samples", found.samples, str(len(chosen)), right))
        waits_s = straight[order].waits_s
        wait = {"mean_s": float(waits_s.mean()), "p99_s": float(np.quantile(waits_s, 0.99))}
        results[order] = {**digests, "wait": wait}
        same = digests["straight"] == digests["shuffled"]
        checks.append(Check(f"{order}.same", same, "yes", same))
    results["difference"] = difference(straight["closing"], straight["exposure"])
    return report("dwell eval order", config, [seed], results, checks, json_path, console)

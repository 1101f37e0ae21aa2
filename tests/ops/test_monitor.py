"""The monitor's arithmetic: what is waiting, what a version contains, how fresh it was when applied."""

import time
from typing import Any

from ops.monitor import Monitor, MonitorThread
from streams.clients import producer
from streams.events import Sample, SampleItem, encode
from streams.settings import KafkaSettings
from streams.topics import SAMPLES, WEIGHTS, WEIGHTS_ACKS
from streams.weights import Ack, Commit, Manifest, StepEntry

T0 = 1_700_000_000_000


def sample(closable_ms: int, arm: str = "learning", **more: Any) -> Sample:
    shown = SampleItem(
        item="i",
        sid=(0, 0, 0),
        position=0,
        duration_ms=1,
        source="policy",
        outcome="ended",
        play_ms=1,
        actions=0,
    )
    fields: dict[str, Any] = {
        "request": "r",
        "user": "u",
        "time_ms": T0,
        "arm": arm,
        "policy_version": 1,
        "catalogue_version": 1,
        "decode_mode": "sample",
        "temperature": 1.0,
        "context": b"",
        "excluded": b"",
        "items": [shown],
        "threshold": 0.75,
        "median": 0.5,
        "start_ms": T0,
        "decided_ms": T0,
        "closed_by": "decided",
        "watermark_ms": T0,
        "closable_ms": T0 + closable_ms,
        "exposure_offset": 0,
        "feedback_upto": 0,
    }
    return Sample(**{**fields, **more})


def manifest(version: int, *ranges: tuple[int, int, int], trained: int = 0) -> Manifest:
    """A version whose steps took these (partition, from, to)."""
    return Manifest(
        version=version,
        lineage="l",
        codebook="c",
        preset="tiny",
        codes=32,
        user_rows=8,
        schema=[],
        digest="",
        size_bytes=0,
        chunks=0,
        journal=[
            StepEntry(ranges=[each], trained=trained, control=0, without_target=0)
            for each in ranges
        ],
        watermark_ms=0,
        created_ms=T0 + version,
    )


def ack(version: int, at_ms: int, applied: bool = True, actor: str = "a") -> Ack:
    return Ack(actor=actor, version=version, applied=applied, created_ms=0, applied_ms=T0 + at_ms)


def test_freshness_is_from_closable_to_the_first_version_that_contains_the_sample() -> None:
    monitor = Monitor()
    for offset, closable_ms in enumerate((0, 100, 200, 300)):
        monitor.sample(0, offset, sample(closable_ms))
    monitor.manifest(manifest(1, (0, 0, 2)))
    monitor.ack(ack(1, 1000))
    assert list(monitor.seen.freshness_s) == [1.0, 0.9]
    monitor.manifest(manifest(2, (0, 2, 3)))
    monitor.ack(ack(2, 2000))
    assert list(monitor.seen.freshness_s) == [1.0, 0.9, 1.8]
    assert monitor.seen.pending == 1


def test_label_wait_is_from_exposure_to_closable_for_both_arms() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(2500))
    monitor.sample(0, 1, sample(500, arm="control"))
    assert list(monitor.seen.label_wait_s) == [2.5, 0.5]


def test_only_the_learning_arm_has_freshness() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(0, arm="control"))
    assert monitor.seen.pending == 0
    monitor.manifest(manifest(1, (0, 0, 1)))
    monitor.ack(ack(1, 1000))
    assert list(monitor.seen.freshness_s) == []
    assert monitor.seen.samples == {"control": 1}


def test_partitions_are_covered_each_by_itself_and_by_all_steps_of_a_version() -> None:
    monitor = Monitor()
    for partition in (0, 1):
        for offset in range(3):
            monitor.sample(partition, offset, sample(0))
    monitor.manifest(manifest(1, (0, 0, 1), (0, 1, 2), (1, 0, 1)))
    monitor.ack(ack(1, 1000))
    assert len(monitor.seen.freshness_s) == 3
    assert monitor.seen.pending == 3


def test_a_version_that_was_skipped_is_contained_in_the_next() -> None:
    monitor = Monitor()
    for offset in range(3):
        monitor.sample(0, offset, sample(0))
    monitor.manifest(manifest(1, (0, 0, 2)))
    monitor.manifest(manifest(2, (0, 2, 3)))
    monitor.ack(ack(2, 500))
    assert list(monitor.seen.freshness_s) == [0.5] * 3
    monitor.ack(ack(1, 900))
    assert list(monitor.seen.freshness_s) == [0.5] * 3


def test_an_acknowledgement_may_come_before_its_version_is_read() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(0))
    monitor.ack(ack(1, 700))
    monitor.ack(ack(1, 900, actor="b"))
    assert monitor.seen.applied == 0
    monitor.manifest(manifest(1, (0, 0, 1)))
    assert list(monitor.seen.freshness_s) == [0.7]
    assert monitor.seen.applied == 1


def test_a_sample_may_be_read_after_the_version_that_contains_it_was_applied() -> None:
    """Topics are read each at its own pace; the sample's freshness is that of the first such version."""
    monitor = Monitor()
    monitor.sample(0, 0, sample(0))
    for version, upto, at_ms in ((1, 2, 1000), (2, 3, 1500), (3, 4, 2000)):
        monitor.manifest(manifest(version, (0, upto - 1, upto)))
        monitor.ack(ack(version, at_ms))
    for offset in (1, 2, 3, 4):
        monitor.sample(0, offset, sample(100))
    assert list(monitor.seen.freshness_s) == [1.0, 0.9, 1.4, 1.9]
    assert monitor.seen.pending == 1


def test_the_first_of_several_actors_counts() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(0))
    monitor.manifest(manifest(1, (0, 0, 1)))
    monitor.ack(ack(1, 500, applied=False))
    monitor.ack(ack(1, 600, actor="b"))
    monitor.ack(ack(1, 800, actor="c"))
    assert list(monitor.seen.freshness_s) == [0.6]
    assert (monitor.seen.applied, monitor.seen.refused) == (1, 1)


def test_a_refused_version_applies_nothing_also_where_the_refusal_comes_early() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(0))
    monitor.ack(ack(1, 400, applied=False))
    monitor.manifest(manifest(1, (0, 0, 1)))
    assert monitor.seen.refused == 1
    assert monitor.seen.pending == 1
    monitor.ack(ack(1, 500, actor="b"))
    assert monitor.seen.pending == 0


def test_unpublished_are_the_partitions_whose_last_sample_no_version_contains() -> None:
    monitor = Monitor()
    assert monitor.seen.unpublished == 0
    monitor.sample(0, 7, sample(0))
    monitor.sample(1, 3, sample(0, arm="control"))
    assert monitor.seen.unpublished == 2
    monitor.manifest(manifest(1, (0, 0, 8), (1, 0, 3)))
    assert monitor.seen.unpublished == 1
    monitor.manifest(manifest(2, (1, 3, 4)))
    assert monitor.seen.unpublished == 0
    monitor.sample(0, 8, sample(0))
    assert monitor.seen.unpublished == 1


def test_versions_trained_samples_and_outcomes_are_counted() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(0))
    monitor.manifest(manifest(4, (0, 0, 1), (0, 1, 1), trained=3))
    seen = monitor.seen
    assert (seen.trained, seen.versions, seen.version, seen.published_ms) == (6, 1, 4, T0 + 4)
    assert (seen.outcomes, seen.closed_by) == ({"ended": 1}, {"decided": 1})


def test_what_is_kept_of_versions_does_not_grow_with_the_run() -> None:
    monitor = Monitor()
    for version in range(1, 3000):
        monitor.manifest(manifest(version, (0, version - 1, version)))
        if version % 3 == 0:
            monitor.ack(ack(version, version))
    assert monitor.kept < 1500


def test_the_thread_reads_what_is_committed_after_it_began_and_survives_what_it_cannot_read(
    made_log: KafkaSettings,
) -> None:
    kafka = made_log
    client = producer(kafka.bootstrap)
    try:
        before = client.send(SAMPLES, encode(sample(0)), partition=0).get(timeout=30)
        thread = MonitorThread(kafka)
        thread.start()
        offset = before.offset + 1
        client.send(SAMPLES, b"not a sample", partition=0)
        client.send(SAMPLES, encode(sample(0)), partition=0)
        client.send(WEIGHTS, b"\xff", b"9/manifest", partition=0)
        client.send(WEIGHTS, encode(manifest(9, (0, 0, offset + 2))), b"9/manifest", partition=0)
        client.send(WEIGHTS, encode(Commit(version=9)), b"9/commit", partition=0)
        client.send(WEIGHTS_ACKS, encode(ack(9, 500)), partition=0)
        client.flush()
        give_up = time.monotonic() + 20
        while thread.monitor.seen.applied < 1 and time.monotonic() < give_up:
            time.sleep(0.05)
        seen = thread.finish()
    finally:
        client.close()
    assert seen.samples == {"learning": 1}
    assert list(seen.freshness_s) == [0.5]
    assert seen.unreadable == 2

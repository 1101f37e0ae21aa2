"""Label wait and freshness, from records alone."""

from ops.monitor import Monitor
from streams.events import Sample
from streams.weights import Ack, Manifest, StepEntry


def sample(arm: str = "learning", time_ms: int = 0, closable_ms: int = 1000) -> Sample:
    return Sample(
        request="r",
        user="u",
        time_ms=time_ms,
        arm=arm,
        policy_version=1,
        catalogue_version=0,
        decode_mode="gumbel_top_k",
        temperature=1.0,
        context=b"",
        excluded=b"",
        items=[],
        threshold=0.75,
        median=0.5,
        start_ms=time_ms,
        decided_ms=closable_ms,
        closed_by="decided",
        watermark_ms=closable_ms,
        closable_ms=closable_ms,
        exposure_offset=0,
        feedback_upto=0,
    )


def manifest(version: int, *ranges: tuple[int, int, int]) -> Manifest:
    entry = StepEntry(ranges=list(ranges), trained=1, control=0, without_target=0)
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
        journal=[entry],
        watermark_ms=0,
        created_ms=1500,
    )


def ack(version: int, applied_ms: int, applied: bool = True) -> Ack:
    return Ack(actor="a", version=version, applied=applied, created_ms=1500, applied_ms=applied_ms)


def test_freshness_is_from_closable_to_the_ack_of_a_version_that_contains_the_sample() -> None:
    monitor = Monitor()
    monitor.sample(0, 5, sample(closable_ms=1000))
    monitor.sample(0, 7, sample(closable_ms=1400))
    monitor.manifest(manifest(2, (0, 0, 6)))
    monitor.ack(ack(2, 2000))
    assert list(monitor.seen.freshness_s) == [1.0]
    assert monitor.seen.pending == 1
    monitor.manifest(manifest(3, (0, 6, 8)))
    monitor.ack(ack(3, 2400))
    assert list(monitor.seen.freshness_s) == [1.0, 1.0]
    assert monitor.seen.pending == 0


def test_a_later_version_contains_what_the_earlier_ones_did() -> None:
    monitor = Monitor()
    monitor.sample(1, 0, sample(closable_ms=1000))
    monitor.manifest(manifest(2, (1, 0, 1)))
    monitor.manifest(manifest(3, (0, 0, 4)))
    monitor.ack(ack(3, 3000))  # version 2 was skipped by the actor
    assert list(monitor.seen.freshness_s) == [2.0]


def test_an_ack_that_is_read_before_its_version_is_kept_for_it() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(closable_ms=1000))
    monitor.ack(ack(2, 2000))
    assert not monitor.seen.freshness_s
    monitor.manifest(manifest(2, (0, 0, 1)))
    assert list(monitor.seen.freshness_s) == [1.0]


def test_a_refusal_makes_nothing_fresh() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample())
    monitor.manifest(manifest(2, (0, 0, 1)))
    monitor.ack(ack(2, 2000, applied=False))
    assert (monitor.seen.refused, monitor.seen.applied, monitor.seen.pending) == (1, 0, 1)


def test_only_the_learning_arm_has_freshness_and_all_have_label_wait() -> None:
    monitor = Monitor()
    monitor.sample(0, 0, sample(arm="control", time_ms=500, closable_ms=1000))
    monitor.manifest(manifest(2, (0, 0, 1)))
    monitor.ack(ack(2, 2000))
    assert not monitor.seen.freshness_s
    assert list(monitor.seen.label_wait_s) == [0.5]


def test_unpublished_counts_partitions_until_a_version_covers_their_last_sample() -> None:
    monitor = Monitor()
    monitor.sample(0, 3, sample())
    monitor.sample(1, 9, sample(arm="control"))
    assert monitor.seen.unpublished == 2
    monitor.manifest(manifest(2, (0, 0, 4), (1, 0, 9)))
    assert monitor.seen.unpublished == 1
    monitor.manifest(manifest(3, (1, 9, 10)))
    assert monitor.seen.unpublished == 0

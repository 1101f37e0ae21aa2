"""Windowed sums: what is in them, when they are final, and that they can be rebuilt from any point of the log."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.events import ACTION_BITS, Insight, Outcome, Sample, SampleItem
from streams.windows import EventClock, Windows, standing
from tests.streams import makers

WINDOW_MS = 10_000
GRACE_MS = 5_000


def item(
    name: str = "a",
    outcome: Outcome = "ended",
    play_ms: int = 0,
    actions: int = 0,
    advantage: int | None = None,
) -> SampleItem:
    return SampleItem(
        item=name,
        sid=(0, 0, 0),
        position=0,
        duration_ms=1000,
        source="policy",
        outcome=outcome,
        play_ms=play_ms,
        actions=actions,
        advantage=advantage,
    )


def sample(
    watermark_ms: int, arm: str = "learning", items: list[SampleItem] | None = None
) -> Sample:
    return makers.sample(watermark_ms, arm, [item()] if items is None else items)


def windows(top: int = 10) -> Windows:
    return Windows(WINDOW_MS, GRACE_MS, top)


def requests(report: list[Insight]) -> dict[tuple[int, str], int]:
    return {(each.window_start_ms, each.arm): each.requests for each in report}


def test_a_window_adds_up_what_the_items_of_its_samples_came_to() -> None:
    w = windows()
    shown = [
        item("a", "ended", 3000, ACTION_BITS["like"], advantage=1),
        item("b", "left", 200, ACTION_BITS["dislike"] | ACTION_BITS["like"], advantage=-1),
        item("c", "censored", 9000),
        item("d", "unseen"),
        item("a", "abandoned", 500, advantage=0),
    ]
    w.add(2, 7, sample(12_345, items=shown))
    w.add(2, 8, sample(19_999, items=[item("b", play_ms=1)]))
    assert w.report(None) == [
        Insight(
            window_start_ms=10_000,
            window_ms=WINDOW_MS,
            arm="learning",
            partitions=[2],
            final=False,
            requests=2,
            shown=6,
            seen=5,
            plays_ms=12_701,
            judged=3,
            positives=1,
            dislikes=1,
            censored=1,
            distinct_items=4,
            top_items=[("a", 2), ("b", 2), ("c", 1), ("d", 1)],
        )
    ]


def test_arms_and_windows_are_apart() -> None:
    w = windows()
    for offset, (watermark_ms, arm) in enumerate(
        [(9_999, "control"), (10_000, "control"), (10_001, "learning"), (10_002, "learning")]
    ):
        w.add(0, offset, sample(watermark_ms, arm))
    assert requests(w.report(None)) == {
        (0, "control"): 1,
        (10_000, "control"): 1,
        (10_000, "learning"): 2,
    }


def test_top_items_are_the_most_shown_and_ties_go_by_name() -> None:
    w = windows(top=2)
    w.add(0, 0, sample(0, items=[item("c"), item("b"), item("a"), item("c")]))
    (insight,) = w.report(None)
    assert insight.top_items == [("c", 2), ("a", 1)]
    assert insight.distinct_items == 3


def test_a_record_read_twice_counts_once() -> None:
    w = windows()
    assert w.add(0, 5, sample(1))
    assert not w.add(0, 5, sample(1))
    assert w.add(1, 5, sample(1)), "offsets are those of a partition"
    assert requests(w.report(None)) == {(0, "learning"): 2}
    assert w.late == 0


def test_a_window_is_final_when_event_time_has_passed_its_end_and_the_grace() -> None:
    w = windows()
    w.add(0, 0, sample(9_000))
    w.add(0, 1, sample(11_000))
    assert [each.final for each in w.report(14_999)] == [False, False]
    assert [each.final for each in w.report(15_000)] == [True, False]


def test_a_sample_of_a_closed_window_is_counted_as_late_and_summed_nowhere() -> None:
    w = windows()
    w.add(0, 0, sample(9_000))
    (before,) = w.report(15_000)
    assert not w.add(1, 0, sample(9_000))
    assert (w.late, w.report(15_000)) == (1, [before])
    w.settle()
    assert not w.add(1, 1, sample(9_999))
    assert (w.late, w.report(15_000)) == (2, [])


def test_event_time_never_reopens_a_window() -> None:
    w = windows()
    w.add(0, 0, sample(9_000))
    w.report(15_000)
    w.settle()
    w.report(3_000)
    assert not w.add(0, 1, sample(9_500))


def test_a_report_is_repeated_until_it_is_settled() -> None:
    w = windows()
    w.add(0, 0, sample(9_000))
    w.add(0, 1, sample(11_000))
    first = w.report(15_000)
    assert w.report(15_000) == first
    w.settle()
    assert w.report(15_000) == []


def test_what_came_after_a_report_is_in_the_next_one() -> None:
    w = windows()
    w.add(0, 0, sample(1_000))
    w.report(None)
    w.add(0, 1, sample(2_000))
    w.settle()
    assert requests(w.report(None)) == {(0, "learning"): 2}


def test_growing_windows_can_be_kept_back_and_come_later() -> None:
    w = windows()
    w.add(0, 0, sample(9_000))
    w.add(0, 1, sample(11_000))
    assert requests(w.report(15_000, with_open=False)) == {(0, "learning"): 1}
    w.settle()
    assert requests(w.report(15_000)) == {(10_000, "learning"): 1}


def test_settling_names_the_first_offset_that_an_open_window_needs() -> None:
    w = windows()
    for partition, offset, watermark_ms in [
        (0, 4, 9_000),
        (0, 5, 10_500),
        (0, 9, 11_000),
        (1, 70, 9_900),
        (2, 3, 10_001),
    ]:
        w.add(partition, offset, sample(watermark_ms))
    w.report(None)
    assert w.settle() == {0: 4, 1: 70, 2: 3}
    w.report(15_000)
    assert w.settle() == {0: 5, 1: 71, 2: 3}
    w.report(25_000)
    assert w.settle() == {0: 10, 1: 71, 2: 4}


Log = list[list[Sample]]
"""The samples of each partition; the offset is the place."""


@st.composite
def logs(draw: st.DrawFn) -> Log:
    rng = random.Random(draw(st.integers(0, 2**32)))
    return [
        [
            sample(at, rng.choice(["control", "learning"]))
            for at in sorted(rng.randrange(60_000) for _ in range(rng.randrange(30)))
        ]
        for _ in range(3)
    ]


def total(insights: list[Insight]) -> dict[tuple[int, str], int]:
    sums: dict[tuple[int, str], int] = {}
    for each in standing(insights):
        key = (each.window_start_ms, each.arm)
        sums[key] = sums.get(key, 0) + each.requests
    return sums


def truth(log: Log) -> dict[tuple[int, str], int]:
    sums: dict[tuple[int, str], int] = {}
    for each in [each for partition in log for each in partition]:
        key = (each.watermark_ms // WINDOW_MS * WINDOW_MS, each.arm)
        sums[key] = sums.get(key, 0) + 1
    return sums


@given(logs(), st.integers(0, 2**32))
def test_readers_that_stop_and_hand_partitions_over_anywhere_publish_the_same_sums(
    log: Log, seed: int
) -> None:
    rng = random.Random(seed)
    topic: list[Insight] = []
    committed = dict.fromkeys(range(len(log)), 0)
    for _ in range(500):
        if all(committed[p] == len(log[p]) for p in committed):
            break
        owner = {p: rng.randrange(2) for p in committed}
        for reader in (0, 1):
            mine = [p for p in committed if owner[p] == reader]
            w, at = windows(), {p: committed[p] for p in mine}
            last = rng.random() < 0.3
            for _ in range(rng.randrange(40)):
                left = [p for p in mine if at[p] < len(log[p])]
                if not left:
                    break
                p = min(left, key=lambda p: log[p][at[p]].watermark_ms)
                w.add(p, at[p], log[p][at[p]])
                now_ms = log[p][at[p]].watermark_ms
                at[p] += 1
                if rng.random() < 0.2:
                    topic += w.report(now_ms)
                    if rng.random() < 0.7:
                        committed |= w.settle()
            if last and all(at[p] == len(log[p]) for p in mine):
                topic += w.report(10**9)
                committed |= w.settle()
            assert w.late == 0
    assert total(topic) == truth(log)


def test_a_record_that_shares_a_partition_replaces_the_earlier_one() -> None:
    def record(partitions: list[int], count: int) -> Insight:
        w = windows()
        w.add(0, 0, sample(0))
        (insight,) = w.report(None)
        insight.partitions, insight.requests = partitions, count
        return insight

    assert total([record([0, 1, 2], 9), record([0], 1)]) == {(0, "learning"): 1}
    assert total([record([0, 1], 4), record([2], 5)]) == {(0, "learning"): 9}
    assert total([record([0], 1), record([1], 2), record([0, 1], 4)]) == {(0, "learning"): 4}


def test_event_time_is_that_of_the_slowest_partition() -> None:
    clock = EventClock([0, 1], idle_s=5, wall_s=100)
    clock.observe(0, 50_000, 101)
    assert clock.now_ms(101) is None, "partition 1 may yet bring older samples"
    clock.observe(1, 20_000, 101)
    assert clock.now_ms(101) == 20_000
    clock.observe(1, 60_000, 102)
    assert clock.now_ms(102) == 50_000


@pytest.mark.parametrize("heard", [False, True])
def test_an_idle_partition_is_not_waited_for(heard: bool) -> None:
    clock = EventClock([0, 1], idle_s=5, wall_s=100)
    if heard:
        clock.observe(1, 1_000, 100)
    clock.observe(0, 50_000, 104)
    assert clock.now_ms(104.9) == (1_000 if heard else None)
    assert clock.now_ms(105) == 50_000


def test_event_time_stands_still_when_all_is_idle_and_never_goes_back() -> None:
    clock = EventClock([0, 1], idle_s=5, wall_s=100)
    clock.observe(0, 50_000, 100)
    assert clock.now_ms(105) is None
    clock.observe(0, 50_000, 106)
    assert clock.now_ms(106) == 50_000
    assert clock.now_ms(200) == 50_000
    clock.observe(1, 20_000, 200)
    assert clock.now_ms(200) == 50_000

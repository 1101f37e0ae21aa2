"""The audit finds nothing in what the join made, and each kind of damage to it."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.audit import Entry, Findings, PartitionLogs, audit
from streams.events import Exposure, Feedback, Tick
from streams.settings import JoinSettings, ShapeSettings
from streams.topics import EXPOSURES, FEEDBACK
from tests.streams.makers import T0, exposure
from tests.streams.shell import JOIN, Arrived, Shell, busy_arrivals

FAR = T0 + 1_000_000


class Ticked(Shell):
    """Ticks count as records of both inputs, as they do in Kafka."""

    def offset(self, topic: str, at: int) -> int:
        other = Feedback if topic == EXPOSURES else Exposure
        return sum(not isinstance(event, other) for event in self.arrivals[:at])


def joined(seed: int, upto: int | None = None, join: JoinSettings = JOIN) -> PartitionLogs:
    """A partition's life, or its beginning, as its topics tell it."""
    arrivals: list[Arrived] = [*busy_arrivals(seed), FAR]
    return logs_of(arrivals[:upto], join)


def logs_of(arrivals: list[Arrived], join: JoinSettings = JOIN) -> PartitionLogs:
    """What the topics hold after these arrivals."""
    shell = Ticked(arrivals, join).run(commits=range(0, len(arrivals), 7))
    inputs: dict[str, list[Entry]] = {EXPOSURES: [], FEEDBACK: []}
    written_ms = T0
    for event in arrivals:
        record = Tick(time_ms=event, writer="test") if isinstance(event, int) else event
        written_ms = max(written_ms, record.time_ms)
        for topic, entries in inputs.items():
            other = Feedback if topic == EXPOSURES else Exposure
            if not isinstance(record, other):
                entries.append(Entry(len(entries), written_ms, record))
    letters: Counter[tuple[str, int]] = Counter()
    closed = {sample.request for sample in shell.samples}
    for entry in inputs[EXPOSURES]:
        shown = entry.event
        if isinstance(shown, Exposure) and shown.request in shell.dead.keys() - closed:
            letters[(EXPOSURES, entry.offset)] = 1
    return PartitionLogs(
        exposures=inputs[EXPOSURES],
        feedback=inputs[FEEDBACK],
        samples=list(enumerate(shell.samples)),
        letters=letters,
        exposures_upto=len(inputs[EXPOSURES]),
        feedback_upto=len(inputs[FEEDBACK]),
        watermark_ms=shell.partition.join.watermark_ms,
        judged=None,
        seeds=[],
    )


def found(logs: PartitionLogs) -> Findings:
    return audit(logs, JOIN, ShapeSettings())


def faults(logs: PartitionLogs) -> dict[str, int]:
    names = ("lost", "duplicated", "wrong_label", "unaccounted")
    return {name: count for name in names if (count := getattr(found(logs), name))}


@settings(max_examples=40)
@given(st.integers(0, 1 << 30), st.floats(0.1, 1))
def test_what_the_join_made_is_right_wherever_it_stands(seed: int, share: float) -> None:
    whole = len(busy_arrivals(seed)) + 1
    logs = joined(seed, max(1, int(share * whole)))
    assert faults(logs) == {}, found(logs).examples
    got = found(logs)
    assert got.shaping_checked == got.samples == len(logs.samples)
    assert got.exposures == got.samples + got.open


def test_an_exposure_that_came_late_is_not_missed_before_its_own_deadline() -> None:
    """It is older than the horizon by the clock of its writing, not by the watermark it met."""
    arrivals: list[Arrived] = [T0, exposure("ahead", T0 + 1000), T0 + 700]
    logs = logs_of([*arrivals, exposure("late", T0 + 690), T0 + 735])
    assert faults(logs) == {}
    assert found(logs).open == 2


def test_after_the_last_deadline_nothing_is_open() -> None:
    got = found(joined(3))
    assert (got.open, got.samples) == (0, got.exposures)
    assert got.samples > 20
    assert got.late > 0 and got.late_exposures > 0


def changed(index: int, **fields: Any) -> Callable[[PartitionLogs], None]:
    def damage(logs: PartitionLogs) -> None:
        offset, sample = logs.samples[index]
        logs.samples[index] = (offset, msgspec.structs.replace(sample, **fields))

    return damage


def item_changed(**fields: Any) -> Callable[[PartitionLogs], None]:
    """The first item of the first sample that has a percentile."""

    def damage(logs: PartitionLogs) -> None:
        for place, (offset, sample) in enumerate(logs.samples):
            for at, item in enumerate(sample.items):
                if item.percentile is not None and item.advantage == 0:
                    items = list(sample.items)
                    items[at] = msgspec.structs.replace(item, **fields)
                    logs.samples[place] = (offset, msgspec.structs.replace(sample, items=items))
                    return
        raise AssertionError("no such item")

    return damage


def dropped(logs: PartitionLogs) -> None:
    del logs.samples[5]


def doubled(logs: PartitionLogs) -> None:
    logs.samples.insert(8, (99, logs.samples[5][1]))


def moved(logs: PartitionLogs) -> None:
    """The fold went over the samples in another order."""
    random.Random(1).shuffle(logs.samples)


def lettered(logs: PartitionLogs) -> None:
    logs.letters[(FEEDBACK, 0)] += 1


def unreadable(logs: PartitionLogs) -> None:
    entry = next(e for e in logs.feedback if isinstance(e.event, Tick))
    logs.feedback[entry.offset] = replace(entry, event=None)


def unfed(logs: PartitionLogs) -> None:
    """All feedback of the first sample with a play is gone from the log."""
    played = next(s.request for _, s in logs.samples if any(i.outcome != "unseen" for i in s.items))
    logs.feedback = [
        e
        for e in logs.feedback
        if not (isinstance(e.event, Feedback) and e.event.request == played)
    ]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (dropped, "lost"),
        (doubled, "duplicated"),
        (changed(4, closed_by="deadline", decided_ms=T0 + 90_000), "wrong_label"),
        (changed(4, watermark_ms=T0), "wrong_label"),
        (changed(4, watermark_ms=FAR + 5), "wrong_label"),
        (changed(4, policy_version=77), "wrong_label"),
        (changed(4, exposure_offset=0), "wrong_label"),
        (changed(4, start_ms=T0 + 900_000), "wrong_label"),
        (changed(4, threshold=0.123), "wrong_label"),
        (changed(4, request="nobody's"), "wrong_label"),
        (item_changed(outcome="unseen"), "wrong_label"),
        (item_changed(play_ms=1 << 20), "wrong_label"),
        (item_changed(actions=31), "wrong_label"),
        (item_changed(percentile=0.123), "wrong_label"),
        (item_changed(advantage=1), "wrong_label"),
        (item_changed(item="another"), "wrong_label"),
        (moved, "wrong_label"),
        (lettered, "unaccounted"),
        (unreadable, "unaccounted"),
        (unfed, "wrong_label"),
    ],
)
def test_each_damage_is_found(damage: Callable[[PartitionLogs], None], fault: str) -> None:
    logs = joined(3)
    damage(logs)
    assert fault in faults(logs)
    assert found(logs).examples


def test_what_is_not_due_is_open() -> None:
    logs = joined(3)
    due = sorted(logs.samples, key=lambda each: each[1].decided_ms)[-1][1]
    logs.samples = [each for each in logs.samples if each[1].request != due.request]
    logs.watermark_ms = due.decided_ms + round(JOIN.lateness_s * 1000) - 1
    assert found(logs).open == 1
    logs.watermark_ms += 1
    assert found(logs).lost == 1


def test_what_was_not_yet_read_is_open() -> None:
    logs = joined(3)
    logs.exposures.append(Entry(len(logs.exposures), FAR, exposure("new", T0, 1)))
    assert found(logs).open == 1


def test_without_its_beginning_the_fold_is_not_replayed() -> None:
    logs = joined(3)
    logs.seeds = None
    item_changed(percentile=0.123)(logs)
    got = found(logs)
    assert (got.wrong_label, got.shaping_checked) == (0, 0)


def test_of_a_range_only_its_own_exposures_are_judged_and_repeats_belong_to_the_first() -> None:
    logs = joined(3)
    logs.seeds = None  # a part of the fold cannot be followed
    whole = found(logs)
    offsets = sorted(sample.exposure_offset for _, sample in logs.samples)
    half = offsets[len(offsets) // 2]
    parts = []
    for part in (range(half), range(half, 9999)):
        logs.judged = part
        parts.append(found(logs))
        assert faults(logs) == {}
    assert sum(part.exposures for part in parts) == whole.exposures
    assert sum(part.samples for part in parts) == whole.samples
    del logs.samples[-1]
    assert faults(logs) == {"lost": 1}


@settings(max_examples=40)
@given(st.integers(0, 1 << 30), st.integers(1, 3))
def test_samples_forced_out_by_the_most_open_are_checked_as_they_stood(
    seed: int, most: int
) -> None:
    logs = joined(seed, join=replace(JOIN, max_open=most))
    assert faults(logs) == {}, found(logs).examples
    forced = [
        index for index, (_, sample) in enumerate(logs.samples) if sample.closed_by == "memory"
    ]
    if forced:
        index = random.Random(seed).choice(forced)
        _, sample = logs.samples[index]
        changed(index, decided_ms=sample.decided_ms + 1)(logs)
        logs.seeds = None  # the fold ends where something is wrong
        assert faults(logs) == {"wrong_label": 1}


def test_the_most_open_force_samples_out() -> None:
    logs = joined(3, join=replace(JOIN, max_open=2))
    assert Counter(sample.closed_by for _, sample in logs.samples)["memory"] > 3

"""A partition's samples do not depend on how its input is cut into batches, nor on how often it dies."""

import random
from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.kv import MemoryKv
from streams.audit import disagreement
from streams.decision import NEVER
from streams.events import (
    Exposure,
    Feedback,
    History,
    LateStart,
    Sample,
    decode,
    encode,
    history_decoder,
    shaping_decoder,
)
from streams.history import PackedHistory
from streams.open_requests import OFFSET_BLOCK
from streams.partition import OffsetNote, Partition
from streams.reference import Rules, verdict
from streams.settings import JoinSettings, ShapeSettings, StreamsSettings
from streams.state import PartitionState
from streams.topics import HISTORIES, SHAPING
from tests.streams.makers import T0, Feed, exposure
from tests.streams.shell import JOIN, Arrived, Shell, busy_arrivals

RULES = Rules(window=40, cap=90, abandon=12, horizon=300)
FAR = T0 + 1_000_000


def wire(shell: Shell) -> list[bytes]:
    return [encode(sample) for sample in shell.samples]


def places(rng: random.Random, count: int, share: float) -> set[int]:
    return {at for at in range(1, count) if rng.random() < share}


@settings(max_examples=25)
@given(st.integers(0, 1 << 30))
def test_samples_do_not_depend_on_how_the_input_is_cut_into_batches(seed: int) -> None:
    arrivals = busy_arrivals(seed)
    whole = Shell(arrivals).run(commits=())
    cut = Shell(arrivals).run(commits=places(random.Random(seed), len(arrivals), 0.2))
    single = Shell(arrivals).run(commits=range(len(arrivals)))
    assert whole.samples
    assert wire(whole) == wire(cut) == wire(single)
    for topic in (HISTORIES, SHAPING):
        assert whole.compacted(topic) == cut.compacted(topic) == single.compacted(topic)


@settings(max_examples=60)
@given(st.integers(0, 1 << 30))
def test_dying_at_any_moment_changes_no_sample(seed: int) -> None:
    """Before a commit, between commit and local state, with and without the disk."""
    arrivals = busy_arrivals(seed)
    rng = random.Random(seed)
    expected = Shell(arrivals).run(commits=places(rng, len(arrivals), 0.2))
    commits = places(rng, len(arrivals), 0.15)
    crashes = places(rng, len(arrivals), 0.05) | {at for at in commits if rng.random() < 0.2}
    died = Shell(arrivals).run(commits, crashes, {at for at in crashes if rng.random() < 0.4})
    assert wire(died) == wire(expected)
    for topic in (HISTORIES, SHAPING):
        assert died.compacted(topic) == expected.compacted(topic)


@settings(max_examples=25)
@given(st.integers(0, 1 << 30))
def test_every_sample_is_what_the_reference_says_from_the_feedback_it_names(seed: int) -> None:
    arrivals = busy_arrivals(seed)
    shell = Shell(arrivals).run(commits=places(random.Random(seed), len(arrivals), 0.3))
    shown = {event.request: event for event in arrivals if isinstance(event, Exposure)}
    feedback = [event for event in arrivals if isinstance(event, Feedback)]
    for sample in shell.samples:
        heard = [e for e in feedback[: sample.feedback_upto] if e.request == sample.request]
        expected = verdict(shown[sample.request], sample.start_ms, heard, RULES)
        assert disagreement(sample, expected) == ""


@settings(max_examples=25)
@given(st.integers(0, 1 << 30))
def test_every_exposure_becomes_one_sample_or_was_too_late(seed: int) -> None:
    arrivals = busy_arrivals(seed)
    rng = random.Random(seed)
    crashes = places(rng, len(arrivals), 0.05)
    shell = Shell(arrivals).run(places(rng, len(arrivals), 0.2), crashes)
    shown = {event.request for event in arrivals if isinstance(event, Exposure)}
    sampled = Counter(sample.request for sample in shell.samples)
    assert all(count == 1 for count in sampled.values())
    assert shown - set(sampled) <= set(shell.dead)
    assert shell.partition.join.open == 0


def test_a_hundred_late_exposures_keep_their_starts_and_on_time_ones_theirs_when_it_dies() -> None:
    """A drained spool: more starts than fit beside an offset, and an on-time request open among them."""
    on_time = exposure("on time", T0 + 995)
    late = [exposure(f"late {n}", T0 + 800 + n) for n in range(100)]
    arrivals: list[Arrived] = [exposure("before", T0), T0 + 1000, on_time]
    for number, each in enumerate(late):
        arrivals += [each, T0 + 1000 + number // 10]
    dies = len(arrivals)
    arrivals.append(FAR)
    expected = Shell(arrivals).run(commits=[dies])
    for wiped in (False, True):
        died = Shell(arrivals).run([dies], [dies], [dies] if wiped else [])
        assert wire(died) == wire(expected)
    starts = {sample.request: sample.start_ms for sample in expected.samples}
    assert starts["on time"] == T0 + 995
    assert starts["late 0"] == T0 + 1000 - 8
    assert starts["late 99"] == T0 + 1009 - 8


def test_starts_of_late_exposures_are_committed_while_open_and_deleted_after() -> None:
    arrivals: list[Arrived] = [T0 + 1000, exposure("late", T0 + 900), FAR]
    shell = Shell(arrivals)
    shell.take(0)
    shell.take(1)
    shell.commit(2)
    (value,) = shell.compacted(SHAPING).values()
    assert decode(shaping_decoder, value) == LateStart(offset=0, start_ms=T0 + 1000 - 8)
    shell.take(2)
    shell.commit(3)
    assert "late/0" not in shell.compacted(SHAPING)
    assert shell.state.late_starts() == {}


def test_a_late_exposure_that_closes_within_its_batch_leaves_no_trace() -> None:
    shell = Shell([T0 + 1000, exposure("late", T0 + 900), FAR]).run(commits=())
    assert len(shell.samples) == 1
    assert [key for key, _ in shell.logs[SHAPING] if key.startswith("late")] == []


def test_what_was_too_late_is_not_opened_by_a_restart() -> None:
    old = exposure("old", T0)
    arrivals: list[Arrived] = [T0 + 1000, exposure("open", T0 + 1000), old, T0 + 1001, FAR]
    shell = Shell(arrivals).run(commits=[3, 4], crashes=[4])
    assert {sample.request for sample in shell.samples} == {"open"}
    assert shell.dead == {"old": 1}


def test_a_request_longer_open_than_ids_are_remembered_survives_a_restart() -> None:
    settings = JoinSettings(window_s=0.04, cap_s=0.09, abandon_s=0.012, dedupe_horizon_s=0.001)
    arrivals: list[Arrived] = [exposure(), T0 + 30, FAR]
    shell = Shell(arrivals, settings).run(commits=[2], crashes=[2])
    assert len(shell.samples) == 1


def test_a_limit_lowered_between_two_lives_closes_by_force_and_loses_nothing() -> None:
    arrivals: list[Arrived] = [exposure(f"r{number}", T0 + number, 1) for number in range(5)]
    arrivals += [Feed("r4")("end", 0, 6, play_ms=5), T0 + 7, FAR]
    shell = Shell(arrivals)
    for at in range(6):
        shell.take(at)
    shell.commit(6)
    shell.join = replace(JOIN, max_open=2)
    shell.begin()
    assert shell.partition.join.open == 5
    shell.take(6)
    assert shell.partition.join.open == 2
    shell.take(7)
    shell.commit(8)
    assert sorted(sample.request for sample in shell.samples) == ["r0", "r1", "r2", "r3", "r4"]
    assert Counter(sample.closed_by for sample in shell.samples)["memory"] == 3


@pytest.mark.parametrize("order", ["closing", "exposure"])
@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30))
def test_no_limit_set_at_any_restart_loses_or_doubles_a_request(
    order: Literal["closing", "exposure"], seed: int
) -> None:
    arrivals = busy_arrivals(seed)
    rng = random.Random(seed)

    class Retuned(Shell):
        def begin(self, wiped: bool = False) -> None:
            self.join = replace(JOIN, order=order, max_open=rng.choice([1, 2, 5, 1000]))
            super().begin(wiped)

    crashes = places(rng, len(arrivals), 0.05)
    shell = Retuned(arrivals).run(places(rng, len(arrivals), 0.2), crashes)
    shown = {event.request for event in arrivals if isinstance(event, Exposure)}
    sampled = Counter(sample.request for sample in shell.samples)
    assert all(count == 1 for count in sampled.values())
    assert shown - set(sampled) <= set(shell.dead)
    assert shell.partition.join.open == 0


def test_feedback_that_waited_in_vain_is_not_revived_by_a_restart() -> None:
    """It is older than the exposure's start by the horizon, so it counts in neither life."""
    feed = Feed("r")
    arrivals: list[Arrived] = [
        *(Feed("keeps the log")("begin", 0, 0, time_ms=T0 + at) for at in range(0, 900, 100)),
        feed("end", 0, 0, play_ms=5),
        feed("begin", 0, 10, play_ms=4),
        T0 + 308 + 5,
        T0 + 308 + 20,
        exposure("r", T0 + 325, 1),
        FAR,
    ]
    alive = Shell(arrivals).run(commits=[13])
    died = Shell(arrivals).run(commits=[13], crashes=[13])
    assert wire(died) == wire(alive)
    (sample,) = alive.samples
    assert sample.items[0].outcome == "unseen"


# --- histories --------------------------------------------------------------------------------------


def history_of(shell: Shell, user: str = "user") -> History:
    value = shell.compacted(HISTORIES)[user]
    return decode(history_decoder, value)


def test_a_history_holds_final_plays_by_their_ends_and_what_was_shown() -> None:
    one, two = Feed("one"), Feed("two")
    arrivals: list[Arrived] = [
        exposure("one", T0, 3),
        exposure("two", T0 + 1, 1),
        one("end", 0, 9, play_ms=90),
        one("like", 0, 9),
        *(one("heartbeat", 1, at, play_ms=at) for at in range(10, 60, 10)),  # censored
        two("end", 0, 8, play_ms=80),
        FAR,
    ]
    shell = Shell(arrivals).run(commits=())
    history = history_of(shell)
    found = [(b.request, b.position, b.play_ms, b.actions, b.end_ms) for b in history.behaviours]
    assert found == [("two", 0, 80, 0, T0 + 8), ("one", 0, 90, 1, T0 + 9)]
    assert history.behaviours[0].item == "item-0"
    assert history.behaviours[0].duration_ms == 20_000
    assert sorted(history.shown) == ["item-0", "item-0", "item-1", "item-2"]
    assert len(shell.logs[HISTORIES]) == 1  # once a user and transaction


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_history_is_capped_at_the_latest(most: int) -> None:
    arrivals: list[Arrived] = []
    for number in range(5):
        arrivals += [exposure(f"r{number}", T0 + 10 * number, 1)]
        arrivals += [Feed(f"r{number}")("end", 0, 10 * number + 1, play_ms=number)]
    streams = StreamsSettings(history_behaviours=2, history_shown=most)
    for commits in ((), range(10)):
        history = history_of(Shell([*arrivals, FAR], streams=streams).run(commits))
        assert [behaviour.play_ms for behaviour in history.behaviours] == [3, 4]
        assert len(history.shown) == most


def test_nothing_to_commit_is_said_so() -> None:
    partition = Partition(JOIN, ShapeSettings(), StreamsSettings(), PartitionState(MemoryKv()))
    assert partition.take().empty
    partition.expose(exposure(), 0, T0)
    assert partition.take().empty
    partition.tick(FAR, True, 0)
    partition.tick(FAR, False, 0)
    output = partition.take()
    assert [type(one) for one in (*output.samples, *output.histories)] == [Sample, PackedHistory]
    assert partition.take().empty


def test_the_note_says_what_is_still_needed() -> None:
    partition = Partition(JOIN, ShapeSettings(), StreamsSettings(), PartitionState(MemoryKv()))
    assert partition.note(5, 6) == OffsetNote(NEVER, NEVER, 5, 6)
    partition.feed(Feed()("begin", 0, 3), 2 * OFFSET_BLOCK, 0)
    partition.expose(exposure(), OFFSET_BLOCK, 0)
    needed = OffsetNote(T0, T0 + 3, OFFSET_BLOCK, 2 * OFFSET_BLOCK)
    assert partition.note(OFFSET_BLOCK + 1, 2 * OFFSET_BLOCK + 1) == needed

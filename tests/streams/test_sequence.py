"""Order `exposure`: the same samples from any order of arrival within the lateness, and whatever dies."""

import random
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.audit import disagreement
from streams.events import Exposure, Feedback, Sample
from streams.reference import Rules, verdict
from streams.settings import JoinSettings
from streams.topics import HISTORIES, SHAPING
from tests.streams.makers import T0, Feed, exposure
from tests.streams.shell import JOIN, Arrived, Shell, busy_arrivals
from tests.streams.test_partition import places, wire

ORDERED = replace(JOIN, order="exposure")
FAR = T0 + 1_000_000
LATENESS_MS = 8


def events_of(seed: int, requests: int = 40) -> list[Exposure | Feedback]:
    """Requests that overlap, with feedback of all kinds."""
    rng = random.Random(seed)
    events: list[Exposure | Feedback] = []
    for number in range(requests):
        name, user = f"r{number}", f"u{rng.randrange(4)}"
        at_ms = rng.randrange(20 * requests)
        events.append(exposure(name, T0 + at_ms, rng.randint(1, 3), user=user))
        feed = Feed(name, user)
        for _ in range(rng.randrange(9)):
            kind = rng.choice(["begin", "heartbeat", "heartbeat", "end", "like", "dislike"])
            play_ms = rng.randrange(40_000)
            events.append(feed(kind, rng.randrange(3), at_ms + rng.randrange(60), play_ms=play_ms))  # type: ignore[arg-type]
        if rng.random() < 0.3:
            events.append(feed.left(at_ms + rng.randrange(80)))
    return events


def arrived(
    events: list[Exposure | Feedback], seed: int, copies: int, within_ms: float = LATENESS_MS - 0.1
) -> list[Arrived]:
    """Each event within the lateness of its time, in an order of its own; ticks keep time."""
    rng = random.Random(seed)
    timed: list[tuple[float, int, Arrived]] = []
    for number, event in enumerate(events):
        timed += [(event.time_ms + rng.uniform(0, within_ms), number, event) for _ in range(copies)]
    last = max(event.time_ms for event in events)
    for tick in range(T0, last, 25):
        at = tick + rng.randrange(25)
        timed.append((at + rng.uniform(0, 5), -1, at))
    timed.sort(key=lambda entry: entry[:2])
    return [*(event for *_, event in timed), FAR]


def labels(shell: Shell) -> list[Sample]:
    """Samples without what says where and when they were made."""
    return [
        msgspec.structs.replace(
            sample, watermark_ms=0, closable_ms=0, exposure_offset=0, feedback_upto=0
        )
        for sample in shell.samples
    ]


@settings(max_examples=80)
@given(st.integers(0, 1 << 30), st.integers(1, 3), st.sampled_from([ORDERED, JOIN]))
def test_shuffled_within_the_lateness_and_repeated_it_makes_the_same_samples(
    seed: int, copies: int, join: JoinSettings
) -> None:
    """Under order `closing` too: requests close in the order of their decisions, however the watermark jumps."""
    events = events_of(seed)
    straight = Shell(arrived(events, seed, 1), join).run(commits=range(0, 9999, 9))
    mixed = arrived(events, seed + 1, copies)
    commits = places(random.Random(seed), len(mixed), 0.2)
    assert labels(Shell(mixed, join).run(commits)) == labels(straight)
    assert len(straight.samples) == 40


def test_beyond_the_lateness_they_may_differ() -> None:
    """Else the test above would say nothing."""
    different = 0
    for seed in range(20):
        events = events_of(seed)
        one, other = (
            Shell(arrived(events, seed + n, 1, 5 * LATENESS_MS), ORDERED).run(commits=())
            for n in range(2)
        )
        different += labels(one) != labels(other)
    assert different > 10


@settings(max_examples=40)
@given(st.integers(0, 1 << 30))
def test_samples_come_in_the_order_of_their_starts(seed: int) -> None:
    shell = Shell(busy_arrivals(seed), ORDERED).run(commits=range(0, 999, 5))
    keys = [(sample.start_ms, sample.request) for sample in shell.samples]
    assert keys == sorted(keys)
    assert shell.partition.join.open == 0


@settings(max_examples=60)
@given(st.integers(0, 1 << 30))
def test_dying_at_any_moment_changes_no_sample(seed: int) -> None:
    arrivals = busy_arrivals(seed)
    rng = random.Random(seed)
    expected = Shell(arrivals, ORDERED).run(commits=places(rng, len(arrivals), 0.2))
    commits = places(rng, len(arrivals), 0.15)
    crashes = places(rng, len(arrivals), 0.05) | {at for at in commits if rng.random() < 0.2}
    wipes = {at for at in crashes if rng.random() < 0.4}
    died = Shell(arrivals, ORDERED).run(commits, crashes, wipes)
    assert wire(died) == wire(expected)
    for topic in (HISTORIES, SHAPING):
        assert died.compacted(topic) == expected.compacted(topic)
    assert [key for key in died.compacted(SHAPING) if key.startswith(("held", "late"))] == []


@settings(max_examples=25)
@given(st.integers(0, 1 << 30))
def test_each_is_what_the_reference_says(seed: int) -> None:
    arrivals = busy_arrivals(seed)
    shell = Shell(arrivals, ORDERED).run(commits=places(random.Random(seed), len(arrivals), 0.3))
    shown = {event.request: event for event in arrivals if isinstance(event, Exposure)}
    feedback = [event for event in arrivals if isinstance(event, Feedback)]
    rules = Rules(window=40, cap=90, abandon=12, horizon=300)
    for sample in shell.samples:
        heard = [e for e in feedback[: sample.feedback_upto] if e.request == sample.request]
        expected = verdict(shown[sample.request], sample.start_ms, heard, rules)
        assert disagreement(sample, expected) == ""


def younger_first() -> list[Arrived]:
    """The second request is decided while the first still plays."""
    first, second = Feed("first", "u"), Feed("second", "u")
    return [
        exposure("first", T0, 1, user="u"),
        exposure("second", T0 + 1, 1, user="u"),
        first("begin", 0, 5),
        second("end", 0, 6, play_ms=5),
        T0 + 20,
        second("like", 0, 6),
        T0 + 21,
        first("end", 0, 17, play_ms=12),
        FAR,
    ]


@pytest.mark.parametrize("dies_at", [None, 5, 6, 7])
@pytest.mark.parametrize("wiped", [False, True])
def test_feedback_while_it_waits_is_too_late_also_after_a_restart(
    dies_at: int | None, wiped: bool
) -> None:
    crashes = [] if dies_at is None else [dies_at]
    shell = Shell(younger_first(), ORDERED)
    shell.run(commits=range(10), crashes=crashes, wipes=crashes if wiped else [])
    assert [sample.request for sample in shell.samples] == ["first", "second"]
    assert [sample.items[0].actions for sample in shell.samples] == [0, 0]


def test_who_waits_is_known_as_closed() -> None:
    arrivals = younger_first()
    arrivals.insert(5, exposure("second", T0 + 1, 1, user="u"))
    arrivals.insert(-1, exposure("second", T0 + 1, 1, user="u"))
    shell = Shell(arrivals, ORDERED).run(commits=range(0, 20, 2))
    assert [sample.request for sample in shell.samples] == ["first", "second"]


def test_who_waited_goes_on_when_the_order_is_changed() -> None:
    shell = Shell(younger_first(), ORDERED)
    for at in range(6):
        shell.take(at)
    shell.commit(6)
    assert "held/1" in shell.compacted(SHAPING)
    shell.join = JOIN
    shell.begin()
    for at in range(6, 9):
        shell.take(at)
    shell.commit(9)
    assert {sample.request for sample in shell.samples} == {"first", "second"}
    assert "held/1" not in shell.compacted(SHAPING)

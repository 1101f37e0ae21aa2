"""The shaping by hand-made histories, and its running quantile against numpy."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.kv import MemoryKv
from streams.decision import Decision
from streams.events import PositionOutcome, Sample, SampleItem, Shaping, encode
from streams.join import Joined
from streams.settings import ShapeSettings
from streams.shape import Histogram, Population, RunningQuantile, Shape, duration_bucket, play_bin
from streams.state import LogRecord, PartitionState, shaping_key
from streams.topics import SHAPING
from tests.streams.makers import T0, exposure

SETTINGS = ShapeSettings(prior_plays=6.0, plays_per_bucket=3)

Play = tuple[str, int, int]
"""Outcome, play in ms, action bits."""


def closed(
    at: int, *plays: Play, user: str = "user", arm: str = "learning", length_ms: int = 1000
) -> Joined:
    """A request exposed at `T0 + at` whose plays end 100 ms after each other from `length_ms` later on."""
    shown = exposure(f"{user}@{at}", T0 + at, len(plays), user=user, arm=arm)
    ends = [T0 + at + length_ms + 100 * position for position in range(len(plays))]
    positions = {
        position: PositionOutcome(outcome, play_ms, ends[position], actions)  # type: ignore[arg-type]
        for position, (outcome, play_ms, actions) in enumerate(plays)
    }
    return Joined(shown, 0, shown.time_ms, Decision(ends[-1], "decided", positions), 0, 0, 0)


def ended(play_ms: int) -> Play:
    return ("ended", play_ms, 0)


class Folded:
    """A shape without committed state."""

    def __init__(self, settings: ShapeSettings = SETTINGS) -> None:
        self.shape = Shape(settings, lambda _arm, _user: None)

    def items(self, joined: Joined) -> list[SampleItem]:
        return self.shape.shape(joined).items

    def percentile(self, joined: Joined) -> float:
        found = self.items(joined)[0].percentile
        assert found is not None
        return found


# --- buckets and ranks ------------------------------------------------------------------------------


@given(st.integers(1, 10_000_000), st.sampled_from([1.3, 2.0]))
def test_a_bucket_holds_durations_between_two_powers_of_the_base(
    duration_ms: int, base: float
) -> None:
    bucket = duration_bucket(duration_ms, base)
    seconds = duration_ms / 1000 + 1e-6
    assert base**bucket <= seconds * (1 + 1e-12)
    assert seconds < base ** (bucket + 1) * (1 + 1e-12)


def test_known_durations_fall_into_known_buckets() -> None:
    assert [duration_bucket(ms, 2.0) for ms in (1000, 1999, 2000, 8000, 500, 0)] == [
        *(0, 0, 1, 3, -1),
        math.floor(math.log2(1e-6)),
    ]


def test_play_bins_ascend_and_are_at_most_seven_percent_wide() -> None:
    plays = [round(100 * 1.01**power) for power in range(900)]
    bins = [play_bin(play) for play in plays]
    assert all(a <= b for a, b in pairwise(bins))
    edges = [
        play
        for (_, before), (play, after) in pairwise(zip(plays, bins, strict=True))
        if before != after
    ]
    assert all(b / a < 1.09 for a, b in pairwise(edges) if a > 5000)
    assert play_bin(600_000) < 135


def test_a_play_ranks_in_the_middle_of_its_equals() -> None:
    plays = Histogram({play_bin(1000): 2.0, play_bin(9000): 3.0})
    population = Population(RunningQuantile(100), {4: plays})
    population.add(4, 9000)
    assert plays.by_bin() == {play_bin(1000): 2.0, play_bin(9000): 4.0}
    assert population.percentile(4, 500) == (0.0, 6.0)
    assert population.percentile(4, 1000) == (1 / 6, 6.0)
    assert population.percentile(4, 9000) == ((2 + 2) / 6, 6.0)
    assert population.percentile(4, 90_000) == (1.0, 6.0)


def test_without_a_population_a_play_is_in_the_middle() -> None:
    assert Population(RunningQuantile(100)).percentile(4, 500) == (0.5, 0.0)


# --- the percentile ---------------------------------------------------------------------------------


def test_a_thin_history_is_shrunk_to_the_population() -> None:
    """q = (less + equal / 2 + prior x population's q) / (n + prior), all counted by hand."""
    folded = Folded()
    folded.items(closed(0, ended(1000), ended(3000), user="other"))  # the population: 1 s and 3 s
    folded.items(closed(10, ended(2000)))
    folded.items(closed(20, ended(5000)))
    (item,) = folded.items(closed(60_000, ended(5000)))
    own = 1 + 0.5 * 1  # 2 s is less, 5 s is equal
    population = (3 + 0.5 * 1) / 4
    assert item.own_plays == 2
    assert item.population == 4.0
    assert item.percentile == (own + 6.0 * population) / (2 + 6.0)


def test_only_plays_that_had_ended_before_the_exposure_count_as_own() -> None:
    for after_end, own in ((0, 0), (1, 1)):
        folded = Folded()
        folded.items(closed(0, ended(1000), length_ms=500))  # ends at T0 + 500
        (item,) = folded.items(closed(500 + after_end, ended(2000)))
        assert item.own_plays == own


def test_own_plays_are_of_the_same_bucket_user_and_arm() -> None:
    folded = Folded()
    folded.items(closed(0, ended(1000)))
    folded.items(closed(0, ended(1000), arm="control"))
    folded.items(closed(0, ended(1000), user="other"))
    longer = closed(60_000, ended(1000))
    longer.exposure.items[0].duration_ms = 60_000
    assert folded.items(longer)[0].own_plays == 0
    (item,) = folded.items(closed(60_000, ended(1000)))
    assert (item.own_plays, item.population) == (1, 2.0)


def test_the_items_of_a_request_do_not_see_each_other() -> None:
    folded = Folded()
    alone = [Folded().items(closed(0, ended(play)))[0] for play in (1000, 9000, 4000)]
    together = folded.items(closed(0, ended(1000), ended(9000), ended(4000)))
    assert (
        [item.percentile for item in together] == [item.percentile for item in alone] == [0.5] * 3
    )
    assert {item.population for item in together} == {0.0}
    assert folded.items(closed(60_000, ended(1)))[0].population == 3.0


def test_threshold_and_median_are_those_of_earlier_samples() -> None:
    folded = Folded()
    first = folded.shape.shape(closed(0, *[ended(1000)] * 6))
    second = folded.shape.shape(closed(1, ended(1000)))
    assert (first.threshold, first.median) == (0.75, 0.5)
    quantile = RunningQuantile(SETTINGS.threshold_memory)
    for item in first.items:
        assert item.percentile is not None
        quantile.add(item.percentile)
    assert [second.threshold, second.median] == quantile.at(0.75, 0.5)


def test_a_users_history_keeps_the_plays_that_ended_last() -> None:
    folded = Folded()  # three plays a bucket
    for at, play in ((3000, 30), (1000, 10), (4000, 40), (2000, 20)):
        folded.items(closed(at, ended(play)))
    (user,) = [change for change in folded.shape.take_changes() if hasattr(change, "plays")]
    assert user.plays == {
        duration_bucket(20_000, 1.3): [(T0 + at + 1000, at // 100) for at in (2000, 3000, 4000)]
    }


# --- what a play is worth ---------------------------------------------------------------------------


@pytest.fixture
def seasoned() -> Folded:
    """Plays of 1 to 100 s by many users, so that ranks spread and the cut is near three quarters."""
    folded = Folded()
    plays = np.random.default_rng(1).permutation(np.arange(1000, 101_000, 100))
    for at, play in enumerate(plays):
        folded.items(closed(at, ended(int(play)), user=f"u{at}"))
    return folded


def judged(folded: Folded, play: Play) -> SampleItem:
    return folded.items(closed(200_000, play, user="new"))[0]


def test_plays_above_the_cut_are_positive_and_those_above_the_median_supervised(
    seasoned: Folded,
) -> None:
    # 60 s is between median and cut: the first rank is shrunk to the population alone
    for play_ms, advantage, supervised in ((95_000, 1, True), (60_000, 0, True), (9000, 0, False)):
        item = judged(seasoned, ended(play_ms))
        assert (item.advantage, item.supervised) == (advantage, supervised)


def test_a_dislike_is_negative_however_long_the_play(seasoned: Folded) -> None:
    for outcome in ("ended", "censored"):
        item = judged(seasoned, (outcome, 95_000, 1 | 16))
        assert (item.advantage, item.supervised) == (-1, False)


def test_a_censored_play_is_positive_above_the_cut_and_else_without_target(
    seasoned: Folded,
) -> None:
    above, below = (
        judged(seasoned, ("censored", 95_000, 0)),
        judged(seasoned, ("censored", 60_000, 0)),
    )
    assert (above.advantage, above.supervised) == (1, True)
    assert (below.advantage, below.supervised) == (None, False)
    assert below.percentile is not None


def test_a_censored_play_enters_no_state() -> None:
    folded = Folded()
    folded.items(closed(0, ("censored", 5000, 0)))
    assert folded.shape.take_changes() == []
    (item,) = folded.items(closed(60_000, ended(5000)))
    assert (item.own_plays, item.population) == (0, 0.0)


def test_what_was_not_seen_has_no_target_and_enters_no_state() -> None:
    folded = Folded()
    (item,) = folded.items(closed(0, ("unseen", 0, 16)))
    assert (item.bucket, item.percentile, item.advantage, item.supervised) == (
        None,
        None,
        None,
        False,
    )
    assert folded.shape.take_changes() == []


def test_a_quarter_of_a_stationary_stream_is_positive_from_the_start() -> None:
    rng = np.random.default_rng(7)
    folded = Folded(ShapeSettings())
    advantages = []
    for at in range(1200):
        user = f"u{rng.integers(60)}"
        plays = [ended(int(play)) for play in rng.lognormal(9, 1, 5)]
        advantages.append(
            [item.advantage for item in folded.items(closed(at * 2000, *plays, user=user))]
        )
    for part in np.array_split(np.array(advantages) == 1, 4):
        assert part.mean() == pytest.approx(0.25, abs=0.05)
    assert (np.array(advantages) == 1).mean() == pytest.approx(0.25, abs=0.02)


# --- the running quantile ---------------------------------------------------------------------------


def test_the_first_quantile_is_the_quantile_itself() -> None:
    fresh = RunningQuantile(4096)
    assert fresh.at(0.25, 0.5, 0.75) == pytest.approx([0.25, 0.5, 0.75])


def test_the_running_quantile_is_that_of_a_fading_window() -> None:
    """Against numpy's sort of the same numbers, weighted by exp(-age / memory); the prior has faded."""
    rng = np.random.default_rng(3)
    memory, count = 200, 4000
    values = np.clip(rng.beta(2, 5, count) + np.linspace(0, 0.3, count), 0, 1)
    running = RunningQuantile(memory)
    for at, value in enumerate(values, 1):
        running.add(float(value))
        if at > 2000 and at % 200 == 0:
            weights = (1 + 1 / memory) ** np.arange(at)
            order = np.argsort(values[:at])
            share = np.cumsum(weights[order]) / weights.sum()
            for q in (0.5, 0.75):
                exact = values[:at][order][np.searchsorted(share, q)]
                assert running.at(q) == [pytest.approx(exact, abs=2 / 256)]


def test_the_running_quantile_survives_its_own_rescaling() -> None:
    memory = 50  # the weight passes 1e12 every 1,400 numbers
    running, rng = RunningQuantile(memory), np.random.default_rng(5)
    for _ in range(10_000):
        running.add(float(rng.uniform(0.4, 0.6)))
    assert running.at(0.5) == [pytest.approx(0.5, abs=0.03)]
    assert np.isfinite(running.weights).all()
    assert running.weight < 1e13


# --- the changelog ----------------------------------------------------------------------------------


def stream(seed: int, count: int) -> list[Joined]:
    rng = np.random.default_rng(seed)
    made = []
    for at in range(count):
        plays: list[Play] = [
            (
                str(rng.choice(["ended", "left", "abandoned", "censored", "unseen"])),
                int(play),
                int(act),
            )
            for play, act in zip(rng.lognormal(9, 1, 3), rng.choice([0, 1, 16], 3), strict=True)
        ]
        user, arm = f"u{rng.integers(8)}", str(rng.choice(["control", "learning"]))
        made.append(
            closed(1000 * at, *plays, user=user, arm=arm, length_ms=int(rng.integers(9000)))
        )
    return made


def test_a_shape_restored_from_its_changelog_gives_the_same_samples() -> None:
    requests = stream(11, 240)
    plain = Folded(ShapeSettings())
    expected = [plain.shape.shape(joined) for joined in requests]

    state = PartitionState(MemoryKv())
    got: list[Sample] = []
    offset = 0
    for first in range(0, len(requests), 37):
        restored = Shape(ShapeSettings(), state.plays)
        for population in state.populations():
            restored.restore(population)
        got += [restored.shape(joined) for joined in requests[first : first + 37]]
        changes: list[Shaping] = restored.take_changes()
        state.apply(
            LogRecord(SHAPING, offset + at, encode(change), shaping_key(change).encode())
            for at, change in enumerate(changes)
        )
        offset += len(changes)
    assert [encode(sample) for sample in got] == [encode(sample) for sample in expected]


def test_what_has_not_changed_is_not_written_again() -> None:
    folded = Folded()
    folded.items(closed(0, ended(1000)))
    assert len(folded.shape.take_changes()) == 3  # the user, the bucket, the quantile
    assert folded.shape.take_changes() == []
    folded.items(closed(5000, ("unseen", 0, 0)))
    assert folded.shape.take_changes() == []

"""How far back the catalogue's versions are kept."""

from hypothesis import given
from hypothesis import strategies as st

from learner.horizon import MARKS, Horizon

SPAN_MS = 1_000 * MARKS


def test_a_version_passes_when_its_span_has_gone_by_and_not_before() -> None:
    horizon = Horizon(SPAN_MS)
    assert horizon.passed(10**12) == -1
    horizon.see(5, 1_000_000)
    horizon.see(8, 1_500_000)
    assert horizon.passed(1_000_000 + SPAN_MS - 1) == -1
    assert horizon.passed(1_000_000 + SPAN_MS) == 5
    assert horizon.passed(1_500_000 + SPAN_MS) == 8
    assert horizon.passed(10**12) == 8, "what nothing has followed is still the catalogue"


def test_a_writer_whose_clock_goes_back_prunes_nothing_early() -> None:
    horizon = Horizon(SPAN_MS)
    horizon.see(1, 5_000_000)
    horizon.see(2, 1_000)
    assert horizon.passed(5_000_000 + SPAN_MS - 1) == -1
    assert horizon.passed(5_000_000 + SPAN_MS) == 2


@given(st.lists(st.integers(0, 20_000), max_size=60), st.integers(0, 3 * SPAN_MS))
def test_what_was_the_catalogue_within_the_span_is_never_passed_and_little_else_is_kept(
    gaps_ms: list[int], after_ms: int
) -> None:
    horizon, written_ms, log = Horizon(SPAN_MS), 0, []
    for version, gap_ms in enumerate(gaps_ms):
        written_ms += gap_ms
        log.append((written_ms, version))
        horizon.see(version, written_ms)
    now_ms = written_ms + after_ms
    exact = max((version for at, version in log if at <= now_ms - SPAN_MS), default=-1)
    earlier = max((v for at, v in log if at <= now_ms - SPAN_MS - SPAN_MS // MARKS), default=-1)
    assert earlier <= horizon.passed(now_ms) <= exact


def test_a_million_changes_leave_few_marks() -> None:
    horizon = Horizon(SPAN_MS)
    for version in range(100_000):
        horizon.see(version, version * 10)
        horizon.passed(version * 10)
    assert len(horizon._marks) <= MARKS + 2

"""What a partition remembers on disk: positions, changelogs, closed ids and forgetting them."""

from pathlib import Path

import pytest

from storage.kv import Kv, MemoryKv, RocksKv
from streams.events import (
    Behaviour,
    BucketShaping,
    History,
    LateStart,
    QuantileShaping,
    Sample,
    Shaping,
    UserShaping,
    decode,
    encode,
    history_decoder,
)
from streams.state import CHANGELOGS, LogRecord, PartitionState, late_key, shaping_key
from streams.topics import HISTORIES, SAMPLES, SHAPING
from tests.streams.makers import T0, exposure
from tests.streams.shell import Shell


def sample(request: str, time_ms: int) -> Sample:
    """A sample of `request`, made by the partition itself."""
    (made,) = Shell([exposure(request, time_ms), time_ms + 10_000]).run(()).samples
    return made


def closing(request: str, time_ms: int, offset: int = 0) -> LogRecord:
    return LogRecord(SAMPLES, offset, encode(sample(request, time_ms)), b"user")


@pytest.fixture(params=["memory", "disk"])
def kv(request: pytest.FixtureRequest, tmp_path: Path) -> Kv:
    return MemoryKv() if request.param == "memory" else RocksKv(tmp_path / "p0")


def test_a_new_state_stands_at_the_beginning_and_knows_nothing(kv: Kv) -> None:
    state = PartitionState(kv)
    assert [state.position(topic) for topic in CHANGELOGS] == [0, 0, 0]
    assert state.plays("learning", "u") is None
    assert state.history("u") is None
    assert not state.is_closed("r")
    assert list(state.populations()) == []
    assert state.late_starts() == {}


def test_records_are_taken_with_their_positions(kv: Kv) -> None:
    state = PartitionState(kv)
    user = UserShaping(arm="learning", user="u/ü", plays={3: [(5, 7)]})
    bucket = BucketShaping(arm="learning", bucket=-3, counts={4: 2.0})
    quantile = QuantileShaping(arm="control", weights=b"\0" * 16, weight=1.5)
    play = Behaviour(request="r", position=0, item="i", end_ms=5, play_ms=7, duration_ms=9)
    history = History(user="u", behaviours=[play], shown=["i", "j"])
    late = LateStart(offset=17, start_ms=T0)
    state.apply(
        [
            *(
                LogRecord(SHAPING, offset, encode(one), shaping_key(one).encode())
                for offset, one in ((4, user), (5, bucket), (6, quantile), (9, late))
            ),
            LogRecord(HISTORIES, 2, encode(history), b"u"),
            closing("r", T0, offset=40),
        ]
    )
    assert [state.position(topic) for topic in (SHAPING, HISTORIES, SAMPLES)] == [10, 3, 41]
    assert state.plays("learning", "u/ü") == {3: [(5, 7)]}
    assert state.plays("control", "u/ü") is None
    assert list(state.populations()) == [bucket, quantile]
    packed = state.history("u")
    assert packed is not None and decode(history_decoder, encode(packed)) == history
    assert state.late_starts() == {17: T0}
    assert state.is_closed("r")
    assert not state.is_closed("s")


def test_a_later_record_replaces_and_one_without_a_value_deletes(kv: Kv) -> None:
    state = PartitionState(kv)
    for offset, plays in enumerate(({1: [(1, 1)]}, {2: [(2, 2)]})):
        one = UserShaping(arm="a", user="u", plays=plays)
        state.apply([LogRecord(SHAPING, offset, encode(one), shaping_key(one).encode())])
    assert state.plays("a", "u") == {2: [(2, 2)]}
    late = LateStart(offset=1, start_ms=5)
    state.apply([LogRecord(SHAPING, 2, encode(late), shaping_key(late).encode())])
    state.apply([LogRecord(SHAPING, 3, None, late_key(1).encode())])
    assert state.late_starts() == {}
    assert state.position(SHAPING) == 4
    state.apply([LogRecord(SHAPING, 4, None, shaping_key(one).encode())])
    assert state.plays("a", "u") is None


def test_no_two_records_of_shaping_share_a_key() -> None:
    records: list[Shaping] = [
        UserShaping(arm="a", user="b", plays={}),
        UserShaping(arm="a", user="b/c", plays={}),
        BucketShaping(arm="a", bucket=1, counts={}),
        BucketShaping(arm="a", bucket=-1, counts={}),
        QuantileShaping(arm="a", weights=b"", weight=1.0),
        QuantileShaping(arm="b", weights=b"", weight=1.0),
        LateStart(offset=1, start_ms=0),
        LateStart(offset=2, start_ms=0),
    ]
    assert len({shaping_key(record) for record in records}) == len(records)


def test_ids_of_old_requests_are_forgotten_and_younger_ones_kept(kv: Kv) -> None:
    state = PartitionState(kv)
    times = {f"r{n}": T0 + n * 1000 for n in range(-3, 4)}
    state.apply(closing(request, time_ms) for request, time_ms in times.items())
    assert state.forget_closed(T0) == 3
    assert {request for request in times if state.is_closed(request)} == {"r0", "r1", "r2", "r3"}
    assert state.forget_closed(T0) == 0
    assert state.forget_closed(T0 + 1) == 1


def test_forgetting_takes_a_bounded_number_at_once_the_oldest_first(kv: Kv) -> None:
    state = PartitionState(kv)
    state.apply(closing(f"r{n}", T0 + n, offset=n) for n in (2, 0, 3, 1))
    assert state.forget_closed(T0 + 100, most=3) == 3
    assert [state.is_closed(f"r{n}") for n in range(4)] == [False, False, False, True]
    assert state.forget_closed(T0 + 100, most=3) == 1


def test_forgetting_before_any_watermark_forgets_nothing(kv: Kv) -> None:
    state = PartitionState(kv)
    state.apply([closing("r", T0)])
    assert state.forget_closed(-(1 << 62)) == 0
    assert state.is_closed("r")


def test_what_was_applied_is_there_after_reopening(tmp_path: Path) -> None:
    state = PartitionState(RocksKv(tmp_path / "p0"))
    state.apply([closing("r", T0, offset=7)])
    state.close()
    again = PartitionState(RocksKv(tmp_path / "p0"))
    assert again.position(SAMPLES) == 8
    assert again.is_closed("r")
    again.close()

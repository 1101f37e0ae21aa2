"""Open requests: what is put away comes back as it was, in the order of time, and memory keeps its bound."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.kv import Kv, MemoryKv, RocksKv
from streams.open_requests import OFFSET_BLOCK, OffsetFloor, OpenRequests
from tests.streams.makers import T0, Feed, exposure


@pytest.fixture(params=["memory", "disk"])
def kv(request: pytest.FixtureRequest, tmp_path: Path) -> Kv:
    return MemoryKv() if request.param == "memory" else RocksKv(tmp_path)


def opened(kv: Kv, count: int, most_hot: int) -> OpenRequests:
    """Requests `r0` ..., each to be looked at a millisecond before the one opened before it."""
    requests = OpenRequests(kv, most_hot)
    for number in range(count):
        name = f"r{number}"
        request = requests.new(name)
        request.exposure, request.exposure_offset = exposure(name), number
        request.add(Feed(name)("begin", 0, number))
        request.begun[0] = T0 + number
        requests.look_at(name, request, T0 + 10_000 - number)
    return requests


def test_what_was_put_away_comes_back_as_it_was(kv: Kv) -> None:
    requests = opened(kv, 5, most_hot=1)
    before = requests.get("r2")
    assert before is not None
    expected = (before.exposure, before.events, before.ids, before.begun, before.check_ms)
    requests.get("r4")
    requests.settle()
    assert len(list(kv.scan(b"o"))) == 4
    again = requests.get("r2")
    assert again is not None and again is not before
    assert (again.exposure, again.events, again.ids, again.begun, again.check_ms) == expected
    assert len(list(kv.scan(b"o"))) == 3
    assert len(requests) == 5
    assert requests.get("another") is None


@pytest.mark.parametrize("most_hot", [0, 3, 1000])
def test_they_are_due_in_the_order_of_time_wherever_they_are(kv: Kv, most_hot: int) -> None:
    requests = opened(kv, 600, most_hot)
    requests.settle()
    assert requests.next_ms <= T0 + 10_000 - 599
    assert requests.due(T0 + 10_000 - 600) is None
    order = []
    while (found := requests.due(T0 + 10_000 - 20)) is not None:
        order.append(found[0])
        requests.remove(found[0])
        if len(order) % 7 == 0:
            requests.settle()
    assert order == [f"r{number}" for number in range(599, 19, -1)]
    assert len(requests) == 20


def test_an_earlier_look_counts_wherever_the_later_one_was_kept(kv: Kv) -> None:
    requests = opened(kv, 10, most_hot=2)
    requests.settle()
    first = requests.get("r0")
    assert first is not None
    requests.look_at("r0", first, T0)
    requests.settle()
    found = requests.due(T0)
    assert found is not None and found[0] == "r0"
    assert requests.due(T0) is None


def test_what_a_process_put_away_is_dropped_by_the_next(kv: Kv) -> None:
    """It rebuilds its open requests from the log."""
    opened(kv, 50, most_hot=1).settle()
    assert len(list(kv.scan(b"d"))) == 49
    again = OpenRequests(kv, 1)
    assert (len(again), again.get("r0")) == (0, None)
    assert not list(kv.scan(b"d"))


@given(st.lists(st.integers(0, 5000), unique=True, min_size=1), st.data())
def test_no_offset_is_below_the_floor_and_the_floor_is_within_a_block(
    offsets: list[int], data: st.DataObject
) -> None:
    floor = OffsetFloor()
    for offset in sorted(offsets):
        floor.add(offset)
    gone = set(data.draw(st.lists(st.sampled_from(offsets), unique=True)))
    for offset in gone:
        floor.remove(offset)
    left = set(offsets) - gone
    expected = min(left, default=9999)
    assert expected - OFFSET_BLOCK < floor.floor(9999) <= expected

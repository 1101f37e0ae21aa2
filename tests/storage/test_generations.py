"""Generations of a store: what was whole counts until what replaces it is whole."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.generations import Generations

Opened = Callable[[], Generations]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """Opens the store, as a new process would."""
    last: list[Generations] = []

    def again() -> Generations:
        while last:
            last.pop().close()
        last.append(Generations(tmp_path / "store"))
        return last[0]

    yield again
    while last:
        last.pop().close()


def pairs(store: Generations) -> dict[bytes, bytes]:
    return dict(store.scan(b""))


def test_nothing_is_whole_at_first(opened: Opened) -> None:
    store = opened()
    assert not store.whole
    store.begin()
    store.write({b"a": b"1"})
    assert (store.get(b"a"), store.whole) == (b"1", False)
    assert not opened().whole


def test_what_is_adopted_is_there_again_and_what_it_replaced_is_gone(opened: Opened) -> None:
    for value in (b"1", b"2", b"3"):
        store = opened()
        store.begin()
        assert pairs(store) == {}
        store.write({b"a": value, b"only" + value: value})
        store.adopt()
        store.write({b"later": value})
    store = opened()
    assert store.whole
    assert pairs(store) == {b"a": b"3", b"only3": b"3", b"later": b"3"}


def test_a_generation_that_was_cut_short_leaves_nothing(opened: Opened) -> None:
    store = opened()
    store.begin()
    store.write({b"a": b"1"})
    store.adopt()
    for _ in range(3):
        store = opened()
        assert pairs(store) == {b"a": b"1"}
        store.begin()
        assert pairs(store) == {}
        store.write({b"b": b"2"})
    assert pairs(opened()) == {b"a": b"1"}


def test_what_is_cleared_does_not_come_back(opened: Opened) -> None:
    store = opened()
    store.begin()
    store.write({b"a": b"1"})
    store.adopt()
    store.clear()
    assert not opened().whole
    store = opened()
    store.begin()
    assert pairs(store) == {}


def test_a_write_changes_and_deletes_together(opened: Opened) -> None:
    store = opened()
    store.begin()
    store.write({b"xa": b"1", b"xb": b"1", b"y": b"1"})
    store.write({b"xa": None, b"xb": b"2"})
    assert list(store.scan(b"x")) == [(b"xb", b"2")]

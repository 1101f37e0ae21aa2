"""Blocks and deltas: what a delta makes of its base is the next state bit for bit, and anything else is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streams.blocks import BLOCK_BYTES, State, blocked, blocked_state, digest_of, root, whole_state
from streams.delta import DeltaError, applied, changes

Content = dict[str, NDArray[Any]]


def state_of(seed: int) -> State:
    """A table of three blocks whose rows straddle them, dense tensors, a scalar, nothing."""
    rng = np.random.default_rng(seed)
    return {
        "table": rng.standard_normal((900, 48)).astype(np.float32),
        "dense": rng.standard_normal((7, 5)),
        "half": rng.standard_normal(11).astype(np.float16),
        "steps": np.array(seed, np.int64),
        "flags": rng.random(9) < 0.5,
        "empty": np.zeros((0, 3), np.float32),
    }


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        (value.dtype, value.shape, value.tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name, value in one.items()
    )


@settings(max_examples=60)
@given(st.data())
def test_a_delta_gives_the_next_state_bit_for_bit(data: st.DataObject) -> None:
    before = state_of(1)
    after = {name: value.copy() for name, value in before.items()}
    rows = data.draw(st.lists(st.integers(0, 899), max_size=40))
    after["table"][rows] += 1
    places = data.draw(st.lists(st.integers(0, 900 * 48 - 1), max_size=40))
    after["table"].reshape(-1)[places] *= -1
    for name in data.draw(st.sets(st.sampled_from(["dense", "half", "steps", "flags"]))):
        after[name] = ~after[name] if name == "flags" else after[name] + 1
    base = blocked_state(before)
    content, following = changes(base, after)
    made = applied(base, content)
    assert same(whole_state(made), after)
    assert same(whole_state(following), after)
    assert root(made) == root(following) == digest_of(after)
    assert same(whole_state(base), before)
    assert set(content) <= {f"{how}{name}" for name in after for how in HOW}


HOW = ("whole:", "rows:", "rows@", "values:", "values@")


def size(content: Content) -> int:
    return sum(value.nbytes for value in content.values())


def test_what_did_not_change_is_neither_carried_nor_copied() -> None:
    before = state_of(1)
    base = blocked_state(before)
    content, following = changes(base, before)
    assert content == {}
    after = {**before, "table": before["table"].copy()}
    after["table"][[3, 899]] += 1
    content, following = changes(base, after)
    assert set(content) == {"rows:table", "rows@table"}
    assert size(content) == 2 * (48 * 4 + 8)
    made = applied(base, content)
    for state in (following, made):
        shared = [
            mine is theirs
            for mine, theirs in zip(state["table"].blocks, base["table"].blocks, strict=True)
        ]
        assert shared == [False, True, False]
        assert state["dense"] is base["dense"] or state["dense"].blocks == base["dense"].blocks


def test_the_cheapest_form_is_taken() -> None:
    before = state_of(1)
    base = blocked_state(before)
    one = {**before, "table": before["table"].copy()}
    one["table"][5, 7] += 1
    assert set(changes(base, one)[0]) == {"values:table", "values@table"}
    every = {**before, "table": before["table"] + 1}
    assert set(changes(base, every)[0]) == {"whole:table"}


def test_change_is_of_bits() -> None:
    before: State = {"x": np.array([0.0, np.nan, 1.0] * 20, np.float32)}
    after: State = {"x": before["x"].copy()}
    after["x"][0] = -0.0
    content, _ = changes(blocked_state(before), after)
    assert content["rows@x"].tolist() == [0]
    assert np.signbit(whole_state(applied(blocked_state(before), content))["x"][0])


@pytest.mark.parametrize(
    "after",
    [
        {"x": np.zeros(4, np.float32)},
        {"x": np.zeros(3, np.float64)},
        {"y": np.zeros(3, np.float32)},
        {"x": np.zeros(3, np.float32), "y": np.zeros(1)},
    ],
)
def test_a_state_of_another_schema_has_no_delta(after: State) -> None:
    with pytest.raises(DeltaError):
        changes(blocked_state({"x": np.zeros(3, np.float32)}), after)


F = np.float32
HOSTILE: list[tuple[Content, str]] = [
    ({"whole:other": np.zeros((4, 2), F)}, "whole:other is no tensor"),
    ({"part:x": np.zeros((4, 2), F)}, "part:x is no tensor"),
    ({"whole:x": np.zeros((2, 4), F)}, "shape"),
    ({"whole:x": np.zeros((4, 2))}, "float64"),
    ({"rows:x": np.zeros((1, 2), F)}, "places"),
    ({"rows:x": np.zeros((1, 2), F), "rows@x": np.array([4])}, "places"),
    ({"rows:x": np.zeros((1, 2), F), "rows@x": np.array([-1])}, "places"),
    ({"rows:x": np.zeros((1, 3), F), "rows@x": np.array([1])}, "places"),
    ({"rows:x": np.zeros((2, 2), F), "rows@x": np.array([2, 1])}, "places"),
    ({"rows:x": np.zeros((2, 2), F), "rows@x": np.array([1, 1])}, "places"),
    ({"rows:x": np.zeros((1, 2), F), "rows@x": np.array([1], np.int32)}, "places"),
    ({"rows:x": np.zeros((1, 2), F), "rows@x": np.array([[1]])}, "places"),
    ({"values:x": np.zeros(1, F), "values@x": np.array([8])}, "places"),
    ({"rows:s": np.zeros(1, F), "rows@s": np.array([1])}, "places"),
]


@pytest.mark.parametrize(("content", "says"), HOSTILE)
def test_a_delta_that_does_not_fit_its_base_is_refused(content: Content, says: str) -> None:
    base = blocked_state({"x": np.ones((4, 2), F), "s": np.array(1, F)})
    before = digest_of(whole_state(base))
    with pytest.raises(DeltaError, match=says):
        applied(base, content)
    assert root(base) == before == digest_of(whole_state(base))


def test_ten_thousand_deltas_leave_the_bits_of_the_last_state() -> None:
    rng = np.random.default_rng(4)
    state: State = {"table": np.zeros((2000, 16), F), "dense": np.zeros(40, F)}
    learner = actor = blocked_state(state)
    for _ in range(10_000):
        state["table"][rng.integers(0, 2000, 3)] += rng.standard_normal((3, 16)).astype(F)
        state["dense"] += rng.standard_normal(40).astype(F)
        content, learner = changes(learner, state)
        actor = applied(actor, content)
    assert root(actor) == root(learner) == digest_of(state)
    assert same(whole_state(actor), state)


def test_blocks_are_of_64_kib_and_any_of_them_moves_the_digest() -> None:
    array = np.arange(40_000, dtype=np.int32)
    tensor = blocked(array)
    assert [block.nbytes for block in tensor.blocks] == [
        BLOCK_BYTES,
        BLOCK_BYTES,
        160_000 - 2 * BLOCK_BYTES,
    ]
    digests = {root({"x": tensor})}
    for place in (0, 20_000, 39_999):
        moved = array.copy()
        moved[place] += 1
        digests.add(root({"x": blocked(moved)}))
    assert len(digests) == 4

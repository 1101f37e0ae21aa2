"""What `control` says, and which arm a user belongs to."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.control import DEFAULT_SHARES, ControlState, arm_of, stable_hash
from streams.events import Command

USERS = [f"user-{number}" for number in range(20_000)]


def command(action: Any, **fields: Any) -> Command:
    return Command(id="c", time_ms=1, who="me", why="because", action=action, **fields)


def folded(*commands: Command) -> ControlState:
    state = ControlState()
    for each in commands:
        state.apply(each)
    return state


def test_a_new_control_pins_nothing_and_halves_the_users() -> None:
    assert ControlState() == ControlState(pinned={}, shares=dict(DEFAULT_SHARES))


def test_the_last_command_about_an_arm_holds() -> None:
    pin = [command("pin", arm="learning", version=version) for version in (3, 5)]
    other = command("pin", arm="control", version=1)
    assert folded(*pin, other).pinned == {"learning": 5, "control": 1}
    assert folded(*pin[::-1]).pinned == {"learning": 3}
    assert folded(pin[0], other, command("follow", arm="learning")).pinned == {"control": 1}
    assert folded(command("follow", arm="learning")).pinned == {}


def test_shares_are_replaced_as_a_whole() -> None:
    shares = {"control": 1.0, "learning": 8.0, "new": 1.0}
    assert folded(command("shares", shares=shares)).shares == shares
    last = {"learning": 1.0}
    assert folded(command("shares", shares=shares), command("shares", shares=last)).shares == last


def test_one_state_does_not_share_its_folds_with_another() -> None:
    one = folded(command("pin", arm="a", version=2), command("shares", shares={"a": 1.0}))
    assert ControlState() != one
    assert ControlState().pinned == {}


def rollback(version: int, upto: int, arm: str = "learning") -> Command:
    return command("rollback", arm=arm, version=version, upto=upto)


def answer(restored: int, version: int, arm: str = "learning") -> Command:
    return command("follow", arm=arm, version=version, restored=restored)


def test_a_rollback_pins_until_the_learner_has_answered() -> None:
    asked = folded(rollback(3, 5))
    assert (asked.pinned, asked.rollbacks) == ({"learning": 3}, {"learning": (3, 5)})
    assert asked.condemned == []
    assert folded(rollback(3, 5), answer(3, 8)) == ControlState(condemned=[(4, 7)])
    assert folded(rollback(3, 4, "other"), answer(3, 8)).pinned == {"other": 3}


@given(st.permutations([(3, 5), (3, 5), (2, 4), (4, 7)]))
def test_several_rollbacks_come_to_the_same_in_any_order(asked: list[tuple[int, int]]) -> None:
    state = folded(*(rollback(*each) for each in asked))
    assert state == folded(rollback(2, 7))
    assert state.pinned == {"learning": 2}


def test_a_rollback_that_comes_after_its_answer_changes_nothing() -> None:
    done = [rollback(3, 5), answer(3, 8)]
    assert folded(*done, rollback(3, 5), rollback(4, 7)) == folded(*done)
    again = folded(*done, rollback(3, 8))
    assert (again.pinned, again.rollbacks) == ({"learning": 3}, {"learning": (3, 8)})


def test_an_answer_ends_only_what_it_satisfies() -> None:
    further = folded(rollback(3, 5), rollback(2, 5), answer(3, 8))
    assert (further.pinned, further.condemned) == ({"learning": 2}, [(4, 7)])
    assert further.rollbacks == {"learning": (2, 5)}
    assert folded(rollback(3, 5), command("pin", arm="learning", version=6), answer(3, 8)) == (
        ControlState(pinned={"learning": 6}, condemned=[(4, 7)])
    )


@pytest.mark.parametrize(
    "said", [command("pin", arm="learning", version=4), command("follow", arm="learning")]
)
def test_a_pin_or_a_follow_withdraws_a_rollback(said: Command) -> None:
    assert folded(rollback(3, 5), said) == folded(said)


def test_a_refusal_is_information() -> None:
    state = folded(rollback(3, 5))
    assert state.apply(command("refuse", arm="learning", version=8, restored=7))
    assert state == folded(rollback(3, 5))


@pytest.mark.parametrize(
    "wrong",
    [
        rollback(3, 5, arm=""),
        rollback(0, 5),
        rollback(5, 5),
        answer(8, 8),
        answer(-1, 8),
        command("refuse", arm="learning"),
        command("pin", arm="", version=3),
        command("pin", arm="learning", version=0),
        command("follow", arm=""),
        command("shares", shares={}),
        command("shares", shares={"a": 0.0}),
        command("shares", shares={"a": 1.0, "b": -1.0}),
        command("shares", shares={"a": math.nan}),
        command("shares", shares={"a": math.inf}),
        command("shares", shares={"": 1.0}),
        command("shares", shares={"a/b": 1.0}),
    ],
)
def test_a_command_that_makes_no_sense_changes_nothing_and_says_so(wrong: Command) -> None:
    """`control` is kept for ever: what breaks a reader there would break it at every start."""
    state = folded(command("pin", arm="learning", version=3))
    before = folded(command("pin", arm="learning", version=3))
    assert not state.apply(wrong)
    assert state == before
    assert state.apply(command("follow", arm="learning"))


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.05, 20), min_size=1))
def test_users_are_shared_out_in_proportion(shares: dict[str, float]) -> None:
    arms = [arm_of(user, shares) for user in USERS[:4000]]
    for arm, share in shares.items():
        expected = share / sum(shares.values())
        assert arms.count(arm) / len(arms) == pytest.approx(expected, abs=0.04)


def test_a_users_arm_does_not_change_with_the_order_or_scale_of_the_shares() -> None:
    for user in USERS[:500]:
        arm = arm_of(user, {"control": 0.5, "learning": 0.5})
        assert arm == arm_of(user, {"learning": 7.0, "control": 7.0})


def test_few_users_move_when_shares_change_a_little() -> None:
    before = [arm_of(user, {"control": 0.5, "learning": 0.5}) for user in USERS]
    after = [arm_of(user, {"control": 0.4, "learning": 0.6}) for user in USERS]
    moved = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    assert set(moved) == {("control", "learning")}
    assert len(moved) / len(USERS) == pytest.approx(0.1, abs=0.01)


def test_the_hash_is_the_same_in_every_process_and_release() -> None:
    assert stable_hash("user", b"dwell-arm") == int.from_bytes(bytes.fromhex(KNOWN), "little")
    assert stable_hash("user", b"other") != stable_hash("user", b"dwell-arm")
    assert [arm_of(user, DEFAULT_SHARES) for user in ("a", "b", "c", "ü")] == KNOWN_ARMS


KNOWN = "39ac020a41ab3947"
KNOWN_ARMS = ["control", "learning", "control", "learning"]
